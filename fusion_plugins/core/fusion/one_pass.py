"""Both losses of a linear output layer, and their gradients, in one pass over the vocabulary.

Every loss of this package depends on the logits z of a position only through ``l_k = z[id_k] - logsumexp(z)`` at the K
stored ids and the label. With ``c = dL/dl`` (K + 1 numbers) the gradient is

    dL/dz_v = sum_k c_k [v = id_k] - (sum_k c_k) softmax(z)_v

so each chunk of positions needs one product with the output layer's weight, a log-normaliser, a gather, the K + 1
coefficients (autograd on a small leaf, so that a registered loss works too), and two products back. Nothing runs again
in the backward pass, which multiplies what the forward pass has made by the incoming scalar. Where the model caps or
scales the output of the layer (:mod:`~fusion_plugins.core.fusion.logit_change`), the chain rule adds a factor.

A loss of whole chunks of the text (:mod:`~fusion_plugins.core.fusion.chunk_losses`) needs the label alone, K = 0. Its
chunks may lie across those of the pass; so each of these sees a few more positions on both sides, for their labels'
log-probabilities alone.

No shape depends on data, so a GPU is not waited for.

Letters as in :mod:`fusion_plugins.core.fusion.losses`: N positions, V vocabulary, H hidden size, K entries, and n the
positions of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusion_plugins.core.fusion.chunk_losses import ChunkLoss, Chunks
from fusion_plugins.core.fusion.divergences import Divergence, divergence, values_of
from fusion_plugins.core.fusion.entries import FusedEntries, Positions, check_shapes, next_labels
from fusion_plugins.core.fusion.logit_change import LogitChange
from fusion_plugins.errors import ConfigError

#: Logits held at once: 2**28 are 512 MB in bfloat16 and 1 GB in float32; both are there under autocast.
CHUNK_ELEMENTS = 2**28
#: Chunks have a multiple of this many positions, for the products.
ROWS = 128


class Sums(NamedTuple):
    """What one pass gives, each ().

    Attributes:
        total: ``lm_weight * lm + fusion_weight * fusion``, nats; it alone has a gradient. (N,) if asked for.
        lm: sum of the cross-entropies of the labels, nats.
        fusion: sum of the divergences from the fused distributions, nats.
        agreed: positions at which the model's most probable token is that of the fused distribution.
    """

    total: Tensor
    lm: Tensor
    fusion: Tensor
    agreed: Tensor


class Factors(NamedTuple):
    """States (M, H) and a weight (V, H), whose product is a part of the logits; without a weight they are the logits.

    The base of an output layer is one such pair, an adapter of low rank another, with H = rank.
    """

    states: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Terms:
    """What the loss of each position is.

    Attributes:
        positions: those that count.
        labels: (N,) token ids, any valid id where a position does not count; None without a language-model term.
        fused: (N, K).
        loss: divergence from the fused distributions, or a loss of chunks.
        weights: of the language-model term and the fusion term.
        chunks: (N,) of a loss of chunks, with which there are no entries; None for a divergence.
    """

    positions: Positions
    labels: Tensor | None
    fused: FusedEntries
    loss: Divergence | ChunkLoss
    weights: tuple[float, float]
    chunks: Chunks | None = None

    @property
    def around(self) -> int:
        """Positions before and after some others that their losses depend on."""
        return 0 if self.chunks is None else self.chunks.longest - 1

    def fusion(self, part: slice, logprobs: Tensor) -> Tensor:
        """Return the fusion term (n,) of some positions.

        Args:
            part: which.
            logprobs: (n, K + 1) of the trained model at the entries and the label.
        """
        if self.chunks is not None:
            return self.loss(logprobs[:, -1], self.chunks[part])
        fused = self.fused[part]
        entries = logprobs[:, : fused.ids.shape[-1]].masked_fill(~fused.mask, 0.0)
        return values_of(self.loss, entries, fused.logprobs.to(logprobs.dtype), fused.mask)


def chunk_rows(vocabulary: int) -> int:
    """Positions per chunk: as many as :data:`CHUNK_ELEMENTS` logits allow, in multiples of :data:`ROWS`."""
    return max(1, CHUNK_ELEMENTS // vocabulary // ROWS) * ROWS


def weighted_losses(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    fused: tuple[Tensor, Tensor] | Chunks,
    *,
    lm_weight: float,
    kind: str | Divergence | ChunkLoss = "ce",
    temperature: float = 1.0,
    chunk_size: int | None = None,
    change: LogitChange | None = None,
    low_rank: Sequence[tuple[Tensor, Tensor]] = (),
    at_most: int | None = None,
) -> Sums:
    """``lm_weight * LM + (1 - lm_weight) * fusion`` of a batch whose output layer is linear.

    The same as :func:`fusion_plugins.core.fusion.losses.token_losses` with ``head = x @ weight.T + bias``, in value and
    gradients, without running the output layer twice.

    Args:
        hidden: (B, T, H) last hidden states. Under autocast the products run in its dtype. Log-normalisers, losses, and
            the sum of the weight's gradient over the chunks are float32 (float64 for float64 states).
        weight: (V, H) of the output layer; None where ``hidden`` are the logits (B, T, V).
        bias: (V,) or None.
        labels: (B, T) token ids, -100 where not supervised; not shifted.
        fused: ids (B, T, K), -1 for an empty entry, and log-probabilities (B, T, K); or chunks (B, T).
        lm_weight: weight of the language-model loss, in [0, 1].
        kind: divergence, a name or a function of that form; with chunks a loss of chunks.
        temperature: of the fused distributions.
        chunk_size: positions per chunk; by default :func:`chunk_rows`.
        change: what the model does to the output of the layer.
        low_rank: states (B, T, r) and matrices (V, r) of adapters, whose products are added to the logits.
        at_most: positions that have a label, or more; see :meth:`Positions.of`.

    Returns:
        Sums over the positions that have a label.

    Raises:
        ConfigError: unknown kind, or a temperature that is not positive.
        DataError: shapes that do not belong together.
    """
    following, kept = next_labels(labels)
    positions = Positions.of(kept, at_most)
    following = positions.take(following)
    labels = following if positions.dropped is None else following.masked_fill(positions.dropped, 0)
    entries, chunks, loss = compared(hidden, fused, kept, positions, kind, temperature)
    terms = Terms(positions, labels, entries, loss, (lm_weight, 1 - lm_weight), chunks)
    factors = [Factors(hidden, weight), *(Factors(*pair) for pair in low_rank)]
    return one_pass(factors, bias, terms, chunk_size=chunk_size, change=change)


def compared(
    hidden: Tensor,
    fused: tuple[Tensor, Tensor] | Chunks,
    kept: Tensor,
    positions: Positions,
    kind: str | Divergence | ChunkLoss,
    temperature: float,
) -> tuple[FusedEntries, Chunks | None, Divergence | ChunkLoss]:
    """Return what the model is compared with at the positions that count, and the loss as a function.

    Raises:
        ConfigError, DataError: as in :func:`weighted_losses`.
    """
    if isinstance(fused, Chunks):
        fused.check(hidden)
        if not callable(kind):
            raise ConfigError(f"chunks: expected a loss of chunks, a function, got {kind!r}")
        return FusedEntries.none(positions.rows), fused.taken(positions), kind
    ids, logprobs = fused
    check_shapes(hidden, ids, logprobs, ids, kept)
    return positions.entries(ids, logprobs, ids >= 0, temperature), None, divergence(kind)


def one_pass(
    factors: Sequence[Factors],
    bias: Tensor | None,
    terms: Terms,
    *,
    chunk_size: int | None = None,
    change: LogitChange | None = None,
    by_position: bool = False,
) -> Sums:
    """Return the losses of a layer whose logits are the sum of products.

    Args:
        factors: states (B, T, H) and weights.
        bias: (V,) or None.
        terms: of the loss.
        chunk_size: positions per chunk; by default :func:`chunk_rows`.
        change: what the model does to the output of the layer.
        by_position: whether ``total`` is (N,). Then the weights and the bias must not need a gradient, because the
            positions are already summed up in it.
    """
    change = change or LogitChange()
    if change.width is not None:
        factors = [_first_tokens(pair, change.width) for pair in factors]
        bias = None if bias is None else bias[: change.width]
    states, weight = factors[0]
    vocabulary = states.shape[-1] if weight is None else weight.shape[0]
    settings = _Settings(
        terms, change, chunk_size or chunk_rows(vocabulary), by_position, differentiable=torch.is_grad_enabled()
    )
    tensors = [one for states, weight in factors for one in (states.flatten(0, 1), weight)]
    return Sums(*_OnePass.apply(settings, bias, *tensors))


def _first_tokens(pair: Factors, width: int) -> Factors:
    states, weight = pair
    return Factors(states[..., :width], None) if weight is None else Factors(states, weight[:width])


@dataclass(frozen=True)
class _Settings:
    terms: Terms
    change: LogitChange
    rows: int
    by_position: bool
    differentiable: bool


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, bias: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        terms, rows = settings.terms, settings.terms.positions.rows
        states = [one for one in tensors[::2] if one is not None]
        weights = tensors[1::2]
        dtype = _product_dtype(states[0], weights[0])
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = [needed and settings.differentiable for needed in ctx.needs_input_grad[1:]]
        gradients = _Gradients.zeros((bias, *tensors), wanted, dtype, sums)
        products = [None if weight is None else weight.to(dtype) for weight in weights]
        offsets = None if bias is None else bias.to(dtype)
        nothing = torch.zeros(0, dtype=sums, device=rows.device)
        found = [_Chunk(nothing, nothing, nothing)]
        # Autocast would cast the small tensors of the losses too.
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, rows.shape[0], settings.rows):
                part = slice(start, start + settings.rows)
                # With the positions around it, which belong to other chunks.
                wide = slice(max(0, start - terms.around), start + settings.rows + terms.around)
                inputs = [_taken(one, terms.positions, wide).to(dtype) for one in states]
                raw = _logits(inputs, products, offsets, settings.change.factor)
                chunk, slope = _chunk(raw, terms, wide, settings.change, sums, any(wanted))
                if slope is not None:
                    # In the place of the logits, which are no longer needed.
                    slope = slope if slope.dtype == dtype else raw.copy_(slope)
                if terms.around:
                    own = slice(start - wide.start, start - wide.start + settings.rows)
                    chunk, inputs = _Chunk(*(one[own] for one in chunk)), [one[own] for one in inputs]
                    slope = None if slope is None else slope[own]
                found.append(chunk)
                if slope is not None:
                    gradients.add(slope, inputs, products, rows[part])
        lm, fusion, agreed = (torch.cat(parts) for parts in zip(*found, strict=True))
        total = fusion if terms.labels is None else terms.weights[0] * lm + terms.weights[1] * fusion
        ctx.save_for_backward(*gradients.made())
        ctx.dtypes = [
            one.dtype if one is not None and needed else None
            for one, needed in zip((bias, *tensors), wanted, strict=True)
        ]
        ctx.rows = rows if settings.by_position else None
        results = total if settings.by_position else total.sum(), lm.sum(), fusion.sum(), agreed.sum()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        if ctx.rows is not None:
            (made,) = saved
            by_row = gradient.new_zeros(made.shape[0]).index_copy_(0, ctx.rows, gradient)
            return (None, *(None if dtype is None else (made * by_row.unsqueeze(-1)).to(dtype) for dtype in ctx.dtypes))
        scaled = (None if dtype is None else _scaled(next(saved), gradient, dtype) for dtype in ctx.dtypes)
        return (None, *scaled)


def _product_dtype(states: Tensor, weight: Tensor | None) -> torch.dtype:
    device = states.device.type
    if weight is None or not torch.is_autocast_enabled(device):
        return states.dtype
    return torch.get_autocast_dtype(device)


def _taken(states: Tensor, positions: Positions, part: slice) -> Tensor:
    """Return the rows of a chunk, zeros where a position does not count: what is there may be no number."""
    taken = states.index_select(0, positions.rows[part])
    return taken if positions.dropped is None else taken.masked_fill_(positions.dropped[part].unsqueeze(-1), 0)


def _logits(
    inputs: Sequence[Tensor], products: Sequence[Tensor | None], offsets: Tensor | None, factor: float
) -> Tensor:
    """Return ``factor * logits`` (n, V); the products take the factor with them."""
    first = products[0]
    if first is None:
        raw = inputs[0] if factor == 1 else inputs[0].mul_(factor)
    elif factor == 1:
        raw = torch.nn.functional.linear(inputs[0], first, offsets)
    elif offsets is None:
        raw = torch.addmm(inputs[0].new_zeros(1), inputs[0], first.t(), beta=0, alpha=factor)
    else:
        raw = torch.addmm(offsets * factor, inputs[0], first.t(), alpha=factor)
    for states, product in zip(inputs[1:], products[1:], strict=True):
        if product is not None:
            raw.addmm_(states, product.t(), alpha=factor)
    return raw


class _Chunk(NamedTuple):
    """Both terms (n,) and whether the most probable tokens agree (n,), 0 where a position does not count."""

    lm: Tensor
    fusion: Tensor
    agreed: Tensor


def _chunk(
    raw: Tensor, terms: Terms, part: slice, change: LogitChange, dtype: torch.dtype, with_slope: bool
) -> tuple[_Chunk, Tensor | None]:
    """Return the terms of a chunk and dL/draw (n, V). Works in the place of ``raw`` where that has the dtype."""
    fused = terms.fused[part]
    ids = fused.ids if terms.labels is None else torch.cat([fused.ids, terms.labels[part].unsqueeze(-1)], -1)
    shifted, bent = _below_highest(raw, change, dtype)
    at = shifted.gather(-1, ids)
    # One exponential per logit, in place: that is most of the time beside the products.
    mass = shifted.exp_().sum(-1, keepdim=True)
    dropped = None if terms.positions.dropped is None else terms.positions.dropped[part]
    lm, fusion, slopes = _terms(at - mass.log(), terms, part, dropped, with_slope)
    # 0 is the highest; of equally probable tokens each agrees.
    agreed = (at.gather(-1, fused.most_probable()).squeeze(-1) >= 0) & fused.present
    chunk = _Chunk(lm, fusion, agreed.to(dtype))
    if slopes is None:
        return chunk, None
    if change.scale != 1:
        slopes = slopes * change.scale
    # The exponentials over their sum are the probabilities.
    slope = shifted.mul_(slopes.sum(-1, keepdim=True).neg_().div_(mass)).scatter_add_(-1, ids, slopes)
    if bent is not None:
        slope.addcmul_(slope, bent.square_(), value=-1)  # the derivative of tanh is 1 - tanh ** 2
    return chunk, slope


def _below_highest(raw: Tensor, change: LogitChange, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return the model's logits less the highest of their position, and the tanh in them, of which the slope is made.

    In place as far as ``raw``, which has the factor of the change in it, has the dtype.
    """
    if change.cap is not None:
        bent = raw.to(dtype).tanh_()
        return (bent - bent.amax(-1, keepdim=True)).mul_(change.cap), bent
    highest = raw.amax(-1, keepdim=True)
    return (raw.sub_(highest) if raw.dtype == dtype else raw - highest.to(dtype)), None


def _terms(
    logprobs: Tensor, terms: Terms, part: slice, dropped: Tensor | None, with_slopes: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return both terms (n,), and the slopes dL/dl (n, K + 1)."""
    with torch.enable_grad():
        leaf = logprobs.requires_grad_(with_slopes)
        fusion = terms.fusion(part, leaf)
        lm = torch.zeros_like(fusion) if terms.labels is None else -leaf[:, -1]
        if dropped is not None:
            lm, fusion = (term.masked_fill(dropped, 0) for term in (lm, fusion))
        slopes = None
        if with_slopes:
            total = fusion if terms.labels is None else terms.weights[0] * lm + terms.weights[1] * fusion
            (slopes,) = torch.autograd.grad(total.sum(), leaf)
    return lm.detach(), fusion.detach(), slopes


@dataclass(frozen=True)
class _Gradients:
    """Gradients that the forward pass makes; None where none is wanted.

    That of a state is complete when its chunk is done; that of a weight is summed up over the chunks.
    """

    bias: Tensor | None
    states: list[Tensor | None]
    weights: list[Tensor | None]

    @classmethod
    def zeros(
        cls, tensors: Sequence[Tensor | None], wanted: Sequence[bool], dtype: torch.dtype, sums: torch.dtype
    ) -> "_Gradients":
        """Return zeros for a bias and pairs of states and weight."""
        bias, *pairs = [
            None if one is None or not needed else torch.zeros_like(one, dtype=dtype if number % 2 else sums)
            for number, (one, needed) in enumerate(zip(tensors, wanted, strict=True))
        ]
        return cls(bias, pairs[::2], pairs[1::2])

    def add(self, slope: Tensor, inputs: Sequence[Tensor], products: Sequence[Tensor | None], rows: Tensor) -> None:
        """Add a chunk, whose dL/dlogits (n, V) belong to some rows (n,) of the states."""
        for one, product, of_states, of_weight in zip(inputs, products, self.states, self.weights, strict=True):
            if of_states is not None:
                of_states.index_copy_(0, rows, slope if product is None else slope @ product)
            if of_weight is not None:
                _add_product(of_weight, slope, one)
        if self.bias is not None:
            self.bias.add_(slope.sum(0, dtype=self.bias.dtype))

    def made(self) -> list[Tensor]:
        """Return those that are wanted, in the order of the tensors."""
        pairs = [one for pair in zip(self.states, self.weights, strict=True) for one in pair]
        return [one for one in (self.bias, *pairs) if one is not None]


def _add_product(of_weight: Tensor, slope: Tensor, inputs: Tensor) -> None:
    """Add ``slope.T @ inputs`` to the float32 gradient of a weight."""
    if slope.dtype == of_weight.dtype:
        of_weight.addmm_(slope.t(), inputs)
    elif slope.is_cuda:
        torch.addmm(of_weight, slope.t(), inputs, out_dtype=of_weight.dtype, out=of_weight)
    else:
        of_weight += torch.mm(slope.t(), inputs)


def _scaled(made: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``made * factor`` in a dtype, without a copy in another."""
    return torch.mul(made, factor, out=torch.empty_like(made, dtype=dtype))
