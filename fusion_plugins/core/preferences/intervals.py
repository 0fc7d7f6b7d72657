"""Intervals of 95 % for shares and means."""

import math
from collections.abc import Sequence

from fusion_plugins.core.preferences.numbers import deviation, difference, mean

#: two-sided 95 %
_Z = 1.959964
Interval = tuple[float, float]
NO_INTERVAL = (math.nan, math.nan)


def wilson(share: float, count: float) -> Interval:
    """Return the 95 % interval of a share (Wilson's), both ends in [0, 1].

    Args:
        share: in [0, 1].
        count: size of the sample, above 0.

    Example:
        >>> [round(end, 3) for end in wilson(0.8, 10)], [round(end, 3) for end in wilson(0, 4)]
        ([0.49, 0.943], [0.0, 0.49])
    """
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # At the ends the formula gives 0 and 1, but for rounding.
    return (middle - half if share > 0 else 0.0), (middle + half if share < 1 else 1.0)


def interval_of_mean(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of a mean; nan with one value."""
    if len(values) < 2:
        return NO_INTERVAL
    middle, half = mean(values), _Z / math.sqrt(len(values)) * deviation(values, ddof=1)
    return difference(middle, half), difference(middle, -half)
