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
    "fusion, lambda 0.9": {"method": "fusion", "sources": "smollm2", "lm_loss_weight": 0.9},
    "fusion, lambda 0.5": {"method": "fusion", "sources": "smollm2", "lm_loss_weight": 0.5},
    "fusion, lambda 0.1": {"method": "fusion", "sources": "smollm2", "lm_loss_weight": 0.1},
    "the target's own distributions, lambda 0.5": {"method": "fusion", "sources": "own", "lm_loss_weight": 0.5},
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
    told = [
        f"{signed(_gain(here, 'fusion, lambda 0.5'))} at {amount}"
        for amount in AMOUNTS
        if len(here := best[best["amount"] == amount])
    ]
    return (
        f"Held-out documentation, fusion at lambda 0.5 with SmolLM2-135M as the only source minus training without it, "
        f"in bits per byte: {'; '.join(told)}.\n"
    )
