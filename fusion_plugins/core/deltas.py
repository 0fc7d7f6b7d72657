"""Differences between a base and its fine-tuned copies, one tensor at a time, in float64 and in little memory.

Both merges, :mod:`fusion_plugins.core.varm` and :mod:`fusion_plugins.core.sce`, are written with these. A tensor is
worked through in chunks of :data:`CHUNK_ELEMENTS` elements that are widened to float64, so that the scratch memory is a
few MB whatever the size and dtype of the tensors.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_plugins.errors import MergeError

__all__ = [
    "CHUNK_ELEMENTS",
    "MEASURES",
    "accumulator_of",
    "chunks",
    "combine",
    "delta_sums",
    "measured",
    "require_finite",
]

MEASURES = ("square", "abs")
#: Elements of one tensor that are held in float64 at a time: small enough to stay in the processor's cache.
CHUNK_ELEMENTS = 1 << 17
#: An accelerator takes so many times more at once: there a call costs more than the memory.
ACCELERATOR_FACTOR = 32


def accumulator_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in on the tensor's device."""
    # Apple's GPUs have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def measured(delta: Tensor, measure: str) -> Tensor:
    """Return ``delta ** 2`` ("square") or ``|delta|`` ("abs"), element by element."""
    return delta.square() if measure == "square" else delta.abs()


def chunks(
    views: Sequence[Tensor], *, whole_rows: bool = False
) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, ...]]]:
    """Yield where a chunk lies and the chunk of every view, in the accumulator's dtype.

    Args:
        views: (R, C) each, the base first.
        whole_rows: never divide a row.
    """
    rows, columns = views[0].shape
    dtype = accumulator_of(views[0])
    limit = CHUNK_ELEMENTS * (1 if views[0].device.type == "cpu" else ACCELERATOR_FACTOR)
    width = columns if whole_rows else min(columns, limit)
    height = max(1, limit // max(width, 1))
    for top in range(0, rows, height):
        for left in range(0, columns, max(width, 1)):
            where = (slice(top, top + height), slice(left, left + width))
            yield where, tuple(view[where].to(dtype) for view in views)


def delta_sums(base: Tensor, tuned: Sequence[Tensor], measure: str = "square") -> Tensor:
    """Return the sum over the elements of ``|tuned[j] - base| ** p``, p = 2 ("square") or 1 ("abs").

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        measure: one of :data:`MEASURES`.

    Returns:
        (J,) float64 on the CPU.
    """
    flat = [tensor.reshape(1, -1) for tensor in (base, *tuned)]
    sums = torch.zeros(len(tuned), dtype=accumulator_of(base), device=base.device)
    for _, (anchor, *others) in chunks(flat):
        for index, other in enumerate(others):
            sums[index] += measured(other - anchor, measure).sum()
    return sums.cpu().double()


def combine(base: Tensor, tuned: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return ``base + sum_j weights[j] * (tuned[j] - base)``, in the dtype of the base.

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        weights: (J,).
    """
    flat = [tensor.reshape(1, -1) for tensor in (base, *tuned)]
    merged = torch.empty_like(flat[0])
    shares = weights.tolist()
    for where, (anchor, *others) in chunks(flat):
        total = anchor.clone()
        for share, other in zip(shares, others, strict=True):
            total.add_(other - anchor, alpha=share)
        merged[where] = total
    return merged.reshape(base.shape)


def require_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Args:
        name: of the parameter, for the message.
        tensors: model -> its tensor.

    Raises:
        MergeError: names the parameter and the first model whose tensor has such a value.
    """
    for model, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise MergeError(
                f"tensor {name!r} of model {model!r}: expected finite values; {bad} of {tensor.numel()} are NaN or "
                "infinite. The checkpoint is damaged or its training diverged: take another checkpoint of this model."
            )
    raise MergeError(f"tensor {name!r}: the differences between the models are too large for float64")
