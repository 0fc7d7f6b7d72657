import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.merging import deltas, varm
from fusion_plugins.core.merging.varm import VarmRule, unit_of, unit_weights, varm_merge, varm_weights
from fusion_plugins.errors import ConfigError, MergeError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "varm.json").read_text())
SHAPES = {
    "model.embed_tokens.weight": (7, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.input_layernorm.weight": (4,),
    "model.norm.weight": (4,),
    "lm_head.weight": (7, 4),
}
UNITS = {
    "matrix": [[name] for name in SHAPES],
    "module": [
        ["model.embed_tokens.weight"],
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"],
        ["model.layers.0.mlp.up_proj.weight"],
        ["model.layers.1.self_attn.q_proj.weight"],
        ["model.layers.1.mlp.up_proj.weight"],
        ["model.layers.1.input_layernorm.weight"],
        ["model.norm.weight"],
        ["lm_head.weight"],
    ],
    "layer": [
        ["model.embed_tokens.weight"],
        [name for name in SHAPES if ".0." in name],
        [name for name in SHAPES if ".1." in name],
        ["model.norm.weight"],
        ["lm_head.weight"],
    ],
    "model": [list(SHAPES)],
}


def random_models(count, *, scale=1e-2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    tuned = [
        {
            name: value
            + scale
            * (1 + index)
            * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            * torch.rand((), generator=generator, dtype=torch.float64)
            for name, value in base.items()
        }
        for index in range(count)
    ]
    return ({name: value.to(dtype) for name, value in base.items()}), [
        {name: value.to(dtype) for name, value in model.items()} for model in tuned
    ]


def brute_shares(values, normalize, temperature):
    """values: list over models of floats -> weights."""
    values = torch.tensor(values, dtype=torch.float64)
    if normalize == "softmax":
        values = (values / temperature - (values / temperature).max()).exp()
    total = values.sum()
    return values / total if total > 0 else torch.zeros_like(values)


def brute_weights(base, tuned, granularity, measure, normalize, temperature):
    """Element by element, unit by unit, straight from the definition."""

    def measured(model, name):
        delta = model[name].double() - base[name].double()
        return delta**2 if measure == "square" else delta.abs()

    if granularity in UNITS:
        weights = {}
        for names in UNITS[granularity]:
            values = [torch.cat([measured(model, name).flatten() for name in names]).mean().item() for model in tuned]
            weights.update(dict.fromkeys(names, brute_shares(values, normalize, temperature)))
        return weights
    weights = {}
    for name, anchor in base.items():
        measures = [measured(model, name) for model in tuned]
        if granularity == "element":
            result = torch.zeros(len(tuned), *anchor.shape, dtype=torch.float64)
            for index in torch.cartesian_prod(*[torch.arange(size) for size in anchor.shape]).reshape(-1, anchor.ndim):
                where = tuple(index.tolist())
                result[(slice(None), *where)] = brute_shares(
                    [float(m[where]) for m in measures], normalize, temperature
                )
        else:
            rows = [m if anchor.ndim > 1 else m[None] for m in measures]
            columns = [
                brute_shares([row[index].mean().item() for row in rows], normalize, temperature)
                for index in range(rows[0].shape[0])
            ]
            result = torch.stack(columns, dim=1)
        weights[name] = result
    return weights


def brute_merge(base, tuned, weights):
    merged = {}
    for name, anchor in base.items():
        weight = weights[name]
        total = anchor.double().clone()
        for index, model in enumerate(tuned):
            share = weight[index]
            if weight.ndim == 2 and weight.shape[1:] != anchor.shape and anchor.ndim > 1:
                share = share.reshape(-1, *[1] * (anchor.ndim - 1))
            total += share * (model[name].double() - anchor.double())
        merged[name] = total
    return merged


@pytest.mark.parametrize("normalize", varm.NORMALIZATIONS)
@pytest.mark.parametrize("measure", deltas.MEASURES)
@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_weights_and_merge_equal_brute_force(granularity, measure, normalize):
    base, tuned = random_models(3)
    tuned[0]["model.norm.weight"] = base["model.norm.weight"].clone()
    for model in tuned:
        model["model.layers.1.mlp.up_proj.weight"] = base["model.layers.1.mlp.up_proj.weight"].clone()
        model["model.layers.0.mlp.up_proj.weight"][:2] = base["model.layers.0.mlp.up_proj.weight"][:2]
    chosen = {"granularity": granularity, "measure": measure, "normalize": normalize, "temperature": 1e-4}
    expected = brute_weights(base, tuned, **chosen)
    weights = varm_weights(base, tuned, **chosen)
    merged = varm_merge(base, tuned, **chosen)
    for name, value in brute_merge(base, tuned, expected).items():
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(merged[name], value, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("case", GOLDEN["merges"], ids=lambda c: f"{c['granularity']}-{c['measure']}-{c['softmax']}")
def test_compat_reproduces_the_released_code(case):
    base = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["base"].items()}
    tuned = [
        {name: torch.tensor(value, dtype=torch.float64) for name, value in model.items()} for model in GOLDEN["tuned"]
    ]
    chosen = {"granularity": case["granularity"], "measure": case["measure"], "compat": "fusechat"}
    if case["softmax"]:
        chosen |= {"normalize": "softmax", "temperature": case["temperature"]}
    weights, merged = varm_weights(base, tuned, **chosen), varm_merge(base, tuned, **chosen)
    assert list(case["weights"]) == list(weights)
    for name in weights:
        expected = torch.tensor(case["weights"][name], dtype=torch.float64)
        torch.testing.assert_close(weights[name], expected, rtol=1e-12, atol=1e-15)
        expected = torch.tensor(case["merged"][name], dtype=torch.float64)
        torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-15)


def test_the_default_departs_from_the_released_code_only_where_something_is_unchanged_or_tensors_differ_in_size():
    base = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["base"].items()}
    tuned = [
        {name: torch.tensor(value, dtype=torch.float64) for name, value in model.items()} for model in GOLDEN["tuned"]
    ]
    case = next(c for c in GOLDEN["merges"] if c["granularity"] == "matrix" and c["measure"] == "square")
    weights = varm_weights(base, tuned)
    different = [
        name
        for name, value in weights.items()
        if not torch.allclose(value, torch.tensor(case["weights"][name], dtype=torch.float64), rtol=1e-12, atol=0)
    ]
    special = GOLDEN["special_cases"]
    assert different == [special["matrix_unchanged_in_model_1"], special["module_unchanged_in_model_2"]]
    assert all(value.sum() == pytest.approx(1) for value in weights.values())


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("measure", deltas.MEASURES)
@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_weights_do_not_depend_on_the_scale_of_the_change(granularity, measure, scale):
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(3)
    moves = [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(2)]
    small = [{name: scale * value for name, value in model.items()} for model in moves]
    expected = varm_weights(base, moves, granularity=granularity, measure=measure)
    weights = varm_weights(base, small, granularity=granularity, measure=measure)
    for name in SHAPES:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-7)


def test_changes_whose_squares_float32_cannot_hold_are_weighted_too():
    base = {"w": torch.zeros(100)}
    tuned = [{"w": torch.full((100,), 1e-25)}, {"w": torch.full((100,), 3e-25)}]
    assert varm_weights(base, tuned)["w"].tolist() == pytest.approx([0.1, 0.9], rel=1e-6)


def test_the_worked_example_of_mean_squares():
    """Mean squares 3e-9 and 9e-9 give weights 1/4 and 3/4; softmax at temperature 1 cannot tell them apart."""
    values = torch.tensor([[3e-9], [9e-9]], dtype=torch.float64)
    assert unit_weights(values, VarmRule()).flatten().tolist() == pytest.approx([0.25, 0.75])
    assert unit_weights(values, VarmRule(normalize="softmax")).flatten().tolist() == pytest.approx([0.5, 0.5], abs=1e-8)


@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_an_unchanged_model_gets_no_weight_and_the_other_is_returned(granularity):
    base, (tuned,) = random_models(1, dtype=torch.float32)
    merged = varm_merge(base, [dict(base), tuned], granularity=granularity)
    weights = varm_weights(base, [dict(base), tuned], granularity=granularity)
    for name in base:
        assert float(weights[name][0].abs().max()) == 0
        # Rows and elements are added to the base in float32: one rounding.
        exact = granularity not in ("row", "element")
        torch.testing.assert_close(merged[name], tuned[name], rtol=0 if exact else 3e-7, atol=0 if exact else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_all_unchanged_keeps_the_base_bit_for_bit(granularity, dtype):
    base, _ = random_models(1, dtype=dtype)
    merged = varm_merge(base, [dict(base)] * 3, granularity=granularity)
    for name in base:
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], base[name])


@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_identical_models_give_that_model(granularity):
    base, (tuned,) = random_models(1, dtype=torch.bfloat16)
    merged = varm_merge(base, [tuned, dict(tuned), dict(tuned)], granularity=granularity)
    for name in base:
        assert torch.equal(merged[name], tuned[name])


def test_changes_below_the_resolution_of_bfloat16_arithmetic_are_kept():
    base = {"w": torch.full((64,), 1.0, dtype=torch.bfloat16)}
    step = 2.0**-7  # one unit in the last place of bfloat16 at 1
    tuned = [{"w": torch.full((64,), 1 + step, dtype=torch.bfloat16)}, {"w": torch.full((64,), 1.0).bfloat16()}]
    assert varm_weights(base, tuned)["w"].tolist() == [1.0, 0.0]
    assert varm_merge(base, tuned)["w"].float().unique().tolist() == [1 + step]


def test_tensors_of_several_chunks_give_what_one_chunk_gives(monkeypatch):
    base, tuned = random_models(2)
    for granularity in varm.GRANULARITIES:
        whole = varm_merge(base, tuned, granularity=granularity)
        monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", 5)
        parts = varm_merge(base, tuned, granularity=granularity)
        monkeypatch.undo()
        for name in base:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-13, atol=1e-15)


def test_a_transposed_and_an_empty_tensor_are_merged():
    base = {"a": torch.zeros(3, 2).T, "b": torch.zeros(0, 4)}
    tuned = [{"a": torch.ones(3, 2).T, "b": torch.zeros(0, 4)}]
    for granularity in varm.GRANULARITIES:
        merged = varm_merge(base, tuned, granularity=granularity)
        assert torch.equal(merged["a"], torch.ones(2, 3))
        assert merged["b"].shape == (0, 4)


def test_priors_multiply_the_values():
    base, tuned = {"w": torch.zeros(4)}, [{"w": torch.full((4,), 1.0)}, {"w": torch.full((4,), 1.0)}]
    assert varm_weights(base, tuned, prior=[3, 1])["w"].tolist() == [0.75, 0.25]
    assert varm_weights(base, tuned, prior=[0, 0])["w"].tolist() == [0, 0]
    softmax = varm_weights(base, tuned, prior=[3, 1], normalize="softmax")["w"]
    assert softmax.tolist() == pytest.approx([0.75, 0.25])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-8, 8, width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    st.sampled_from(varm.GRANULARITIES),
    st.sampled_from(deltas.MEASURES),
)
def test_weights_are_shares_and_the_merge_lies_between_the_models(moves, granularity, measure):
    base = {"layers.0.w": torch.zeros(2, 3)}
    tuned = [{"layers.0.w": torch.tensor(move).reshape(2, 3)} for move in moves]
    weights = varm_weights(base, tuned, granularity=granularity, measure=measure)["layers.0.w"]
    assert bool((weights >= 0).all())
    total = weights.sum(dim=0)
    assert bool((((total - 1).abs() < 1e-6) | (total == 0)).all())
    merged = varm_merge(base, tuned, granularity=granularity, measure=measure)["layers.0.w"]
    stacked = torch.stack([model["layers.0.w"] for model in tuned] + [base["layers.0.w"]])
    assert bool((merged <= stacked.amax(dim=0) + 1e-5).all())
    assert bool((merged >= stacked.amin(dim=0) - 1e-5).all())


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("model.layers.11.mlp.experts.3.w1.weight", "model.layers.11.mlp", "model.layers.11"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn", "transformer.h.0"),
        ("model.embed_tokens.weight", "model.embed_tokens", "model.embed_tokens"),
        ("model.norm.weight", "model.norm", "model.norm"),
        ("scale", "scale", "scale"),
        ("0.weight", "0.weight", "0"),
    ],
)
def test_units_follow_the_names_of_parameters(name, module, layer):
    assert unit_of(name, "module") == module
    assert unit_of(name, "layer") == layer
    assert unit_of(name, "matrix") == name
    assert unit_of(name, "model") == "model"
    with pytest.raises(ConfigError, match="granularity: expected one of matrix, row, .*; got 'head'"):
        unit_of(name, "head")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("granularity", varm.GRANULARITIES)
def test_nan_and_infinity_are_refused_by_tensor_name(granularity, bad):
    base, tuned = random_models(2)
    tuned[1]["model.layers.0.mlp.up_proj.weight"][2, 1] = bad
    for function in (varm_weights, varm_merge):
        with pytest.raises(MergeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*tuned\[1\]"):
            function(base, tuned, granularity=granularity)


def test_wrong_settings_are_named_together():
    with pytest.raises(
        ConfigError, match="granularity: expected one of matrix.*temperature: expected a number above 0"
    ):
        VarmRule(granularity="tensor", temperature=0)
    with pytest.raises(TypeError, match="granularty"):
        varm_weights({}, [{}], granularty="row")
    with pytest.raises(ConfigError, match="expected 1 values, one per tuned model; got 2"):
        varm_weights({"w": torch.zeros(1)}, [{"w": torch.ones(1)}], prior=[1, 2])
    with pytest.raises(ConfigError, match="prior: expected finite numbers"):
        VarmRule(prior=[1, -1])
    with pytest.raises(ConfigError, match="compat: expected one of None, fusechat; got 'none'"):
        varm_merge({"w": torch.zeros(1)}, [{"w": torch.ones(1)}], compat="none")


def test_models_of_other_names_or_shapes_are_refused():
    base = {"w": torch.zeros(2)}
    with pytest.raises(MergeError, match=r"tuned\[0\]: expected the parameters of the base, got 1 .*: \['v'\]"):
        varm_weights(base, [{"w": torch.zeros(2), "v": torch.zeros(1)}])
    with pytest.raises(MergeError, match=r"'w' of tuned\[0\]: expected the base's shape \(2,\), got \(3,\)"):
        varm_merge(base, [{"w": torch.zeros(3)}], granularity="element")
    with pytest.raises(MergeError, match="expected one tuned model or more"):
        varm_merge(base, [])
