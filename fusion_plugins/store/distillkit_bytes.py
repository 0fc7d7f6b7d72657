"""How DistillKit packs the distributions of one position into bytes, and how to read them.

``exact_k`` values; the coefficients of a polynomial for the others; then bins of quantized residuals, each a scale and
its elements, packed from the highest bit on. With ``delta_encoding`` values are differences from the one before.
Indices are packed from the highest bit on, in ceil(log2(d)) bits each.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fusion_plugins.config import Settings
from fusion_plugins.core.arrays import FloatArray, IntArray
from fusion_plugins.errors import DataError

Bytes = npt.NDArray[np.uint8]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
CONFIG_NAME = "compression_config.yaml"
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ResidualBin(Settings):
    """One group of quantized residuals."""

    scale_dtype: Dtype = Field(description="type of the scale")
    element_bits: int = Field(ge=1, le=64, description="bits of an element")
    num_elements: int = Field(ge=1, description="number of elements")


class Compression(Settings):
    """DistillKit's ``logprob_compressor``."""

    d: int = Field(ge=2, description="size of the vocabulary")
    k: int = Field(ge=1, description="entries per position")
    exact_k: int = Field(ge=0, description="entries that are stored as numbers")
    exact_dtype: Dtype = Field("float32", description="their type")
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = Field(None, description="terms of the approximation")
    term_dtype: Dtype = Field("float32", description="type of their coefficients")
    residual_bins: list[ResidualBin] = Field(description="quantized residuals, in the order of the entries")
    delta_encoding: bool = Field(True, description="whether values are differences from the one before")
    error_diffusion: bool = Field(False, description="how they were rounded; of no matter here")
    normalize_t: bool = Field(False, description="whether the argument of the polynomial is mapped to 0 to 1")

    @model_validator(mode="after")
    def _check_counts(self) -> "Compression":
        if self.exact_k + sum(each.num_elements for each in self.residual_bins) > self.k:
            raise ValueError("expected exact_k and the elements of all bins to be at most k together")
        return self

    @property
    def index_bits(self) -> int:
        """Bits of one packed index."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def logprob_bytes(self) -> int:
        """Bytes of the log-probabilities of one position."""
        terms = len(self.polynomial_terms or ())
        bins = sum(_SIZES[e.scale_dtype] + -(-e.num_elements * e.element_bits // 8) for e in self.residual_bins)
        return self.exact_k * _SIZES[self.exact_dtype] + terms * _SIZES[self.term_dtype] + bins


def unpack_bits(packed: Bytes, bits: int, count: int) -> npt.NDArray[np.int64]:
    """Return (..., count) integers of that many bits each, out of (..., M) bytes, from the highest bit on.

    Example:
        >>> unpack_bits(np.array([[0b10100111, 0b10000000]], np.uint8), 3, 3).tolist()
        [[5, 1, 7]]
    """
    single = np.unpackbits(packed, axis=-1)[..., : count * bits].reshape(*packed.shape[:-1], count, bits)
    found = np.zeros(single.shape[:-1], np.int64)
    for place in range(bits):
        found = found << 1 | single[..., place]
    return found


def decode_logprobs(packed: Bytes, compression: Compression) -> FloatArray:
    """Return (T, K) float32 log-probabilities of (T, B) bytes, as they were packed, in the order of the entries.

    Raises:
        DataError: the number of bytes is not that of the settings.
    """
    _require_bytes(packed, compression.logprob_bytes, "compressed_logprobs")
    place, rows = 0, len(packed)

    def take(count: int, dtype: str) -> npt.NDArray[np.float64]:
        nonlocal place
        size = count * _SIZES[dtype]
        part = np.ascontiguousarray(packed[:, place : place + size])
        place += size
        return _numbers(part, dtype)

    exact = take(compression.exact_k, compression.exact_dtype)
    others = np.zeros((rows, compression.k - compression.exact_k))
    if compression.polynomial_terms:
        coefficients = take(len(compression.polynomial_terms), compression.term_dtype)
        others += coefficients @ _terms(compression, others.shape[1]).T
    start = 0
    for each in compression.residual_bins:
        scale = take(1, each.scale_dtype)
        size = -(-each.num_elements * each.element_bits // 8)
        levels = unpack_bits(packed[:, place : place + size], each.element_bits, each.num_elements)
        place += size
        signed = 2 * levels - 1 if each.element_bits == 1 else levels - (1 << (each.element_bits - 1))
        others[:, start : start + each.num_elements] += signed * scale
        start += each.num_elements
    values = np.concatenate([exact, others], axis=1)
    return (np.cumsum(values, axis=1) if compression.delta_encoding else values).astype(np.float32)


def decode(logprobs: Bytes, indices: Bytes, compression: Compression, vocab_size: int) -> tuple[IntArray, FloatArray]:
    """Return (T, K) ids and log-probabilities, by descending probability; -1 and -inf where there is no entry.

    The approximation may make entries sum to more than 1, or change their order: they are scaled down and sorted.

    Raises:
        DataError: the number of bytes is not that of the settings.
    """
    _require_bytes(indices, -(-compression.k * compression.index_bits // 8), "bytepacked_indices")
    ids = unpack_bits(indices, compression.index_bits, compression.k)
    values = decode_logprobs(logprobs, compression).astype(np.float64)
    there = np.isfinite(values) & (ids < vocab_size)
    values = np.where(there, values, -np.inf)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(values).sum(axis=1, keepdims=True))
    values = values - np.maximum(total, 0.0)
    ids = np.where(there, ids, -1)
    order = np.lexsort((ids, -values), axis=1)
    ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    return ids.astype(np.int32), values.astype(np.float32)


def _require_bytes(packed: Bytes, expected: int, column: str) -> None:
    if packed.ndim != 2 or packed.shape[1] != expected:
        got = packed.shape[1] if packed.ndim == 2 else "rows of different lengths"
        raise DataError(
            f"{column}: expected {expected} bytes per position by the settings of the compression, got {got}. Give the "
            f"{CONFIG_NAME} that the set was made with."
        )


def _numbers(packed: Bytes, dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return packed.view(f"<f{_SIZES[dtype]}").astype(np.float64)


def _terms(compression: Compression, count: int) -> npt.NDArray[np.float64]:
    """(count, terms): each term at every entry that is approximated."""
    points = np.linspace(0, 1, count) if compression.normalize_t else np.arange(count, dtype=np.float64)
    functions = {"sqrt": np.sqrt, "exp": np.exp}
    terms = compression.polynomial_terms or []
    return np.stack([functions[t](points) if isinstance(t, str) else points**t for t in terms], axis=1)
