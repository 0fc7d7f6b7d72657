"""What a model does to the output of its output layer: soft-capping, scaling, leaving out padded tokens.

All known models that change their logits give ``cap * tanh(scale * z / cap)`` (Gemma), ``scale * z`` (Granite, Cohere,
Falcon-H1), or the first tokens of a padded vocabulary. Which of these, and with which numbers, is measured: known
numbers go in where the output layer's would, and what the model makes of them must be such a function, everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

#: What a function may differ by, relatively, from the measured values: float32's rounding, not bfloat16's.
TOLERANCE = 1e-5
#: Powers of two of the smallest and the largest number that goes in: one where a cap bends nothing, one where it binds.
REACH = 14


@dataclass(frozen=True)
class LogitChange:
    """``cap * tanh(scale * z / cap)`` of the first ``width`` logits; without a cap ``scale * z``.

    Attributes:
        scale: factor, which is also the derivative at 0.
        cap: bound that the logits cannot pass, or None.
        width: tokens that the model has; those of the output layer behind them are left out.
    """

    scale: float = 1.0
    cap: float | None = None
    width: int | None = None

    @property
    def is_none(self) -> bool:
        """Whether the logits are the output layer's."""
        return self == LogitChange(width=self.width)

    @property
    def factor(self) -> float:
        """What the logits are multiplied with before anything else."""
        return self.scale if self.cap is None else self.scale / self.cap

    def described(self) -> str:
        """Return it in words."""
        parts = [
            "" if self.cap is None else f"the model caps its logits at {self.cap:g}",
            "" if self.scale == 1 else f"the model scales its logits by {self.scale:g}",
            "" if self.width is None else f"the model has the first {self.width} tokens of the layer",
        ]
        return "; ".join(part for part in parts if part) or "the model returns the output of the layer"

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the model's logits (..., width) for those of its output layer (..., V)."""
        raw = raw[..., : self.width]
        if self.cap is not None:
            return self.cap * torch.tanh(raw * self.factor)
        return raw if self.scale == 1 else self.scale * raw


def probe_values(vocabulary: int, device: torch.device) -> Tensor:
    """(V,) float32 numbers that go in: both signs, far apart, and not representable in bfloat16.

    All of them differ, so that a change of certain tokens alone is noticed.
    """
    powers = torch.linspace(-REACH, REACH, vocabulary, dtype=torch.float64).exp2()
    signs = 1 - 2 * (torch.arange(vocabulary) % 2)
    between = 1 + 2**-9  # half of what bfloat16 has between 1 and the next number
    return (powers * signs * between).float().to(device)


def measured_change(given: Tensor, found: Tensor) -> LogitChange | None:
    """Return the change that makes ``found`` (at most V,) of ``given`` (V,), or None: it is another one."""
    width, found = found.numel(), found.double()
    if not 2 <= width <= given.numel() or not bool(torch.isfinite(found).all()):
        return None
    cut = None if width == given.numel() else width
    given = given[:width].double()
    low, high = given.abs().argmin(), given.abs().argmax()
    scale, bound = _without_rounding(float(found[low] / given[low])), abs(float(found[high]))
    if scale == 0 or bound == 0:
        return None
    # Without a cap the largest number has the same factor as the smallest.
    linear = bool(torch.isclose(found[high], scale * given[high], rtol=TOLERANCE, atol=0))
    change = LogitChange(scale, None if linear else _without_rounding(bound), cut)
    return change if bool(torch.isclose(change(given), found, rtol=TOLERANCE, atol=0).all()) else None


def _without_rounding(value: float) -> float:
    """Return the short decimal, or one over it, from which a value differs by float32's rounding; else the value."""
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}") if value else 0.0):
        if abs(value - candidate) <= 2e-7 * abs(candidate):
            return candidate
    return value
