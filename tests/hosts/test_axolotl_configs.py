"""The shipped recipes: valid for axolotl as they are, without misspelt keys, and trained for real at toy size."""

import copy
import json
import shutil

import axolotl_runs as runs
import pytest
import real_assets
import tiny
import yaml
from axolotl_runs import ROOT, forget_plugins, row_folder, scored

RECIPES = sorted(path.name for path in (ROOT / "axolotl_configs").glob("*.yml"))
#: what is trained here; the others are one of these with another name and learning rate
TRAINED = [name for name in RECIPES if "llama3_2" not in name and name != "fusechat3_llama_wrpo_sft.yml"]
H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
#: what the machine demands: sizes and precision. Model paths come on top.
SMALL = {
    "bf16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "sequence_len": 128,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "optimizer": "adamw_torch",
    "dataset_num_proc": 0,
}


@pytest.fixture(scope="module")
def workplace(material, tmp_path_factory):
    """A folder with everything that the recipes name, at toy size: data, stores, and the model of the first stage."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "axolotl_configs", folder / "axolotl_configs")
    (folder / "data").mkdir()
    shutil.copy(material.texts, folder / "data" / "corpus.jsonl")
    shutil.copy(material.chats, folder / "data" / "chats.jsonl")
    own = [row | {"source": "sft", "response": f"I {row['response']}"} for row in scored(20) if row["source"] == "near"]
    row_folder(folder / "data" / "scored", scored(20) + own)
    row_folder(folder / "data" / "verdicts", judged(20))
    (folder / "stores").mkdir()
    runs.capture(material.chats, material.target, folder / "stores" / "openchat")
    for store, made in {
        "llama2": "texts-target",
        "openllama": "texts-digits",
        "mpt": "texts-digits",
        "mixtral": "chats-digits",
        "solar": "chats-digits",
    }.items():
        shutil.copytree(material.folder / made, folder / "stores" / store)
    for source in ("gemma", "mistral", "llama", "qwen"):
        store = folder / "stores" / f"pairs-{source}"
        if source == "gemma":
            runs.capture(folder / "data" / "scored", material.folder / "digits", store, top_k=1)
        else:
            shutil.copytree(folder / "stores" / "pairs-gemma", store)
    shutil.copytree(folder / "data" / "scored", folder / "data" / "own_scored")
    for source in ("gemma", "qwen-math", "qwen"):
        shutil.copytree(folder / "stores" / "pairs-gemma", folder / "stores" / f"own-{source}")
    return folder


@pytest.fixture(scope="module")
def models(material, workplace):
    """Checkpoints whose tokenizers have the pad tokens that the recipes name."""
    for name in ("llama", "qwen", "gemma", "verdict", "llama_wrpo", "llama_fuserl"):
        recipe = read(f"fusechat3_{name}.yml")
        tokenizer = copy.deepcopy(tiny.byte_level())
        tokenizer.add_special_tokens({"pad_token": recipe["special_tokens"]["pad_token"]})
        tiny.llama_checkpoint(workplace / recipe["base_model"], tokenizer=tokenizer)
    folder = workplace / "models"
    runs.capture(
        workplace / "data" / "scored", folder / "fusechat3-llama-sft", workplace / "stores" / "pairs-target", 1
    )
    return folder


def judged(prompts):
    """Verdicts without rewards: of every second prompt "near" is always right, of the others each source sometimes."""
    rows = scored(prompts)
    for row in rows:
        always = row["source"] == "near" and int(row["prompt_id"][1:]) % 2 == 0
        row |= {"reward": None, "correct": always or row["index"] == 1, "domain": "math"}
    return rows


def read(name):
    return yaml.safe_load((ROOT / "axolotl_configs" / name).read_text(encoding="utf-8"))


#: target -> learning rates of SFT and DPO, beta, loss: the tables of FuseChat-3.0
PUBLISHED = {
    "llama": ("meta-llama/Llama-3.1-8B-Instruct", 5e-6, 8e-7, 10, "sigmoid_norm"),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B-Instruct", 5e-6, 1e-6, 10, "sigmoid_norm"),
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B-Instruct", 5e-6, 1e-6, 10, "sigmoid_norm"),
    "qwen": ("Qwen/Qwen2.5-7B-Instruct", 2e-6, 3e-7, 0.01, "sigmoid"),
    "gemma": ("google/gemma-2-9b-it", 2e-6, 5e-7, 0.01, "sigmoid"),
}


@pytest.mark.parametrize("target", PUBLISHED)
def test_the_settings_of_the_five_targets_are_the_published_ones(target):
    model, *expected = PUBLISHED[target]
    sft, dpo = read(f"fusechat3_{target}_sft.yml"), read(f"fusechat3_{target}.yml")
    assert [sft["learning_rate"], dpo["learning_rate"], dpo["rl_beta"], *dpo["dpo_loss_type"]] == expected
    assert (sft["base_model"], dpo["base_model"]) == (model, sft["output_dir"])
    assert (sft["num_epochs"], dpo["num_epochs"]) == (3, 1)
    assert sft["fusion"] == dpo["fusion"]
    for recipe in (sft, dpo):
        assert (recipe["sequence_len"], recipe["lr_scheduler"], recipe["warmup_ratio"]) == (2048, "cosine", 0.1)


def test_every_preference_recipe_says_what_it_costs_and_has_a_folder_of_its_own():
    names = [name for name in RECIPES if name.startswith("fusechat3_")]
    assert all("GPU hour" in head(name) and "# Data:" in head(name) for name in names)
    for key in ("output_dir", "dataset_prepared_path"):
        assert len({read(name)[key] for name in names}) == len(names)
    for first in ("llama_wrpo_sft", "llama_fuserl_sft"):
        sft, second = read(f"fusechat3_{first}.yml"), read(f"fusechat3_{first.removesuffix('_sft')}.yml")
        assert second["base_model"] == sft["output_dir"]
        assert all(sft["fusion"][key] == second["fusion"][key] for key in sft["fusion"])


def test_the_recipes_are_there():
    assert {"fusellm_llama2.yml", "fusechat_openchat_mixtral.yml", "fusechat3_llama.yml"} <= set(RECIPES)
    assert all(f"axolotl train axolotl_configs/{name}" in head(name) for name in RECIPES)


def head(name):
    lines = (ROOT / "axolotl_configs" / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", RECIPES)
def test_axolotl_accepts_the_recipe_as_it_is(name, workplace, monkeypatch):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.chdir(workplace)
    forget_plugins()
    cfg = DictDefault(read(name))
    prepare_plugins(cfg)
    checked = validate_config(cfg, capabilities=H100, env_capabilities={"torch_version": "2.13.0"})
    assert checked.fusion
    assert checked.micro_batch_size * checked.gradient_accumulation_steps * 8 == 128


@pytest.mark.parametrize("name", RECIPES)
def test_no_key_is_misspelt(name):
    """axolotl drops keys that it does not know, without a word."""
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import DPODataset, SFTDataset

    settings = read(name)
    assert settings.keys() - {*AxolotlInputConfig.model_fields, "fusion"} == set()
    entry = DPODataset if settings.get("rl") else SFTDataset
    for data_set in settings["datasets"]:
        assert data_set.keys() - entry.model_fields.keys() == set()


@pytest.mark.parametrize("name", TRAINED)
def test_the_recipe_trains(name, workplace, models, material, run_folder, monkeypatch):
    monkeypatch.chdir(workplace)
    settings = read(name) | SMALL
    if not settings["base_model"].startswith("models/"):
        fused = settings["fusion"].get("sources")
        settings["base_model"] = str(material.target if fused else models / f"fusechat3-{name.split('_')[1]}-sft")
    # Sharding over GPUs: see the real command below.
    del settings["deepspeed"]
    trainer = runs.train(settings, run_folder)
    assert trainer.state.global_step == 2
    assert (workplace / settings["output_dir"] / "model.safetensors").exists()


@pytest.mark.parametrize("tokenizer", ["tiny", pytest.param("llama3_1", marks=pytest.mark.real)])
def test_both_stages_of_a_recipe_see_the_same_ids(tokenizer, workplace, models, run_folder, monkeypatch):
    """Every prompt in both stages, and one source, so that the best answer is the chosen one."""
    monkeypatch.chdir(workplace)
    folder = models / "fusechat3-llama-sft"
    if tokenizer != "tiny":
        real_assets.require()
        folder = tiny.llama_checkpoint(run_folder / "real", tokenizer=real_assets.tokenizer(tokenizer))
    data = row_folder(run_folder / "scored", [row for row in scored(6) if row["source"] == "also"])
    rows = {}
    for name in ("fusechat3_llama_sft.yml", "fusechat3_llama.yml"):
        settings = read(name) | SMALL | {"base_model": str(folder)}
        del settings["fusion"]["split"], settings["deepspeed"]
        settings["datasets"][0]["path"] = str(data)
        settings["dataset_prepared_path"] = str(run_folder / name)
        rows[name] = list(runs.prepare(settings, run_folder)[1])
    supervised = sorted(row["input_ids"] for row in rows["fusechat3_llama_sft.yml"])
    pairs = rows["fusechat3_llama.yml"]
    assert len(supervised) == 6
    assert supervised == sorted(row["prompt_ids"] + row["chosen_ids"] for row in pairs)
    learnt = [[label for label in row["labels"] if label != -100] for row in rows["fusechat3_llama_sft.yml"]]
    assert sorted(learnt) == sorted(row["chosen_ids"] for row in pairs)
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] for row in pairs)


def test_by_verdict_each_stage_gets_the_prompts_that_it_can_use(workplace, models, run_folder, monkeypatch):
    monkeypatch.chdir(workplace)
    prompts = {}
    for name in ("fusechat3_verdict_sft.yml", "fusechat3_verdict.yml"):
        settings = read(name) | SMALL | {"base_model": str(models / "fusechat3-verdict-sft")}
        del settings["deepspeed"]
        settings["dataset_prepared_path"] = str(run_folder / name)
        settings["output_dir"] = str(run_folder / "out")
        prompts[name] = len(runs.prepare(settings, run_folder)[1])
    assert prompts == {"fusechat3_verdict_sft.yml": 10, "fusechat3_verdict.yml": 10}
    reports = [json.loads((run_folder / "out" / f"fusion_{name}.json").read_text()) for name in ("sft", "pairs")]
    assert reports[0]["by_source"] == {"near": 10}
    assert all("limits" not in report for report in reports)


@pytest.mark.slow
def test_the_flagship_command_runs_sharded(workplace, models):
    """`axolotl train axolotl_configs/fusechat3_llama.yml` with its ZeRO-3; sizes and precision on the command line."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items() if key != "dataset_num_proc"]
    result = runs.sharded_command("train", "axolotl_configs/fusechat3_llama.yml", *flags, cwd=workplace)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "'loss': '0.6931'" in result.stdout
    checkpoint = workplace / "models" / "fusechat3-llama" / "checkpoint-2"
    assert list(checkpoint.glob("global_step2/zero_pp_rank_0_*")), "DeepSpeed's shards of the weights"
