"""Figures of a training log or an evaluation: sums over positions and processes, divided once.

A mean of the means of micro-batches would weigh a position by the size of its batch, and count a batch without fused
positions as one without loss.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: what a batch gives: sums over its positions, their counts, and two values of the batch as a whole
SUMS = ("lm", "fusion", "positions", "fused_positions", "agreed", "entropy")
VALUES = ("weight", "router")


class Figures:
    """Sums of the batches since the last figures.

    The sums stay on the device, in float64 where it has that.

    Args:
        of_fused: names of figures that are means over the positions with a fused distribution.
    """

    def __init__(self, of_fused: Sequence[str] = ()) -> None:
        self._of_fused = tuple(of_fused)
        self._sums: Tensor | None = None

    def add(self, *, positions: Tensor, of_fused: Tensor | None = None, **given: Tensor | float) -> None:
        """Add one batch.

        Args:
            positions: () supervised positions.
            of_fused: (N,) sums over the positions with a fused distribution, as they were named.
            given: the other names of :data:`SUMS` and :data:`VALUES`, each () or a number.
        """
        dtype = _dtype(positions.device)
        given |= {"positions": positions}
        sums, values = (
            torch.stack([_on(positions.device, given[name], dtype) for name in names]) for names in (SUMS, VALUES)
        )
        weight, (lm, fusion) = values[0], sums[:2]
        # The weight of the language-model loss may change within the batches of one figure.
        loss = weight * lm + (1 - weight) * fusion
        more = sums.new_zeros(len(self._of_fused)) if of_fused is None else of_fused.detach().to(sums)
        added = torch.cat([sums, values * sums[2], loss.view(1), more])
        self._sums = added if self._sums is None else self._sums + added

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the figures and start anew.

        Args:
            reduce: sums a tensor over the processes; all of them call this.
            device: of this process, for one that has seen no batch.

        Returns:
            ``loss``, ``lm_loss``, ``lm_weight`` and ``fusion_coverage`` (shares of all supervised positions; nats),
            ``ppl`` (exp of ``lm_loss``), ``fusion_loss`` and ``fused_entropy`` (nats per position with a fused
            distribution), ``top1_agreement`` (share of these positions at which the model's most probable token is that
            of the fused distribution), what was named besides, and ``router_loss`` (where the model has one). What no
            position has is left out, and what is NaN (chunks have no entropy, and no most probable token).
        """
        names = (*SUMS, *VALUES, "loss", *self._of_fused)
        sums = torch.zeros(len(names), device=device, dtype=_dtype(device)) if self._sums is None else self._sums
        self._sums = None
        total = dict(zip(names, reduce(sums).tolist(), strict=True))
        positions, fused = total["positions"], total["fused_positions"]
        if not positions:
            return {}
        figures = {
            "loss": (total["loss"] + total["router"]) / positions,
            "lm_loss": total["lm"] / positions,
            "ppl": perplexity(total["lm"] / positions),
            "fusion_coverage": fused / positions,
            "lm_weight": total["weight"] / positions,
        }
        if fused:
            figures["fusion_loss"] = total["fusion"] / fused
            means = {"fused_entropy": "entropy", "top1_agreement": "agreed", **{name: name for name in self._of_fused}}
            figures |= {name: total[key] / fused for name, key in means.items() if not math.isnan(total[key])}
        if total["router"]:
            figures["router_loss"] = total["router"] / positions
        return figures


def perplexity(lm_loss: float) -> float:
    """Return exp of the language-model loss; infinite where that is too large for a number."""
    try:
        return math.exp(lm_loss)
    except OverflowError:
        return math.inf


def _on(device: torch.device, value: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Return a value (), without waiting for the device: a number becomes a filled tensor there, not a copy."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype)
    return torch.full((), value, device=device, dtype=dtype)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
