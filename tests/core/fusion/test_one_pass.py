"""The one-pass form of both losses: the same values and gradients as the plain form, and what it holds at once."""

import pytest
import torch

from fusion_plugins.core.fusion.losses import LOSSES, token_losses
from fusion_plugins.core.fusion.one_pass import weighted_losses

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
def test_gradients_are_right_by_differences(kind):
    hidden, weight, bias, labels, fused = case(b=1, t=5, v=7, k=3)
    tensors = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *leaves: weighted_losses(*leaves, labels, fused, lm_weight=0.4, kind=kind, chunk_size=2).total, tensors
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
