"""Differences between a base and its tuned models, one tensor at a time, with little memory.

Both merges, :mod:`~fusion_plugins.core.merging.varm` and :mod:`~fusion_plugins.core.merging.sce`, use these functions.
They process a tensor in chunks of :data:`CHUNK_ELEMENTS` elements and convert only the chunk to float32 (float64 stays
float64), so that the scratch memory is a few MB for any size and dtype. Sums over chunks are in float64.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fusion_plugins.errors import MergeError

MEASURES = ("square", "abs")
#: The dtypes of weights. Numbers of any other dtype are codes of a quantized checkpoint, indices or masks.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEQUANTIZE = "load the model in full precision (dequantized), save it, and merge the saved copy"
#: Elements of one tensor that are converted at a time: 256 kB in float32, so that a few chunks fit into the cache.
CHUNK_ELEMENTS = 1 << 16
#: Chunks on an accelerator are larger by this factor: there, starting a kernel costs more than the memory does.
ACCELERATOR_FACTOR = 64
#: float32 cannot hold squares below about 1e-45. A sum below this bound may have lost some of them.
UNDERFLOW = 1e-30


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def measured(delta: Tensor, measure: str) -> Tensor:
    """Return ``delta ** 2`` ("square") or ``|delta|`` ("abs"), element by element."""
    return delta.square() if measure == "square" else delta.abs()


def chunks(
    views: Sequence[Tensor], *, whole_rows: bool = False, dtype: torch.dtype | None = None
) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, ...]]]:
    """Yield the position of each chunk and that chunk of every view.

    Args:
        views: (R, C) each, the base first.
        whole_rows: never split a row.
        dtype: of the chunks; :func:`compute_dtype` by default.
    """
    rows, columns = views[0].shape
    dtype = dtype or compute_dtype(views)
    limit = CHUNK_ELEMENTS * (1 if views[0].device.type == "cpu" else ACCELERATOR_FACTOR)
    width = columns if whole_rows else min(columns, limit)
    # An empty tensor has a width of 0, which is no step for a range.
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
    dtype = compute_dtype(flat)
    sums = _delta_sums(flat, measure, dtype)
    # Repeat in float64 what float32 may have rounded to 0. MPS has no float64.
    if dtype == torch.float32 and base.device.type != "mps" and bool((sums < UNDERFLOW).any()):
        return _delta_sums(flat, measure, torch.float64)
    return sums


def combine(base: Tensor, tuned: Sequence[Tensor], weights: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``base + sum_j weights[j] * (tuned[j] - base)``.

    An element that no model changed is exactly the base's, and a weight of 1 gives exactly that model's tensor.

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        weights: (J,).
        dtype: of the result; the base's by default.
    """
    # The largest weight goes first, through lerp: at a weight of 1 lerp returns its second argument exactly, whereas
    # base + (tuned - base) is rounded twice.
    ranked = sorted(zip(weights.tolist(), tuned, strict=True), key=lambda pair: -pair[0])
    taken = [(weight, tensor) for weight, tensor in ranked if weight != 0]
    if not taken:
        return base.to(dtype or base.dtype, copy=True)
    flat = [tensor.reshape(1, -1) for tensor in (base, *(tensor for _, tensor in taken))]
    merged = torch.empty_like(flat[0], dtype=dtype)
    (largest, _), *smaller = taken
    for where, (anchor, first, *others) in chunks(flat):
        slot = merged[where]
        # Where the result has the dtype of the computation, compute in place and save a copy.
        total = torch.lerp(anchor, first, largest, out=slot if slot.dtype == anchor.dtype else None)
        for (weight, _), other in zip(smaller, others, strict=True):
            total.add_(other - anchor, alpha=weight)
        if total is not slot:
            slot.copy_(total)
    return merged.reshape(base.shape)


def require_weights(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose numbers cannot be averaged; a buffer that is the same in all models is not averaged.

    Args:
        name: of the parameter, for the message.
        tensors: model -> its tensor, the base first.

    Raises:
        MergeError: names the parameter and the first model whose tensor holds no weights.
    """
    coded = next((model for model, tensor in tensors.items() if tensor.dtype not in WEIGHT_DTYPES), None)
    first, *others = tensors.values()
    if coded is None or all(_same_bytes(first, other) for other in others):
        return
    raise MergeError(
        f"tensor {name!r} of model {coded!r}: expected weights in float64, float32, float16 or bfloat16, got "
        f"{tensors[coded].dtype} that differs between the models. Codes of a quantized checkpoint cannot be averaged: "
        f"{DEQUANTIZE}."
    )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    # As bytes, since torch cannot compare all of these dtypes.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.to(one.device).reshape(-1).view(torch.uint8))
    )


def require_finite(numbers: Tensor, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity in the inputs of a merge.

    NaN and infinity survive every sum, so the few numbers that a merge computes anyway tell whether an input has any.
    Only then are the inputs searched.

    Args:
        numbers: computed from all elements of all inputs.
        name: of the parameter, for the message.
        tensors: model -> its tensor.

    Raises:
        MergeError: names the parameter and the first model whose tensor has such a value.
    """
    if bool(torch.isfinite(numbers).all()):
        return
    for model, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise MergeError(
                f"tensor {name!r} of model {model!r}: expected finite values, got NaN or infinity in {bad} of "
                f"{tensor.numel()}. The checkpoint is damaged or its training diverged: use another checkpoint."
            )
    raise MergeError(
        f"tensor {name!r}: expected differences from the base whose measure is finite, got an overflow. Check that all "
        "models are tuned from this base: no fine-tuning changes a model that much."
    )


def _delta_sums(flat: Sequence[Tensor], measure: str, dtype: torch.dtype) -> Tensor:
    sums = torch.zeros(len(flat) - 1, dtype=torch.float64)
    for _, (anchor, *others) in chunks(flat, dtype=dtype):
        for index, other in enumerate(others):
            delta = (other - anchor).flatten()
            # dot squares and sums in one pass over the memory.
            sums[index] += (torch.dot(delta, delta) if measure == "square" else delta.abs_().sum()).cpu()
    return sums
