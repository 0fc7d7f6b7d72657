"""Question b: each level of each setting against the default, at the scarce amount."""

from pathlib import Path

import numpy as np
import pandas
import yaml

from fusion_lab.report import NOT_RUN, figure, hypotheses, markdown, read, save
from fusion_lab.runner import QUESTIONS
from fusion_lab.statistics import Mean, difference, holm, mean, pm, signed

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
    default = mean(_of(text, base)["bpb"].to_list())
    header = ["instead of the default", "mean, bits per byte", "p (Holm)", "docs", "sums"]
    head = f"The default: {pm(default)} bits per byte, {default.n} seeds. Each line: the level minus the default.\n\n"
    better = [
        f"{KEYS[k]}: {v} ({signed(g)})"
        for (k, v, g, _, _), p in zip(found, corrected, strict=True)
        if g.value < 0 and p < 0.05
    ]
    worse = [
        f"{KEYS[k]}: {v} ({signed(g)})"
        for (k, v, g, _, _), p in zip(found, corrected, strict=True)
        if g.value > 0 and p < 0.05
    ]
    sentence = "![Differences from the default](images/lab_settings.svg)\n\n" + (
        f"After Holm's correction, better than the default: {'; '.join(better) or 'no level of any key'}. "
        f"Worse: {'; '.join(worse) or 'none'}. All other levels: no difference shown.\n"
    )
    return told | {
        "settings": head + markdown(header, rows),
        "settings-sentence": sentence,
    }


def _of(table: pandas.DataFrame, factors: dict[str, str]) -> pandas.DataFrame:
    return table[np.logical_and.reduce([table[key] == value for key, value in factors.items()])]


def _compare(table: pandas.DataFrame, base: dict[str, str]) -> list[tuple[str, str, Mean, Mean, Mean]]:
    def mask(factors: dict[str, str]) -> pandas.Series:
        return pandas.Series(
            np.logical_and.reduce([table[key] == value for key, value in factors.items()]), table.index
        )

    found = []
    for key in KEYS:
        for level in sorted(set(table[key]) - {base[key]}):
            ours = mask(base | {key: level})
            if ours.any():
                gains = [difference(table, ours, mask(base), column) for column in ("bpb", "bpb_docs", "bpb_sums")]
                found.append((key, level, *gains))
    return found


def _plot(found: list[tuple[str, Mean]], path: Path) -> None:
    picture, axes = figure(width=7, height=0.26 * len(found) + 0.8)
    places = range(len(found), 0, -1)
    halves = [0 if np.isnan(gain.half) else gain.half for _, gain in found]
    axes.errorbar([gain.value for _, gain in found], places, xerr=halves, fmt="o", color="tab:blue", capsize=2)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(list(places), [name for name, _ in found])
    axes.set_xlabel("bits per byte minus the default (left: better)")
    save(picture, path)
