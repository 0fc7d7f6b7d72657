"""Who teaches a position: a source, or one of three words that counts, records and pages have in common."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray

#: sources that teach a position together; a fallback that teaches the next token itself; nobody
SEVERAL, LABEL, NOTHING = "(several sources)", "(the label)", "(no source)"


def teacher_names(sources: Sequence[str]) -> list[str]:
    """Return what the numbers of :func:`teacher_numbers` mean, given the names of the sources."""
    return [*sources, SEVERAL, LABEL, NOTHING]


def teacher_numbers(
    present: BoolArray, source: npt.NDArray[np.signedinteger[Any]], kept: FloatArray, sources: int
) -> IntArray:
    """Return who teaches each of N positions, as (N,) numbers into :func:`teacher_names`.

    Args:
        present: (N,) bool, the positions that have a distribution.
        source: (N,) number of the source that teaches the position; -1 where no single one does.
        kept: (N,) mass that the distribution has from the sources; 0 where a fallback made it of the label.
        sources: how many there are.

    Example:
        >>> present, source, kept = np.arange(4) < 3, np.array([1, -1, -1, -1]), np.array([1, 1, 0, 0])
        >>> [teacher_names(["a", "b"])[number] for number in teacher_numbers(present, source, kept, 2)]
        ['b', '(several sources)', '(the label)', '(no source)']
    """
    several, label, nothing = range(sources, sources + 3)
    without_one = np.where(np.asarray(kept) > 0, several, label)
    return np.where(present, np.where(np.asarray(source) >= 0, source, without_one), nothing)
