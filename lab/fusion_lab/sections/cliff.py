"""The cliff: problems solved, by how a source that splits digits is brought to the target."""

from pathlib import Path

from fusion_lab.report import NOT_RUN, figure, forest, hypotheses, markdown, read, save
from fusion_lab.statistics import difference, mean, pm, signed

NAMES = {
    "clm": "no source (CLM)",
    "same": "twin with the target's tokenizer",
    "published_hard": "published alignment, hard (strict)",
    "published_soft": "published alignment, soft",
    "exact": "our offsets, exact map, no chain",
    "strict": "our strict offsets, exact map, no chain",
    "ours": "ours: offsets, first_token, chain (the default)",
    "one_to_many": "ours, one_to_many",
}


def make(results: Path, images: Path) -> dict[str, str]:
    """Return the table and the sentence."""
    table = read(results, "cliff")
    told = {"cliff-hypotheses": hypotheses("cliff")}
    if table is None:
        return told | {"cliff": NOT_RUN, "cliff-sentence": NOT_RUN}
    names = [name for name in NAMES if (table["method"] == name).any()]
    means = {name: mean(table[table["method"] == name]["chains"].to_list()) for name in names}

    def against(name: str, other: str) -> str:
        return signed(difference(table, table["method"] == name, table["method"] == other, "chains"), 1, 100)

    rows = [
        [
            NAMES[name],
            pm(means[name], 1, 100),
            pm(mean(table[table["method"] == name]["answers"].to_list()), 1, 100),
            pm(mean(table[table["method"] == name]["bpb_sums"].to_list())),
            "" if name == "clm" else against(name, "clm"),
            "" if name in ("clm", "same") else against(name, "same"),
        ]
        for name in names
    ]
    picture, axes = figure(height=0.3 * len(names) + 0.8)
    forest(axes, [(NAMES[name], means[name]) for name in names], 100)
    for name, colour in (("clm", "black"), ("same", "tab:green")):
        if name in means:
            axes.axvline(100 * means[name].value, color=colour, linewidth=0.8, linestyle=":")
    axes.set_xlabel("held-out problems with the right sums, %")
    save(picture, images / "lab_cliff.svg")
    header = ["how", "right sums, %", "right answer, %", "bits per byte", "minus CLM", "minus the twin"]
    share = {
        name: means[name].value / means["same"].value
        for name in ("ours", "one_to_many")
        if {name, "same"} <= set(means)
    }
    sentence = "![Problems solved by alignment](images/lab_cliff.svg)\n\n" + "".join(
        [
            f"Right sums, minus CLM, in points: twin with the target's own tokenizer {against('same', 'clm')}, "
            f"published strict alignment {against('published_hard', 'clm')}, published soft alignment "
            f"{against('published_soft', 'clm')}, ours {against('ours', 'clm')}, one_to_many "
            f"{against('one_to_many', 'clm')}.",
            *(f" {NAMES[name]} reaches {value:.2f} of the twin's share." for name, value in share.items()),
            f" {means['clm'].n} seeds.\n",
        ]
    )
    chance = (
        f"\nThe best constant answer solves {table['constant'].iloc[0]:.1%}, the target before training "
        + _before(results)
    )
    return told | {"cliff": markdown(header, rows) + chance, "cliff-sentence": sentence}


def _before(results: Path) -> str:
    world = read(results, "world")
    assert world is not None  # a world is measured before anything is asked in it
    return f"{world[world['of'] == 'target']['chains'].iloc[0]:.1%} with right sums.\n"
