"""`fusion merge-check`: each fault is named with its cure, and a sound configuration passes."""

import json
import os
import shutil
from pathlib import Path

import merging
import pytest
import tiny
import torch
import yaml
from click import testing
from merging import config_of, merge
from safetensors.torch import load_file
from typer.testing import CliRunner

from fusion_plugins.errors import ConfigError, MergeError
from fusion_plugins.mergekit import check as module
from fusion_plugins.mergekit.check import check_merge


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = merging.make_models(folder)
    made["other_shape"] = tiny.llama_checkpoint(folder / "other_shape", seed=3, intermediate_size=64)
    made["tied"] = tiny.llama_checkpoint(folder / "tied", seed=4, tie_word_embeddings=True)
    made["larger_vocabulary"] = tiny.llama_checkpoint(folder / "larger_vocabulary", seed=5, vocab_size=500)
    made["other_ids"] = tiny.llama_checkpoint(folder / "other_ids", seed=6, tokenizer=tiny.digit_splitting(420))
    return made


def check_of(tmp_path, config):
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config))
    return check_merge(path, out=tmp_path)


def texts(check, level="error"):
    return [f"{finding.text} -> {finding.cure}" for finding in check.findings if finding.level == level]


def test_a_sound_configuration_passes_and_says_what_it_takes(models, tmp_path):
    check = check_of(tmp_path, config_of(models, "one", "two", dtype="float32", out_dtype="bfloat16"))
    assert check.ok
    assert check.findings == []
    facts = dict(check.facts)
    elements = sum(tensor.numel() for tensor in tiny.tensors_of(models["base"]).values())
    assert facts[str(models["base"])] == f"LlamaForCausalLM, {elements:,} parameters, bfloat16"
    assert facts["merged model"] == f"{elements * 2 / 1e3:.1f} kB in bfloat16"
    assert {"disk", "memory"} <= set(facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "vram"}, "no merge method 'vram' -> did you mean ram or varm?"),
        ({"parameters": {"granularty": "row"}}, "varm has no parameter 'granularty'; did you mean 'granularity'?"),
        ({"parameters": {"granularity": "tensor"}}, "'granularity': expected one of matrix, row"),
        ({"parameters": {"compat": "none"}}, "'compat': expected 'fusechat' or no such parameter; got 'none'"),
        ({"out_dtpe": "bfloat16"}, "unknown key 'out_dtpe'; did you mean 'out_dtype'?"),
        ({"base_model": None}, "requires a base input"),
        ({"slices": [{"sources": []}]}, "Exactly one of 'models', 'slices', or 'modules'"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_a_wrong_configuration_is_named(models, tmp_path, change, message):
    check = check_of(tmp_path, config_of(models, "one", "two") | change)
    assert not check.ok
    assert any(message in text for text in texts(check)), texts(check)


def test_parameters_of_mergekits_own_methods_are_checked_too(models, tmp_path):
    config = config_of(models, "one", "two", method="ties", parameters={"weight": 0.5, "densty": 0.5})
    config["models"][0]["paramters"] = {"weight": 1}
    found = texts(check_of(tmp_path, config))
    assert any("ties has no parameter 'densty'; did you mean 'density'?" in text for text in found)
    assert any("models[0]: unknown key 'paramters'; did you mean 'parameters'?" in text for text in found)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("other_shape", "model.layers.0.mlp.down_proj.weight is [32, 64] in"),
        ("larger_vocabulary", "vocabularies differ: lm_head.weight is [500, 32] in"),
        ("other_ids", "tokens have another id in"),
    ],
)
def test_models_that_do_not_fit_are_named_with_the_cure(models, tmp_path, model, message):
    found = texts(check_of(tmp_path, config_of(models, "one", model)))
    assert any(message in text for text in found), found


def test_an_untied_model_beside_a_tied_base_is_refused(models, tmp_path):
    found = texts(check_of(tmp_path, config_of(models | {"base": models["tied"]}, "one", "tied")))
    assert any("tie_word_embeddings is False in" in text for text in found), found


def test_a_tokenizer_setting_settles_vocabularies(models, tmp_path):
    config = config_of(models, "one", "other_ids", tokenizer={"source": "base"})
    assert texts(check_of(tmp_path, config)) == []


def test_other_architectures_are_refused(models, tmp_path):
    folder = tmp_path / "mistral"
    shutil.copytree(models["one"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config))
    found = texts(check_of(tmp_path, config_of(models | {"mistral": folder}, "one", "mistral")))
    assert any("is a MistralForCausalLM" in text and "is a" in text for text in found)


def test_special_tokens_and_templates_that_differ_are_warned_about(models, tmp_path):
    folder = tmp_path / "special"
    shutil.copytree(models["one"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|im_start|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    check = check_of(tmp_path, config_of(models | {"special": folder}, "special", "two"))
    warned = texts(check, "warning")
    assert any(text.startswith("eos_token is '<|im_start|>' in") for text in warned)
    assert any("has another chat template" in text for text in warned)
    assert check.ok


def test_missing_and_damaged_models_are_named(models, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(models["one"], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    shutil.copytree(models["two"], tmp_path / "incomplete")
    next((tmp_path / "incomplete").glob("model-00002*")).unlink()
    shutil.copytree(models["one"], tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    names = {name: tmp_path / name for name in ("empty", "cut", "incomplete", "weightless", "absent")}
    found = "\n".join(texts(check_of(tmp_path, config_of(models | names, *names))))
    for name in ("empty", "absent"):
        assert f"{tmp_path / name}: expected a folder with config.json" in found
    assert f"{tmp_path / 'cut' / 'model.safetensors'}: expected a complete file of weights" in found
    assert f"{tmp_path / 'incomplete'}: expected every shard that the index names; missing: model-00002" in found
    assert ".safetensors -> Download the model again" in found
    assert f"{tmp_path / 'weightless'}: expected model.safetensors or pytorch_model.bin" in found


def test_tensors_that_mergekit_drops_are_named(tmp_path):
    """Its description of Llama has no biases."""
    models = merging.make_models(tmp_path / "models", attention_bias=True)
    config = config_of(models, "one", "two")
    (found,) = texts(check_of(tmp_path, config))
    assert "does not know 8 parameter(s) of" in found
    assert "model.layers.0.self_attn.q_proj.bias" in found
    with pytest.raises(MergeError, match=r"does not know 8 parameter\(s\) of .*: they would be missing"):
        merging.run_merge(tmp_path, config)


def test_copies_are_noticed(models, tmp_path):
    shutil.copytree(models["one"], tmp_path / "copy")
    config = config_of(models | {"copy": tmp_path / "copy"}, "one", "copy", "two")
    warned = texts(check_of(tmp_path, config), "warning")
    assert len(warned) == 1
    assert "seems to hold the same weights as" in warned[0]


def test_a_base_that_the_models_were_not_trained_from_is_noticed(models, tmp_path):
    """It has the same shapes, so nothing else tells. A merge without a base is not warned."""
    models = dict(models)
    for name, seed in (("one", 1), ("two", 2)):
        models[name] = tiny.llama_checkpoint(tmp_path / name, seed=seed, moved=1e-3, base=models["base"])
    assert texts(check_of(tmp_path, config_of(models, "one", "two")), "warning") == []
    other = tiny.llama_checkpoint(tmp_path / "other", seed=8)
    (warned,) = texts(check_of(tmp_path, config_of(models | {"base": other}, "one", "two")), "warning")
    assert f"times nearer to each other than to {other} -> check base_model" in warned
    config = config_of(models | {"other": other}, "other", "one", "two", method="linear", parameters={"weight": 1.0})
    del config["base_model"]
    assert texts(check_of(tmp_path, config), "warning") == []


@pytest.mark.parametrize("method", ["sce", "fusechat_sce"])
def test_a_selection_among_one_model_is_warned_of(models, tmp_path, method):
    """The warning says what happens: the merged model is the base."""
    half = {"select_topk": 0.5}
    config = config_of(models, "one", method=method, parameters=half)
    (warned,) = texts(check_of(tmp_path, config), "warning")
    assert f"{models['one']} is the only one, so that the merged model is the base" in warned
    base, merged = tiny.tensors_of(models["base"]), merge(tmp_path, config)
    assert all(torch.equal(merged[name].float(), tensor.float()) for name, tensor in base.items())
    assert texts(check_of(tmp_path, config_of(models, "one", method=method)), "warning") == []
    for share, warns in (([1, 1], 0), ([{"filter": "mlp", "value": 1.0}, {"value": [1.0, 0.5]}], 1)):
        config = config_of(models, "one", method=method, parameters={"select_topk": share})
        assert len(texts(check_of(tmp_path, config), "warning")) == warns
    both = config_of(models, "one", "two", method=method, parameters=half)
    assert texts(check_of(tmp_path, both), "warning") == []


def test_a_model_named_twice_is_refused(models, tmp_path):
    found = texts(check_of(tmp_path, config_of(models, "one", "one")))
    assert any("Duplicate merge inputs" in text for text in found)


def test_dtypes_that_lose_precision_are_warned_about(models, tmp_path):
    assert texts(check_of(tmp_path, config_of(models, "one", "two", dtype="float16")), "warning") == []
    config = config_of(models, "base", "one", method="linear", dtype="float16", parameters={"weight": 1.0})
    del config["base_model"]
    warned = texts(check_of(tmp_path, config), "warning")
    assert [text.partition(" -> ")[0] for text in warned] == [
        "dtype float16 narrows the range of bfloat16 weights",
        "dtype float16 rounds float32 weights before merging",
    ]


def test_too_little_disk_or_memory_is_named(models, tmp_path, monkeypatch):
    """The machine is given as smaller than it is; the estimates are the real ones."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(module, "_memory", lambda: 1000)
    check = check_of(tmp_path, config_of(models, "one", "two"))
    assert any("1.0 kB are free" in text for text in texts(check))
    assert any("--out-shard-size 1B" in text for text in texts(check, "warning"))


def test_a_relative_folder_that_looks_like_a_hub_name_is_warned_about(models, tmp_path, monkeypatch):
    monkeypatch.chdir(models["one"].parent)
    config = config_of(models, "one")
    config["models"] = [{"model": "one"}, {"model": "./two"}]
    warned = texts(check_of(tmp_path, config), "warning")
    assert len(warned) == 1
    assert "write ./one" in warned[0]


def test_the_command_ends_with_status_1_on_errors(models, tmp_path):
    from fusion_plugins.cli import app

    path = tmp_path / "merge.yml"
    for settings, status, said in (
        ({}, 0, "no problems found"),
        ({"measure": "squre"}, 1, "ERROR: "),
    ):
        path.write_text(yaml.safe_dump(config_of(models, "one", "two", parameters=settings)))
        result = CliRunner().invoke(app, ["merge-check", str(path)])
        assert result.exit_code == status, result.output
        assert said in result.output


def test_each_step_is_said_before_it_starts(models, tmp_path):
    from fusion_plugins.cli import app

    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config_of(models, "one", "two")))
    result = CliRunner().invoke(app, ["merge-check", str(path)])
    steps = result.stderr
    for number, name in enumerate(("base", "one", "two"), start=1):
        assert f"reading model {number} of 3: {models[name]} ..." in steps
    for step in ("comparing the models ...", "planning the merge ...", "steps of the plan ..."):
        assert step in steps
    assert "reading" not in result.stdout


@pytest.mark.parametrize("name", ["[/bold]", "\x1b[2J", "[link=x]", ":smile:"])
def test_names_are_shown_as_they_are(models, tmp_path, name):
    from fusion_plugins.cli import app

    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config_of(models | {"odd": f"/nowhere/{name}"}, "one", "odd")))
    result = CliRunner().invoke(app, ["merge-check", str(path)])
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert f"ERROR: /nowhere/{name}".replace("\x1b", "\\x1b") in result.stdout


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bomb(9).encode(), "its aliases repeat each other"),
        (b"\xff\xfea: 1", "in UTF-8"),
        (b"[" * 5000, "not YAML"),
        (b"a: 2024-99-99", "not YAML"),
        (b"!!python/object:os.system x", "not YAML"),
        (b"a: \x01", "not YAML"),
        (b"a: !!timestamp soon", "not YAML"),
        (b"a: !!bool perhaps", "not YAML"),
    ],
)
def test_files_that_are_no_yaml_are_one_short_sentence(tmp_path, content, said):
    path = tmp_path / "merge.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as raised:
        check_merge(path)
    assert len(str(raised.value)) < 500


def test_values_of_a_wrong_configuration_are_not_repeated(tmp_path):
    said = "\n".join(texts(check_of(tmp_path, {"merge_method": "varm", "models": {"key": "sk-of-a-friend"}})))
    assert "models: Input should be a valid list" in said
    assert "sk-" not in said


def changed(models, tmp_path, change):
    """A copy of the sharded model after a change, in a merge with `one`."""
    folder = tmp_path / "changed"
    shutil.copytree(models["two"], folder)
    change(folder)
    return config_of(models | {"changed": folder}, "one", "changed"), folder


def cut_shard(folder):
    file = next(folder.glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:-10])


def pipe(folder):
    (folder / "model.safetensors.index.json").unlink()
    os.mkfifo(folder / "model.safetensors")


def shard_elsewhere(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../two/model-00001-of-00002.safetensors")
    file.write_text(json.dumps(index))


def shards_without_names(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"lm_head.weight": 5}}))


def pickled(change):
    """Damage of a checkpoint of one pickled file: ``change`` gets its state dict."""

    def damage(folder):
        state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        change(state)
        torch.save(state, folder / "pytorch_model.bin")

    return damage


DAMAGES = {
    "truncated shard": (cut_shard, "expected a complete file of weights"),
    "no shard": (lambda folder: next(folder.glob("model-00002*")).unlink(), "missing: model-00002"),
    "broken index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "JSONDecodeError"),
    "index without a map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "shards in another folder": (shard_elsewhere, "names of files in this folder"),
    "shards that are numbers": (shards_without_names, "names of files in this folder"),
    "names that are numbers": (pickled(lambda state: state.update({5: torch.ones(1)})), "no plain mapping of names"),
    "sparse tensors": (
        pickled(lambda state: state.update({"lm_head.weight": state["lm_head.weight"].to_sparse()})),
        "no plain mapping of names to dense tensors",
    ),
    "pipe": (pipe, "expected a file, got something else"),
    "broken config.json": (lambda folder: (folder / "config.json").write_text("{"), "that transformers cannot read"),
    "config.json of nothing": (lambda folder: (folder / "config.json").write_text("[1]"), "transformers cannot read"),
    "config.json that is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_one_sentence_in_the_check_and_in_mergekits_command(models, tmp_path, damage):
    from mergekit.scripts.run_yaml import main

    change, said = DAMAGES[damage]
    config, folder = changed(models, tmp_path, change)
    found = texts(check_of(tmp_path, config))
    assert any(said in text and str(folder) in text for text in found), found
    result = testing.CliRunner().invoke(main, [str(tmp_path / "merge.yml"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [b"{", b'{"version": "1.0", "model": {"type": "BPE"}}', b"\xff"])
def test_a_broken_tokenizer_is_named(models, tmp_path, damage):
    config, folder = changed(models, tmp_path, lambda folder: (folder / "tokenizer.json").write_bytes(damage))
    check = check_of(tmp_path, config)
    assert check.ok
    assert any(f"the tokenizer of {folder} cannot be read" in text for text in texts(check, "warning"))
    assert not check_of(tmp_path, config | {"tokenizer": {"source": str(folder)}}).ok


def test_an_output_folder_that_cannot_be_made_is_named(models, tmp_path):
    from mergekit.scripts.run_yaml import main

    (tmp_path / "file").write_text("")
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config_of(models, "one", "two")))
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none/out"):
        (found,) = [text for text in texts(check_merge(path, out=Path(out))) if "expected a folder for" in text]
        assert str(out) in found
        result = testing.CliRunner().invoke(main, [str(path), str(out)])
        assert result.exit_code == 1
        assert f"Error: {out}: expected a folder for the merged model" in result.output


def test_weights_that_are_in_the_output_folder_are_noticed(models, tmp_path):
    path = tmp_path / "merge.yml"
    path.write_text(yaml.safe_dump(config_of(models, "one", "two")))
    warned = texts(check_merge(path, out=models["two"]), "warning")
    assert any("holds weights already, such as model-00001" in text for text in warned)


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    path = tmp_path / "merge.yml"
    with pytest.raises(ConfigError, match="expected a merge configuration, but cannot read it"):
        check_merge(path)
    for text, found in (("- 1\n", "list"), ("", "an empty file")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"expected a merge configuration \(a mapping\), got {found}"):
            check_merge(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        check_merge(path)
