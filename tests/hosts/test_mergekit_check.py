"""`fusion merge-check`: each fault is named with its cure, and a sound configuration passes."""

import json
import shutil

import merging
import pytest
import tiny
import yaml
from merging import config_of
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


def test_a_model_named_twice_is_refused(models, tmp_path):
    found = texts(check_of(tmp_path, config_of(models, "one", "one")))
    assert any("Duplicate merge inputs" in text for text in found)


def test_dtypes_that_lose_precision_are_warned_about(models, tmp_path):
    warned = texts(check_of(tmp_path, config_of(models, "one", "two", dtype="float16")), "warning")
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
