"""Question f: a real language model as the source of a small target, on documentation."""

from pathlib import Path

import pandas

from fusion_lab.report import NOT_RUN, hypotheses, markdown, read
from fusion_lab.sections.fusellm import AMOUNTS
from fusion_lab.statistics import Mean, difference, mean, pm, rows_with, signed
from fusion_lab.world import Lab

QUESTION = "f_real_source"
#: name of a run -> the factors that tell it from the others
RUNS = {
    f"{name}lambda {weight:g}{told}": {
        "method": "fusion",
        "sources": source,
        "lm_loss_weight": weight,
        "fallback": fallback,
    }
    for name, source, weight, fallback, told in (
        ("fusion, ", "smollm2", 0.9, "mask", ""),
        ("fusion, ", "smollm2", 0.5, "mask", ""),
        ("fusion, ", "smollm2", 0.5, "next_label", ", next_label"),
        ("fusion, ", "smollm2", 0.1, "mask", ""),
        ("the target's own distributions, ", "own", 0.5, "mask", ""),
    )
}


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the table and the sentence of the question; it has no plot."""
    told, table = {"real-hypotheses": hypotheses(QUESTION)}, read(results, QUESTION)
    if table is None:
        return told | {"real": NOT_RUN, "real-sentence": NOT_RUN}
    best = table[table["of"] == "heldout"]
    rows = []
    for amount in AMOUNTS:
        here = best[best["amount"] == amount]
        clm = mean(here[here["method"] == "clm"]["bpb"].to_list())
        if clm.n:
            count = Lab("cpu", Path()).amount(amount)
            gains = [signed(_gain(here, name)) for name in RUNS]
            rows.append([f"{amount} ({count} texts)", pm(clm), *gains, clm.n])
    header = ["documentation", "without a source (CLM)", *(f"{name}, minus CLM" for name in RUNS), "seeds"]
    return told | {"real": markdown(header, rows), "real-sentence": _sentence(best)}


def _gain(here: pandas.DataFrame, name: str) -> Mean:
    return difference(here, rows_with(here, RUNS[name]), here["method"] == "clm", "bpb")


def _sentence(best: pandas.DataFrame) -> str:
    by_amount = {amount: here for amount in AMOUNTS if len(here := best[best["amount"] == amount])}
    mask, label = (
        "; ".join(f"{signed(_gain(here, name))} at {amount}" for amount, here in by_amount.items())
        for name in ("fusion, lambda 0.5", "fusion, lambda 0.5, next_label")
    )
    return (
        "Held-out documentation, fusion at lambda 0.5 with SmolLM2-135M as the only source minus training without it, "
        f"in bits per byte: with `fallback: mask` {mask}; with `next_label` {label}.\n"
    )
