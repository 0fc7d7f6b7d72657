"""`fusechat_sce` inside stock mergekit, and how it compares with mergekit's own `sce`."""

import json

import merging
import pytest
import tiny
import torch
from merging import config_of, merge, run_merge

from fusion_plugins.core.merging.sce import VARIANTS, sce
from fusion_plugins.errors import ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return merging.make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("select_topk", [0.1, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_command_gives_what_the_core_gives(models, tmp_path, variant, select_topk):
    chosen = {"select_topk": select_topk, "variant": variant}
    config = config_of(models, "one", "two", method="fusechat_sce", dtype="float32", parameters=chosen)
    merged = merge(tmp_path, config)
    record = json.loads((tmp_path / "out" / "fusion_merge.json").read_text())
    recorded = {entry["name"]: entry for entry in record["tensors"]}
    base, tuned = tiny.tensors_of(models["base"]), [tiny.tensors_of(models[name]) for name in ("one", "two")]
    for name, tensor in base.items():
        expected = sce(tensor.float(), [model[name].float() for model in tuned], **chosen)
        assert torch.equal(merged[name], expected.merged)
        assert list(recorded[name]["weights"].values()) == expected.weights.tolist()
        assert recorded[name]["selected"] == expected.selected


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """Three models that changed so much that mergekit's absolute threshold of 1e-6 has no effect."""
    folder = tmp_path_factory.mktemp("strong")
    base = tiny.llama_checkpoint(folder / "base")
    tuned = {
        name: tiny.llama_checkpoint(folder / name, seed=seed, moved=1.0, base=base)
        for seed, name in enumerate(("one", "two", "three"), start=1)
    }
    return {"base": base} | tuned


@pytest.mark.parametrize("select_topk", [0.1, 0.5, 1.0])
def test_variant_mergekit_is_what_mergekit_does_where_its_threshold_has_no_effect(strong, tmp_path, select_topk):
    chosen = {"dtype": "float32", "parameters": {"select_topk": select_topk}}
    theirs = merge(tmp_path, config_of(strong, "one", "two", "three", method="sce", **chosen), name="theirs")
    chosen["parameters"]["variant"] = "mergekit"
    ours = merge(tmp_path, config_of(strong, "one", "two", "three", method="fusechat_sce", **chosen), name="ours")
    for name, tensor in theirs.items():
        # Theirs works in float32 throughout, and divides by at least 1e-6.
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-5)


def test_light_fine_tunes_are_weighted_where_mergekit_takes_a_plain_mean(tmp_path):
    base = tiny.llama_checkpoint(tmp_path / "base")
    light = {"base": base}
    for seed, (name, moved) in enumerate((("one", 1e-5), ("two", 1e-4)), start=1):
        light[name] = tiny.llama_checkpoint(tmp_path / name, seed=seed, moved=moved, base=base)
    tensors = {name: tiny.tensors_of(folder)["lm_head.weight"].double() for name, folder in light.items()}
    deltas = [tensors[name] - tensors["base"] for name in ("one", "two")]
    agree = (deltas[0] * deltas[1]) > 0
    squares = torch.stack([delta.square().mean() for delta in deltas])
    for method, shares in (("sce", [0.5, 0.5]), ("fusechat_sce", (squares / squares.sum()).tolist())):
        config = config_of(light, "one", "two", method=method, dtype="float32")
        merged = merge(tmp_path, config, name=method)["lm_head.weight"].double() - tensors["base"]
        expected = shares[0] * deltas[0] + shares[1] * deltas[1]
        torch.testing.assert_close(merged[agree], expected[agree], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_topk": 10}, "'select_topk': expected a number of at least 0 and at most 1; got 10"),
        ({"variant": "own"}, "'variant': expected one of paper, fusechat, mergekit; got 'own'"),
        ({"int8_mask": True}, "fusechat_sce has no parameter 'int8_mask'"),
    ],
)
def test_wrong_parameters_are_named(models, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        run_merge(tmp_path, config_of(models, "one", "two", method="fusechat_sce", parameters=settings))
