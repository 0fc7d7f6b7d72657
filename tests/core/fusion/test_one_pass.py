"""The one-pass form of both losses: the same values and gradients as the plain form, and what it holds at once."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_plugins.core.fusion.divergences import LOSSES, cross_entropy
from fusion_plugins.core.fusion.logit_change import LogitChange
from fusion_plugins.core.fusion.losses import chunked_fusion_loss, fusion_loss, token_losses
from fusion_plugins.core.fusion.one_pass import chunk_rows, weighted_losses
from fusion_plugins.errors import PluginError

KINDS = [*sorted(LOSSES), lambda student, fused, mask: ((student - fused) ** 2 * mask).sum(-1)]


def case(dtype=torch.float64, b=2, t=9, h=6, v=31, k=4, seed=0):
    """Hidden states, weight, bias, labels with gaps, and fused distributions with empty entries and positions."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(b, t, h, generator=generator, dtype=dtype)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((v, h), (v,)))
    labels = torch.randint(0, v, (b, t), generator=generator)
    labels[0, :3], labels[-1, 4] = -100, -100
    ids = torch.rand(b, t, v, generator=generator).topk(k, -1).indices
    logprobs = torch.randn(b, t, k, generator=generator, dtype=dtype).log_softmax(-1) - 0.2
    ids[0, 3], ids[-1, :, 2] = -1, -1
    return hidden, weight, bias, labels, (ids, logprobs)


def plain(hidden, weight, bias, labels, fused, lm_weight, kind, **options):
    found = token_losses(
        hidden, lambda x: torch.nn.functional.linear(x, weight, bias), labels, fused, kind=kind, **options
    )
    return lm_weight * found.lm + (1 - lm_weight) * found.fusion, found.lm, found.fusion


def gradients(function, tensors):
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    total, lm, fusion = function(*leaves)
    (total * 1.7).backward()
    return (total, lm, fusion), [leaf.grad for leaf in leaves if leaf is not None]


def one_pass(hidden, weight, bias, labels, fused, lm_weight, kind, **options):
    found = weighted_losses(hidden, weight, bias, labels, fused, lm_weight=lm_weight, kind=kind, **options)
    return found.total, found.lm, found.fusion


@pytest.mark.parametrize("kind", KINDS, ids=[*sorted(LOSSES), "registered"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_form(kind, chunk_size, with_bias):
    hidden, weight, bias, labels, fused = case()
    tensors = (hidden, weight, bias if with_bias else None)
    expected = gradients(lambda *leaves: plain(*leaves, labels, fused, 0.3, kind, temperature=1.5), tensors)
    found = gradients(
        lambda *leaves: one_pass(*leaves, labels, fused, 0.3, kind, temperature=1.5, chunk_size=chunk_size), tensors
    )
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("change", [None, LogitChange(scale=0.7, cap=1.2)], ids=["as they are", "capped"])
def test_gradients_are_right_by_differences(kind, change):
    hidden, weight, bias, labels, fused = case(b=1, t=5, v=7, k=3)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *leaves: one_pass(*leaves, labels, fused, 0.4, kind, chunk_size=2, change=change)[0], tensors
    )


@pytest.mark.parametrize("lm_weight", [0.0, 1.0])
def test_one_of_the_two_losses_alone(lm_weight):
    hidden, weight, bias, labels, fused = case()
    found = weighted_losses(hidden, weight, bias, labels, fused, lm_weight=lm_weight)
    torch.testing.assert_close(found.total, found.lm if lm_weight else found.fusion)


def test_a_frozen_output_layer_gets_no_gradient_and_costs_none():
    hidden, weight, _, labels, fused = case()
    hidden.requires_grad_()
    weighted_losses(hidden, weight, None, labels, fused, lm_weight=0.5).total.backward()
    expected = plain(leaf := hidden.detach().clone().requires_grad_(), weight, None, labels, fused, 0.5, "ce")[0]
    expected.backward()
    torch.testing.assert_close(hidden.grad, leaf.grad)
    assert weight.grad is None


def test_without_gradients_there_are_values_alone():
    hidden, weight, bias, labels, fused = case()
    weight.requires_grad_()
    with torch.no_grad():
        found = weighted_losses(hidden, weight, bias, labels, fused, lm_weight=0.5)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, plain(hidden, weight, bias, labels, fused, 0.5, "ce")[0].detach())


def test_a_batch_without_labels_gives_zeros_that_have_gradients():
    hidden, weight, bias, labels, fused = case()
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    found = weighted_losses(*tensors, torch.full_like(labels, -100), fused, lm_weight=0.5)
    found.total.backward()
    assert found.total == 0
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in tensors)


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_bfloat16_products_are_near_float32_and_gradients_have_the_dtype_of_their_tensor(kind):
    hidden, weight, bias, labels, fused = case(torch.float32, t=40, h=32, v=200, seed=1)
    fused = (fused[0], fused[1].float())
    expected = gradients(lambda *leaves: plain(*leaves, labels, fused, 0.5, kind), (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda *leaves: one_pass(*leaves, labels, fused, 0.5, kind), (hidden, weight, bias))
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_bfloat16_weights_take_their_gradient_summed_in_float32():
    hidden, weight, _, labels, fused = case(torch.float32, b=1, t=65, h=16, v=50)
    halves = [tensor.bfloat16().requires_grad_() for tensor in (hidden, weight)]
    exact = [half.detach().double().requires_grad_() for half in halves]
    fused = (fused[0], fused[1].double())
    weighted_losses(*halves, None, labels, fused, lm_weight=0.5, chunk_size=2).total.backward()
    weighted_losses(*exact, None, labels, fused, lm_weight=0.5).total.backward()
    assert halves[1].grad.dtype == torch.bfloat16
    # 32 chunks: a sum in bfloat16 would be off by several times its precision of 2**-8.
    assert (halves[1].grad.double() - exact[1].grad).norm() <= 2**-7 * exact[1].grad.norm()


def test_a_registered_loss_sees_the_entries_that_it_would_see_without_chunks():
    seen = []

    def loss(student, fused, mask):
        seen.append((student.detach(), fused, mask))
        return (student * mask).sum(-1)

    hidden, weight, bias, labels, fused = case()
    weighted_losses(hidden, weight, bias, labels, fused, lm_weight=0.5, kind=loss, chunk_size=4)
    chunks = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    seen.clear()
    token_losses(hidden, lambda x: x @ weight.T + bias, labels, fused, kind=loss)
    for ours, theirs in zip(chunks, seen[0], strict=True):
        torch.testing.assert_close(ours, theirs)


WRONG_LOSSES = {
    "a column": (
        lambda *given: cross_entropy(*given).unsqueeze(-1),
        r"tensor of shape \(\d+,\).* got shape \(\d+, 1\)",
    ),
    "one number": (lambda *given: cross_entropy(*given).sum(), r"got shape \(\)"),
    "a number of Python": (lambda *given: 0.0, "got float"),
    "one value per entry": (lambda student, fused, mask: student * mask, r"got shape \(\d+, 4\)"),
    "nothing": (lambda *given: None, "got NoneType"),
    "no gradient": (lambda *given: cross_entropy(*given).detach(), "nothing would be learnt"),
}


@pytest.mark.parametrize(("loss", "message"), WRONG_LOSSES.values(), ids=list(WRONG_LOSSES))
@pytest.mark.parametrize("at_most", [None, 18])
def test_a_registered_loss_of_another_form_is_refused(loss, message, at_most):
    """A column would be spread over all positions, and the loss be many times too large."""
    hidden, weight, bias, labels, fused = case()
    hidden.requires_grad_()
    arguments = (hidden, weight, bias, labels, fused)
    with pytest.raises(PluginError, match=message):
        weighted_losses(*arguments, lm_weight=0.5, kind=loss, at_most=at_most)
    with pytest.raises(PluginError, match=message):
        token_losses(hidden, lambda x: x @ weight.T + bias, labels, fused, kind=loss, at_most=at_most)


CHANGES = {
    "cap": LogitChange(cap=1.5),
    "factor": LogitChange(scale=0.4),
    "both": LogitChange(scale=-2.0, cap=3.0),
    "cut": LogitChange(width=29),
    "all": LogitChange(scale=0.5, cap=2.0, width=30),
}


@pytest.mark.parametrize("kind", KINDS, ids=[*sorted(LOSSES), "registered"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_capped_scaled_and_cut_logits_have_the_same_losses_and_gradients(kind, change):
    hidden, weight, bias, labels, fused = case()
    labels, fused = labels.clamp_max(28), (fused[0].clamp_max(28), fused[1])

    def changed(hidden, weight, bias):
        head = lambda x: change(torch.nn.functional.linear(x, weight, bias))  # noqa: E731
        found = token_losses(hidden, head, labels, fused, kind=kind)
        return 0.3 * found.lm + 0.7 * found.fusion, found.lm, found.fusion

    expected = gradients(changed, (hidden, weight, bias))
    for chunk_size in (None, 4):
        found = gradients(
            lambda *leaves, size=chunk_size: one_pass(
                *leaves, labels, fused, 0.3, kind, change=change, chunk_size=size
            ),
            (hidden, weight, bias),
        )
        for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_adapters_of_low_rank_are_a_part_of_the_weight():
    hidden, weight, bias, labels, fused = case()
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(*shape, generator=generator, dtype=hidden.dtype) for shape in ((2, 6), (31, 2), (3, 6), (31, 3))
    ]

    def whole(hidden, weight, bias, a, b, c, d):
        return plain(hidden, weight + b @ a + d @ c, bias, labels, fused, 0.3, "jsd")

    def folded(hidden, weight, bias, a, b, c, d):
        pairs = [(hidden @ a.T, b), (hidden @ c.T, d)]
        return one_pass(hidden, weight, bias, labels, fused, 0.3, "jsd", low_rank=pairs, chunk_size=4)

    expected, found = (gradients(form, (hidden, weight, bias, *tensors)) for form in (whole, folded))
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at_most", [13, 15, 18, 1000])
def test_a_bound_of_the_positions_changes_nothing(at_most):
    hidden, weight, bias, labels, fused = case()
    assert (labels[:, 1:] != -100).sum() == 13
    hidden[0, 0] = torch.nan  # a position that does not count may hold anything
    tensors = (hidden, weight, bias)
    expected = gradients(lambda *leaves: one_pass(*leaves, labels, fused, 0.3, "reverse_kl"), tensors)
    found = gradients(
        lambda *leaves: one_pass(*leaves, labels, fused, 0.3, "reverse_kl", at_most=at_most, chunk_size=5), tensors
    )
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_bound_that_is_too_small_is_an_error():
    hidden, weight, bias, labels, fused = case()
    with pytest.raises(RuntimeError, match="more positions count than the 12"):
        one_pass(hidden, weight, bias, labels, fused, 0.3, "ce", at_most=12)


def test_given_logits_take_the_same_way():
    hidden, weight, bias, labels, fused = case()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    expected = gradients(lambda z: plain(z, torch.eye(31, dtype=z.dtype), None, labels, fused, 0.3, "jsd"), (logits,))
    found = gradients(lambda z: one_pass(z, None, None, labels, fused, 0.3, "jsd", chunk_size=5), (logits,))
    for ours, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_agreement_counts_the_positions_with_the_same_most_probable_token():
    logits = torch.zeros(1, 6, 5)
    for position, token in enumerate((2, 3, 1, 4, 0)):
        logits[0, position, token] = 1
    labels = torch.tensor([[-100, 1, 1, 1, 1, -100]])  # positions 0 to 3 count
    ids = torch.tensor([[[2, 1], [1, 3], [1, -1], [-1, -1], [0, 1], [0, 1]]])
    logprobs = torch.tensor([0.6, 0.4]).log().expand(1, 6, 2)
    found = weighted_losses(logits, None, None, labels, (ids, logprobs), lm_weight=0.5, chunk_size=3)
    other = token_losses(logits, lambda z: z, labels, (ids, logprobs), chunk_size=3)
    assert found.agreed == other.agreed == 2  # 0 and 2; 1 has another token on top, 3 no distribution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_of_the_weights_gradient_does_not_grow_with_the_chunks(dtype):
    """Against float64, of the same rounded states and weights: sums in the low precision would grow with the chunks."""
    hidden, weight, _, labels, fused = case(torch.float32, b=1, t=513, h=16, v=64, k=6)
    low = [hidden.to(dtype), (weight * 0.2).to(dtype)]
    fused = (fused[0], fused[1].float())
    exact = [one.double().requires_grad_() for one in low]
    weighted_losses(*exact, None, labels, (fused[0], fused[1].double()), lm_weight=0.5).total.backward()
    errors = {}
    for chunk_size in (512, 64, 8, 2):
        leaves = [low[0].clone().requires_grad_(), low[1].clone().float().requires_grad_()]
        weighted_losses(*leaves, None, labels, fused, lm_weight=0.5, chunk_size=chunk_size).total.backward()
        errors[chunk_size] = ((leaves[1].grad - exact[1].grad).norm() / exact[1].grad.norm()).item()
    assert max(errors.values()) <= 1.2 * errors[512], errors
    assert errors[512] < 4 * torch.finfo(dtype).eps


class Operations(TorchDispatchMode):
    """Counts the operations that start a kernel on a GPU: all but views."""

    VIEWS = ("slice", "view", "unsqueeze", "squeeze", "expand", "select", "detach", "alias", "t.default", "empty")

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.wide = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.__name__
        if not name.startswith(self.VIEWS) or "backward" in name or name.startswith("index_select"):
            self.found[name] += 1
            if any(isinstance(one, torch.Tensor) and one.dim() == 2 and one.shape[1] == 101 for one in (out, *args)):
                self.wide[name] += 1
        return out


@pytest.mark.parametrize(
    ("change", "dtype", "kernels", "wide"),
    [
        (LogitChange(), torch.float32, 53, 9),
        (LogitChange(), torch.bfloat16, 56, 10),
        (LogitChange(scale=0.5, cap=9.0), torch.bfloat16, 62, 15),
    ],
    ids=["float32", "bfloat16", "capped"],
)
def test_a_chunk_starts_few_kernels(change, dtype, kernels, wide):
    """The numbers stand in docs/how-it-works.md. The wide ones work on all logits of the chunk."""
    counts = []
    for chunks in (1, 5):
        hidden, weight, _, labels, fused = case(torch.float32, b=1, t=41, h=8, v=101, k=5)
        leaves = [one.to(dtype).requires_grad_() for one in (hidden, weight)]
        with Operations() as operations:
            found = weighted_losses(
                *leaves, None, labels, fused, lm_weight=0.5, change=change, at_most=40, chunk_size=40 // chunks
            )
            found.total.backward()
        counts.append((operations.found.total(), operations.wide.total()))
    per_chunk = [(five - one) / 4 for one, five in zip(*counts, strict=True)]
    assert per_chunk[0] <= kernels
    assert per_chunk[1] <= wide
    assert counts[0][0] - per_chunk[0] <= 45, "beside the chunks"


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(128_256, 2048), (262_144, 1024), (32_000, 8320), (2**28, 128), (4e9, 128)]
)
def test_chunks_are_multiples_of_128_positions(vocabulary, rows):
    assert chunk_rows(int(vocabulary)) == rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_public_losses_take_one_pass_where_they_can(reduction, trained, monkeypatch):
    """Of a trained layer the positions are already summed up in its gradient, so `none` needs the layer once more."""
    hidden, weight, bias, labels, fused = case()
    layer = torch.nn.Linear(6, 31, dtype=hidden.dtype).requires_grad_(trained)
    calls, forward = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *given: calls.append(1) or forward(*given))
    arguments = (fused[0], fused[1], fused[0] >= 0, labels != -100)
    states = hidden.clone().requires_grad_()
    value = chunked_fusion_loss(states, layer, *arguments, reduction=reduction, chunk_size=4)
    (value * torch.arange(1, value.numel() + 1).view(value.shape)).sum().backward()
    assert bool(calls) is (reduction == "none" and trained)
    other = hidden.clone().requires_grad_()
    logits = torch.nn.functional.linear(other, layer.weight.detach(), layer.bias.detach())
    expected = fusion_loss(logits, *arguments, reduction=reduction)
    (expected * torch.arange(1, expected.numel() + 1).view(expected.shape)).sum().backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(states.grad, other.grad)
