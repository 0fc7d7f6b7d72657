"""SCE: select, calculate, erase. The merge of FuseChat 2.0, for one tensor, in the three variants that exist.

With ``delta[j] = tuned[j] - base`` and ``tau = select_topk``:

1. **Select** the elements whose variance over the models is among the largest, ``d[j] = mask * delta[j]``.
2. **Calculate** ``eta[j] = sum(d[j] ** 2) / sum_l sum(d[l] ** 2)``.
3. **Erase** the elements against the majority sign of ``sum_j d[j]``, which gives ``d'[j]``; a sum of 0 counts as
   positive.
4. **Update** ``base + sum_j eta[j] * d'[j]``.

==================================  ==============  ====================  ============================
..                                  paper           fusechat (released)   mergekit (its own ``sce``)
==================================  ==============  ====================  ============================
number selected, rounded down       tau * elements  tau * (variance > 0)  tau * (variance > 0)
unselected elements                 keep the base   are merged            keep the base
majority sign from                  selected        all deltas            selected
divided by the surviving ``eta``    no              yes                   yes
==================================  ==============  ====================  ============================

Two rules hold for all three. Elements of equal variance are selected in the order of their index. An element of
variance 0 is never selected, unless ``select_topk`` is 1, which turns the selection off. All thresholds are relative:
mergekit's ``sce`` compares with an absolute 1e-6, which gives light fine-tunes equal weights, and this module does not.
Differences are taken in float32 (float64 for float64 inputs) and summed in float64; variances are ranked in float32.

References:
    FuseChat: Knowledge Fusion of Chat Models, arXiv 2408.07990, algorithm 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fusion_plugins.core.merging.deltas import chunks, require_weights
from fusion_plugins.errors import ConfigError

VARIANTS = ("paper", "fusechat", "mergekit")


@dataclass(frozen=True)
class SceResult:
    """A merged tensor and its statistics.

    Attributes:
        merged: in the shape of the base.
        weights: (J,) float64 ``eta``, on the CPU; not finite if an input is not.
        values: (J,) float64, mean over the elements of the squared, selected deltas.
        selected: number of elements that the selection kept.
    """

    merged: Tensor
    weights: Tensor
    values: Tensor
    selected: int


def sce_merge(base: Tensor, tuned: Sequence[Tensor], *, select_topk: float = 1.0, variant: str = "paper") -> Tensor:
    """Merge one tensor with SCE.

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        select_topk: share of the elements to select, in [0, 1]; 1 turns the selection off.
        variant: one of :data:`VARIANTS`.

    Returns:
        The merged tensor in the dtype of the base.

    Raises:
        ConfigError: a setting is wrong.
        MergeError: a tensor holds codes in place of weights.

    Example:
        >>> base = torch.zeros(2)
        >>> sce_merge(base, [torch.tensor([3.0, 1.0]), torch.tensor([1.0, -1.0])])
        tensor([2.6667, 0.8333])
    """
    require_weights("(unnamed)", {"base": base, **{f"tuned[{index}]": tensor for index, tensor in enumerate(tuned)}})
    return sce(base, tuned, select_topk=select_topk, variant=variant).merged


def sce(
    base: Tensor,
    tuned: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    variant: str = "paper",
    dtype: torch.dtype | None = None,
) -> SceResult:
    """Merge one tensor with SCE and return the weights with it.

    Args:
        base: as for :func:`sce_merge`, as are the next three.
        tuned: J tensors.
        select_topk: share of the elements to select.
        variant: one of :data:`VARIANTS`.
        dtype: of the result; the base's by default.

    Raises:
        ConfigError: a setting is wrong.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"SCE: variant: expected one of {', '.join(VARIANTS)}; got {variant!r}")
    if not 0 <= select_topk <= 1:
        raise ConfigError(f"SCE: select_topk: expected a share between 0 and 1; got {select_topk!r}")
    flat = [tensor.reshape(-1) for tensor in (base, *tuned)]
    mask = None if select_topk == 1 else _select(flat, select_topk, of_all=variant == "paper")
    squares = torch.zeros(len(tuned), dtype=torch.float64)
    for where, _, deltas in _chunks(flat):
        kept = deltas if mask is None else deltas * mask[where]
        squares += kept.square().sum(dim=1).cpu()
    weights = _calculate(squares, equal_at_zero=variant == "fusechat")
    merged = torch.empty_like(flat[0], dtype=dtype)
    for where, anchor, deltas in _chunks(flat):
        # The released code selects for the weights only, and merges the deltas of all elements.
        if mask is not None and variant != "fusechat":
            deltas = deltas * mask[where]
        merged[where] = anchor + _erase(deltas, weights, divide=variant != "paper")
    selected = base.numel() if mask is None else int(mask.sum())
    return SceResult(merged.reshape(base.shape), weights, squares / max(base.numel(), 1), selected)


def _select(flat: Sequence[Tensor], share: float, *, of_all: bool) -> Tensor:
    """(N,) bool: the elements of largest variance over the models (population variance)."""
    variance = torch.empty(flat[0].shape, dtype=torch.float32, device=flat[0].device)
    for where, _, deltas in _chunks(flat):
        variance[where] = _variance(deltas)
    varied = int(torch.count_nonzero(variance))
    # A fraction of the decimal that the user wrote: 0.29 of 100 is 29, though 0.29 * 100 is 28.999...96.
    count = min(int(Fraction(repr(float(share))) * (variance.numel() if of_all else varied)), varied)
    if count == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    smallest = _kth_largest(variance, count)
    mask = variance > smallest
    # Elements that tie with the last selected one fill the remaining places in the order of their index.
    ties = (variance == smallest).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def _variance(deltas: Tensor) -> Tensor:
    """Population variance over the J models times J ** 2: (J, n) to (n,)."""
    # Without a division, equal variances of numbers of few bits, as in bfloat16, come out equal. The shift makes the
    # result exactly 0 where all models agree, and keeps the difference of the two sums above 1 / (J + 1) of the first.
    shifted = deltas - deltas[:1]
    return shifted.square().sum(dim=0).mul_(len(deltas)).sub_(shifted.sum(dim=0).square_())


def _kth_largest(values: Tensor, k: int) -> float:
    rank = values.numel() - k
    if values.device.type == "cpu":  # ten times faster than torch.kthvalue
        return float(np.partition(values.numpy(), rank)[rank])
    return float(torch.kthvalue(values, rank + 1).values)


def _calculate(squares: Tensor, *, equal_at_zero: bool) -> Tensor:
    """(J,) ``eta`` of (J,) sums of squares; where nothing changed: equal weights or zeros."""
    total = squares.sum()
    if not bool(total == 0):  # NaN comes through, and is refused by the caller
        return squares / total
    return torch.full_like(squares, 1 / len(squares)) if equal_at_zero else squares


def _erase(deltas: Tensor, weights: Tensor, *, divide: bool) -> Tensor:
    """Erase the elements against the majority sign and add up the others: (J, n) deltas, (J,) weights to (n,)."""
    sign = (deltas.sum(dim=0) >= 0).to(deltas) * 2 - 1
    # Times the sign, what agrees with the majority is positive: one clamp erases the rest.
    surviving = (deltas * sign).clamp_(min=0)
    weights = weights.to(deltas)
    update = (weights @ surviving) * sign
    if not divide:
        return update
    total = weights @ (surviving > 0).to(deltas)
    return update / torch.where(total == 0, 1.0, total)


def _chunks(flat: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the position of each chunk, the base's part (n,) and the deltas (J, n)."""
    for (_, where), (anchor, *others) in chunks([tensor.unsqueeze(0) for tensor in flat]):
        yield where, anchor[0], torch.cat(others) - anchor
