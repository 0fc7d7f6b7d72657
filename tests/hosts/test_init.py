"""What `fusion init` writes, in front of the real axolotl and mergekit: their schemas, and two runs from end to end."""

import html
import json
import re
import shlex

import axolotl_runs as runs
import pytest
import tiny
import torch
import yaml
from axolotl_runs import forget_plugins
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fusion_plugins.chain.round_configs import load_rounds
from fusion_plugins.chain.rounds import write_rounds
from fusion_plugins.cli import app
from fusion_plugins.core.fusion.teachers import LABEL, SEVERAL
from fusion_plugins.init.plan import make_plan
from fusion_plugins.init.settings import InitConfig
from fusion_plugins.init.write import files_of, write_files
from fusion_plugins.reports.build import page_of
from fusion_plugins.reports.chain import Options
from fusion_plugins.store import open_store

H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
CHAT = [{"role": "user", "content": "How much is 2 + 3?"}, {"role": "assistant", "content": "5"}]
SUM = {"text": "How much is 2 + 3?", "domain": "math", "reference": "5"}
ROWS = {
    "fusellm": {"text": "Some text."},
    "fusechat": {"messages": CHAT},
    "fusechat3": {"text": "Sing!"},
    "rounds": SUM,
}
#: method -> files that axolotl trains with
TRAININGS = {"fusellm": 1, "fusechat": 2, "fusechat3": 2, "rounds": 2}
#: target, machine and choices of the plans whose files are checked
CASES = {
    "large": ({"parameters": 7e9, "model_type": "llama", "pad_token": "<unk>", "names_pad": False}, {"gpus": 8}),
    "sharded": ({"parameters": 2.7e10, "model_type": "gemma2", "pad_token": "<pad>"}, {"gpus": 8}),
    "adapter": ({"parameters": 7e9, "model_type": "qwen2", "pad_token": "<pad>"}, {"gpus": 1, "gpu_memory": 24}),
    "4bit": ({"parameters": 3e10, "model_type": "qwen3", "pad_token": "<pad>"}, {"gpus": 1, "gpu_memory": 40}),
    "vllm": ({"parameters": 1e9, "model_type": "llama", "pad_token": "<pad>"}, {"gpus": 2, "vllm": "/opt/vllm"}),
    "cpu": ({"parameters": 5e8, "model_type": "qwen2", "pad_token": "<pad>", "thinking_switch": True}, {"gpus": 0}),
}


def plan_of(folder, method, target, **choices):
    path = runs.write_rows(folder / f"{method}.jsonl", [ROWS[method]] * 1)
    names = ["org/target", "org/one", "org/two"]
    facts = {name: {"parameters": 7e9, "model_type": "llama", "window": 4096} for name in names}
    facts["org/target"] |= target
    choices = {"gpu_memory": 80} | choices
    return make_plan(
        InitConfig(
            method=method,
            target=names[0],
            sources=names[1:],
            texts=str(path),
            out=str(folder / method),
            facts=facts,
            **choices,
        )
    )


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("case", CASES)
def test_axolotl_and_mergekit_accept_every_file(case, method, tmp_path, monkeypatch):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from mergekit.config import MergeConfiguration

    target, choices = CASES[case]
    plan = plan_of(tmp_path, method, target, **choices)
    files = files_of(plan)
    write_files(files, tmp_path / method)
    monkeypatch.chdir(tmp_path / method)
    trainings = [name for name in files if name.startswith(("train", "sft", "dpo"))]
    assert len(trainings) == TRAININGS[method]
    for name in trainings:
        settings = yaml.safe_load(files[name])
        # axolotl drops keys that it does not know, without a word.
        assert settings.keys() - {*AxolotlInputConfig.model_fields, "fusion"} == set()
        forget_plugins()
        cfg = DictDefault(settings)
        prepare_plugins(cfg)
        capabilities = H100 if plan.machine.gpus else {**H100, "bf16": False, "n_gpu": 1, "compute_capability": None}
        checked = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
        assert checked.fusion
        assert (
            checked.micro_batch_size * checked.gradient_accumulation_steps * max(plan.machine.gpus, 1)
            == plan.batch.total
        )
        assert (checked.adapter or None) == plan.memory.adapter
        assert (plan.memory.stage > 0) == bool(checked.deepspeed)
    if method == "fusechat":
        merge = MergeConfiguration.model_validate(yaml.safe_load(files["merge.yml"]))
        assert len(merge.referenced_models()) == 3
        assert any(model.lora for model in merge.referenced_models()) == bool(plan.memory.adapter)
    if method == "rounds":
        # What `fusion rounds` makes of both files passes the settings of its commands, and axolotl's.
        chain = write_rounds(load_rounds("rounds.yml", {}))
        assert ("02-merge" in chain.steps) == bool(plan.memory.adapter)
        forget_plugins()
        cfg = DictDefault(yaml.safe_load((tmp_path / method / "rounds" / "02" / "train.yml").read_text()))
        prepare_plugins(cfg)
        checked = validate_config(cfg, capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"})
        assert checked.fusion["rule"] == "fixed_weights"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.llama_checkpoint(folder / "target", seed=1, tokenizer=tiny.sentencepiece_bpe())
    tiny.llama_checkpoint(folder / "digits", seed=2, tokenizer=tiny.digit_splitting())
    tiny.llama_checkpoint(folder / "bytes", seed=3, tokenizer=tiny.byte_level())
    tiny.reward_checkpoint(folder / "reward")
    return folder


def run_steps(folder, monkeypatch, run_folder):
    """Do what `fusion run` would start, step by step, in this process: importing the hosts takes longer than a step."""
    monkeypatch.chdir(folder)
    for step in yaml.safe_load((folder / "fusion.yml").read_text())["steps"]:
        program, *arguments = shlex.split(step["command"])
        if program == "axolotl":
            action, name, *flags = arguments
            assert (action, flags) == ("train", ["--launcher", "python"])
            runs.train(yaml.safe_load((folder / name).read_text()), run_folder / step["name"])
        else:
            assert program == "fusion"
            result = CliRunner().invoke(app, arguments)
            assert result.exception is None, (step["name"], result.output)
        assert all((folder / path).exists() for path in step.get("writes", [])), step["name"]


def init(folder, models, *arguments):
    flags = ["--target", models / "target", "--sources", models / "digits", models / "bytes", "--epochs", "1"]
    result = CliRunner().invoke(app, ["init", *map(str, [*arguments, *flags, "--out", folder, "--gpus", "0"])])
    assert result.exception is None, result.output


def check_page(folder, report):
    """The page of the run has the figures of its files; the losses of its example texts are those of its models."""
    page = html.unescape(page_of(folder, Options(examples=8)))
    store = open_store(folder / "stores" / "digits").manifest
    assert all(f'<td class="number">{count:,}</td>' in page for count in (store.rows, store.tokens, store.bytes))
    assert f"{report['texts']:,} texts, {report['positions']:,} supervised positions" in page
    for domain, counts in report["taught"].items():
        for count in counts.values():
            assert f"{count:,} ({count / sum(counts.values()):.1%})" in page, domain
    record = json.loads((folder / "fused" / "fusion_training.json").read_text())
    (checkpoint,) = (folder / "fused").glob("checkpoint-*")
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["lm_loss"] for entry in history if "lm_loss" in entry]
    assert losses
    assert losses == [entry["lm_loss"] for entry in record["log_history"] if "lm_loss" in entry]
    assert all(f'<td class="number">{loss:.4g}</td>' in page for loss in losses)
    assert set(record["versions"]) > {"fusion-plugins", "python", "axolotl", "transformers", "torch"}
    assert record["config"]["fusion"]["sources"][0]["name"] == "digits"
    examples = record["examples"]
    assert len(examples) == 8
    tokenizer = AutoTokenizer.from_pretrained(folder / "fused")
    for example in examples:
        said = tokenizer.decode(example["ids"])
        assert "".join("".join(example["tokens"]).split()) == "".join(said.split())
        assert set(example["sources"][1:]) <= {"digits", "bytes", "target", SEVERAL, LABEL, None}
        assert example["sources"][0] is None
    said = re.findall(r"([\d.]+) nats before the training, ([\d.]+) after it", page)
    for name, place in ((record["base_model"], 0), (folder / "fused", 1)):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        for example, shown in zip(examples, said, strict=True):
            ids, trained = torch.tensor([example["ids"]]), torch.tensor(example["supervised"])[1:]
            with torch.no_grad():
                nats = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            assert float(shown[place]) == pytest.approx(float(nats[trained].mean()), abs=1e-3)


@pytest.mark.slow
def test_a_generated_fusellm_folder_runs_from_end_to_end(models, run_folder, monkeypatch):
    texts = runs.write_rows(run_folder / "texts.jsonl", [{"content": text} for text in runs.texts(24)])
    init(run_folder / "fusellm", models, "fusellm", "--texts", texts, "--columns", "{field: content}")
    run_steps(run_folder / "fusellm", monkeypatch, run_folder)
    assert (run_folder / "fusellm" / "fused" / "model.safetensors").is_file()
    report = json.loads((run_folder / "fusellm" / "fused" / "fusion_report.json").read_text())
    assert report
    check_page(run_folder / "fusellm", next(iter(report.values())))


@pytest.mark.slow
def test_a_generated_fusechat3_folder_runs_from_end_to_end(models, run_folder, monkeypatch):
    prompts = runs.write_rows(run_folder / "prompts.jsonl", [{"question": f"Say {number}!"} for number in range(30)])
    flags = ["--columns", "{field: question}", "--reward-model", models / "reward"]
    flags += ["--samples", "4", "--max-tokens", "24"]
    init(run_folder / "fusechat3", models, "fusechat3", "--prompts", prompts, *flags)
    # Untrained models end no answer by themselves.
    sampling = run_folder / "fusechat3" / "sample.yml"
    sampling.write_text(sampling.read_text().replace("    top_p:", "    stop: [e, a]\n    top_p:"))
    run_steps(run_folder / "fusechat3", monkeypatch, run_folder)
    assert (run_folder / "fusechat3" / "dpo" / "model.safetensors").is_file()
    pairs = json.loads((run_folder / "fusechat3" / "dpo" / "fusion_pairs.json").read_text())
    assert pairs["pairs"] > 0
    page = page_of(run_folder / "fusechat3", Options())
    assert f"{pairs['pairs']:,} pairs of {pairs['kept']:,} of {pairs['prompts']:,} prompts." in page
    for part in ("Responses: sample", "Scored responses: score", "Training: sft", "Training: dpo", "Best answers"):
        assert part in page
