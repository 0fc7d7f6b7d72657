"""Question c: merges against their base, their parents, and one target fused with all sources."""

from pathlib import Path

import pandas
from statsmodels.stats.proportion import proportion_confint

from fusion_lab.report import NOT_RUN, figure, forest, hypotheses, markdown, read, save
from fusion_lab.statistics import Mean, mean, pm, signed

NAMES = {
    "linear": "linear",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "fusechat_sce": "SCE",
    "varm:matrix": "VaRM, matrix (the default)",
    "varm:row": "VaRM, row",
    "varm:element": "VaRM, element",
    "varm:module": "VaRM, module",
    "varm:layer": "VaRM, layer",
    "varm:model": "VaRM, model",
}
AGAINST = ("base", "texts alone", "best parent", "mean of parents", "one target, all sources")


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the tables and the sentence of the question."""
    table = read(results, "c_merges")
    declared = {"merges-hypotheses": hypotheses("c_merges")}
    if table is None:
        return declared | dict.fromkeys(("merges-sentence", "merges", "merges-odds"), NOT_RUN)
    found = _gains(table)
    _plot(found, images / "lab_merges.svg")
    return declared | {
        "merges-sentence": "![Merges against their parents](images/lab_merges.svg)\n\n" + _sentence(found),
        "merges": _levels(table) + "\n" + _by_targets(found),
        "merges-odds": _odds(found),
    }


def _gains(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return one row per merge: its bits per byte minus those of what it is compared with."""
    rows = []
    # The target trained on the same texts without a source; it is also the fourth parent, and so is in those cells.
    alone = (
        table[(table["of"] == "parent") & (table["method"] == "none")].drop_duplicates("seed").set_index("seed")["bpb"]
    )
    for (targets, seed), cell in table.groupby(["targets", "seed"]):
        parents = cell[cell["of"] == "parent"]["bpb"]
        others = {
            "base": cell[cell["of"] == "base"]["bpb"].iloc[0],
            "texts alone": alone.get(seed, float("nan")),
            "best parent": parents.min(),
            "mean of parents": parents.mean(),
            "one target, all sources": cell[cell["of"] == "together"]["bpb"].iloc[0],
        }
        for merge in cell[cell["of"] == "merge"].to_dict("records"):
            gains = {name: merge["bpb"] - other for name, other in others.items()}
            rows.append({"targets": targets, "seed": seed, "method": merge["method"], **gains})
    return pandas.DataFrame(rows)


def _levels(table: pandas.DataFrame) -> str:
    """Return what is compared with: the base, each parent, and the target that is fused with all sources."""
    rows = []
    single = table[table["of"] != "merge"].drop_duplicates(["of", "method", "seed"])
    for (of, method), group in single.groupby(["of", "method"], sort=False):
        named = {"base": "base", "together": f"one target, {method}"}
        name = named.get(str(of), f"parent, {method}")
        figures = [pm(mean(group[column].to_list())) for column in ("bpb", "bpb_docs", "bpb_sums")]
        rows.append([name, *figures])
    return markdown(["model", "bits per byte", "docs", "sums"], rows)


def _by_targets(found: pandas.DataFrame) -> str:
    rows = []
    for targets, some in found.groupby("targets"):
        for method, name in NAMES.items():
            here = some[some["method"] == method]
            if len(here):
                gains = [signed(mean(here[other].to_list())) for other in AGAINST]
                rows.append([f"{targets} targets, {name}", *gains])
    return markdown(["merge", *(f"minus {other}" for other in AGAINST)], rows)


def _odds(found: pandas.DataFrame) -> str:
    rows = []
    for method, name in NAMES.items():
        here = found[found["method"] == method]
        cells = []
        for other in AGAINST:
            wins, n = int((here[other] < 0).sum()), len(here)
            low, high = proportion_confint(wins, n, method="wilson")
            cells.append(f"{wins} of {n} ({low:.0%} to {high:.0%})")
        if len(here):
            rows.append([name, *cells])
    return markdown(["merge", *(f"better than {other}" for other in AGAINST)], rows)


def _means(found: pandas.DataFrame, other: str) -> dict[str, Mean]:
    # A mean over numbers of targets first: a seed counts once.
    by_seed = found.groupby(["method", "seed"])[other].mean()
    return {method: mean(by_seed[method].to_list()) for method in NAMES if method in by_seed.index.get_level_values(0)}


def _sentence(found: pandas.DataFrame) -> str:
    gains = {other: _means(found, other) for other in AGAINST}
    best = min(gains["base"], key=lambda method: gains["base"][method].value)
    told = ", ".join(f"{signed(gains[other][best])} against the {other}" for other in AGAINST)
    wins = {other: int((found[other] < 0).sum()) for other in AGAINST}
    best_parent, together = wins["best parent"], wins["one target, all sources"]
    untaught = {n: int((some["texts alone"] < 0).sum()) for n, some in found.groupby("targets")}
    fair = ", ".join(f"{count} of the merges of {n} targets" for n, count in untaught.items())
    return (
        f"The best merge on average is {NAMES[best]}: in bits per byte (negative: the merge is better) {told}. Of all "
        f"{len(found)} merges, {wins['base']} are better than the base, {wins['mean of parents']} than the mean of "
        f"their parents, {best_parent} than their best parent, and {together} than one target fused with all "
        f"sources. Better than the target trained on the same texts without a source are {fair}. "
        f"{found['seed'].nunique()} seeds.\n"
    )


def _plot(found: pandas.DataFrame, path: Path) -> None:
    shown = ("mean of parents", "texts alone", "best parent", "one target, all sources")
    picture, axes = figure(len(shown), width=10, height=3.2, sharey=True)
    for panel, other in zip(axes, shown, strict=True):
        # DARE's would press the others together; the table has it.
        means = {method: gain for method, gain in _means(found, other).items() if method != "dare_linear"}
        forest(panel, [(NAMES[method], gain) for method, gain in means.items()])
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(f"minus {other}", fontsize=9)
        panel.set_xlabel("bits per byte")
    save(picture, path)
