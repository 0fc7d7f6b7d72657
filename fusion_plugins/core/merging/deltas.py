"""Differences between a base and its fine-tuned copies, one tensor at a time, in little memory.

Both merges, :mod:`~fusion_plugins.core.merging.varm` and :mod:`~fusion_plugins.core.merging.sce`, use these. A tensor
is worked through in chunks of :data:`CHUNK_ELEMENTS` elements that are widened to float32 (float64 stays float64), so
that the scratch memory is a few MB whatever the size and dtype of the tensors. Sums over chunks are in float64.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_plugins.errors import MergeError

__all__ = [
    "CHUNK_ELEMENTS",
    "MEASURES",
    "chunks",
    "combine",
    "compute_dtype",
    "delta_sums",
    "measured",
    "require_finite",
]

MEASURES = ("square", "abs")
#: Elements of one tensor that are widened at a time: small enough to stay in the processor's cache.
CHUNK_ELEMENTS = 1 << 16
#: An accelerator takes so many times more at once: there a call costs more than the memory.
ACCELERATOR_FACTOR = 64
#: A sum of squares below this may have lost changes whose squares float32 cannot hold.
UNDERFLOW = 1e-30


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 if one of the tensors is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def measured(delta: Tensor, measure: str) -> Tensor:
    """Return ``delta ** 2`` ("square") or ``|delta|`` ("abs"), element by element."""
    return delta.square() if measure == "square" else delta.abs()


def chunks(
    views: Sequence[Tensor], *, whole_rows: bool = False, dtype: torch.dtype | None = None
) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, ...]]]:
    """Yield where a chunk lies and the chunk of every view.

    Args:
        views: (R, C) each, the base first.
        whole_rows: never divide a row.
        dtype: of the chunks; :func:`compute_dtype` by default.
    """
    rows, columns = views[0].shape
    dtype = dtype or compute_dtype(views)
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
    sums = _delta_sums(flat, measure, compute_dtype(flat))
    if compute_dtype(flat) == torch.float32 and base.device.type != "mps" and bool((sums < UNDERFLOW).any()):
        return _delta_sums(flat, measure, torch.float64)
    return sums


def combine(base: Tensor, tuned: Sequence[Tensor], weights: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``base + sum_j weights[j] * (tuned[j] - base)``.

    An element that no model changed is the base's, and a weight of 1 gives that model's tensor, bit for bit.

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        weights: (J,).
        dtype: of the result; the base's by default.
    """
    ranked = sorted(zip(weights.tolist(), tuned, strict=True), key=lambda pair: -pair[0])
    taken = [(share, tensor) for share, tensor in ranked if share != 0]
    if not taken:
        return base.to(dtype or base.dtype, copy=True)
    flat = [tensor.reshape(1, -1) for tensor in (base, *(tensor for _, tensor in taken))]
    merged = torch.empty_like(flat[0], dtype=dtype)
    (largest, _), *smaller = taken
    for where, (anchor, first, *others) in chunks(flat):
        slot = merged[where]
        total = torch.lerp(anchor, first, largest, out=slot if slot.dtype == anchor.dtype else None)
        for (share, _), other in zip(smaller, others, strict=True):
            total.add_(other - anchor, alpha=share)
        if total is not slot:
            slot.copy_(total)
    return merged.reshape(base.shape)


def _delta_sums(flat: Sequence[Tensor], measure: str, dtype: torch.dtype) -> Tensor:
    sums = torch.zeros(len(flat) - 1, dtype=torch.float64)
    for _, (anchor, *others) in chunks(flat, dtype=dtype):
        for index, other in enumerate(others):
            delta = (other - anchor).flatten()
            sums[index] += (torch.dot(delta, delta) if measure == "square" else delta.abs_().sum()).cpu()
    return sums


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
