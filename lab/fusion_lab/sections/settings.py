"""Question b: each level of each setting against the default, at the scarce amount."""

from pathlib import Path

import numpy as np
import pandas
import yaml

from fusion_lab.report import NOT_RUN, figure, forest, hypotheses, markdown, read, save
from fusion_lab.runner import QUESTIONS
from fusion_lab.statistics import Mean, difference, holm, mean, pm, rows_with, signed

#: factor -> the key that it is
KEYS = {
    "method": "(no fusion)",
    "rule": "`rule`",
    "metric": "`metric`",
    "top_k": "`top_k` of the capture",
    "loss": "`loss`",
    "vocabulary_map": "`projection.vocabulary_map`",
    "chain": "`projection.chain`",
    "tail": "`projection.tail`",
    "min_mass": "`projection.min_mass`",
    "fallback": "`projection.fallback`",
    "sources": "(sources)",
}


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the table and the sentence of the question."""
    table = read(results, "b_settings")
    told = {"settings-hypotheses": hypotheses("b_settings")}
    if table is None:
        return told | {"settings": NOT_RUN, "settings-sentence": NOT_RUN}
    best = table[table["of"] == "heldout"]
    values = yaml.safe_load((QUESTIONS / "b_settings.yml").read_text(encoding="utf-8"))
    base = {key: str(value) for key, value in values["base"].items()}
    text = best.astype({key: str for key in base})
    found = _compare(text, base)
    corrected = holm([gain for *_, gain, _, _ in found])
    _plot([(f"{key}: {level}", gain) for key, level, gain, _, _ in found], images / "lab_settings.svg")
    rows = [
        [
            f"{KEYS[key]}: {level}",
            signed(gain),
            "?" if np.isnan(p) else f"{p:.3f}",
            signed(docs),
            signed(sums),
        ]
        for (key, level, gain, docs, sums), p in zip(found, corrected, strict=True)
    ]
    default = mean(text[rows_with(text, base)]["bpb"].to_list())
    header = ["instead of the default", "mean, bits per byte", "p (Holm)", "docs", "sums"]
    head = f"The default: {pm(default)} bits per byte, {default.n} seeds. Each line: the level minus the default.\n\n"
    clear = [
        (gain.value < 0, f"{KEYS[key]}: {level} ({signed(gain)})")
        for (key, level, gain, _, _), p in zip(found, corrected, strict=True)
        if p < 0.05
    ]
    better, worse = ([name for gains, name in clear if gains is wanted] for wanted in (True, False))
    sentence = "![Differences from the default](images/lab_settings.svg)\n\n" + (
        f"After Holm's correction, better than the default: {'; '.join(better) or 'no level of any key'}. "
        f"Worse: {'; '.join(worse) or 'none'}. All other levels: no difference shown.\n"
    )
    return told | {
        "settings": head + markdown(header, rows),
        "settings-sentence": sentence,
    }


def _compare(table: pandas.DataFrame, base: dict[str, str]) -> list[tuple[str, str, Mean, Mean, Mean]]:
    found, default = [], rows_with(table, base)
    for key in KEYS:
        for level in sorted(set(table[key]) - {base[key]}):
            ours = rows_with(table, base | {key: level})
            if ours.any():
                gains = [difference(table, ours, default, column) for column in ("bpb", "bpb_docs", "bpb_sums")]
                found.append((key, level, *gains))
    return found


def _plot(found: list[tuple[str, Mean]], path: Path) -> None:
    picture, axes = figure(width=7, height=0.26 * len(found) + 0.8)
    forest(axes, found)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("bits per byte minus the default (left: better)")
    save(picture, path)
