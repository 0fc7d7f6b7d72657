"""Last step: one table, on the terminal and as Markdown, the same numbers as JSON, and one plot."""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusion_demo.plan import EVALUATED
from fusion_demo.settings import DOMAINS, SIZES, SOURCES
from fusion_demo.stages import Spent

__all__ = ["read_scores", "write_results"]

Scores = dict[str, dict[str, Any]]
COLUMNS = (*DOMAINS, "mean")
COLOURS = {"code": "#4477aa", "prose": "#ccbb44", "maths": "#228833", "mean": "#333333"}
#: What the plot calls the models.
SHORT = {
    "target": "before fusion",
    "clm": "CLM",
    "fusellm_paper": "FuseLLM 0.9",
    "fusellm": "FuseLLM 0.5",
    "pair_code": "pair: code",
    "pair_maths": "pair: maths",
    "merged": "merged (VaRM)",
    "sft": "SFT",
    "dpo": "SFT + DPO",
}


def read_scores(work: Path) -> Scores:
    """Model -> what :func:`fusion_demo.evaluate.evaluate` found, in the order of the table."""
    return {name: json.loads((work / "scores" / f"{name}.json").read_text()) for name in EVALUATED}


def _cells(scores: dict[str, Any]) -> list[str]:
    bits = [f"{scores['bits_per_byte'][column]:.3f}" for column in COLUMNS]
    return [*bits, f"{scores['accuracy']:.1%}"]


def _print(scores: Scores, console: Console) -> None:
    table = Table(title="Held-out bits per byte (lower is better), and held-out problems solved (verified)")
    table.add_column("model")
    for column in (*COLUMNS, "solved"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in scores.items():
        table.add_row(EVALUATED[name], *_cells(found), end_section=name in (SOURCES[-1], "target", "fusellm", "merged"))
    console.print(table)


def _markdown(scores: Scores, facts: dict[str, Any]) -> str:
    rows = [["model", *COLUMNS, "solved"], ["---", *["---:"] * (len(COLUMNS) + 1)]]
    rows += [[EVALUATED[name], *_cells(found)] for name, found in scores.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    problems = next(iter(scores.values()))["problems"]
    return "\n".join(
        [
            "# Results of the demonstration",
            "",
            "Held-out bits per byte (lower is better; end of text or turn included) and the share of "
            f"{problems} held-out word problems whose greedy answer the verifier accepts.",
            "",
            *lines,
            "",
            f"Seed {facts['settings']['seed']}, one run each; {facts['machine']}, {facts['cores']} cores; "
            f"{facts['wall_seconds']:.0f} s on the clock in this run, {facts['cpu_seconds']:.0f} s of CPU time in all.",
            "",
        ]
    )


def _plot(scores: Scores, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bits, solved) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2.2, 1), layout="constrained")
    base = scores["target"]["bits_per_byte"]
    compared = [name for name in SHORT if name != "target"]
    width = 0.8 / len(COLUMNS)
    for i, column in enumerate(COLUMNS):
        saved = [base[column] - scores[name]["bits_per_byte"][column] for name in compared]
        places = [x + (i - 1.5) * width for x in range(len(compared))]
        bits.bar(places, saved, width, label=column, color=COLOURS[column])
    bits.axhline(0, color="black", linewidth=0.8)
    bits.set_ylabel("bits per byte saved against the target before fusion")
    bits.set_xticks(range(len(compared)), [SHORT[name] for name in compared], rotation=30, ha="right")
    bits.legend(title="held-out texts", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    accuracies = [100 * scores[name]["accuracy"] for name in SHORT]
    bars = solved.barh([*SHORT.values()], accuracies, color="tab:gray")
    solved.bar_label(bars, fmt="%.1f", padding=3)
    solved.invert_yaxis()
    solved.set_xlim(0, max(1.0, *accuracies) * 1.15)
    solved.set_xlabel("held-out word problems solved, %")
    for side in (bits, solved):
        side.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_results(
    out: Path, work: Path, size: str, spent: dict[str, Spent], wall: float, console: Console
) -> dict[str, Any]:
    """Print the table and write ``results.json``, ``results.md`` and ``results.png`` to ``out``."""
    scores = read_scores(work)
    facts = {
        "size": size,
        "settings": asdict(SIZES[size]),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(sum(each.cpu for each in spent.values()), 1),
        "stages": {name: each._asdict() for name, each in spent.items()},
    }
    _print(scores, console)
    results = {"models": {name: {"title": EVALUATED[name], **found} for name, found in scores.items()}, **facts}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(_markdown(scores, facts), encoding="utf-8")
    _plot(scores, out / "results.png")
    console.print(f"{wall:.0f} s; results.json, results.md, results.png and logs stand in {out}")
    return results
