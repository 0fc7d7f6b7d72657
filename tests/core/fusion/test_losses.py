import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_plugins.core.fusion.divergences import LOSSES
from fusion_plugins.core.fusion.losses import chunked_fusion_loss, fusion_loss, token_losses
from fusion_plugins.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "fusion_loss.json").read_text(encoding="utf-8"))["cases"]
KINDS = sorted(LOSSES)


def dense_loss(logits, target, loss_mask, kind):
    """The plain dense form: target (B, T, V) probabilities that sum to 1. Mean over the mask."""
    q = torch.softmax(logits, -1)
    middle = (target + q) / 2

    def divergence(p, r):
        return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - r.log()), 0.0).sum(-1)

    per_row = {
        "ce": -(target * q.log()).sum(-1),
        "kl": divergence(target, q),
        "reverse_kl": divergence(q, target),
        "jsd": (divergence(target, middle) + divergence(q, middle)) / 2,
    }[kind]
    return per_row[loss_mask].mean()


def batch(b=2, t=5, v=11, k=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, t, v, generator=generator, dtype=dtype)
    ids = torch.rand(b, t, v, generator=generator).topk(k, -1).indices
    logprobs = torch.randn(b, t, k, generator=generator, dtype=dtype).log_softmax(-1)
    mask = torch.ones(b, t, k, dtype=torch.bool)
    loss_mask = torch.rand(b, t, generator=generator) > 0.3
    return logits, ids, logprobs, mask, loss_mask


def scattered(ids, logprobs, mask, v):
    probabilities = torch.zeros(*ids.shape[:2], v, dtype=logprobs.dtype)
    return probabilities.scatter_add(-1, ids.clamp_min(0), logprobs.exp() * mask)


@pytest.mark.parametrize("kind", ["ce", "kl", "jsd"])
def test_sparse_rows_with_all_their_mass_give_the_dense_value_and_gradient(kind):
    logits, ids, logprobs, mask, loss_mask = batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = fusion_loss(ours, ids, logprobs, mask, loss_mask, kind=kind)
    expected = dense_loss(theirs, scattered(ids, logprobs, mask, logits.shape[-1]), loss_mask, kind)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(value, ours)[0], torch.autograd.grad(expected, theirs)[0], rtol=1e-5, atol=1e-6
    )


def test_reverse_kl_over_the_whole_vocabulary_is_the_dense_value():
    logits, ids, logprobs, mask, loss_mask = batch(v=6, k=6)
    value = fusion_loss(logits, ids, logprobs, mask, loss_mask, kind="reverse_kl")
    expected = dense_loss(logits, scattered(ids, logprobs, mask, 6), loss_mask, "reverse_kl")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_reverse_kl_does_not_reward_mass_outside_the_entries():
    ids, logprobs = torch.tensor([[[0, 1]]]), torch.full((1, 1, 2), 0.5).log()
    mask, row = torch.ones_like(ids, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    inside = fusion_loss(torch.tensor([[[5.0, 5.0, 0.0]]]), ids, logprobs, mask, row, kind="reverse_kl")
    outside = fusion_loss(torch.tensor([[[0.0, 0.0, 5.0]]]), ids, logprobs, mask, row, kind="reverse_kl")
    assert inside < 0.2 < 5 < outside


def test_one_row_by_hand():
    """p = (3/4, 1/4) on ids 2 and 0; z = (0, 0, ln 2), so q = (1/4, 1/4, 1/2).

    ce = 3/4 ln 2 + 1/4 ln 4 = 5/4 ln 2; entropy of p = 2 ln 2 - 3/4 ln 3; kl = ce - entropy = 3/4 (ln 3 - ln 2).
    """
    logits = torch.tensor([[[0.0, 0.0, math.log(2)]]], dtype=torch.float64)
    ids, logprobs = torch.tensor([[[2, 0]]]), torch.tensor([[[0.75, 0.25]]], dtype=torch.float64).log()
    arguments = (logits, ids, logprobs, torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool))
    assert fusion_loss(*arguments, kind="ce").item() == pytest.approx(1.25 * math.log(2), abs=1e-12)
    assert fusion_loss(*arguments, kind="kl").item() == pytest.approx(0.75 * math.log(1.5), abs=1e-12)


def test_row_t_is_compared_with_the_logits_of_row_t():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = 50.0
    ids, logprobs = torch.full((1, 3, 1), 2), torch.zeros(1, 3, 1)
    per_row = fusion_loss(logits, ids, logprobs, torch.ones(1, 3, 1), torch.ones(1, 3), reduction="none")
    torch.testing.assert_close(per_row, torch.tensor([[math.log(4), 0.0, math.log(4)]]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_in_float64(kind):
    logits, ids, logprobs, mask, loss_mask = batch(b=1, t=3, v=6, k=3)
    logprobs = logprobs - 0.3  # leaves mass outside the entries
    mask[0, 1] = False
    assert torch.autograd.gradcheck(
        lambda z: fusion_loss(z, ids, logprobs, mask, loss_mask, kind=kind), logits.requires_grad_()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_form_has_the_same_value_and_gradients(kind, reduction):
    _, ids, logprobs, mask, loss_mask = batch(b=3, t=7, v=13)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    results = []
    for chunk_size in (None, 2, 4):
        head = torch.nn.Linear(5, 13, dtype=torch.float64)
        torch.nn.init.ones_(head.bias)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, 65, dtype=torch.float64).view(13, 5))
        states = hidden.clone().requires_grad_()
        if chunk_size is None:
            value = fusion_loss(head(states), ids, logprobs, mask, loss_mask, kind=kind, reduction=reduction)
        else:
            value = chunked_fusion_loss(
                states, head, ids, logprobs, mask, loss_mask, kind=kind, reduction=reduction, chunk_size=chunk_size
            )
        (value * torch.arange(1, value.numel() + 1).view(value.shape)).sum().backward()
        results.append((value.detach(), states.grad, head.weight.grad, head.bias.grad))
    for other in results[1:]:
        for ours, reference in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_a_head_may_be_a_weight():
    _, ids, logprobs, mask, loss_mask = batch(b=2, t=5, v=13)
    hidden, weight = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(13, 4, dtype=torch.float64)
    expected = fusion_loss(hidden @ weight.T, ids, logprobs, mask, loss_mask)
    torch.testing.assert_close(chunked_fusion_loss(hidden, weight, ids, logprobs, mask, loss_mask), expected)


def test_chunked_gradients_are_right_in_float64():
    _, ids, logprobs, mask, loss_mask = batch(b=1, t=5, v=6, k=3)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_fusion_loss(h, lambda x: x @ w.T, ids, logprobs, mask, loss_mask, chunk_size=2),
        (hidden, weight),
    )


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_chunked_form_never_holds_all_logits():
    b, t, v, width, chunk = 2, 64, 997, 8, 16
    _, ids, logprobs, mask, _ = batch(b, t, v, dtype=torch.float32)
    head = torch.nn.Linear(width, v, bias=False)
    hidden = torch.randn(b, t, width, requires_grad=True)
    with LargestTensor() as largest:
        chunked_fusion_loss(hidden, head, ids, logprobs, mask, torch.ones(b, t), chunk_size=chunk).backward()
    assert largest.elements <= chunk * v < b * t * v
    with LargestTensor() as dense:
        fusion_loss(head(hidden), ids, logprobs, mask, torch.ones(b, t)).backward()
    assert dense.elements >= b * t * v


def test_an_empty_mask_gives_a_zero_with_a_gradient():
    logits, ids, logprobs, mask, loss_mask = batch()
    logits.requires_grad_()
    for reduction in ("mean", "sum"):
        value = fusion_loss(logits, ids, logprobs, mask, torch.zeros_like(loss_mask), reduction=reduction)
        value.backward()
        assert value.item() == 0
        assert torch.count_nonzero(logits.grad) == 0
    head = torch.nn.Linear(11, 11, dtype=torch.float64)
    chunked_fusion_loss(logits, head, ids, logprobs, mask, torch.zeros_like(loss_mask)).backward()
    assert torch.count_nonzero(head.weight.grad) == 0


def test_rows_without_entries_and_minus_infinity_are_safe():
    logits, ids, logprobs, mask, _ = batch(dtype=torch.float32)
    ids[0, 0], mask[0, 0], logprobs[0, 0] = -1, False, float("-inf")
    logprobs[0, 1, 0] = float("-inf")  # an entry of probability zero
    logits[0, 1, ids[0, 1, 0]] = float("-inf")  # that the student excludes as well
    logits[1, 2] = float("nan")  # a row that the mask drops
    rows = torch.ones(2, 5, dtype=torch.bool)
    rows[1, 2] = False
    for kind in KINDS:
        states = logits.clone().requires_grad_()
        value = fusion_loss(states, ids, logprobs, mask, rows, kind=kind)
        value.backward()
        assert torch.isfinite(value), kind
        assert torch.isfinite(states.grad).all(), kind
        assert torch.count_nonzero(states.grad[1, 2]) == 0


def test_temperature_softens_the_target_and_keeps_its_mass():
    logits, ids, logprobs, mask, loss_mask = batch()
    tempered = (logprobs / 2).log_softmax(-1)
    for kept in (0.0, -0.5):
        torch.testing.assert_close(
            fusion_loss(logits, ids, logprobs + kept, mask, loss_mask, temperature=2.0),
            fusion_loss(logits, ids, tempered + kept, mask, loss_mask),
        )


def test_bfloat16_logits_are_computed_in_float32():
    logits, ids, logprobs, mask, loss_mask = batch(dtype=torch.float32)
    low = logits.bfloat16()
    value = fusion_loss(low, ids, logprobs, mask, loss_mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, fusion_loss(low.float(), ids, logprobs, mask, loss_mask), rtol=0, atol=0)


def test_token_losses_are_the_two_terms_over_supervised_rows():
    logits, ids, logprobs, _, _ = batch(b=2, t=6, v=9)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, :3] = -100
    ids[1, 4] = -1
    logprobs[1, 4] = float("-inf")
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    found = token_losses(logits, None, labels, (ids, logprobs))
    lm = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), following.flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(found.lm, lm)
    torch.testing.assert_close(
        found.fusion, fusion_loss(logits, ids, logprobs, ids >= 0, following != -100, reduction="sum")
    )
    assert (found.positions, found.fused_positions) == (8, 7)


def test_token_losses_through_a_head_equal_those_of_its_logits():
    _, ids, logprobs, _, _ = batch(b=2, t=6, v=9)
    labels, hidden = torch.randint(0, 9, (2, 6)), torch.randn(2, 6, 4, dtype=torch.float64)
    head = torch.nn.Linear(4, 9, dtype=torch.float64)
    dense = token_losses(head(hidden), None, labels, (ids, logprobs), kind="jsd")
    chunked = token_losses(hidden, head, labels, (ids, logprobs), kind="jsd", chunk_size=3)
    for name in ("lm", "fusion", "positions", "fused_positions"):
        torch.testing.assert_close(getattr(chunked, name), getattr(dense, name))


def test_a_loss_can_be_a_function_of_its_own():
    logits, ids, logprobs, mask, loss_mask = batch()

    def total_variation(student, target, valid):
        return ((student.exp() - target.exp()).abs() * valid).sum(-1) / 2

    value = fusion_loss(logits, ids, logprobs, mask, loss_mask, kind=total_variation)
    assert 0 < value.item() < 1


def test_wrong_settings_and_shapes_are_named():
    logits, ids, logprobs, mask, loss_mask = batch()
    with pytest.raises(ConfigError, match="unknown loss 'hinge'; expected one of ce, kl"):
        fusion_loss(logits, ids, logprobs, mask, loss_mask, kind="hinge")
    with pytest.raises(ConfigError, match="temperature: expected a number above 0"):
        fusion_loss(logits, ids, logprobs, mask, loss_mask, temperature=0)
    with pytest.raises(ConfigError, match="mean, sum or none"):
        fusion_loss(logits, ids, logprobs, mask, loss_mask, reduction="max")
    with pytest.raises(DataError, match=r"\(2, 5, 4\)"):
        fusion_loss(logits[:, 1:], ids, logprobs, mask, loss_mask)


def golden_target(case, names, weights_or_choice):
    """Dense float64 target (B, T, V) of a golden case, by the recipe of the published collator and trainer."""
    b, t, v = case["B"], case["T"], case["V"]
    target = torch.zeros(b, t, v, dtype=torch.float64)
    for row, chosen in enumerate(weights_or_choice):
        weights = chosen if isinstance(chosen, list) else [float(name == chosen) for name in names]
        for position in range(t):
            if not case["attention_mask"][row][position]:
                target[row, position, case["pad_token_id"]] = 1
                continue
            for name, weight in zip(names, weights, strict=True):
                ids = case["sources"][name]["topk_ids"][row][position]
                source = case["sources"][name if ids else "base"]
                scores = torch.tensor(source["topk_logits"][row][position], dtype=torch.float64)
                target[row, position, source["topk_ids"][row][position]] += weight * torch.softmax(
                    scores / case["temperature"], -1
                )
    return target


EXPECTATIONS = [(c, e) for c in GOLDEN for e in c["expected"]]


@pytest.mark.parametrize(
    ("case", "expected"),
    EXPECTATIONS,
    ids=[
        f"{c['case']}-{'+'.join(e['sources'])}-{e['rule']}-{e['loss_type']}-{e['decay_progress']}"
        for c, e in EXPECTATIONS
    ],
)
def test_published_losses_are_reproduced(case, expected):
    wanted = expected["float64"]
    target = golden_target(case, expected["sources"], wanted["choice_or_weights"])
    width = int((target > 0).sum(-1).max())
    probabilities, ids = target.topk(width, -1)
    logits = torch.tensor(case["student_logits"], dtype=torch.float32).double().requires_grad_()
    labels = torch.tensor(case["labels"])
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    rows = torch.tensor(case["attention_mask"]).bool() if case["family"] == "fusellm" else following != -100

    arguments = (logits, ids, probabilities.log(), probabilities > 0)
    fusion = fusion_loss(*arguments, rows, kind=expected["loss_type"])
    per_row = fusion_loss(*arguments, torch.ones_like(rows), kind=expected["loss_type"], reduction="none")
    lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100)
    weight = wanted["lm_weight_used"]
    loss = weight * lm + (1 - weight) * fusion
    (gradient,) = torch.autograd.grad(loss, logits)

    torch.testing.assert_close(per_row, torch.tensor(wanted["per_position"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert fusion.item() == pytest.approx(wanted["fusion_loss"], rel=1e-9)
    assert loss.item() == pytest.approx(wanted["loss"], rel=1e-9)
    assert gradient.norm().item() == pytest.approx(wanted["student_grad_l2"], rel=1e-7)
    for row, position, token, value in wanted["student_grad_samples"]:
        assert gradient[row, position, token].item() == pytest.approx(value, rel=1e-6, abs=1e-12)
