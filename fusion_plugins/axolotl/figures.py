"""Figures of a training log or an evaluation: sums over positions and processes, divided once.

A mean of the means of micro-batches would weigh a position by the size of its batch, and count a batch without fused
positions as one without loss.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: What is summed over the positions. ``loss``, ``weight`` and ``router`` are values of a batch times its positions.
SUMS = ("loss", "lm", "fusion", "weight", "router", "positions", "fused_positions")


class Figures:
    """Sums of the batches since the last figures.

    The sums stay on the device, in float64 where it has that.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, **sums: Tensor | float) -> None:
        """Add the sums of one batch, by the names of :data:`SUMS`."""
        device = next(value.device for value in sums.values() if isinstance(value, Tensor))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([torch.as_tensor(sums[name], device=device).detach().to(dtype) for name in SUMS])
        self._sums = values if self._sums is None else self._sums + values

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the figures and start anew.

        Args:
            reduce: sums a tensor over the processes; all of them call this.
            device: of this process, for one that has seen no batch.

        Returns:
            ``loss``, ``lm_loss``, ``lm_weight`` and ``fusion_coverage`` (shares of all supervised positions; nats),
            ``ppl`` (exp of ``lm_loss``), ``fusion_loss`` (nats per position with a fused distribution) and
            ``router_loss`` (where the model has one). What no position has is left out.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(len(SUMS), device=device, dtype=dtype) if self._sums is None else self._sums
        self._sums = None
        total = dict(zip(SUMS, reduce(sums).tolist(), strict=True))
        positions, fused = total["positions"], total["fused_positions"]
        if not positions:
            return {}
        figures = {
            "loss": total["loss"] / positions,
            "lm_loss": total["lm"] / positions,
            "ppl": perplexity(total["lm"] / positions),
            "fusion_coverage": fused / positions,
            "lm_weight": total["weight"] / positions,
        }
        if fused:
            figures["fusion_loss"] = total["fusion"] / fused
        if total["router"]:
            figures["router_loss"] = total["router"] / positions
        return figures


def perplexity(lm_loss: float) -> float:
    """Return exp of the language-model loss; infinite where that is too large for a number."""
    try:
        return math.exp(lm_loss)
    except OverflowError:
        return math.inf
