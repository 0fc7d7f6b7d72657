"""Question a: curves over epochs, best against best by amount of text, and by compute."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from fusion_lab.report import figure, hypotheses, markdown, read, save
from fusion_lab.statistics import Mean, difference, mean, pm, signed
from fusion_lab.world import Lab

AMOUNTS = ("scarce", "few", "some", "plenty")
RUNS = {"CLM": None, "lambda 0.9": 0.9, "lambda 0.5": 0.5, "lambda 0.1": 0.1}
COLOURS = {"CLM": "black", "lambda 0.9": "tab:blue", "lambda 0.5": "tab:green", "lambda 0.1": "tab:red"}
#: how many trainings share one capture
SHARED = (1, 3, 10)


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the tables and the sentence of the question."""
    table = read(results, "a_fusellm")
    if table is None:
        return {}
    table = table.assign(run=_runs(table))
    best, curves = table[table["of"] == "heldout"], table[table["of"] == "validation"]
    _plot(curves, images / "lab_fusellm.svg")
    return {
        "fusellm-sentence": _sentence(best, curves),
        "fusellm-best": _best(best) + _before(results),
        "fusellm-domains": _domains(best),
        "fusellm-compute": _compute(curves),
        "fusellm-hypotheses": hypotheses("a_fusellm"),
    }


def _runs(table: pandas.DataFrame) -> pandas.Series:
    named = table["lm_loss_weight"].map(lambda weight: f"lambda {weight:g}")
    return named.where(table["method"] == "fusion", "CLM")


def _present(table: pandas.DataFrame) -> list[str]:
    return [amount for amount in AMOUNTS if (table["amount"] == amount).any()]


def _named(amount: str) -> str:
    """Return an amount with its number of rows."""
    count = Lab("cpu", Path()).amount(amount)
    return f"{amount} ({count} texts, {count} problems)"


def _gain(best: pandas.DataFrame, amount: str, run: str, column: str = "bpb") -> Mean:
    here = best["amount"] == amount
    return difference(best, here & (best["run"] == run), here & (best["run"] == "CLM"), column)


def _best(best: pandas.DataFrame) -> str:
    rows = []
    for amount in _present(best):
        here = best[best["amount"] == amount]
        clm = mean(here[here["run"] == "CLM"]["bpb"].to_list())
        gains = [signed(_gain(best, amount, run)) for run in RUNS if run != "CLM"]
        gains.append(signed(_gain(best, amount, "lambda 0.5", "chains"), 1, 100))
        rows.append([_named(amount), pm(clm), *gains, clm.n])
    compared = [f"{run} minus CLM" for run in RUNS if run != "CLM"]
    return markdown(["texts", "CLM", *compared, "right sums, points, lambda 0.5 minus CLM", "seeds"], rows)


def _before(results: Path) -> str:
    world = read(results, "world")
    assert world is not None  # a world is measured before anything is asked in it
    return f"\nThe target before any of these trainings: {world[world['of'] == 'target']['bpb'].iloc[0]:.3f}.\n"


def _domains(best: pandas.DataFrame) -> str:
    rows = []
    for amount in _present(best):
        for run in RUNS:
            here = best[(best["amount"] == amount) & (best["run"] == run)]
            if len(here):
                figures = [pm(mean(here[column].to_list())) for column in ("bpb_docs", "bpb_sums", "bpb")]
                chains = pm(mean(here["chains"].to_list()), 1, 100)
                rows.append([f"{amount}, {run}", *figures, chains, pm(mean(here["epoch"].to_list()), 1)])
    return markdown(["run", "docs", "sums", "mean", "right sums, %", "best epoch"], rows)


def _reached(curve: pandas.DataFrame, budget: float) -> float:
    """Return the lowest validation figure of a run within a budget of CPU seconds; nan where that is not known.

    A run that ended earlier says what it would have reached only if it had turned before its end.
    """
    turned = curve["bpb"].idxmin() != curve["epoch"].idxmax()
    if budget > curve["seconds"].max() and not turned:
        return float("nan")
    within = curve[curve["seconds"] <= budget + 1e-9]
    return float(within["bpb"].min()) if len(within) else float("nan")


def _compute(curves: pandas.DataFrame) -> str:
    """Compare at the seconds that fusion needs up to its best checkpoint, capture counted; CLM may take as many."""
    rows = []
    for amount in _present(curves):
        for run in list(RUNS)[1:]:
            pairs = list(_pairs(curves[curves["amount"] == amount], run))
            if pairs:
                cells = [cell for shared in SHARED for cell in _at_equal_compute(pairs, shared)]
                rows.append([f"{amount}, {run}", *cells])
    header = [word for n in SHARED for word in (f"seconds, capture / {n}", f"minus CLM, capture / {n}")]
    return markdown(["run", *header], rows)


def _pairs(curves: pandas.DataFrame, run: str) -> Iterator[tuple[pandas.DataFrame, pandas.DataFrame]]:
    """Yield the curves of a run and of CLM for every seed that has both."""
    for _, group in curves.groupby("seed"):
        ours, clm = group[group["run"] == run], group[group["run"] == "CLM"]
        if len(ours) and len(clm):
            yield ours, clm


def _at_equal_compute(pairs: Sequence[tuple[pandas.DataFrame, pandas.DataFrame]], shared: int) -> tuple[str, str]:
    best = [ours.loc[ours["bpb"].idxmin()] for ours, _ in pairs]
    budgets = [float(at["seconds"] + at["captured"] / shared) for at in best]
    reached = [_reached(clm, budget) for (_, clm), budget in zip(pairs, budgets, strict=True)]
    gains = [float(at["bpb"]) - value for at, value in zip(best, reached, strict=True) if not np.isnan(value)]
    text = signed(mean(gains)) + ("" if len(gains) == len(pairs) else f" ({len(gains)} of {len(pairs)} seeds)")
    return f"{np.mean(budgets):.1f}", text


def _turns(curves: pandas.DataFrame, amount: str, run: str) -> tuple[int, int]:
    """Return in how many of the seeds the lowest point is before the last one."""
    here = curves[(curves["amount"] == amount) & (curves["run"] == run)]
    ends = [group["epoch"].max() > group.loc[group["bpb"].idxmin(), "epoch"] for _, group in here.groupby("seed")]
    return sum(bool(end) for end in ends), len(ends)


def _sentence(best: pandas.DataFrame, curves: pandas.DataFrame) -> str:
    parts = [f"{signed(_gain(best, amount, 'lambda 0.5'))} at {_named(amount)}" for amount in _present(best)]
    present = [run for run in RUNS if ((curves["amount"] == "scarce") & (curves["run"] == run)).any()]
    turned = ["{} in {} of {}".format(run, *_turns(curves, "scarce", run)) for run in present]
    return (
        f"Fusion at lambda 0.5 minus training without it (CLM), best against best, in bits per byte (negative: fusion "
        f"is better; bold: the 95 % interval leaves out 0): {'; '.join(parts)}. At the scarce amount the lowest point "
        f"is before the last epoch for {', '.join(turned)} seeds.\n"
    )


def _plot(curves: pandas.DataFrame, path: Path) -> None:
    amounts = _present(curves)
    picture, axes = figure(max(len(amounts), 1), width=9, sharey=False)
    panels: Sequence[Any] = np.atleast_1d(axes)
    for panel, amount in zip(panels, amounts, strict=True):
        for run in RUNS:
            here = curves[(curves["amount"] == amount) & (curves["run"] == run)]
            if not len(here):
                continue
            grouped = here.groupby("epoch")["bpb"].apply(lambda values: mean(values.to_list()))
            middle = np.array([value.value for value in grouped])
            half = np.nan_to_num([value.half for value in grouped])
            panel.plot(grouped.index, middle, color=COLOURS[run], label=run, marker=".")
            panel.fill_between(grouped.index, middle - half, middle + half, color=COLOURS[run], alpha=0.15, linewidth=0)
        panel.set_title(amount)
        panel.set_xlabel("epoch")
    panels[0].set_ylabel("validation, bits per byte")
    panels[0].legend(frameon=False)
    save(picture, path)
