"""`fusion init` on small models: what it warns of, and what it writes about it."""

import json

import pytest
import tiny
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from fusion_plugins.chain.round_configs import load_rounds
from fusion_plugins.chain.rounds import write_rounds
from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError, DataError, StoreError
from fusion_plugins.init.names import seen_from
from fusion_plugins.init.plan import Plan, make_plan
from fusion_plugins.init.settings import InitConfig
from fusion_plugins.init.steps import steps_of
from fusion_plugins.init.write import files_of, run_file, write_files

SEVEN_B = {"window": 4096, "parameters": 6.7e9, "model_type": "llama", "pad_token": "<unk>", "names_pad": False}
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}" + tiny.CHATML
CHATS = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(20)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints in a folder: two sources with other tokenizers than the target's."""
    folder = tmp_path_factory.mktemp("models")
    tiny.llama_checkpoint(folder / "target", tokenizer=tiny.byte_level())
    tiny.llama_checkpoint(folder / "digits", tokenizer=tiny.digit_splitting(), max_position_embeddings=64)
    tiny.llama_checkpoint(folder / "llama", tokenizer=tiny.sentencepiece_bpe())
    return folder


def rows(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def texts(path, count=60, words=3):
    return rows(path, [{"id": f"t{n}", "text": f"The number {n} " + "and so on " * words} for n in range(count)])


def plan_of(models, tmp_path, **changes) -> Plan:
    settings = {
        "method": "fusellm",
        "target": str(models / "target"),
        "sources": [str(models / "digits")],
        "out": str(tmp_path / "out"),
        **changes,
    }
    settings.setdefault("texts", texts(tmp_path / "texts.jsonl"))
    return make_plan(InitConfig(**settings))


def said(plan, about):
    return " ".join(finding.text for finding in plan.findings if finding.about == about)


def stopped(plan):
    return {finding.about for finding in plan.findings if finding.stops}


def test_models_are_read_from_their_folders(models, tmp_path):
    plan = plan_of(models, tmp_path, sources=[str(models / "digits"), str(models / "llama")])
    assert [source.facts.window for source in plan.sources] == [64, 128]
    assert [source.short for source in plan.sources] == ["digits", "llama"]
    facts = plan.target.facts
    assert (facts.model_type, facts.vocab_size, facts.chat_template, facts.reasons) == ("llama", 420, True, False)
    assert 2e4 < facts.parameters < 1e5
    assert plan.values["sequence_len"].value <= 64
    assert not plan.findings


def test_a_padding_token_that_ends_no_turn_is_preferred(models, tmp_path):
    plan = plan_of(models, tmp_path, target=str(models / "llama"), sources=[str(models / "digits")])
    assert (plan.target.facts.pad_token, plan.target.facts.names_pad) == ("<unk>", False)
    assert yaml.safe_load(files_of(plan)["train.yml"])["special_tokens"] == {"pad_token": "<unk>"}
    named = plan_of(models, tmp_path, target=str(models / "llama"), pad_token="<s>")
    assert named.target.facts.pad_token == "<s>"
    with pytest.raises(ConfigError, match="expected a token of .*got '<nowhere>'"):
        plan_of(models, tmp_path, pad_token="<nowhere>")


def test_texts_that_no_window_holds_are_cut_first(models, tmp_path):
    plan = plan_of(models, tmp_path, texts=texts(tmp_path / "long.jsonl", words=40))
    assert "longest text has" in said(plan, "digits") + said(plan, "target")
    assert [step.name for step in steps_of(plan)][0] == "cut"
    files = files_of(plan)
    assert yaml.safe_load(files["train.yml"])["datasets"][0]["path"] == "pieces.jsonl"
    assert yaml.safe_load(files["capture-digits.yml"])["texts"] == "pieces.jsonl"
    assert not stopped(plan)


def test_columns_of_other_names_are_in_every_file_that_reads_the_texts(models, tmp_path):
    keys = {"field_messages": "turns", "message_property_mappings": {"role": "from", "content": "value"}}
    chats = [{"turns": [{"from": turn["role"], "value": turn["content"]} for turn in chat]} for chat in CHATS]
    given = {"texts": rows(tmp_path / "chats.jsonl", chats), "columns": keys}
    files = files_of(plan_of(models, tmp_path, method="fusechat", **given))
    assert yaml.safe_load(files["capture-digits.yml"])["columns"] == keys
    entry = yaml.safe_load(files["train-digits.yml"])["datasets"][0]
    assert {key: entry[key] for key in keys} == keys
    prompts = rows(tmp_path / "prompts.jsonl", [{"question": f"{n} + 1?"} for n in range(9)])
    names = {"columns": {"field": "question"}, "texts": prompts, "reward_model": "org/reward"}
    for method, place in (("fusechat3", "sample.yml"), ("rounds", "rounds.yml")):
        made = yaml.safe_load(files_of(plan_of(models, tmp_path, method=method, **names))[place])
        assert made.get("sample", made)["columns"] == {"field": "question"}
    with pytest.raises(ValidationError, match="columns: reference are of prompts, and fusellm reads texts"):
        plan_of(models, tmp_path, columns={"reference": "answer"})
    # Pieces have the usual names again.
    long = rows(tmp_path / "long.jsonl", [{"content": "word " * 200}])
    plan = plan_of(models, tmp_path, texts=long, columns={"field": "content"})
    cut = next(step for step in steps_of(plan) if step.name == "cut")
    assert cut.command[-2:] == ["--set", 'columns={"field": "content"}']
    assert set(yaml.safe_load(files_of(plan)["train.yml"])["datasets"][0]) == {"path", "type"}
    assert "columns" not in yaml.safe_load(files_of(plan)["capture-digits.yml"])


def test_chats_that_are_too_long_are_left_out_by_name(models, tmp_path):
    long = [{"role": "user", "content": "so " * 90}, {"role": "assistant", "content": "Yes."}]
    path = rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in [*CHATS, long]])
    plan = plan_of(models, tmp_path, method="fusechat", texts=path)
    files = files_of(plan)
    assert yaml.safe_load(files["capture-digits.yml"])["on_unusable"] == "skip"
    assert yaml.safe_load(files["train-digits.yml"])["fusion"]["on_missing_text"] == "skip"
    assert "left out and named" in said(plan, "digits")


def test_a_sequence_length_beyond_a_window_cannot_work(models, tmp_path):
    assert stopped(plan_of(models, tmp_path, sequence_len=100)) == {"digits"}
    assert stopped(plan_of(models, tmp_path, sequence_len=60)) == set()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"content": "x"}, "a column 'text' or a column 'messages'"),
        ({"text": ""}, "not empty"),
        ({"text": "a", "messages": CHATS[0]}, "either a column 'text'"),
        ({"messages": [{"role": "king", "content": "x"}]}, "with a role out of"),
    ],
)
def test_rows_without_the_field_are_named_and_left_out(models, tmp_path, row, reason):
    path = rows(tmp_path / "some.jsonl", [{"text": f"A text {n}."} for n in range(5)] + [row])
    plan = plan_of(models, tmp_path, texts=path)
    assert reason in said(plan, path)
    assert "1 rows cannot be used" in said(plan, path)
    assert yaml.safe_load(files_of(plan)["capture-target.yml"])["on_unusable"] == "skip"
    with pytest.raises(DataError, match="expected texts, got none that can be used"):
        plan_of(models, tmp_path, texts=rows(tmp_path / "none.jsonl", [row]))


def test_a_model_without_a_chat_template_cannot_work_with_chats(models, tmp_path):
    plain = tiny.llama_checkpoint(tmp_path / "plain")
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    chats = rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    plan = plan_of(models, tmp_path, method="fusechat", target=str(plain), texts=chats)
    assert stopped(plan) == {"plain"}
    assert "--chat-template plain=FILE" in said(plan, "plain")
    assert not stopped(plan_of(models, tmp_path, target=str(plain)))  # plain texts need none
    (tmp_path / "chatml.jinja").write_text(tiny.CHATML)
    given = {"plain": str(tmp_path / "chatml.jinja")}
    plan = plan_of(models, tmp_path, method="fusechat", target=str(plain), texts=chats, chat_templates=given)
    assert not stopped(plan)
    files = files_of(plan)
    assert yaml.safe_load(files["train-digits.yml"])["chat_template_jinja"] == given["plain"]
    assert yaml.safe_load(files["capture-plain.yml"])["chat_template"] == given["plain"]


@pytest.mark.parametrize("method", ["fusechat", "fusechat3"])
def test_a_template_that_reasons_is_told_not_to(models, tmp_path, method):
    thinking = tiny.llama_checkpoint(tmp_path / "thinking")
    (thinking / "chat_template.jinja").write_text(THINKING)
    items = [{"messages": chat if method == "fusechat" else chat[:1]} for chat in CHATS]
    path = rows(tmp_path / "chats.jsonl", items)
    plan = plan_of(models, tmp_path, method=method, sources=[str(thinking)], texts=path)
    assert "knows reasoning" in said(plan, "thinking")
    files = files_of(plan)
    asked = files["capture-thinking.yml"] if method == "fusechat" else files["sample.yml"]
    assert "chat_template_kwargs: {enable_thinking: false}" in asked


def test_a_tokenizer_that_loses_text_cannot_work(models, tmp_path):
    lossy = tiny.llama_checkpoint(tmp_path / "lossy", tokenizer=tiny.wordpiece())
    plan = plan_of(models, tmp_path, sources=[str(lossy)])
    assert stopped(plan) == {"lossy"}
    assert "read wrong" in said(plan, "lossy")


def test_chats_without_an_answer_cannot_be_learnt_from(models, tmp_path):
    path = rows(tmp_path / "prompts.jsonl", [{"messages": chat[:1]} for chat in CHATS])
    assert stopped(plan_of(models, tmp_path, method="fusechat", texts=path)) == {path}
    assert not stopped(plan_of(models, tmp_path, method="fusechat3", texts=path))


def test_prompts_decide_who_scores_the_answers(models, tmp_path):
    sums = [{"text": f"{n} + 1?", "domain": "math", "reference": str(n + 1)} for n in range(20)]
    plan = plan_of(models, tmp_path, method="fusechat3", texts=rows(tmp_path / "sums.jsonl", sums))
    files = files_of(plan)
    assert yaml.safe_load(files["score.yml"])["scorers"] == {"math": {}}
    assert yaml.safe_load(files["sft.yml"])["fusion"] == yaml.safe_load(files["dpo.yml"])["fusion"]
    assert yaml.safe_load(files["dpo.yml"])["fusion"]["pairs"] == {"rule": "verdict"}
    mixed = rows(tmp_path / "mixed.jsonl", [*sums, {"text": "Sing!"}])
    plan = plan_of(models, tmp_path, method="fusechat3", texts=mixed)
    scorers = yaml.safe_load(files_of(plan)["score.yml"])["scorers"]
    assert scorers["reward"]["preset"].startswith("skywork")
    assert sorted(scorers["reward"]["domains"]) == ["instruction", "math"]
    assert "1 of 21 prompts cannot be verified" in said(plan, mixed)
    armorm = "RLHFlow/ArmoRM-Llama3-8B-v0.1"
    assert stopped(plan_of(models, tmp_path, method="fusechat3", texts=mixed, reward_model=armorm)) == {armorm}
    trusted = {"reward_model": armorm, "trust_remote_code": True}
    plan = plan_of(models, tmp_path, method="fusechat3", texts=mixed, **trusted)
    assert yaml.safe_load(files_of(plan)["score.yml"])["scorers"]["reward"]["trust_remote_code"] is True


def test_published_sampling_settings_are_those_of_the_model_of_that_name(models, tmp_path):
    prompts = rows(tmp_path / "prompts.jsonl", [{"text": "Sing!"}])
    names = ["google/gemma-2-27b-it", "Qwen/Qwen2.5-Math-72B-Instruct", "Qwen/Qwen2.5-72B-Instruct", "a/other-27b"]
    facts = dict.fromkeys(names, SEVEN_B)
    plan = plan_of(models, tmp_path, method="fusechat3", sources=names, texts=prompts, facts=facts)
    sources = yaml.safe_load(files_of(plan)["sample.yml"])["sources"]
    assert [source.get("preset") for source in sources] == [
        "fusechat3-gemma-2-27b",
        "fusechat3-qwen-2.5-math-72b",
        "fusechat3-qwen-2.5-72b",
        None,
    ]


def test_a_model_that_cannot_be_reached_can_be_said_by_hand(models, tmp_path):
    name = "meta-llama/Llama-2-7b-hf"
    with pytest.raises(ConfigError, match=r"--facts 'meta-llama/Llama-2-7b-hf=\{window") as raised:
        plan_of(models, tmp_path, target=name)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"cannot load '{name}'")  # not "source ...", which the target is not
    plan = plan_of(models, tmp_path, target=name, facts={name: SEVEN_B}, gpus=8, gpu_memory=80)
    assert (plan.target.short, plan.memory.stage) == ("llama-2-7b-hf", 2)
    assert (plan.values["lm_loss_weight"].value, plan.values["top_k"].value) == (0.5, 64)
    with pytest.raises(ConfigError, match="expected some of the models"):
        plan_of(models, tmp_path, facts={"another": SEVEN_B})


def test_models_of_one_name_get_different_folders_and_one_model_twice_is_refused(models, tmp_path):
    names = ["a/same", "b/same", "c/SAME"]
    facts = dict.fromkeys(names, SEVEN_B)
    plan = plan_of(models, tmp_path, sources=names, facts=facts)
    assert [source.short for source in plan.sources] == ["same", "same-2", "same-3"]
    with pytest.raises(ConfigError, match="twice"):
        plan_of(models, tmp_path, sources=["a/same", "a/same"], facts={"a/same": SEVEN_B})


@pytest.mark.parametrize("name", ["a: b", "x #y", "-z", "{w}", "q'\"", "tab\tname", "模型"])
def test_names_are_data(models, tmp_path, name, monkeypatch):
    """Whatever a folder is called, the files say it, and the shell lines quote it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(models / "digits")
    plan = make_plan(
        InitConfig(
            method="fusellm", target=str(models / "target"), sources=[name], texts=texts(tmp_path / "t.jsonl"), out="o"
        )
    )
    short = plan.sources[0].short
    assert yaml.safe_load(files_of(plan)[f"capture-{short}.yml"])["model"] == f"../{name}"
    assert set("abcdefghijklmnopqrstuvwxyz0123456789._-") >= set(short)


def test_paths_are_those_that_the_folder_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inner").mkdir()
    assert seen_from("run", "model") == "../model"
    assert seen_from("run", "run/inner") == "./inner"
    assert seen_from(".", "model") == "./model"
    assert seen_from("run", "owner/name") == "owner/name"
    # Programs that run behind a link see what is above the folder itself.
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    seen = seen_from("runs/one", "model")
    (tmp_path / "runs" / "one").mkdir()
    assert (tmp_path / "runs" / "one" / seen).is_dir()


def test_templates_and_models_of_folders_decide_the_steps_that_use_them(models, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(tiny.CHATML)
    source = str(models / "digits")
    prompts = rows(tmp_path / "p.jsonl", [{"text": f"Say {n}", "domain": "math"} for n in range(20)])
    changes = {"texts": prompts, "chat_templates": {"digits": str(template), "target": str(template)}, "out": "o"}
    plan = plan_of(models, tmp_path, method="fusechat3", reward_model=str(models / "llama"), **changes)
    steps = {step.name: step for step in steps_of(plan)}
    assert {prompts, source, str(template)} == set(steps["sample"].reads)
    assert steps["score"].reads == ("responses", str(models / "llama"))
    assert str(template) in steps["sft"].reads
    chats = rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    plan = plan_of(models, tmp_path, method="fusechat", **changes | {"texts": chats})
    assert str(template) in next(steps_of(plan)).reads


def test_the_steps_name_what_they_read_and_write(models, tmp_path):
    chats = rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    sources = [str(models / "digits"), str(models / "llama")]
    plan = plan_of(models, tmp_path, method="fusechat", sources=sources, texts=chats, vllm="/opt/vllm")
    chain = yaml.safe_load(run_file(plan))
    assert chain["environments"] == {"vllm": "/opt/vllm"}
    steps = {step["name"]: step for step in chain["steps"]}
    assert [*steps] == [
        *("capture-digits", "capture-llama", "capture-target", "doctor"),
        *("train-digits", "train-llama", "merge-check", "merge", "report"),
    ]
    assert {name for name, step in steps.items() if step.get("env") == "vllm"} == {
        name for name in steps if "capture" in name
    }
    assert steps["merge"]["reads"] == ["train-digits", "train-llama"]
    written = [path for step in steps.values() for path in step.get("writes", [])]
    assert len(written) == len(set(written))
    own = plan_of(models, tmp_path, own=False)
    assert "doctor" not in [step.name for step in steps_of(own)]


def test_what_the_user_has_changed_is_not_overwritten(models, tmp_path):
    files = files_of(plan_of(models, tmp_path))
    out = tmp_path / "out"
    write_files(files, out)
    write_files(files, out)
    (out / "train.yml").write_bytes(b"mine\xff")
    with pytest.raises(ConfigError, match="train.yml in .* not overwritten"):
        write_files(files, out)
    assert (out / "train.yml").read_bytes() == b"mine\xff"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="expected a folder"):
        write_files(files, tmp_path / "file")


def test_the_command_writes_the_folder_with_flags_or_with_answers(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "texts.jsonl")
    target, digits, llama = (str(models / name) for name in ("target", "digits", "llama"))
    flags = ["--target", target, "--sources", digits, llama, "--texts", "texts.jsonl", "--lm-loss-weight", "0.25"]
    result = CliRunner().invoke(app, ["init", "fusellm", *flags])
    assert result.exception is None, result.output
    written = {path.name for path in (tmp_path / "fusellm").iterdir()}
    assert {"README.md", "fusion.yml", "train.yml", "capture-digits.yml", "capture-llama.yml"} <= written
    assert yaml.safe_load((tmp_path / "fusellm" / "train.yml").read_text())["fusion"]["lm_loss_weight"] == 0.25
    answers = "\n".join(["fusellm", target, f"{digits} {llama}", "texts.jsonl", "asked", "0", "y", ""])
    result = CliRunner().invoke(app, ["init"], input=answers)
    assert result.exception is None, result.output
    assert (tmp_path / "asked" / "train.yml").is_file()
    result = CliRunner().invoke(app, ["init"], input=answers.replace("asked", "no").replace("\ny\n", "\nn\n"))
    assert not (tmp_path / "no").exists()


def test_nothing_is_written_where_something_cannot_work(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "texts.jsonl")
    flags = ["--target", str(models / "target"), "--sources", str(models / "digits"), "--texts", "texts.jsonl"]
    result = CliRunner().invoke(app, ["init", "fusellm", *flags, "--sequence-len", "1000"])
    assert "cannot work; nothing was written" in str(result.exception)
    assert not (tmp_path / "fusellm").exists()
    assert CliRunner().invoke(app, ["init", "fusellm", *flags, "--sequence-len", "1000", "--force"]).exception is None
    assert "cannot work yet" in (tmp_path / "fusellm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["fusionllm"], "method: Input should be 'fusellm'"),
        (["fusellm", "--facts", "x"], "expected MODEL=VALUE"),
        (["fusellm", "--facts", "x={window"], "expected YAML"),
        (["fusellm", "--facts", "x=3"], "expected YAML such as"),
        (["fusellm", "--facts", "x={windows: 3}"], "windows: unknown key"),
        (["fusellm", "--target", "t"], "sources: missing"),
        (["fusellm", "--lm-loss-weight", "2"], "lm_loss_weight"),
        (["fusellm", "--target", "t", "--sources", "s", "--texts", "x", "--tuned"], "are for the method rounds"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    assert message in str(CliRunner().invoke(app, ["init", *flags]).exception)


def sums(path, count=20):
    return rows(path, [{"text": f"{n} + 1?", "domain": "math", "reference": str(n + 1)} for n in range(count)])


def test_rounds_begin_with_a_target_that_is_tuned_on_answers_of_the_sources(models, tmp_path, monkeypatch):
    sources = [str(models / "digits"), str(models / "llama")]
    held_out = texts(tmp_path / "held.jsonl")
    changes = {"method": "rounds", "sources": sources, "texts": sums(tmp_path / "sums.jsonl"), "rounds": 3}
    plan = plan_of(models, tmp_path, held_out=held_out, vllm="/opt/vllm", **changes)
    assert [step.name for step in steps_of(plan)] == ["sample", "score", "report", "sft", "rounds"]
    files = files_of(plan)
    write_files(files, tmp_path / "out")
    rounds = load_rounds(tmp_path / "out" / "rounds.yml", {})
    assert (rounds.config.target, rounds.config.rounds, rounds.config.sample["temperature"]) == ("./sft", 3, 1.0)
    assert rounds.config.held_out.texts == held_out
    assert rounds.config.score["scorers"] == {"math": {}}
    chain = write_rounds(rounds)
    assert {chain.steps[name].env for name in ("01-sample", "02-capture-digits")} == {"vllm"}
    assert chain.where(chain.steps["01-sample"]) == "/opt/vllm"
    block = yaml.safe_load(files["train.yml"])["fusion"]
    assert (block["rule"], block["weights_from"], block["lm_loss_weight"]) == ("fixed_weights", "scored", 0.0)
    last = list(steps_of(plan))[-1]
    assert {"sft", "scored", "train.yml", held_out, *sources} <= set(last.reads)
    assert yaml.safe_load(files["sft.yml"])["fusion"] == {"sft": {"rule": "verdict"}}


def test_rounds_of_a_tuned_target_need_no_first_stage(models, tmp_path):
    prompts = rows(tmp_path / "prompts.jsonl", [{"text": f"Sing {n}!"} for n in range(20)])
    plan = plan_of(models, tmp_path, method="rounds", texts=prompts, tuned=True)
    files = files_of(plan)
    assert {name for name in files if name.endswith(".yml")} == {"rounds.yml", "train.yml", "fusion.yml"}
    assert [step.name for step in steps_of(plan)] == ["rounds"]
    assert yaml.safe_load(files["rounds.yml"])["target"] == str(models / "target")
    assert "score" not in yaml.safe_load(files["rounds.yml"])
    assert yaml.safe_load(files["train.yml"])["fusion"]["rule"] == "min_ce"
    assert not plan.findings


def test_where_no_answer_can_be_verified_the_sources_count_alike(models, tmp_path):
    prompts = rows(tmp_path / "prompts.jsonl", [{"text": f"Sing {n}!"} for n in range(20)])
    sources = [str(models / "digits"), str(models / "llama")]
    plan = plan_of(models, tmp_path, method="rounds", texts=prompts, sources=sources, adapter="lora")
    files = files_of(plan)
    assert "weights_from" not in yaml.safe_load(files["train.yml"])["fusion"]
    assert yaml.safe_load(files["sft.yml"])["fusion"] == {"sft": {"rule": "reward"}}
    made = yaml.safe_load(files["rounds.yml"])
    # The report of the first stage is not in the folder of the model whose adapter was merged.
    assert (made["target"], made["sft_sources"]) == ("./sft-full/merged", ["digits", "llama"])
    assert "cannot be verified" in said(plan, prompts)


def test_rounds_are_asked_for_too(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sums(tmp_path / "sums.jsonl")
    answers = "\n".join(["rounds", str(models / "target"), str(models / "digits"), "sums.jsonl", "n", "", "0", "y", ""])
    result = CliRunner().invoke(app, ["init"], input=answers)
    assert result.exception is None, result.output
    assert (tmp_path / "rounds" / "rounds.yml").is_file()
    done = CliRunner().invoke(app, ["run", "rounds/fusion.yml", "--dry-run"])
    assert "fusion rounds --config rounds.yml" in " ".join(done.output.split())
