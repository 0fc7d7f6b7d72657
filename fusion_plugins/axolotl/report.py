"""The report of a fused dataset: what each source contributed, as a table and as JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from fusion_plugins.core.fusion.accounting import ChunkReport, FusionReport, ProjectionReport
from fusion_plugins.terminal import console, say


def read_counters(counters: Iterable[str]) -> FusionReport:
    """Add up the counters of all batches, as JSON texts; empty texts do not count."""
    total = FusionReport()
    for text in counters:
        if text:
            values: dict[str, Any] = json.loads(text)
            sources = {name: ProjectionReport(**source) for name, source in values.pop("sources").items()}
            chunks = ChunkReport(**values.pop("chunks"))
            total = total + FusionReport(**values, sources=sources, chunks=chunks)
    return total


def show_report(
    report: FusionReport, too_long: int, sequence_len: int, unusable: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Print the coverage and the kept mass of each source, and how many rows were left out."""
    if report.chunks.texts:
        say(chunk_line(report.chunks))
    else:
        console().print(_sources(report))
    for line in taught_lines(asdict(report)):
        say(line)
    for row in unusable:
        say(f"left out {row['row']}: {row['reason']}")
    if too_long:
        say(
            f"{too_long} of {report.texts} texts are longer than sequence_len ({sequence_len} tokens): axolotl drops "
            "them, or stops (excess_length_strategy). Split long texts before `fusion capture` to use them."
        )


def _sources(report: FusionReport) -> Table:
    """Return a table of what each source contributed."""
    share = report.fused_positions / report.positions if report.positions else 0.0
    table = Table(
        title=f"fusion: {report.texts} texts, {report.positions} supervised positions, {share:.1%} with a fused "
        "distribution"
    )
    for heading in ("source", "coverage", "kept mass", "lowest CE", "unaligned", "left out", "low mass", "fallback"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, source in report.sources.items():
        chosen = report.chosen.get(name, 0) / report.texts if report.texts else 0.0
        counts = (source.unaligned, source.left_out, source.low_mass, source.fallback)
        unused = (n / max(1, source.positions) for n in counts)
        table.add_row(name, *(f"{value:.1%}" for value in (source.coverage, source.mass_kept, chosen, *unused)))
    return table


def chunk_line(report: ChunkReport) -> str:
    """Return a sentence on the chunks of a dataset."""
    shares = report.shares()
    parts = [f"fusion: {report.texts} texts, {report.positions} supervised positions, {report.chunks} chunks"]
    words = {
        "coverage": "{:.1%} of the positions in one",
        "tokens_per_chunk": "{:.2f} tokens per chunk",
        "one_token_chunks": "{:.1%} of these tokens are a chunk",
        "bytes_without_common_end": "{:.1%} of the bytes without a common end",
        "sampled": "{:.1%} of the tokens with the sampler's log-probability",
    }
    return ", ".join([*parts, *(text.format(shares[name]) for name, text in words.items() if name in shares)])


def taught_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield, per domain of a report, which source teaches how many positions."""
    for domain, counts in (report.get("taught") or {}).items():
        total = sum(counts.values())
        parts = ", ".join(f"{name} {count} ({count / total:.1%})" for name, count in counts.items())
        yield f"fusion: {domain or 'all domains'}: of {total} positions, taught by {parts}"


def report_content(
    report: FusionReport,
    too_long: int,
    unusable: Sequence[Mapping[str, Any]] = (),
    missing: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the report of one dataset for its JSON file.

    Args:
        report: its counters.
        too_long: texts longer than ``sequence_len``.
        unusable: what was left out: row and reason.
        missing: the same, of rows that a store lacks.
    """
    shares = {
        name: {"coverage": source.coverage, "mass_kept": source.mass_kept} for name, source in report.sources.items()
    }
    left_out = {"unusable": list(unusable), "missing_from_stores": list(missing)}
    content = {**asdict(report), "shares": shares, "longer_than_sequence_len": too_long, **left_out}
    content["chunks"] |= {"shares": report.chunks.shares()}
    return content if report.chunks.texts else {key: value for key, value in content.items() if key != "chunks"}
