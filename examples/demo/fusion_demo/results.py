"""What came out: ``results.md``, ``results.json`` and ``results.svg`` from the figures of all models.

Differences are paired by seed: two models of a seed saw the same texts, problems and answers.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusion_lab.report import figure, forest, markdown, save
from fusion_lab.statistics import Mean, holm, mean, pm, signed
from fusion_lab.world import read_rows
from statsmodels.stats.proportion import proportion_confint

from fusion_demo.chain import MODELS

__all__ = ["write_results"]

Scores = dict[str, dict[str, float]]
NAMES = {
    "numbers": "source `numbers` (Mistral, SentencePiece, whole numbers)",
    "digits": "source `digits` (Qwen2, byte-level, single digits)",
    "docs": "source `docs` (GPT-NeoX, 2,048 byte-level tokens)",
    "target": "target, before (Llama, 1,024 byte-level tokens)",
    "clm": "CLM: trained on without fusion",
    "fusellm": "FuseLLM: all sources, lambda 0.5",
    "pair_numbers": "FuseChat: fused with `numbers`",
    "pair_docs": "FuseChat: fused with `docs`",
    "merged": "FuseChat: the two merged, VaRM",
    "sft": "FuseChat-3.0: SFT on best answers, half of the problems",
    "dpo": "FuseChat-3.0: then LN-DPO on pairs, the other half",
    "sft_all": "SFT on best answers, all problems",
}
PAIRS = ("pair_numbers", "pair_docs")
BITS, SUMS = "bpb", "chains"
COLUMNS = {"bpb_docs": "docs", "bpb_sums": "sums", BITS: "mean"}


class Comparison(NamedTuple):
    """One model less another, or less several.

    Attributes:
        title: what is compared.
        ours, theirs: names of models; ``best`` and ``mean`` are of the pairs.
        by: what it is judged by.
    """

    title: str
    ours: str
    theirs: str
    by: str


COMPARED = (
    Comparison("FuseLLM minus CLM", "fusellm", "clm", BITS),
    Comparison("VaRM merge minus the target before", "merged", "target", BITS),
    Comparison("VaRM merge minus the mean of its parents", "merged", "mean", BITS),
    Comparison("VaRM merge minus its best parent", "merged", "best", BITS),
    Comparison("VaRM merge minus one target with all sources", "merged", "fusellm", BITS),
    Comparison("SFT on best answers minus the target before", "sft", "target", SUMS),
    Comparison("LN-DPO after it minus SFT", "dpo", "sft", SUMS),
    Comparison("SFT on all problems minus LN-DPO after half", "sft_all", "dpo", SUMS),
)


def write_results(folder: Path) -> None:
    """Write the three files into the folder of the chain."""
    world, *seeds = _scores(folder / "scores")
    for scores in seeds:
        parents = [scores[name] for name in PAIRS]
        scores["best"] = min(parents, key=lambda parent: parent[BITS])
        scores["mean"] = {key: sum(parent[key] for parent in parents) / len(parents) for key in parents[0]}
        scores["target"] = world["target"]
    problems = sum("gold" in row for row in read_rows(folder / "world" / "data" / "heldout.jsonl"))
    parts = [_levels(world, seeds, problems), _chance(world, len(seeds), problems), _compared(seeds), _times(folder)]
    (folder / "results.md").write_text("\n".join(parts), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({"world": world, "seeds": seeds}, indent=1), encoding="utf-8")
    _plot(seeds, folder / "results.svg")


def _scores(folder: Path) -> list[Scores]:
    """Return the figures of the world's models, then those of every seed."""
    seeds = sorted((path for path in folder.glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "world.json", *seeds)]


def _levels(world: Scores, seeds: Sequence[Scores], problems: int) -> str:
    """Return the table of all models: one model of the world has an interval over problems, the others over seeds."""
    rows = []
    for name, figures in world.items():
        shares = [_over_problems(figures[key], problems) for key in (SUMS, "answers")]
        rows.append([NAMES[name], *(f"{figures[key]:.3f}" for key in COLUMNS), *shares, f"{figures['luck']:.1%}"])
    # The sources in the order of the names; the target last, before what is made of it.
    rows.sort(key=lambda row: list(NAMES.values()).index(row[0]))
    for name in MODELS:
        bits = [pm(mean([scores[name][key] for scores in seeds])) for key in COLUMNS]
        shares = [pm(mean([scores[name][key] for scores in seeds]), 1, 100) for key in (SUMS, "answers")]
        luck = sum(scores[name]["luck"] for scores in seeds) / len(seeds)
        rows.append([NAMES[name], *bits, *shares, f"{luck:.1%}"])
    return markdown(["model", *COLUMNS.values(), "right sums, %", "right answer, %", "luck"], rows)


def _over_problems(share: float, problems: int) -> str:
    """Write a share of problems with its interval (Wilson)."""
    low, high = proportion_confint(round(share * problems), problems, method="wilson")
    return f"{share:.1%} ({low:.1%} to {high:.1%})".replace("%", "")


def _chance(world: Scores, seeds: int, problems: int) -> str:
    constant = world["target"]["constant"]
    return (
        f"**Chance: the best constant answer solves {constant:.1%}** of the {problems} held-out problems. *docs*, "
        "*sums* and *mean* are bits per byte of held-out texts, lower is better. *Right sums*: the right number, and "
        "exactly the sums of the problem. *Luck*: right numbers if the same answers were dealt to other problems. "
        f"\N{PLUS-MINUS SIGN} is half of a 95 % interval over seeds ({seeds}: texts, problems, answers and their "
        "order); in brackets a 95 % interval over the problems.\n"
    )


def _differences(seeds: Sequence[Scores], one: Comparison, key: str) -> Mean:
    return mean([scores[one.ours][key] - scores[one.theirs][key] for scores in seeds])


def _compared(seeds: Sequence[Scores]) -> str:
    """Return the table of differences, and what each says."""
    judged = [_differences(seeds, one, one.by) for one in COMPARED]
    rows = []
    for one, main, p in zip(COMPARED, judged, holm(judged), strict=True):
        bits = [signed(_differences(seeds, one, key)) for key in COLUMNS]
        rows.append([one.title, *bits, signed(_differences(seeds, one, SUMS), 1, 100), *_verdict(one, main, p)])
    judged_by = "judged by *mean*, those of FuseChat-3.0 by *right sums*"
    return (
        markdown(["difference", *COLUMNS.values(), "right sums, points", "p (Holm)", "says"], rows)
        + f"\nPaired by seed, 95 % intervals, bold where they leave out 0; {judged_by}. The best parent is chosen on "
        "the held-out texts, in its favour.\n"
    )


def _verdict(one: Comparison, main: Mean, p: float) -> tuple[str, str]:
    """Return the corrected p-value and what the difference says, in words."""
    if not p <= 1:  # one seed
        return "?", "nothing: one seed"
    if p >= 0.05:
        return f"{p:.3f}", "no difference shown"
    better = main.value > 0 if one.by == SUMS else main.value < 0
    return f"{p:.3f}", "better" if better else "worse"


def _times(folder: Path) -> str:
    """Return what each kind of step took, from the records of the chain."""
    spent: dict[str, list[float]] = defaultdict(list)
    for record in _records(folder):
        words = record["command"]
        kind = " ".join(words[:2]) if words[0] in ("axolotl", "fusion") else words[0]
        spent[f"step.py {words[2]}" if kind == "python" else kind].append(record["seconds"])
    rows = [[f"`{kind}`", len(seconds), f"{sum(seconds):.0f}"] for kind, seconds in spent.items()]
    return markdown(["command", "times", "seconds, together"], rows)


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / ".fusion_run" / "fusion").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["done"]:
            yield record


def _plot(seeds: Sequence[Scores], path: Path) -> None:
    picture, axes = figure(2, width=9, height=2.4)
    for panel, by, factor, unit in zip(axes, (BITS, SUMS), (1, 100), ("bits per byte", "points"), strict=True):
        found = [(one.title, _differences(seeds, one, by)) for one in COMPARED if one.by == by]
        forest(panel, found, factor)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_xlabel(f"{'mean' if by == BITS else 'right sums'}, {unit}")
    picture.set_size_inches(11, 2.4)
    save(picture, path)
