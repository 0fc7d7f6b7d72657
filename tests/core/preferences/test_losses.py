"""The preference losses against their formulas in plain Python, and their gradients."""

import math
import random

import numpy as np
import pytest
import torch

from fusion_plugins.core.preferences.losses import PAIR_LOSSES, dpo, fused_reference, wrpo, wrpo_alpha


def log_sigmoid(value):
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def ratios(count, n=5, seed=0):
    drawn = torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return [row.requires_grad_() for row in drawn]


@pytest.mark.parametrize("beta", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_wrpo_is_its_formula(alpha, beta, smoothing):
    source, own, rejected = ratios(3)
    losses = wrpo(source, own, rejected, beta=beta, alpha=alpha, label_smoothing=smoothing)
    for found, s, o, r in zip(losses.tolist(), source.tolist(), own.tolist(), rejected.tolist(), strict=True):
        margin = beta * (alpha * s + (1 - alpha) * o - r)
        assert found == pytest.approx(
            -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin), abs=1e-9
        )


def test_wrpo_without_a_source_is_dpo_on_the_own_pair_and_with_it_alone_dpo_on_the_sources():
    source, own, rejected = ratios(3)
    assert torch.equal(wrpo(source, own, rejected, beta=0.3, alpha=0.0), dpo(0.3 * (own - rejected)))
    assert torch.equal(wrpo(source, own, rejected, beta=0.3, alpha=1.0), dpo(0.3 * (source - rejected)))


def test_the_gradients_of_the_losses_are_those_of_their_values():
    lengths = (torch.tensor([3.0, 5, 2, 9, 1]).double(), torch.tensor([4.0, 1, 2, 7, 6]).double())
    assert torch.autograd.gradcheck(lambda s, o, r: wrpo(s, o, r, beta=0.7, alpha=0.3, label_smoothing=0.1), ratios(3))
    for loss in PAIR_LOSSES.values():
        assert torch.autograd.gradcheck(lambda c, r, loss=loss: loss(c, r, lengths, 0.7), ratios(2, seed=1))


def test_the_gradient_of_wrpo_shares_one_pull_between_the_two_better_answers():
    source, own, rejected = ratios(3)
    wrpo(source, own, rejected, beta=0.5, alpha=0.2).sum().backward()
    pull = -torch.sigmoid(-0.5 * (0.2 * source + 0.8 * own - rejected)).detach() * 0.5
    assert torch.allclose(source.grad, 0.2 * pull, atol=1e-9)
    assert torch.allclose(own.grad, 0.8 * pull, atol=1e-9)
    assert torch.allclose(rejected.grad, -pull, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_the_losses_of_pairs_are_their_formulas(name):
    beta, (chosen, rejected) = 0.4, ratios(2)
    lengths = (torch.tensor([3.0, 5, 2, 9, 1]).double(), torch.tensor([4.0, 1, 2, 7, 6]).double())
    found = PAIR_LOSSES[name](chosen, rejected, lengths, beta).tolist()
    for loss, c, r, long, short in zip(
        found, chosen.tolist(), rejected.tolist(), *map(torch.Tensor.tolist, lengths), strict=True
    ):
        expected = {
            "sigmoid": -log_sigmoid(beta * (c - r)),
            "sigmoid_norm": -log_sigmoid(beta * (c / long - r / short)),
            "ipo": (c / long - r / short - 1 / (2 * beta)) ** 2,
            "hinge": max(0.0, 1 - beta * (c - r)),
        }[name]
        assert loss == pytest.approx(expected, abs=1e-9)


def test_margins_far_beyond_float_range_give_finite_losses():
    huge = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    assert wrpo(huge, huge, torch.zeros(2).double(), beta=1.0, alpha=0.5).tolist() == [1e4, 0.0]


def test_alpha_rises_from_zero_by_the_steps():
    assert [wrpo_alpha(0.1, step, 10) for step in (0, 1, 5, 10, 12)] == pytest.approx([0, 0.01, 0.05, 0.1, 0.1])
    assert wrpo_alpha(0.1, 3, 0) == 0.1


def slow_reference(sources, target, rule, clip):
    """Pair by pair, in plain Python."""
    fused = []
    for place in range(len(sources[0])):
        values = [list(map(float, source[place])) for source in sources]
        if clip:
            own = target[place]
            values = [[max(chosen, own[0]), min(rejected, own[1])] for chosen, rejected in values]
        if rule == "mean" or len(values) == 1:
            fused.append([math.fsum(value[side] for value in values) / len(values) for side in (0, 1)])
            continue
        distances = [abs(value[0] - target[place][0]) + abs(value[1] - target[place][1]) for value in values]
        fused.append(values[distances.index(max(distances))])
    return fused


@pytest.mark.parametrize("rule", ["mean", "max_margin"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_fused_reference_is_its_definition(rule, clip, count):
    draw = random.Random(count)
    sources = np.array([[[-draw.random() * 3 for _ in "cr"] for _ in range(20)] for _ in range(count)])
    target = np.array([[-draw.random() * 3 for _ in "cr"] for _ in range(20)])
    found = fused_reference(sources, target, rule=rule, clip=clip)
    assert found == pytest.approx(np.array(slow_reference(sources.tolist(), target.tolist(), rule, clip)), abs=1e-12)


@pytest.mark.parametrize("rule", ["mean", "max_margin"])
@pytest.mark.parametrize("clip", [True, False])
def test_the_target_alone_is_its_own_reference(rule, clip):
    target = -np.random.default_rng(0).random((9, 2))
    assert np.array_equal(fused_reference(target[None], target, rule=rule, clip=clip), target)


def test_a_clipped_source_never_agrees_less_with_the_preference_than_the_target():
    rng = np.random.default_rng(1)
    sources, target = -rng.random((4, 50, 2)), -rng.random((50, 2))
    for rule in ("mean", "max_margin"):
        fused = fused_reference(sources, target, rule=rule)
        assert (fused[:, 0] >= target[:, 0]).all()
        assert (fused[:, 1] <= target[:, 1]).all()


def test_infifpo_is_dpo_per_token_with_the_fused_reference():
    """One pair by hand: pi has -2.0 and -4.0 per token, the source -1.0 and -3.0, the target -1.5 and -2.0.

    Clipping leaves the source as it is. log ref = fused * |y|, so the margin is 2 * ((-2 + 1) - (-4 + 3)) = 0.
    """
    fused = fused_reference(np.array([[[-1.0, -3.0]]]), np.array([[-1.5, -2.0]]))
    lengths = (torch.tensor([5.0]).double(), torch.tensor([2.0]).double())
    sums = torch.tensor([[-2.0 * 5, -4.0 * 2]]).double() - torch.from_numpy(fused) * torch.tensor([5.0, 2.0])
    loss = PAIR_LOSSES["sigmoid_norm"](sums[:, 0], sums[:, 1], lengths, 2.0)
    assert loss.tolist() == pytest.approx([math.log(2)], abs=1e-12)
