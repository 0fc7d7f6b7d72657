"""Fused distributions of the positions that count, in the form that every loss works on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_plugins.errors import ConfigError, DataError


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

    @classmethod
    def none(cls, positions: Tensor) -> "FusedEntries":
        """Return no entries (N, 0) for N positions, given as any (N,) tensor: for a loss of the labels alone."""
        ids = positions.new_zeros((len(positions), 0), dtype=torch.long)
        return cls(ids, ids.float(), ids.bool())

    def __getitem__(self, part: slice) -> "FusedEntries":
        return FusedEntries(self.ids[part], self.logprobs[part], self.mask[part])

    @property
    def present(self) -> Tensor:
        """(N,) bool, which positions have a fused distribution."""
        return self.mask.any(-1)

    def most_probable(self) -> Tensor:
        """(N, 1) place of the most probable entry among the K; 0 where there is none."""
        if not self.ids.shape[-1]:
            return self.ids.new_zeros((len(self.ids), 1))
        return self.logprobs.masked_fill(~self.mask, float("-inf")).argmax(-1, keepdim=True)


def _tempered(logprobs: Tensor, mask: Tensor, temperature: float) -> Tensor:
    hidden = ~mask
    mass = logprobs.masked_fill(hidden, float("-inf")).logsumexp(-1, keepdim=True)
    scaled = logprobs / temperature
    normaliser = scaled.masked_fill(hidden, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.where(mask, scaled - normaliser + mass, 0.0)


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that count, as places in its B * T positions, those that count first.

    Attributes:
        rows: (N,) int64 places.
        dropped: (N,) bool, which of them do not count; None where all of them do.
    """

    rows: Tensor
    dropped: Tensor | None

    @classmethod
    def of(cls, kept: Tensor, at_most: int | None) -> "Positions":
        """Return the positions that a mask (B, T) keeps.

        Args:
            kept: (B, T) bool.
            at_most: at least as many as the mask keeps, known on the host: then no shape depends on data, and a GPU is
                not waited for. None asks the mask.
        """
        kept = kept.flatten()
        dropped = ~kept
        size = int(kept.sum()) if at_most is None else min(at_most, kept.numel())
        rows = dropped.int().argsort(stable=True)[:size]
        if at_most is None:
            return cls(rows, None)
        torch._assert_async(kept.sum() <= size, f"more positions count than the {size} that were announced")
        return cls(rows, dropped.index_select(0, rows))

    def take(self, values: Tensor) -> Tensor:
        """Return the rows of (B, T, ...) values: (N, ...)."""
        return values.flatten(0, 1).index_select(0, self.rows)

    def entries(self, ids: Tensor, logprobs: Tensor, mask: Tensor, temperature: float) -> FusedEntries:
        """Return the fused distributions (N, K) of (B, T, K) ones; a position that does not count has none."""
        taken = self.take(mask)
        if self.dropped is not None:
            taken = taken.bool() & ~self.dropped.unsqueeze(-1)
        return FusedEntries.of(self.take(ids), self.take(logprobs), taken, temperature)


def next_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of every position (B, T), that is the next token's, and which positions have one."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return following, following != -100


def check_shapes(hidden: Tensor, ids: Tensor, logprobs: Tensor, mask: Tensor, kept: Tensor) -> None:
    """Raise DataError unless all belong to the same (B, T) positions."""
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
