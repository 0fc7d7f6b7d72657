"""`varm` inside stock mergekit: every granularity, and whatever mergekit does between the file and the method."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import merging
import pytest
import tiny
import torch
import yaml
from merging import config_of, expected_of, merge, run_merge
from safetensors.torch import save_file

from fusion_plugins.core.merging.varm import GRANULARITIES, varm_merge
from fusion_plugins.errors import ConfigError, MergeError

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return merging.make_models(tmp_path_factory.mktemp("models"))


def assert_same(merged, expected, dtype=None):
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor.to(dtype or tensor.dtype)), name


def test_the_command_line_merges_the_shipped_recipe_with_other_models(models, tmp_path):
    config = yaml.safe_load((merging.CONFIGS / "varm.yml").read_text())
    config["base_model"] = str(models["base"])
    for entry, name in zip(config["models"], ("one", "two"), strict=True):
        entry["model"] = str(models[name])
    path = tmp_path / "varm.yml"
    path.write_text(yaml.safe_dump(config))
    done = subprocess.run([BIN / "mergekit-yaml", path, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged, expected = tiny.tensors_of(tmp_path / "out"), expected_of(models, "one", "two")
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        # Another process may sum with other threads: the last bit of bfloat16 may fall the other way.
        torch.testing.assert_close(merged[name], tensor.to(torch.bfloat16), rtol=2**-7, atol=0.0)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


@pytest.mark.parametrize("measure", ["square", "abs"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_command_gives_what_the_core_gives_for_whole_checkpoints(models, tmp_path, granularity, measure):
    chosen = {"granularity": granularity, "measure": measure, "normalize": "softmax", "temperature": 1e-4}
    merged = merge(tmp_path, config_of(models, "one", "two", "same", dtype="float32", parameters=chosen))
    assert_same(merged, expected_of(models, "one", "two", "same", **chosen))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compat_gives_what_the_released_code_gives(models, tmp_path, granularity):
    chosen = {"granularity": granularity, "compat": "fusechat"}
    merged = merge(tmp_path, config_of(models, "one", "two", "same", dtype="float32", parameters=chosen))
    assert_same(merged, expected_of(models, "one", "two", "same", **chosen))


def test_compat_can_be_set_for_some_tensors_only(models, tmp_path):
    """Where no filter matches, the parameter has its default, which is None."""
    setting = [{"filter": "mlp", "value": "fusechat"}]
    merged = merge(tmp_path, config_of(models, "one", "same", dtype="float32", parameters={"compat": setting}))
    published = expected_of(models, "one", "same", compat="fusechat")
    ours = expected_of(models, "one", "same")
    assert not torch.equal(published["lm_head.weight"], ours["lm_head.weight"])
    assert_same(merged, {name: (published if "mlp" in name else ours)[name] for name in merged})


def test_all_unchanged_keeps_the_base(models, tmp_path):
    for granularity in ("matrix", "layer"):
        config = config_of(models, "same", dtype="bfloat16", parameters={"granularity": granularity})
        assert_same(merge(tmp_path, config, name=granularity), tiny.tensors_of(models["base"]))


def test_per_model_weights_are_priors(models, tmp_path):
    config = config_of(models, "one", "two", dtype="float32", parameters={"granularity": "module"})
    config["models"][0]["parameters"] = {"weight": 5}
    expected = expected_of(models, "one", "two", granularity="module", prior=[5, 1])
    assert_same(merge(tmp_path, config), expected)


def test_a_filter_divides_units_by_what_it_selects(models, tmp_path):
    """Layers without their feed-forward tensors, which are merged one by one."""
    setting = [{"filter": "mlp", "value": "matrix"}, {"value": "layer"}]
    merged = merge(tmp_path, config_of(models, "one", "two", dtype="float32", parameters={"granularity": setting}))
    base = {name: tensor.float() for name, tensor in tiny.tensors_of(models["base"]).items()}
    tuned = [tiny.tensors_of(models[name]) for name in ("one", "two")]
    parts = [
        (granularity, [name for name in base if ("mlp" in name) == inside])
        for granularity, inside in (("matrix", True), ("layer", False))
    ]
    expected = {}
    for granularity, names in parts:
        only = [{name: model[name] for name in names} for model in tuned]
        expected |= varm_merge({name: base[name] for name in names}, only, granularity=granularity)
    assert_same(merged, expected)


@pytest.mark.parametrize("granularity", ["matrix", "module", "layer", "model"])
def test_slices_merge_what_they_pair(models, tmp_path, granularity):
    """Output layer 0 is made of layer 1 everywhere, output layers 1 and 2 of layers 0 and 1 of `two` alone."""

    def sources(layers, *names):
        return [{"model": str(models[name]), "layer_range": layers} for name in ("base", *names)]

    slices = [{"sources": sources([1, 2], "one", "two")}, {"sources": sources([0, 2], "two")}]
    config = {
        "merge_method": "varm",
        "base_model": str(models["base"]),
        "slices": slices,
        "dtype": "float32",
        "parameters": {"granularity": granularity},
    }
    merged = merge(tmp_path, config)
    inputs = {name: tiny.tensors_of(models[name]) for name in ("base", "one", "two")}

    def renamed(name, model):
        if ".layers.0." in name:
            return inputs[model][name.replace(".layers.0.", ".layers.1.")]
        if ".layers.1." in name or ".layers.2." in name:
            return inputs[model][name.replace(".layers.1.", ".layers.0.").replace(".layers.2.", ".layers.1.")]
        return inputs[model][name]

    last = [
        name
        for name in merged
        if ".layers.1." in name or ".layers.2." in name or name in ("model.norm.weight", "lm_head.weight")
    ]
    first = [name for name in merged if name not in last]
    expected = varm_merge(
        {name: renamed(name, "base").float() for name in first},
        [{name: renamed(name, model) for name in first} for model in ("one", "two")],
        granularity=granularity,
    )
    expected |= {name: renamed(name, "two") for name in last}
    assert len(merged) == len(inputs["base"]) + 9
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor.float(), rtol=1e-6, atol=1e-7)


def test_modules_and_tokens_that_the_user_names_are_no_unknown_keys(models, tmp_path):
    config = config_of(models, "one", "two", dtype="float32")
    config["modules"] = {"default": {"models": config.pop("models")}}
    config["tokenizer"] = {"source": "base", "tokens": {"<|im_start|>": {"source": str(models["one"])}}}
    merged = merge(tmp_path, config)
    assert set(merged) == set(tiny.tensors_of(models["base"]))
    record = json.loads((tmp_path / "out" / "fusion_merge.json").read_text())
    assert record["models"] == [str(models[name]) for name in ("one", "two")]
    config["modules"]["default"]["models"][0]["wieght"] = 1
    with pytest.raises(ConfigError, match=r"modules\.default\.models\[0\]: unknown key 'wieght'"):
        merge(tmp_path, config, name="misspelt")


@pytest.mark.parametrize("granularity", ["matrix", "layer"])
def test_adapters_are_merged_first_and_untouched_tensors_keep_the_base(models, tmp_path, granularity):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(models["base"], dtype=torch.float32),
            LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        tuned.save_pretrained(tmp_path / name)
    config = config_of(models, dtype="float32", parameters={"granularity": granularity})
    config["models"] = [{"model": f"{models['base']}+{tmp_path / name}"} for name in ("first", "second")]
    merged = merge(tmp_path, config, "--lora-merge-cache", tmp_path / "cache", "--lora-merge-dtype", "float32")
    caches = sorted(path for path in (tmp_path / "cache").iterdir())
    tuned = [next(tiny.tensors_of(path) for path in caches if f"_{name}_" in path.name) for name in ("first", "second")]
    base = tiny.tensors_of(models["base"])
    assert_same(merged, varm_merge({k: v.float() for k, v in base.items()}, tuned, granularity=granularity))
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"].float())


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """A base, and two models with the same words under other ids; the second has words of its own, too."""
    folder = tmp_path_factory.mktemp("vocabularies")
    tokenizers = [tiny.byte_level(300), tiny.byte_level(300), tiny.digit_splitting(320)]
    names = ("base", "one", "two")
    return {
        name: tiny.llama_checkpoint(folder / name, seed=seed, tokenizer=tokenizer)
        for seed, (name, tokenizer) in enumerate(zip(names, tokenizers, strict=True))
    }


def by_token(folder):
    """The tensors with vocabulary rows in the order of the tokens: the ids of a union differ from run to run."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder).get_vocab()
    order = torch.tensor([tokens[token] for token in sorted(tokens)])
    return {
        name: tensor[order] if name in ("model.embed_tokens.weight", "lm_head.weight") else tensor
        for name, tensor in tiny.tensors_of(folder).items()
    }


@pytest.mark.parametrize("granularity", ["matrix", "module", "model"])
@pytest.mark.parametrize("source", ["base", "union"])
def test_statistics_see_permuted_vocabularies(vocabularies, tmp_path, source, granularity):
    """What mergekit hands to a method is read out with linear merges that take one model whole."""
    shared = {"dtype": "float32", "tokenizer": {"source": source}}
    aligned = {}
    for chosen in vocabularies:
        config = config_of(vocabularies, method="linear", **shared)
        config["models"] = [
            {"model": str(vocabularies[name]), "parameters": {"weight": 1.0 if name == chosen else 0.0}}
            for name in vocabularies
        ]
        aligned[chosen] = by_token(run_merge(tmp_path, config, name=f"only_{chosen}"))
    config = config_of(vocabularies, "one", "two", parameters={"granularity": granularity}, **shared)
    merged = by_token(run_merge(tmp_path, config))
    expected = varm_merge(aligned["base"], [aligned["one"], aligned["two"]], granularity=granularity)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert (len(merged["lm_head.weight"]) == len(tiny.byte_level(300))) == (source == "base")


@pytest.mark.parametrize("granularity", ["matrix", "layer", "model"])
def test_vocabularies_of_different_size_are_refused_with_the_cure(vocabularies, tmp_path, granularity):
    config = config_of(vocabularies, "two", dtype="float32", parameters={"granularity": granularity})
    with pytest.raises((MergeError, ValueError), match=r"tokenizer: \{source: base\}"):
        merge(tmp_path, config)


def test_tied_embeddings_are_merged_once(tmp_path):
    models = merging.make_models(tmp_path, tie_word_embeddings=True)
    for granularity in ("matrix", "model"):
        config = config_of(models, "one", "two", dtype="float32", parameters={"granularity": granularity})
        merged = merge(tmp_path, config, name=granularity)
        assert "lm_head.weight" not in merged
        assert_same(merged, expected_of(models, "one", "two", granularity=granularity))


@pytest.mark.parametrize(
    "flags",
    [
        ["--lazy-unpickle"],
        ["--low-cpu-memory"],
        ["--read-to-gpu"],
        ["--async-write", "--write-threads", "2", "--out-shard-size", "10K"],
        ["--clone-tensors"],
    ],
)
def test_flags_do_not_change_the_result(models, tmp_path, flags):
    config = config_of(models, "one", "two", dtype="float32", parameters={"granularity": "layer"})
    merged = merge(tmp_path, config, *flags)
    assert_same(merged, expected_of(models, "one", "two", granularity="layer"))
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 5) == ("--out-shard-size" in flags)


def test_pickled_checkpoints_are_read(models, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "pickled"
    model = AutoModelForCausalLM.from_pretrained(models["one"])
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    pickled = models | {"one": folder}
    for flags in ([], ["--lazy-unpickle"]):
        config = config_of(pickled, "one", "two", dtype="float32", parameters={"granularity": "module"})
        assert_same(merge(tmp_path, config, *flags), expected_of(models, "one", "two", granularity="module"))


def test_parameters_in_a_pickled_checkpoint_are_merged_like_tensors(models, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(models["one"], folder)
    state = tiny.tensors_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, folder / "pytorch_model.bin")
    merged = merge(tmp_path, config_of(models | {"one": folder}, "one", "two", dtype="float32"))
    assert_same(merged, expected_of(models, "one", "two"))


def test_without_dtype_the_result_has_the_widest_dtype_of_the_inputs(models, tmp_path):
    merged = merge(tmp_path, config_of(models, "one", "two"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}


def test_inputs_stay_as_narrow_as_they_are_stored_and_the_result_has_the_dtype_of_the_configuration(tmp_path):
    """In bfloat16, float32 results of bfloat16 inputs would be rounded."""
    base = tiny.llama_checkpoint(tmp_path / "base", dtype="bfloat16")
    narrow = {"base": base}
    for seed, name in enumerate(("one", "two"), start=1):
        narrow[name] = tiny.llama_checkpoint(tmp_path / name, seed=seed, moved=1e-2, base=base, dtype="bfloat16")
    for granularity in GRANULARITIES:
        config = config_of(narrow, "one", "two", dtype="float32", parameters={"granularity": granularity})
        merged = merge(tmp_path, config, name=granularity)
        assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
        wide = {name: tiny.tensors_of(folder) for name, folder in narrow.items()}
        wide = {name: {key: tensor.float() for key, tensor in model.items()} for name, model in wide.items()}
        assert_same(merged, varm_merge(wide["base"], [wide["one"], wide["two"]], granularity=granularity))


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A base in float32 and two fine-tunes whose differences are lost in bfloat16."""
    folder = tmp_path_factory.mktemp("light")
    found = {"base": tiny.llama_checkpoint(folder / "base")}
    for seed, name in enumerate(("one", "two"), start=1):
        found[name] = tiny.llama_checkpoint(folder / name, seed=seed, moved=1e-5, base=found["base"])
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", "float16"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_narrow_dtype_rounds_the_result_and_not_the_inputs(light, tmp_path, granularity, dtype):
    parameters = {"granularity": granularity}
    expected = expected_of(light, "one", "two", granularity=granularity)
    narrow = getattr(torch, dtype.removeprefix("torch."))
    assert_same(merge(tmp_path, config_of(light, "one", "two", dtype=dtype, parameters=parameters)), expected, narrow)
    config = config_of(light, "one", "two", dtype=dtype, out_dtype="float32", parameters=parameters)
    assert_same(merge(tmp_path, config, name="wide"), expected)


@pytest.mark.parametrize("more", [{"tokenizer": {"source": "union"}}, {}])
def test_a_narrow_dtype_does_not_round_permuted_or_truncated_embeddings_either(light, tmp_path, more):
    config = config_of(light, "one", "two", dtype="bfloat16", **more)
    merged = merge(tmp_path, config, *([] if more else ["--unsafe-truncate-embeddings"]))
    assert_same(merged, expected_of(light, "one", "two"), torch.bfloat16)


def test_a_narrow_dtype_does_not_round_the_inputs_of_mergekit_pytorch(light, tmp_path):
    files = {name: folder / "model.safetensors" for name, folder in light.items()}
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config_of(files, "one", "two", dtype="bfloat16")))
    command = [BIN / "mergekit-pytorch", path, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged, expected = tiny.tensors_of(tmp_path / "out"), expected_of(light, "one", "two")
    # Another process may sum with other threads: the last bit of bfloat16 may fall the other way, here and there.
    same = [merged[name] == tensor.bfloat16() for name, tensor in expected.items()]
    assert sum(int(each.sum()) for each in same) > 0.999 * sum(each.numel() for each in same)


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_numbers_beyond_the_range_of_float16_stop_the_merge(tmp_path, method, key):
    def large(folder, name, factor):
        made = tiny.llama_checkpoint(folder / name)
        tensors = tiny.tensors_of(made)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * factor
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        return made

    models = {"base": large(tmp_path, "base", 1e5), "one": large(tmp_path, "one", 1.1e5)}
    with pytest.raises(MergeError, match=r"'model\.norm\.weight': expected numbers of at most 65,504"):
        merge(tmp_path, config_of(models, "one", method=method, **{key: "float16"}))


def test_an_optional_tensor_that_only_the_base_has_is_copied(models, tmp_path):
    """Granite's biases are optional; apart from them its tensors are named as Llama's."""
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj.bias"
    granite = {}
    for model in ("base", "one", "two"):
        tensors = tiny.tensors_of(models[model])
        if model == "base":
            tensors[name] = torch.full((32,), 0.5, dtype=torch.bfloat16)
        granite[model] = tmp_path / model
        granite[model].mkdir()
        save_file(tensors, granite[model] / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((models[model] / "config.json").read_text())
        config |= {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
        (granite[model] / "config.json").write_text(json.dumps(config))
    for granularity in ("matrix", "layer"):
        config = config_of(granite, "one", "two", dtype="float32", parameters={"granularity": granularity})
        merged = merge(tmp_path, config, name=granularity)
        copied = merged.pop(name)
        assert copied.dtype == torch.float32
        assert copied.unique().tolist() == [0.5]
        assert_same(merged, expected_of(models, "one", "two", granularity=granularity))


def test_a_plan_gives_the_same_result_when_threads_share_it(models, tmp_path):
    """As a multi-GPU merge does: statistics first, then tensors in several threads at a time."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import SaveTensor
    from mergekit.merge import MergePlanner, _model_out_config
    from mergekit.options import MergeOptions

    raw = config_of(models, "one", "two", dtype="float32", parameters={"granularity": "layer"})
    config, options = MergeConfiguration.model_validate(raw), MergeOptions()
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    merges = [task.tensor_task for task in planner.plan_to_disk(str(tmp_path / "out")) if isinstance(task, SaveTensor)]
    statistics = {merge.statistics for merge in merges}
    assert len(statistics) == 2 + 3
    assert all(task.main_thread_only() for task in statistics)

    def run(part):
        return {task.output_weight.name: value for task, value in Executor(part).run(quiet=True)}

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(run, [merges[index::4] for index in range(4)]))
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert_same(merged, expected_of(models, "one", "two", granularity="layer"))
    (record,) = {merge.record for merge in merges}
    assert set(record.tensors) == set(merged)


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
@pytest.mark.parametrize("granularity", ["matrix", "row", "element", "layer"])
def test_nan_is_refused_by_tensor_and_model(models, tmp_path, method, granularity):
    from safetensors.torch import save_file

    if method == "fusechat_sce" and granularity != "matrix":
        granularity = None
    tensors = tiny.tensors_of(models["one"])
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    folder = tmp_path / "broken"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((models["one"] / "config.json").read_text())
    config = config_of(models | {"one": folder}, "one", "two", method=method, dtype="float32")
    if granularity is not None and method == "varm":
        config["parameters"] = {"granularity": granularity}
    with pytest.raises(MergeError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of model '.*broken'.*1 of"):
        merge(tmp_path, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "tensor"}, "'granularity': expected one of matrix, row, .*; got 'tensor'"),
        ({"temperature": 0}, "'temperature': expected a number above 0; got 0"),
        ({"measure": "squre"}, "'measure': expected one of square, abs; got 'squre'"),
        ({"granularty": "row"}, "varm has no parameter 'granularty'; did you mean 'granularity'?"),
        ({"compat": "none"}, "'compat': expected 'fusechat' or no such parameter; got 'none'. Remove 'compat'"),
        ({"planned": 1}, "varm has no parameter 'planned'"),
    ],
)
def test_wrong_parameters_are_named(models, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        merge(tmp_path, config_of(models, "one", "two", parameters=settings))
    assert not (tmp_path / "out").exists()


def test_a_shared_parameter_under_a_model_is_refused(models, tmp_path):
    config = config_of(models, "one", "two")
    config["models"][0]["parameters"] = {"measure": "abs", "weight": -1}
    with pytest.raises(ConfigError, match=r"models\[0\]\.parameters: 'measure' is one setting for all models"):
        merge(tmp_path, config)
    config["models"][0]["parameters"] = {"weight": -1}
    with pytest.raises(ConfigError, match="'weight': expected a number of at least 0; got -1"):
        merge(tmp_path, config)


def test_an_unknown_top_level_key_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'out_dtpe'; did you mean 'out_dtype'"):
        merge(tmp_path, config_of(models, "one", "two", out_dtpe="bfloat16"))


def test_a_base_is_required(models, tmp_path):
    config = config_of(models, "one", "two")
    del config["base_model"]
    with pytest.raises(ValueError, match="requires a base input"):
        merge(tmp_path, config)


def test_large_units_are_refused_where_no_checkpoint_is_planned(models):
    from mergekit.merge_methods import merge_tensors

    tensors = [torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 2.0)]
    merged = merge_tensors(tensors, "varm", base_index=0, parameters={"granularity": "row"})
    assert merged.unique().tolist() == pytest.approx([1.8])
    with pytest.raises(MergeError, match="expected a planned merge of whole checkpoints .* granularity 'layer'"):
        merge_tensors(tensors, "varm", base_index=0, parameters={"granularity": "layer"})


def test_mergekit_pytorch_merges_units_and_writes_a_record(models, tmp_path):
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import main

    files = {name: str(models[name] / "model.safetensors") for name in ("base", "one", "same")}
    config = {
        "merge_method": "varm",
        "base_model": files["base"],
        "models": [{"model": files["one"]}, {"model": files["same"]}],
        "parameters": {"granularity": "layer"},
        "dtype": "float32",
    }
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(main, [str(path), str(tmp_path / "out")])
    assert result.exception is None, result.exception
    assert_same(tiny.tensors_of(tmp_path / "out"), expected_of(models, "one", "same", granularity="layer"))
    record = json.loads((tmp_path / "out" / "fusion_merge.json").read_text())
    assert record["models"] == [files["one"], files["same"]]


def test_a_tensor_that_a_model_lacks_is_named(models, tmp_path):
    from safetensors.torch import save_file

    tensors = tiny.tensors_of(models["one"])
    tied = tensors.pop("lm_head.weight")
    folder = tmp_path / "headless"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((models["one"] / "config.json").read_text())
    assert tied.shape == tensors["model.embed_tokens.weight"].shape
    config = config_of(models | {"one": folder}, "one", "two", dtype="float32", parameters={"granularity": "model"})
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"headless has no tensor model\.norm\.weight, which the merge needs"):
        run_merge(tmp_path, config)
