"""Figures of rewards that hold for all finite floats: no sum, difference or square on the way goes beyond the largest.

Rewards have the scale of whatever gave them. Where one is absurd, a report has to show it, and must not fail.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

_LARGEST = sys.float_info.max


def difference(first: float, second: float) -> float:
    """Return ``first - second``, at most the largest float.

    Example:
        >>> difference(1.5, 0.5), difference(1e308, -1e308) == sys.float_info.max
        (1.0, True)
    """
    return max(-_LARGEST, min(_LARGEST, first - second))


def mean(values: Sequence[float]) -> float:
    """Return the mean, of an exact sum where a float holds it; nan without values.

    Example:
        >>> mean([0.1] * 10), mean([1e308, 1e308])
        (0.1, 1e+308)
    """
    if not len(values):
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


def deviation(values: Sequence[float], ddof: int = 0) -> float:
    """Return the standard deviation, at most the largest float.

    Args:
        values: more than ``ddof``.
        ddof: 1 for that of a sample.

    Example:
        >>> deviation([1.0, 3.0]), deviation([1e200, 3e200]) == 1e200
        (1.0, True)
    """
    # A power of two changes no digit, and the squares of what is left are small.
    exponent = math.frexp(max(map(abs, values)))[1]
    scaled = float(np.std(np.ldexp(np.asarray(values, np.float64), -exponent), ddof=ddof))
    try:
        return math.ldexp(scaled, exponent)
    except OverflowError:
        return _LARGEST


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the quantiles of some values, linear between them.

    Args:
        values: at least one.
        shares: each in [0, 1].

    Example:
        >>> quantiles([0.0, 1.0, 4.0], [0.5, 0.75]), quantiles([-1e308, 1e308], [0.5])
        ([1.0, 2.5], [0.0])
    """
    return [float(value) * 4 for value in np.quantile(np.asarray(values, np.float64) / 4, shares)]
