"""The account of a fused data set: what each source contributed, printed as a table and kept as JSON."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusion_plugins.core.fusion.accounting import FusionReport, ProjectionReport

__all__ = ["read_counters", "show_report", "write_report"]


def read_counters(counters: Iterable[str]) -> FusionReport:
    """Add up the counters of all batches, as JSON texts; empty texts do not count."""
    total = FusionReport()
    for text in counters:
        if text:
            values: dict[str, Any] = json.loads(text)
            sources = {name: ProjectionReport(**source) for name, source in values.pop("sources").items()}
            total = total + FusionReport(**values, sources=sources)
    return total


def show_report(report: FusionReport, too_long: int, sequence_len: int) -> None:
    """Print what became of the rows of each source."""
    share = report.fused_rows / report.rows if report.rows else 0.0
    table = Table(title=f"fusion: {report.texts} texts, {report.rows} supervised rows, {share:.1%} with a fused target")
    for heading in ("source", "coverage", "kept mass", "lowest CE", "unaligned", "low mass", "fallback"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, source in report.sources.items():
        chosen = report.chosen.get(name, 0) / report.texts if report.texts else 0.0
        rows = max(1, source.rows)
        shares = (source.coverage, source.mass_kept, chosen, *(n / rows for n in _unused(source)))
        table.add_row(name, *(f"{value:.1%}" for value in shares))
    console = Console()
    console.print(table)
    if too_long:
        console.print(
            f"{too_long} of {report.texts} texts are longer than sequence_len ({sequence_len} tokens): axolotl drops "
            "them, or stops (excess_length_strategy). Split long texts before `fusion capture` to use them."
        )


def write_report(path: Path, data_set: str, report: FusionReport, too_long: int, *, fresh: bool) -> None:
    """Write the account of one data set into a JSON file that holds one per data set.

    Args:
        path: the file.
        data_set: the data set's path.
        report: its counters.
        too_long: texts longer than ``sequence_len``.
        fresh: start the file anew; else add to what stands there.
    """
    accounts = {} if fresh or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
    shares = {
        name: {"coverage": source.coverage, "mass_kept": source.mass_kept} for name, source in report.sources.items()
    }
    accounts[data_set] = {**asdict(report), "shares": shares, "longer_than_sequence_len": too_long}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(accounts, indent=1) + "\n", encoding="utf-8")


def _unused(source: ProjectionReport) -> tuple[int, int, int]:
    return source.unaligned, source.low_mass, source.fallback
