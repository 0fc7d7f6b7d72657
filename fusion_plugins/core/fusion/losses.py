"""Divergence between the trained model and the fused distributions, without ever building a dense distribution.

The fused distribution at position ``t`` is compared with the logits at position ``t``: both describe token ``t + 1``,
so nothing is shifted here. Only the K stored ids of a position are looked up; with the log-normaliser of its logits
they give the student's true log-probabilities, and every divergence below is a function of those.

Letters: B batch, T tokens, V vocabulary, K entries per position, H hidden size, N positions that the loss mask keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusion_plugins.errors import ConfigError, DataError

Divergence: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Reduction: TypeAlias = Literal["mean", "sum", "none"]

#: Logits held at once by the chunked form: 2**26 float32 numbers are 256 MB.
CHUNK_ELEMENTS = 2**26
#: Probability that a bucket holds at least; keeps log(0) and its gradient out of the two-sided divergences.
FLOOR = 1e-7
#: The two-sided divergences raise the student's log-probabilities to at least this, because 0 * -inf is NaN.
LOWEST = -1e4


def cross_entropy(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """Cross-entropy ``-sum p log q`` over the stored entries, nats; mass outside them weighs nothing.

    Args:
        student_logprobs: (..., K) log-probabilities of the trained model at the stored ids, 0 where masked.
        fused_logprobs: (..., K) fused log-probabilities, 0 where masked.
        fused_mask: (..., K) bool, which entries hold a probability.

    Returns:
        (...) one value per position.
    """
    return -(_probabilities(fused_logprobs, fused_mask) * student_logprobs).sum(-1)


def forward_kl(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """``sum p (log p - log q)`` over the stored entries: the gradient of :func:`cross_entropy`, another value."""
    return (_probabilities(fused_logprobs, fused_mask) * (fused_logprobs - student_logprobs)).sum(-1)


def reverse_kl(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """``sum q (log q - log p)`` over the stored entries and one bucket for everything else.

    Without the bucket the model could lower the value by moving its mass off the stored entries. The bucket's
    probability in the fused distribution is at least :data:`FLOOR`, so the value is finite where it has no mass there.
    """
    student_logprobs = student_logprobs.clamp_min(LOWEST)
    q = _probabilities(student_logprobs, fused_mask)
    inside = (q * (student_logprobs - fused_logprobs)).sum(-1)
    q_rest, p_rest = _rest(q), _rest(_probabilities(fused_logprobs, fused_mask))
    return inside + q_rest * (q_rest.log() - p_rest.log())


def jensen_shannon(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """``(KL(p | m) + KL(q | m)) / 2`` with ``m = (p + q) / 2``, over the stored entries and one bucket for the rest.

    Exact when the fused distribution has no mass outside its entries; at most log 2.
    """
    student_logprobs = student_logprobs.clamp_min(LOWEST)
    p, q = _probabilities(fused_logprobs, fused_mask), _probabilities(student_logprobs, fused_mask)
    p_rest, q_rest = _rest(p), _rest(q)
    middle = ((p + q) / 2).clamp_min(FLOOR**2).log()
    middle_rest = ((p_rest + q_rest) / 2).log()
    inside = (p * (fused_logprobs - middle) + q * (student_logprobs - middle)).sum(-1)
    rest = p_rest * (p_rest.log() - middle_rest) + q_rest * (q_rest.log() - middle_rest)
    return (inside + rest) / 2


LOSSES: dict[str, Divergence] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
}


@dataclass(frozen=True)
class TokenLosses:
    """What :func:`token_losses` returns, summed over the positions with a label.

    Attributes:
        lm: () sum of the cross-entropies of the next tokens, nats.
        fusion: () sum of the divergences from the fused distributions, nats.
        positions: () int64, positions with a label.
        fused_positions: () int64, those of them that have a fused distribution.
    """

    lm: Tensor
    fusion: Tensor
    positions: Tensor
    fused_positions: Tensor


def fusion_loss(
    logits: Tensor,
    fused_ids: Tensor,
    fused_logprobs: Tensor,
    fused_mask: Tensor,
    loss_mask: Tensor,
    *,
    kind: str | Divergence = "ce",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence between the model's distributions and sparse fused distributions.

    For ``ce``: ``sum_t m_t (-sum_k p_tk log softmax(z_t)[id_tk]) / sum_t m_t``.

    Args:
        logits: (B, T, V) of the trained model; position t describes token t + 1. Computed in float32 (float64 stays).
        fused_ids: (B, T, K) integer token ids; any value where the mask is False.
        fused_logprobs: (B, T, K) natural log-probabilities; -inf is a probability of zero.
        fused_mask: (B, T, K) bool, which entries exist.
        loss_mask: (B, T) bool, which positions count (those whose next token is supervised).
        kind: a name of :data:`LOSSES`, or a function of that form.
        temperature: softens the fused distributions only (as published): ``p ** (1 / temperature)``, scaled so that a
            position keeps its mass.
        reduction: "mean" divides by the positions that ``loss_mask`` keeps, "none" returns (B, T) with 0 elsewhere.

    Returns:
        () or (B, T), float32 (float64 for float64 logits), nats. An empty mask gives a zero that has a gradient.

    Raises:
        ConfigError: unknown kind or reduction, or a temperature that is not positive.
        DataError: shapes that do not belong together.

    References:
        FuseLLM, arXiv 2401.10491, section 3.3 (L_Fusion); FuseChat, arXiv 2402.16107.

    Example:
        >>> logits = torch.zeros(1, 1, 4)
        >>> ids, half = torch.tensor([[[0, 2]]]), torch.full((1, 1, 2), 0.5).log()
        >>> one = torch.ones(1, 1, dtype=torch.bool)
        >>> round(float(fusion_loss(logits, ids, half, torch.ones_like(ids, dtype=torch.bool), one)), 4)
        1.3863
    """
    return chunked_fusion_loss(
        logits,
        _identity,
        fused_ids,
        fused_logprobs,
        fused_mask,
        loss_mask,
        kind=kind,
        temperature=temperature,
        reduction=reduction,
        chunk_size=max(1, loss_mask.numel()),
    )


def chunked_fusion_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor] | Tensor,
    fused_ids: Tensor,
    fused_logprobs: Tensor,
    fused_mask: Tensor,
    loss_mask: Tensor,
    *,
    kind: str | Divergence = "ce",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """:func:`fusion_loss` of ``head(hidden)``, with the same value and gradients and never all logits at once.

    Positions that ``loss_mask`` drops never reach the head. The backward pass computes the logits of a chunk again.

    Args:
        hidden: (B, T, H) last hidden states.
        head: maps (n, H) to logits (n, V); called once per chunk, so sharded weights are gathered by its own forward.
            Or the weight (V, H) of a linear head without bias.
        fused_ids: as in :func:`fusion_loss`, like all that follow.
        fused_logprobs: (B, T, K).
        fused_mask: (B, T, K).
        loss_mask: (B, T).
        kind: divergence.
        temperature: of the fused distributions.
        reduction: mean, sum or none.
        chunk_size: positions per chunk; by default as many as :data:`CHUNK_ELEMENTS` logits allow.

    Returns:
        () or (B, T).

    Raises:
        ConfigError: as in :func:`fusion_loss`.
        DataError: as in :func:`fusion_loss`.
    """
    _check_shapes(hidden, fused_ids, fused_logprobs, fused_mask, loss_mask)
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction: expected mean, sum or none, got {reduction!r}")
    if isinstance(head, Tensor):
        head = partial(torch.nn.functional.linear, weight=head)
    kept = loss_mask.bool()
    fused = FusedEntries.of(fused_ids[kept], fused_logprobs[kept], fused_mask[kept], temperature)
    _, values = _in_chunks(hidden[kept], head, None, fused, divergence(kind), chunk_size)
    if reduction == "none":
        return values.new_zeros(kept.shape).masked_scatter(kept, values)
    total = values.sum()
    return total / max(1, values.numel()) if reduction == "mean" else total


def token_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor] | None,
    labels: Tensor,
    fused: tuple[Tensor, Tensor],
    *,
    kind: str | Divergence = "ce",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenLosses:
    """The language-model term and the fusion term of one batch, from one pass over the head.

    Position t counts when label t + 1 exists (is not -100); the last position never does.

    Args:
        hidden: (B, T, H) last hidden states, or (B, T, V) logits when ``head`` is None.
        head: maps (n, H) to (n, V).
        labels: (B, T) token ids, -100 where not supervised; not shifted.
        fused: ids (B, T, K), -1 for an empty entry, and log-probabilities (B, T, K).
        kind: divergence, as in :func:`fusion_loss`.
        temperature: of the fused distributions.
        chunk_size: positions per chunk.

    Returns:
        Sums and counts; the caller divides, by the tokens of the whole global batch.

    Raises:
        ConfigError: as in :func:`fusion_loss`.
        DataError: as in :func:`fusion_loss`.
    """
    kept, following, entries = kept_positions(hidden, labels, fused, temperature)
    if head is None:
        head, chunk_size = _identity, max(1, kept.numel())
    lm, fusion = _in_chunks(hidden[kept], head, following, entries, divergence(kind), chunk_size)
    return TokenLosses(lm.sum(), fusion.sum(), kept.sum(), entries.mask.any(-1).sum())


def kept_positions(
    hidden: Tensor, labels: Tensor, fused: tuple[Tensor, Tensor], temperature: float
) -> "tuple[Tensor, Tensor, FusedEntries]":
    """Return which positions have a label (B, T), the labels (N,) of those, and their fused distributions."""
    ids, logprobs = fused
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    kept = following != -100
    _check_shapes(hidden, ids, logprobs, ids, kept)
    entries = FusedEntries.of(ids[kept], logprobs[kept], ids[kept] >= 0, temperature)
    return kept, following[kept], entries


@dataclass(frozen=True)
class FusedEntries:
    """Fused distributions with ids and log-probabilities of 0 where the mask is False, all (N, K).

    Then a masked entry is a valid index and adds 0 to a sum, in the value and in the gradient.
    """

    ids: Tensor
    logprobs: Tensor
    mask: Tensor

    @classmethod
    def of(cls, ids: Tensor, logprobs: Tensor, mask: Tensor, temperature: float) -> "FusedEntries":
        """Return the entries that hold a probability, softened by the temperature, which must be above 0."""
        if not temperature > 0:
            raise ConfigError(f"temperature: expected a number above 0, got {temperature}")
        logprobs = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
        mask = mask.bool() & torch.isfinite(logprobs)
        logprobs = logprobs.masked_fill(~mask, 0.0)
        if temperature != 1.0:
            logprobs = _tempered(logprobs, mask, temperature)
        return cls(ids.long().masked_fill(~mask, 0), logprobs, mask)

    def __getitem__(self, part: slice) -> "FusedEntries":
        return FusedEntries(self.ids[part], self.logprobs[part], self.mask[part])


def _tempered(logprobs: Tensor, mask: Tensor, temperature: float) -> Tensor:
    hidden = ~mask
    mass = logprobs.masked_fill(hidden, float("-inf")).logsumexp(-1, keepdim=True)
    scaled = logprobs / temperature
    normaliser = scaled.masked_fill(hidden, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.where(mask, scaled - normaliser + mass, 0.0)


def _in_chunks(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor | None,
    fused: FusedEntries,
    loss: Divergence,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """(N,) language-model terms (zeros without labels) and (N,) fusion terms."""
    size = chunk_size or _default_chunk(states, head)
    # Without positions there is still one, empty, part: the zero needs a gradient, and every rank must call the head.
    parts = [slice(start, start + size) for start in range(0, max(1, states.shape[0]), size)]
    lm, fusion = [], []
    for part in parts:
        wanted = None if labels is None else labels[part]
        arguments = (states[part], head, wanted, fused[part], loss)
        terms = (
            _position_terms(*arguments)
            if len(parts) == 1
            else checkpoint(_position_terms, *arguments, use_reentrant=False)
        )
        lm.append(terms[0])
        fusion.append(terms[1])
    return torch.cat(lm), torch.cat(fusion)


def _position_terms(
    states: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor | None, fused: FusedEntries, loss: Divergence
) -> tuple[Tensor, Tensor]:
    width = fused.ids.shape[-1]
    ids = fused.ids if labels is None else torch.cat([fused.ids, labels.unsqueeze(-1)], -1)  # (n, K or K + 1)
    logprobs = _LogprobsAt.apply(head(states), ids)
    student = logprobs[:, :width].masked_fill(~fused.mask, 0.0)
    fusion = loss(student, fused.logprobs.to(logprobs.dtype), fused.mask)
    return (torch.zeros_like(fusion) if labels is None else -logprobs[:, width]), fusion


class _LogprobsAt(torch.autograd.Function):
    """``log softmax(logits)`` at some ids only: (n, V), (n, K) -> (n, K), float32 (float64 for float64).

    An own backward pass, because autograd's rules for ``log_softmax`` keep a float32 copy of the logits. This one keeps
    the logits in their own dtype, and makes one buffer of their size in the backward pass: about half the memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
        normaliser = logits.to(wide).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, ids, normaliser)
        return logits.gather(-1, ids).to(wide) - normaliser

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, ids, normaliser = ctx.saved_tensors
        # d log q_k / d z_v = [v = id_k] - q_v
        out = (logits.to(normaliser.dtype) - normaliser).exp_().mul_(-gradient.sum(-1, keepdim=True))
        return out.scatter_add_(-1, ids, gradient).to(logits.dtype), None


def _default_chunk(states: Tensor, head: Callable[[Tensor], Tensor]) -> int:
    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    return max(1, CHUNK_ELEMENTS // int(vocabulary))


def _probabilities(logprobs: Tensor, mask: Tensor) -> Tensor:
    return logprobs.exp() * mask


def _rest(probabilities: Tensor) -> Tensor:
    return (1 - probabilities.sum(-1)).clamp_min(FLOOR)


def _identity(states: Tensor) -> Tensor:
    return states


def divergence(kind: str | Divergence, known: Mapping[str, Divergence] = LOSSES) -> Divergence:
    """Return the divergence of a name, or the function itself; raises ConfigError for an unknown name."""
    if callable(kind):
        return kind
    if kind not in known:
        raise ConfigError(f"unknown loss {kind!r}; expected one of {', '.join(known)}, or a function")
    return known[kind]


def _check_shapes(hidden: Tensor, ids: Tensor, logprobs: Tensor, mask: Tensor, kept: Tensor) -> None:
    fits = (
        hidden.dim() == 3
        and kept.shape == hidden.shape[:2]
        and ids.dim() == 3
        and ids.shape[:2] == kept.shape
        and ids.shape == logprobs.shape == mask.shape
    )
    if not fits:
        raise DataError(
            "expected states (B, T, ...), fused ids, log-probabilities and mask (B, T, K) and a loss mask (B, T); "
            f"got {tuple(hidden.shape)}, {tuple(ids.shape)}, {tuple(logprobs.shape)}, {tuple(mask.shape)} and "
            f"{tuple(kept.shape)}"
        )
