"""The advantage: against the plain formula and its autograd in float64, the textbook form, and cut into parts."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from fusion_plugins.core.fusion.chunk_losses import Chunks, advantage, is_per_chunk, per_chunk
from fusion_plugins.core.fusion.divergences import jensen_shannon, reverse_kl
from fusion_plugins.core.fusion.logit_change import LogitChange
from fusion_plugins.core.fusion.losses import fusion_loss, token_losses
from fusion_plugins.core.fusion.one_pass import weighted_losses
from fusion_plugins.errors import ConfigError, DataError

UNCLIPPED = partial(advantage, clip=1e9)
NAN = float("nan")


def case(dtype=torch.float64, b=2, t=14, h=6, v=31, seed=0, longest=4):
    """Hidden states, weight, labels with gaps, and chunks of one to four positions between them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((b, t, h), (v, h)))
    labels = torch.randint(0, v, (b, t), generator=generator)
    labels[0, :3], labels[-1, 6] = -100, -100
    place = torch.zeros(b, t, dtype=torch.int64)
    logprobs, sampled = torch.zeros(b, t, dtype=dtype), torch.full((b, t), NAN, dtype=dtype)
    for row in range(b):
        at = 0
        while at < t - 1:
            n = int(torch.randint(1, longest + 1, (), generator=generator))
            # A chunk is all there or not at all.
            if at + n < t and (labels[row, at + 1 : at + n + 1] != -100).all() and (row, at) != (1, 0):
                place[row, at : at + n] = torch.arange(1, n + 1)
                logprobs[row, at : at + n] = -2.5 * n * torch.rand((), generator=generator, dtype=dtype)
                if n != 2:
                    sampled[row, at : at + n] = -2 * torch.rand(n, generator=generator, dtype=dtype) - 2
            at += n
    return hidden, weight, labels, Chunks(place, logprobs, sampled, longest)


def plain(logits, labels, chunks, lm_weight=0.0, clip=10.0, ratio_clip=0.2):
    """-sum over chunks of A r log pi(chunk), chunk by chunk, A and r as numbers; and lambda times the cross-entropy."""
    said = logits.log_softmax(-1)
    total = logits.new_zeros(())
    for row, at in (chunks.place == 1).nonzero().tolist():
        stop = at + 1
        while stop < labels.shape[1] and chunks.place[row, stop] == stop - at + 1:
            stop += 1
        own = sum(said[row, k, labels[row, k + 1]] for k in range(at, stop))
        advantage = min(clip, max(-clip, float(chunks.logprobs[row, at]) - float(own)))
        sampled = float(chunks.sampled[row, at:stop].sum())
        ratio = 1.0
        if ratio_clip is not None and sampled == sampled:
            ratio = float((own.detach() - sampled).exp())
            ratio = min(1 + ratio_clip, ratio)
        total = total - advantage * ratio * own
    kept = labels[:, 1:] != -100
    lm = -said[:, :-1].gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)[kept].sum()
    return lm_weight * lm + (1 - lm_weight) * total


def gradients(loss, *tensors):
    leaves = [one.clone().requires_grad_() for one in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("lm_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
def test_gradients_are_those_of_the_plain_formula_however_the_pass_is_cut(chunk_size, lm_weight):
    hidden, weight, labels, chunks = case()
    expected = gradients(lambda x, w: plain(linear(x, w), labels, chunks, lm_weight), hidden, weight)
    for at_most in (None, 25, 28):
        options = {"lm_weight": lm_weight, "kind": advantage, "chunk_size": chunk_size, "at_most": at_most}
        ours = partial(weighted_losses, bias=None, labels=labels, fused=chunks, **options)
        found = gradients(lambda x, w, ours=ours: ours(x, w).total, hidden, weight)
        for one, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(one, theirs, rtol=1e-9, atol=1e-10)

    def of_any_head(x, w):
        found = token_losses(x, lambda s: linear(s, w), labels, chunks, kind=advantage, chunk_size=chunk_size)
        return lm_weight * found.lm + (1 - lm_weight) * found.fusion

    for one, theirs in zip(gradients(of_any_head, hidden, weight), expected, strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"ratio_clip": None}, {"ratio_clip": 1e9}, {"ratio_clip": 0.01}])
def test_advantage_and_ratio_are_clipped_as_the_plain_formula_says(options):
    hidden, weight, labels, chunks = case(seed=3)
    expected = gradients(lambda x, w: plain(linear(x, w), labels, chunks, **options), hidden, weight)
    found = gradients(
        lambda x, w: (
            weighted_losses(x, w, None, labels, chunks, lm_weight=0.0, kind=partial(advantage, **options)).total
        ),
        hidden,
        weight,
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_cap_of_the_logits_and_low_rank_adapters_are_taken_along():
    hidden, weight, labels, chunks = case(seed=5)
    low = torch.randn(*hidden.shape[:2], 2, dtype=hidden.dtype), torch.randn(len(weight), 2, dtype=hidden.dtype)
    change = LogitChange(scale=0.5, cap=4.0)

    def whole(x, w, a, b):
        return plain(change(linear(x, w) + linear(a, b)), labels, chunks, 0.25)

    def ours(x, w, a, b):
        options = {"lm_weight": 0.25, "kind": advantage, "chunk_size": 3, "change": change, "low_rank": [(a, b)]}
        return weighted_losses(x, w, None, labels, chunks, **options).total

    for found, expected in zip(
        gradients(ours, hidden, weight, *low), gradients(whole, hidden, weight, *low), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_the_value_is_the_clipped_reverse_kl_of_each_chunk_and_counts_are_those_of_the_chunks():
    hidden, weight, labels, chunks = case(seed=7)
    chunks = Chunks(chunks.place, chunks.logprobs, torch.full_like(chunks.sampled, NAN), chunks.longest)
    said = linear(hidden, weight).log_softmax(-1)
    of_labels = said[:, :-1].gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
    first, inside = chunks.place[:, :-1] == 1, chunks.place[:, :-1] > 0
    expected = of_labels[inside].sum() - chunks.logprobs[:, :-1][first].sum()
    found = weighted_losses(hidden, weight, None, labels, chunks, lm_weight=0.0, kind=UNCLIPPED, chunk_size=4)
    torch.testing.assert_close(found.fusion, expected)
    assert found.agreed == 0
    counted = token_losses(hidden, lambda x: linear(x, weight), labels, chunks, kind=UNCLIPPED)
    torch.testing.assert_close(counted.fusion, expected)
    assert counted.fused_positions == inside.sum()


def one_token_chunks(labels, logprobs, sampled=None):
    place = torch.zeros_like(labels)
    place[:, :-1] = (labels[:, 1:] != -100).to(place.dtype)
    unknown = torch.full_like(logprobs, NAN)
    return Chunks(place, logprobs, unknown if sampled is None else sampled, 1)


def test_one_token_chunks_are_the_textbook_advantage_of_every_token():
    hidden, weight, labels, _ = case(seed=11)
    teacher = -3 * torch.rand(labels.shape, dtype=hidden.dtype)
    kept = labels[:, 1:] != -100

    def textbook(x, w):
        said = linear(x, w).log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return -((teacher[:, :-1] - said).detach() * said)[kept].sum()

    def ours(x, w):
        chunks = one_token_chunks(labels, teacher)
        return weighted_losses(x, w, None, labels, chunks, lm_weight=0.0, kind=UNCLIPPED, chunk_size=5).total

    for found, expected in zip(gradients(ours, hidden, weight), gradients(textbook, hidden, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_expected_gradient_over_all_answers_is_that_of_the_reverse_kl_of_chunks():
    """Every string of two tokens is an answer; weighted by its probability, the gradients add up to the exact one."""
    generator = torch.Generator().manual_seed(2)
    v = 3
    logits = torch.randn(1 + v, v, generator=generator, dtype=torch.float64)  # row 0, then one row per first token
    teacher = torch.randn(v * v, generator=generator, dtype=torch.float64).log_softmax(0)

    def said(z):
        rows = z.log_softmax(-1)
        return torch.stack([rows[0, a] + rows[1 + a, b] for a, b in itertools.product(range(v), range(v))])

    exact = gradients(lambda z: (said(z).exp() * (said(z) - teacher)).sum(), logits)[0]
    total = torch.zeros_like(logits)
    for n, (a, b) in enumerate(itertools.product(range(v), range(v))):
        chunk = Chunks(torch.tensor([1, 2]), teacher[n].expand(2), torch.full((2,), NAN), 2)

        def sample(z, a=a, b=b, chunk=chunk):
            rows = z.log_softmax(-1)
            return advantage(torch.stack([rows[0, a], rows[1 + a, b]]), chunk, clip=1e9).sum()

        total += said(logits)[n].exp() * gradients(sample, logits)[0]
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-12)


def test_a_source_that_gives_a_chunk_no_probability_counts_as_far_as_the_clip():
    place, logprobs = torch.tensor([1, 1]), torch.tensor([-float("inf"), -1.0])
    chunks = Chunks(place, logprobs, torch.full((2,), NAN), 1)
    own = torch.tensor([-1.0, -1.0], requires_grad=True)
    advantage(own, chunks, clip=3.0).sum().backward()
    assert own.grad.tolist() == [3.0, 0.0]


@pytest.mark.parametrize(("own", "sampled"), [(-12.0, -1.0), (-9.0, -2.0), (-40.0, -0.1)])
def test_what_the_model_has_stopped_saying_is_hardly_pushed_down_any_more(own, sampled):
    said = torch.tensor([own], requires_grad=True)
    chunks = Chunks(torch.ones(1, dtype=torch.int64), torch.tensor([-60.0]), torch.tensor([sampled]), 1)
    advantage(said, chunks).sum().backward()
    assert 0 <= float(said.grad) <= 10 * math.exp(own - sampled) * 1.001


def test_many_passes_over_the_same_answers_bring_the_model_nearer_to_the_source():
    """Four answers of a linear model to each of 200 prompts, 48 passes over them: the reverse KL of other prompts.

    With a ratio of 1 the model ends further away than it began, as with a ratio that is never below 0.8.
    """

    def distances(seed, ratio_clip):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((200, 24), (400, 24), (24, 40), (24, 40))
        prompts, others, source, noise = (torch.randn(*shape, generator=generator) for shape in shapes)
        weight = 0.75 * (source + noise)

        def reverse_kl_of_others():
            said, teacher = (others @ weight).log_softmax(-1), (2.5 * others @ source).log_softmax(-1)
            return float((said.exp() * (said - teacher)).sum(-1).mean())

        said, teacher = (prompts @ weight).log_softmax(-1), (2.5 * prompts @ source).log_softmax(-1)
        drawn = torch.multinomial(said.exp(), 4, replacement=True, generator=generator)
        logprobs, sampled = (each.gather(1, drawn).flatten() for each in (teacher, said))
        chunks = Chunks(torch.ones(800, dtype=torch.int64), logprobs, sampled, 1)
        before = reverse_kl_of_others()
        weight.requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=0.02)
        for _ in range(48):
            now = (prompts @ weight).log_softmax(-1).gather(1, drawn).flatten()
            optimizer.zero_grad()
            advantage(now, chunks, ratio_clip=ratio_clip).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return before, reverse_kl_of_others()

    before, ours, without = (
        torch.tensor([[*distances(seed, 0.2), distances(seed, None)[1]] for seed in range(4)]).mean(0).tolist()
    )
    assert ours < before < without


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": -1.0}, {"clip": NAN}, {"ratio_clip": 0.0}])
def test_bounds_that_cannot_be_are_refused(options):
    chunks = Chunks(torch.ones(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1), 1)
    with pytest.raises(ConfigError, match=next(iter(options))):
        advantage(torch.zeros(1), chunks, **options)


def test_chunks_of_another_batch_and_a_divergence_by_name_are_refused():
    hidden, weight, labels, chunks = case()
    with pytest.raises(DataError, match="expected chunks"):
        weighted_losses(hidden[:, 1:], weight, None, labels[:, 1:], chunks, lm_weight=0.5, kind=advantage)
    with pytest.raises(ConfigError, match="loss of chunks"):
        weighted_losses(hidden, weight, None, labels, chunks, lm_weight=0.5, kind="reverse_kl")
    assert is_per_chunk(advantage)
    assert not is_per_chunk(reverse_kl)
    assert is_per_chunk(per_chunk(lambda label_logprobs, chunks: label_logprobs))


def test_a_batch_without_chunks_gives_a_zero_that_has_a_gradient():
    hidden, weight, labels, chunks = case()
    none = Chunks(torch.zeros_like(chunks.place), chunks.logprobs, chunks.sampled, 1)
    leaf = hidden.clone().requires_grad_()
    found = weighted_losses(leaf, weight, None, labels, none, lm_weight=0.0, kind=advantage)
    found.total.backward()
    assert found.total == 0
    assert not leaf.grad.any()


def dense(p, q, beta):
    middle = beta * p + (1 - beta) * q
    kl = {0: p * (p / q).log(), 1: q * (q / p).log()}
    return kl.get(beta, beta * p * (p / middle).log() + (1 - beta) * q * (q / middle).log()).sum(-1)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_the_jensen_shannon_divergence_has_any_beta(beta):
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(1, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    ids, ones = torch.arange(9).expand(1, 5, 9), torch.ones(1, 5, dtype=torch.bool)

    def ours(z):
        said, kind = teacher.log_softmax(-1), partial(jensen_shannon, beta=beta)
        return fusion_loss(z, ids, said, torch.ones_like(ids, dtype=torch.bool), ones, kind=kind, reduction="sum")

    def plain_form(z):
        return dense(teacher.softmax(-1), z.softmax(-1), beta).sum()

    torch.testing.assert_close(ours(student), plain_form(student), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours, student)[0], gradients(plain_form, student)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.5, NAN])
def test_a_beta_that_cannot_be_is_refused(beta):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ConfigError, match="beta: expected a number from 0 to 1"):
        jensen_shannon(zeros, zeros, zeros == 0, beta=beta)


def test_the_ends_of_the_divergence_are_its_limits_and_count_the_rest():
    """Two of three entries are stored; the rest of p and q is one entry more."""
    q = torch.tensor([[0.2, 0.3]], dtype=torch.float64)
    p, mask = torch.tensor([[0.5, 0.1]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    whole_p, whole_q = torch.tensor([0.5, 0.1, 0.4]), torch.tensor([0.2, 0.3, 0.5])
    near = 1e-5
    for end, beside in ((0, near), (1, 1 - near)):
        exact = jensen_shannon(q.log(), p.log(), mask, beta=end)
        torch.testing.assert_close(exact, dense(whole_p, whole_q, end).double().view(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(jensen_shannon(q.log(), p.log(), mask, beta=beside) / near, exact, rtol=1e-3, atol=0)
