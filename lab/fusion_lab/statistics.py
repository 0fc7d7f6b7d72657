"""Comparisons that are paired by seed: differences, 95 % intervals, and p-values corrected by Holm."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas
from scipy import stats
from statsmodels.stats.multitest import multipletests

__all__ = ["Mean", "difference", "holm", "mean", "pm", "rows_with", "signed"]

#: what a table shows where there is no seed
NOTHING = "\N{EN DASH}"


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
        value: the mean; nan without any seed.
        half: half of the 95 % interval of the mean (Student's t); nan with fewer than two seeds.
        p: two-sided p-value of the mean being 0; nan with fewer than two seeds.
        n: seeds.
    """

    value: float
    half: float
    p: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return bool(abs(self.value) > self.half)


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of values of independent seeds."""
    array = np.asarray(values, float)
    n = len(array)
    if n < 2:
        return Mean(float(array[0]) if n else float("nan"), float("nan"), float("nan"), n)
    error = float(stats.sem(array))
    if error == 0.0:
        return Mean(float(array.mean()), 0.0, 1.0 if array.mean() == 0 else 0.0, n)
    half = float(stats.t.ppf(0.975, n - 1) * error)
    return Mean(float(array.mean()), half, float(stats.ttest_1samp(array, 0.0).pvalue), n)


def rows_with(table: pandas.DataFrame, factors: Mapping[str, Any]) -> pandas.Series:
    """Return a boolean mask of the rows that have a value in each of some columns."""
    return pandas.Series(np.logical_and.reduce([table[key] == value for key, value in factors.items()]), table.index)


def difference(table: pandas.DataFrame, ours: pandas.Series, theirs: pandas.Series, column: str) -> Mean:
    """Return the mean of ``ours - theirs`` over the seeds that both have.

    Args:
        table: one row per cell; ``ours`` and ``theirs`` select rows, at most one per seed.
        ours: boolean mask.
        theirs: boolean mask.
        column: what is compared.
    """
    left, right = (table[mask].set_index("seed")[column] for mask in (ours, theirs))
    return mean((left - right).dropna().to_list())


def holm(values: Sequence[Mean]) -> list[float]:
    """Return the p-values of several comparisons, corrected by Holm's method; nan where there is none."""
    p = np.array([value.p for value in values])
    known = ~np.isnan(p)
    corrected = np.full(len(p), np.nan)
    if known.any():
        corrected[known] = multipletests(p[known], method="holm")[1]
    return [float(value) for value in corrected]


def pm(value: Mean, digits: int = 3, factor: float = 1.0) -> str:
    """Write a mean and half of its interval."""
    if not value.n:
        return NOTHING
    half = "?" if np.isnan(value.half) else f"{value.half * factor:.{digits}f}"
    return f"{value.value * factor:.{digits}f} ± {half}"


def signed(value: Mean, digits: int = 3, factor: float = 1.0) -> str:
    """Write a difference with its sign; in bold where the interval leaves out 0."""
    if not value.n:
        return NOTHING
    text = f"{value.value * factor:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    text += " ± ?" if np.isnan(value.half) else f" ± {value.half * factor:.{digits}f}"
    return f"**{text}**" if value.clear else text
