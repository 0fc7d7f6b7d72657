"""What a model costs on held-out texts, and how sure that is."""

import math
from typing import NamedTuple

from fusion_plugins.core.arrays import FloatArray

#: standard errors on each side of a 95 % interval
Z = 1.959964


class PerByte(NamedTuple):
    """Nats over bytes, and the ends of its 95 % interval (NaN with fewer than two texts)."""

    value: float
    low: float
    high: float


def nats_per_byte(nats: FloatArray, n_bytes: FloatArray) -> PerByte:
    r"""Return the sum of nats over the sum of bytes, with the texts as the sample.

    ``r = sum(x) / sum(b)``; its variance is that of a ratio estimator, ``n / (n - 1) * sum((x - r b)^2) / sum(b)^2``
    (Cochran, Sampling Techniques, 1977, section 2.11). With the differences of two models on the same texts as ``nats``
    it is the interval of the paired difference.

    Args:
        nats: (N,) cross-entropy of each text.
        n_bytes: (N,) supervised bytes of each text, above 0.

    Example:
        >>> import numpy as np
        >>> [round(value, 3) for value in nats_per_byte(np.array([1.0, 3.0]), np.array([1.0, 1.0]))]
        [2.0, 0.04, 3.96]
    """
    total = float(n_bytes.sum())
    if not total:
        return PerByte(math.nan, math.nan, math.nan)
    ratio, count = float(nats.sum()) / total, len(nats)
    if count < 2:
        return PerByte(ratio, math.nan, math.nan)
    squares = float(((nats - ratio * n_bytes) ** 2).sum())
    half = Z * math.sqrt(count / (count - 1) * squares) / total
    return PerByte(ratio, ratio - half, ratio + half)
