import pytest
import torch

from fusion_plugins.core.merging import deltas
from fusion_plugins.core.merging.sce import VARIANTS, sce, sce_merge
from fusion_plugins.errors import ConfigError


def brute_sce(base, tuned, select_topk, variant):
    """Algorithm 1 over plain Python numbers, with the differences of each variant spelled out."""
    base, deltas = base.double().flatten().tolist(), [(t.double() - base.double()).flatten().tolist() for t in tuned]
    models, elements = range(len(deltas)), range(len(base))
    mean = [sum(deltas[j][i] for j in models) / len(deltas) for i in elements]
    variance = [sum((deltas[j][i] - mean[i]) ** 2 for j in models) / len(deltas) for i in elements]
    variance = torch.tensor(variance, dtype=torch.float64).float().tolist()
    selected = set(elements)
    if select_topk < 1:
        candidates = [i for i in elements if variance[i] > 0]
        count = int(select_topk * (len(base) if variant == "paper" else len(candidates)) + 1e-9)
        selected = set(sorted(candidates, key=lambda i: (-variance[i], i))[:count])
    kept = [[deltas[j][i] if i in selected else 0.0 for i in elements] for j in models]
    squares = [sum(value**2 for value in model) for model in kept]
    total = sum(squares)
    eta = [s / total if total else (1 / len(deltas) if variant == "fusechat" else 0.0) for s in squares]
    used = deltas if variant == "fusechat" else kept
    merged = []
    for i in elements:
        positive = sum(used[j][i] for j in models) >= 0
        alive = [j for j in models if (used[j][i] > 0 if positive else used[j][i] < 0)]
        change = sum(eta[j] * used[j][i] for j in alive)
        weight = sum(eta[j] for j in alive)
        if variant != "paper" and weight:
            change /= weight
        merged.append(base[i] + change)
    return torch.tensor(merged, dtype=torch.float64), torch.tensor(eta, dtype=torch.float64), len(selected)


def random_tensors(count, shape=(8, 9), scale=1e-2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    moves = [scale * (j + 1) * torch.randn(shape, generator=generator, dtype=torch.float64) for j in range(count)]
    for move in moves:
        move[0] = 0  # unchanged by every model
    return base, [base + move for move in moves]


@pytest.mark.parametrize("select_topk", [0.0, 0.1, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sce_equals_brute_force(variant, select_topk, count):
    base, tuned = random_tensors(count)
    expected, eta, selected = brute_sce(base, tuned, select_topk, variant)
    result = sce(base, tuned, select_topk=select_topk, variant=variant)
    torch.testing.assert_close(result.merged.flatten(), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(result.weights, eta, rtol=1e-12, atol=1e-15)
    assert result.selected == selected


@pytest.mark.parametrize("count", [2, 3, 5, 6])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_elements_of_equal_variance_in_bfloat16_are_selected_in_the_order_of_their_index(count, share):
    """Around 1, bfloat16 has steps of 1/128: differences of a few steps have many variances that are exactly equal."""
    generator = torch.Generator().manual_seed(count)
    steps = torch.randint(-4, 5, (count, 500), generator=generator)
    base = torch.full((500,), 1.5, dtype=torch.bfloat16)
    tuned = [(base.float() + row / 128).bfloat16() for row in steps]
    exact = [count * sum(step**2 for step in column) - sum(column) ** 2 for column in steps.T.tolist()]
    expected = sorted(range(500), key=lambda i: (-exact[i], i))[: round(share * 500)]
    result = sce(base, tuned, select_topk=share)
    assert result.values.tolist() == (steps[:, expected].double() / 128).square().sum(dim=1).div(500).tolist()
    assert result.selected == len(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_do_not_depend_on_the_scale_of_the_change(variant):
    generator = torch.Generator().manual_seed(1)
    moves = [(j + 1) * torch.randn(64, generator=generator) for j in range(3)]
    expected = sce(torch.zeros(64), moves, select_topk=0.5, variant=variant)
    for scale in (1e-1, 1e-4, 1e-7):
        result = sce(torch.zeros(64), [scale * move for move in moves], select_topk=0.5, variant=variant)
        torch.testing.assert_close(result.weights, expected.weights, rtol=1e-5, atol=0)
        torch.testing.assert_close(result.merged / scale, expected.merged, rtol=1e-5, atol=1e-6)


def test_light_changes_are_not_made_uniform():
    """Changes of 1e-4 and 3e-4 have mean squares far below 1e-6, and their weights are as 1 to 9."""
    base = torch.zeros(8)
    result = sce(base, [torch.full((8,), 1e-4), torch.full((8,), 3e-4)])
    assert result.weights.tolist() == pytest.approx([0.1, 0.9], rel=1e-6)


def test_elements_of_equal_variance_are_selected_in_the_order_of_their_index():
    base = torch.zeros(10)
    tuned = [torch.ones(10), -torch.ones(10) * 3]
    merged = sce_merge(base, tuned, select_topk=0.3)
    assert merged.nonzero().flatten().tolist() == [0, 1, 2]


def test_an_element_on_which_all_models_agree_is_not_selected():
    base = torch.zeros(4)
    tuned = [torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])]
    assert sce(base, tuned, select_topk=0.9).selected == 1
    assert sce_merge(base, tuned, select_topk=0.9).nonzero().flatten().tolist() == [3]


def test_the_share_means_what_is_written():
    base, tuned = torch.zeros(100), [torch.arange(100.0), -torch.arange(100.0) - 1]
    assert sce(base, tuned, select_topk=0.29).selected == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unchanged_models_keep_the_base_bit_for_bit(variant, dtype):
    base = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for share in (0.1, 1.0):
        merged = sce_merge(base, [base.clone(), base.clone()], select_topk=share, variant=variant)
        assert merged.dtype == dtype
        assert torch.equal(merged, base)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_of_several_chunks_give_what_one_chunk_gives(variant, monkeypatch):
    base, tuned = random_tensors(3)
    whole = sce(base, tuned, select_topk=0.3, variant=variant)
    monkeypatch.setattr(deltas, "CHUNK_ELEMENTS", 7)
    parts = sce(base, tuned, select_topk=0.3, variant=variant)
    torch.testing.assert_close(parts.merged, whole.merged, rtol=1e-13, atol=1e-15)
    assert parts.selected == whole.selected


def test_nan_shows_in_the_weights():
    tuned = [torch.ones(4), torch.tensor([1.0, float("nan"), 1.0, 1.0])]
    for share in (0.5, 1.0):
        assert not bool(torch.isfinite(sce(torch.zeros(4), tuned, select_topk=share).weights).all())


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="variant: expected one of paper, fusechat, mergekit; got 'own'"):
        sce_merge(torch.zeros(1), [torch.ones(1)], variant="own")
    with pytest.raises(ConfigError, match="select_topk: expected a share between 0 and 1; got 10"):
        sce_merge(torch.zeros(1), [torch.ones(1)], select_topk=10)
