"""Losses of whole chunks of a text: they need the label's log-probability and nothing else of the trained model.

What a chunk is, :mod:`fusion_plugins.core.fusion.chunks` says. A loss is a function of the label's log-probabilities
and :class:`Chunks`, marked with :func:`per_chunk`.

Letters: B batch, T tokens, N positions that have a label, one text after the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fusion_plugins.core.fusion.entries import Positions
from fusion_plugins.errors import ConfigError, DataError

ChunkLoss: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Chunks:
    """The chunks of a batch, by position: (B, T), or (N,) when the positions that count were taken out of it.

    Attributes:
        place: integer, place of the position in its chunk, from 1 on; 0 where it is in none. Those of a chunk follow
            one another.
        logprobs: float, log-probability of the position's whole chunk under the sources, nats.
        sampled: float, log-probability that the sampler gave the position's label, nats; NaN where that is unknown.
        longest: positions of the longest chunk, or more: a number of the host, which no GPU has to be waited for.
    """

    place: Tensor
    logprobs: Tensor
    sampled: Tensor
    longest: int

    @property
    def present(self) -> Tensor:
        """Bool, which positions are in a chunk."""
        return self.place > 0

    def __getitem__(self, part: slice) -> "Chunks":
        return Chunks(self.place[part], self.logprobs[part], self.sampled[part], self.longest)

    def taken(self, positions: Positions) -> "Chunks":
        """Return those (N,) of the positions that count, out of (B, T)."""
        place = positions.take(self.place)
        if positions.dropped is not None:
            place = place.masked_fill(positions.dropped, 0)
        return Chunks(place, positions.take(self.logprobs), positions.take(self.sampled), self.longest)

    def check(self, hidden: Tensor) -> None:
        """Raise DataError unless the chunks are those of (B, T, ...) states."""
        shapes = [tuple(one.shape) for one in (self.place, self.logprobs, self.sampled)]
        if hidden.dim() != 3 or any(shape != tuple(hidden.shape[:2]) for shape in shapes):
            raise DataError(f"expected chunks (B, T) of states (B, T, ...), got {shapes} and {tuple(hidden.shape)}")

    def sums(self, values: Tensor) -> Tensor:
        """Return, at each of n positions, the sum of (n,) values over its chunk; 0 where it is in none.

        A chunk whose first position is not among them has a sum of no meaning.
        """
        number = (self.place == 1).cumsum(0)
        inside = values.masked_fill(~self.present, 0)
        return inside.new_zeros(len(inside) + 1).index_add(0, number, inside)[number].masked_fill(~self.present, 0)


def per_chunk(loss: ChunkLoss) -> ChunkLoss:
    """Mark a loss that is called with the label's log-probabilities and :class:`Chunks` in the place of entries."""
    loss.per_chunk = True  # type: ignore[attr-defined]
    return loss


def is_per_chunk(loss: Any) -> bool:
    """Whether a loss, perhaps one with its options, is marked with :func:`per_chunk`."""
    return bool(getattr(getattr(loss, "func", loss), "per_chunk", False))


@per_chunk
def advantage(label_logprobs: Tensor, chunks: Chunks, *, clip: float = 10.0, ratio_clip: float | None = 0.2) -> Tensor:
    """Policy gradient of the reverse KL, on the model's own answers, chunk by chunk.

    With ``A = log p(chunk) - log pi(chunk)``, within ``[-clip, clip]``, and ``r = pi(chunk) / pi_sampling(chunk)``,
    at most ``1 + ratio_clip``, the gradient of a chunk is ``-A r grad log pi(chunk)``; neither A nor r
    has one of its own. Where the tokenizers are one, each token is a chunk, and this is the textbook advantage.

    The ratio has no lower bound. What the model has stopped saying must stop to count: with one, every pass over the
    same answers pushes them down as if they had just been sampled, and the model ends worse than it began.

    Args:
        label_logprobs: (n,) log-probabilities of the trained model, nats.
        chunks: (n,) of the same positions.
        clip: bound of the advantage, nats.
        ratio_clip: how far the ratio may be above 1; None for a ratio of 1. It is 1 where the sampler's log-probability
            of a token of the chunk is unknown.

    Returns:
        (n,) nats, ``-A r`` at the first position of each chunk and 0 elsewhere. While the ratio is 1 the sum over
        answers that the model has sampled estimates the reverse KL.

    Raises:
        ConfigError: bounds that are not positive.

    References:
        On-policy distillation: the advantage per token; Lightning OPD, arXiv 2604.13010: log-probabilities that were
        computed once.

    Example:
        >>> place, said = torch.tensor([1, 2, 1]), torch.tensor([-3.0, -3.0, -1.0])
        >>> chunks = Chunks(place, said, torch.full((3,), torch.nan), longest=2)
        >>> advantage(torch.tensor([-1.0, -1.5, -2.0]), chunks)
        tensor([ 0.5000,  0.0000, -1.0000])
    """
    if not clip > 0:
        raise ConfigError(f"clip: expected a number of nats above 0, got {clip!r}")
    if ratio_clip is not None and not ratio_clip > 0:
        raise ConfigError(f"ratio_clip: expected a number above 0, or none for a ratio of 1, got {ratio_clip!r}")
    of_chunk = chunks.sums(label_logprobs)
    own = of_chunk.detach()
    weight = (chunks.logprobs.to(own.dtype) - own).clamp(-clip, clip)
    if ratio_clip is not None:
        sampled = chunks.sums(chunks.sampled.to(own.dtype))
        # Clipped as a logarithm too: exp of a large number is none.
        log_ratio = torch.where(torch.isfinite(sampled), own - sampled, 0.0).clamp(-50, 50)
        weight = weight * log_ratio.exp().clamp(max=1 + ratio_clip)
    # 1 in value, and the gradient of log pi(chunk).
    surrogate = -weight * (1 + of_chunk - own)
    return surrogate.masked_fill(chunks.place != 1, 0)


CHUNK_LOSSES: Mapping[str, ChunkLoss] = {"advantage": advantage}
