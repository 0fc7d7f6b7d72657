"""Divergence between the trained model and the fused distributions, without ever building a dense distribution.

The fused distribution at position ``t`` is compared with the logits at position ``t``: both describe token ``t + 1``,
so nothing is shifted here. Only the K stored ids of a position are looked up; with the log-normaliser of its logits
they give the student's true log-probabilities, and every divergence is a function of those.

The losses of logits and of a linear output layer are :mod:`~fusion_plugins.core.fusion.one_pass`. Any other layer is a
function here, which runs once more in the backward pass.

Letters: B batch, T tokens, V vocabulary, K entries per position, H hidden size, N positions that the loss mask keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion_plugins.core.fusion.chunk_losses import ChunkLoss, Chunks
from fusion_plugins.core.fusion.divergences import Divergence, cross_entropy, divergence, values_of
from fusion_plugins.core.fusion.entries import FusedEntries, Positions, check_shapes, next_labels
from fusion_plugins.core.fusion.one_pass import Factors, Terms, chunk_rows, compared, one_pass
from fusion_plugins.errors import ConfigError

Reduction: TypeAlias = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class TokenLosses:
    """What :func:`token_losses` returns, summed over the positions with a label.

    Attributes:
        lm: () sum of the cross-entropies of the next tokens, nats.
        fusion: () sum of the divergences from the fused distributions, nats.
        positions: () int64, positions with a label.
        fused_positions: () int64, those of them that have a fused distribution.
        agreed: () int64, those of them at which the most probable tokens of both are the same.
    """

    lm: Tensor
    fusion: Tensor
    positions: Tensor
    fused_positions: Tensor
    agreed: Tensor


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
        kind: a name of :data:`~fusion_plugins.core.fusion.divergences.LOSSES`, or a function of that form.
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
        None,
        fused_ids,
        fused_logprobs,
        fused_mask,
        loss_mask,
        kind=kind,
        temperature=temperature,
        reduction=reduction,
    )


def chunked_fusion_loss(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor] | Tensor | None,
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

    Positions that ``loss_mask`` drops never reach the head. For a head of another kind, and for a trained head with
    reduction "none", the backward pass computes the logits of a chunk again.

    Args:
        hidden: (B, T, H) last hidden states.
        head: maps (n, H) to logits (n, V); called once per chunk, so sharded weights are gathered by its own forward.
            Or the weight (V, H) of a linear head without bias, or None where ``hidden`` are the logits. With these, and
            with a linear layer, all is computed in one pass.
        fused_ids: as in :func:`fusion_loss`, like all that follow.
        fused_logprobs: (B, T, K).
        fused_mask: (B, T, K).
        loss_mask: (B, T).
        kind: divergence.
        temperature: of the fused distributions.
        reduction: mean, sum or none.
        chunk_size: positions per chunk; by default :func:`~fusion_plugins.core.fusion.one_pass.chunk_rows`.

    Returns:
        () or (B, T).

    Raises:
        ConfigError: as in :func:`fusion_loss`.
        DataError: as in :func:`fusion_loss`.
    """
    check_shapes(hidden, fused_ids, fused_logprobs, fused_mask, loss_mask)
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction: expected mean, sum or none, got {reduction!r}")
    kept = loss_mask.bool()
    positions = Positions.of(kept, None)
    fused = positions.entries(fused_ids, fused_logprobs, fused_mask, temperature)
    loss = divergence(kind)
    weight, bias = _linear(head)
    by_position = reduction == "none"
    if (weight is None and head is not None) or (by_position and _trained(weight, bias)):
        function = head if callable(head) else partial(nn.functional.linear, weight=head)
        values = _in_chunks(positions.take(hidden), function, None, fused, loss, chunk_size)[1]
        total = values if by_position else values.sum()
    else:
        terms = Terms(positions, None, fused, loss, (0.0, 1.0))
        total = one_pass([Factors(hidden, weight)], bias, terms, chunk_size=chunk_size, by_position=by_position).total
    if by_position:
        return total.new_zeros(kept.numel()).index_copy(0, positions.rows, total).view(kept.shape)
    return total / max(1, positions.rows.numel()) if reduction == "mean" else total


def _linear(head: Callable[[Tensor], Tensor] | Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of a head that is a linear layer and nothing more."""
    if isinstance(head, Tensor):
        return head, None
    # A subclass, a hook or a replaced forward pass may compute something else.
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if isinstance(head, nn.Linear) and plain and not head._forward_hooks and not head._forward_pre_hooks:
        return head.weight, head.bias
    return None, None


def _trained(weight: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (weight, bias))


def token_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor] | None,
    labels: Tensor,
    fused: tuple[Tensor, Tensor] | Chunks,
    *,
    kind: str | Divergence | ChunkLoss = "ce",
    temperature: float = 1.0,
    chunk_size: int | None = None,
    at_most: int | None = None,
) -> TokenLosses:
    """The language-model term and the fusion term of one batch, each with a gradient of its own, for any head.

    The head runs again in the backward pass; see :func:`fusion_plugins.core.fusion.one_pass.weighted_losses`.

    Position t counts when label t + 1 exists (is not -100); the last position never does.

    Args:
        hidden: (B, T, H) last hidden states, or (B, T, V) logits when ``head`` is None.
        head: maps (n, H) to (n, V).
        labels: (B, T) token ids, -100 where not supervised; not shifted.
        fused: ids (B, T, K), -1 for an empty entry, and log-probabilities (B, T, K); or chunks (B, T).
        kind: divergence, as in :func:`fusion_loss`; with chunks a loss of chunks.
        temperature: of the fused distributions.
        chunk_size: positions per chunk.
        at_most: positions that have a label, or more; see :meth:`Positions.of`.

    Returns:
        Sums and counts; the caller divides, by the tokens of the whole global batch.

    Raises:
        ConfigError: as in :func:`fusion_loss`.
        DataError: as in :func:`fusion_loss`.
    """
    following, kept = next_labels(labels)
    positions = Positions.of(kept, at_most)
    entries, chunks, loss = compared(hidden, fused, kept, positions, kind, temperature)
    states = positions.take(hidden)
    dropped = positions.dropped
    if dropped is not None:
        states = states.masked_fill(dropped.unsqueeze(-1), 0)
    if head is None:
        head, chunk_size = _identity, max(1, states.shape[0])
    wanted = positions.take(following).clamp_min(0)
    # A loss of chunks is one of the labels' log-probabilities, so it needs no entries and no part of the pass.
    by_position = loss if chunks is None else cross_entropy
    lm, fusion, agreed = _in_chunks(states, head, wanted, entries, by_position, chunk_size)
    if chunks is not None:
        fusion = loss(-lm, chunks)
    if dropped is not None:
        lm, fusion = (term.masked_fill(dropped, 0) for term in (lm, fusion))
    present = entries.present if chunks is None else chunks.present
    return TokenLosses(lm.sum(), fusion.sum(), kept.sum(), present.sum(), agreed.sum())


def _in_chunks(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor | None,
    fused: FusedEntries,
    loss: Divergence,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) language-model terms (zeros without labels), fusion terms, and whether the most probable tokens agree."""
    size = chunk_size or _default_chunk(states, head)
    # Without positions there is still one, empty, part: the zero needs a gradient, and every rank must call the head.
    parts = [slice(start, start + size) for start in range(0, max(1, states.shape[0]), size)]
    found = []
    for part in parts:
        wanted = None if labels is None else labels[part]
        arguments = (states[part], head, wanted, fused[part], loss)
        terms = (
            _position_terms(*arguments)
            if len(parts) == 1
            else checkpoint(_position_terms, *arguments, use_reentrant=False)
        )
        found.append(terms)
    lm, fusion, agreed = (torch.cat(terms) for terms in zip(*found, strict=True))
    return lm, fusion, agreed


def _position_terms(
    states: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor | None, fused: FusedEntries, loss: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    width = fused.ids.shape[-1]
    ids = fused.ids if labels is None else torch.cat([fused.ids, labels.unsqueeze(-1)], -1)  # (n, K or K + 1)
    logits = head(states)
    logprobs = _LogprobsAt.apply(logits, ids)
    student = logprobs[:, :width].masked_fill(~fused.mask, 0.0)
    fusion = values_of(loss, student, fused.logprobs.to(logprobs.dtype), fused.mask)
    with torch.no_grad():
        at = logits.gather(-1, ids.gather(-1, fused.most_probable()))
        agreed = (at >= logits.amax(-1, keepdim=True)).squeeze(-1) & fused.present
    return (torch.zeros_like(fusion) if labels is None else -logprobs[:, width]), fusion, agreed


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
    return chunk_rows(vocabulary)


def _identity(states: Tensor) -> Tensor:
    return states
