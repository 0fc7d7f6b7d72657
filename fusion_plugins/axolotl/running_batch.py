"""The batch of the running forward pass: its labels, what the model is compared with, and its counts."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fusion_plugins.core.fusion.chunk_losses import Chunks


@dataclass(frozen=True)
class RunningBatch:
    """Labels (B, T) of the running forward pass, and what the model is compared with.

    Attributes:
        fused: ids and log-probabilities (B, T, K), or chunks (B, T).
        origin: (B, T) kept mass and number of the source of each position; None where that is unknown.
        at_most: positions that have a label, or more: a number of the host, which no GPU has to be waited for.
    """

    labels: Tensor
    fused: tuple[Tensor, Tensor] | Chunks
    origin: tuple[Tensor, Tensor] | None
    at_most: int

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """() positions with a label, () those of them with a fused distribution, and () the sum of its entropy, nats.

        The entropy is that of the stored entries; chunks have none.
        """
        positions = self.labels[:, 1:] != -100
        if isinstance(self.fused, Chunks):
            nothing = torch.full((), torch.nan, device=self.labels.device)
            return positions.sum(), self._fused_positions.sum(), nothing
        ids, logprobs = (values[:, :-1] for values in self.fused)
        entries = (ids >= 0) & torch.isfinite(logprobs) & positions.unsqueeze(-1)
        own = logprobs.masked_fill(~entries, 0.0)
        entropy = -(own.exp() * own).sum()
        return positions.sum(), entries.any(-1).sum(), entropy

    @property
    def _fused_positions(self) -> Tensor:
        """(B, T - 1) bool, the positions with a label and a fused distribution or a chunk."""
        found = self.fused.present if isinstance(self.fused, Chunks) else (self.fused[0] >= 0).any(-1)
        return (self.labels[:, 1:] != -100) & found[:, :-1]

    def of_chunks(self) -> Tensor:
        """(3,) sums over the positions in a chunk: 1 where one begins, is one token, is known to the sampler."""
        assert isinstance(self.fused, Chunks)
        first = self.fused.place[:, :-1] == 1
        alone = first & (self.fused.place[:, 1:] != 2)
        known = torch.isfinite(self.fused.sampled[:, :-1])
        return torch.stack([(found & self._fused_positions).sum() for found in (first, alone, known)]).float()

    def of_fused(self, sources: int) -> Tensor:
        """(1 + S,) sums over the positions with a fused distribution: kept mass, and 1 where a source teaches."""
        if self.origin is None:
            return torch.full((1 + sources,), torch.nan, device=self.labels.device)
        kept, source = (values[:, :-1] for values in self.origin)
        fused = self._fused_positions
        numbers = torch.arange(sources, device=source.device)
        taught = (source.unsqueeze(-1) == numbers) & fused.unsqueeze(-1)
        return torch.cat([(kept.float() * fused).sum().view(1), taught.sum((0, 1)).float()])
