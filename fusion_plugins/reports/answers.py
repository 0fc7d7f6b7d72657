"""The parts about responses, scored or not, and about the output of ``fusion doctor``."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_plugins.page import render_part
from fusion_plugins.reports.blocks import Block, Part, Section, Table, Text, cut, number, share
from fusion_plugins.reports.kinds import DOCTOR, expected_form, read_json
from fusion_plugins.scoring.report import scored_values
from fusion_plugins.store import open_rows

HEADS = ("domain", "source", "responses", "prompts", "mean characters", "cut", "empty", "mean tokens")
#: lines of advice that a page repeats
ADVICE = 20


@dataclass
class _Group:
    """Counts of the responses of one source in one domain."""

    responses: int = 0
    characters: int = 0
    empty: int = 0
    cut: int = 0
    with_tokens: int = 0
    tokens: int = 0
    prompts: set[str] = field(default_factory=set)

    def add(self, row: Mapping[str, Any]) -> None:
        text = row["response"] or ""
        self.responses += 1
        self.characters += len(text)
        self.empty += not text.strip()
        self.cut += row.get("finish_reason") == "length"
        self.prompts.add(row["prompt_id"])
        if row.get("n_tokens") is not None:
            self.with_tokens += 1
            self.tokens += row["n_tokens"]


def response_blocks(folder: Path) -> list[Block]:
    """Return the table of a folder of responses: counts per domain and source. Its rows are read one shard at a time.

    Raises:
        StoreError: it is damaged.
    """
    rows = open_rows(folder)
    groups: dict[tuple[str, str], _Group] = defaultdict(_Group)
    for row in rows:
        groups[row.get("domain") or "", row["source"]].add(row)
    lines = [
        [
            *(domain or "none", source, number(group.responses), number(len(group.prompts))),
            *(f"{group.characters / group.responses:,.0f}", share(group.cut, group.responses)),
            share(group.empty, group.responses),
            f"{group.tokens / group.with_tokens:,.0f}" if group.with_tokens else "–",
        ]
        for (domain, source), group in sorted(groups.items())
    ]
    state = "" if rows.manifest.complete else " The folder is unfinished: `fusion sample` is at work, or was stopped."
    counted = Text(f"{len(rows):,} responses.{state}")
    return [counted, Table("Responses by domain and source", HEADS, lines, words=2)]


def response_sections(folder: Path) -> list[Section]:
    """Return the page's sections about a folder of responses.

    Raises:
        StoreError: it is damaged.
    """
    manifest = open_rows(folder).manifest
    facts = manifest.facts | manifest.provenance | {"made_by": manifest.made_by, "created": manifest.created}
    made = [[name, cut(str(value), 500)] for name, value in facts.items()]
    return [
        Section("What was sampled", response_blocks(folder)),
        Section("Version and configuration", [Table("Configuration", ("setting", "value"), made, words=2)]),
    ]


def scored_blocks(folder: Path, *, seed: int, verdicts: int) -> list[Block]:
    """Return what a whole page says of scored responses, for a page about more.

    Raises:
        StoreError, DataError: as :func:`fusion_plugins.scoring.report.examine_scored`.
    """
    values = scored_values(folder, seed=seed, verdicts=verdicts, level=3)
    return [Part(render_part("parts/scored.html", values))]


def examined_blocks(folder: Path) -> list[Block]:
    """Return the verdicts and the advice of ``fusion doctor``.

    Raises:
        DataError: its file is damaged.
    """
    found = read_json(folder / DOCTOR) or {}
    with expected_form(folder / DOCTOR):
        return [*_examined(found), Text(f"All of it is in {folder.name}/doctor.html.")]


def _examined(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if sources := found.get("sources"):
        rows = [[_name(source), str(source.get("verdict"))] for source in sources]
        blocks.append(Table("Verdicts", ("source", "verdict"), rows, words=2))
        advice = [f"{_name(source)}: {line}" for source in sources for line in source.get("advice", ())]
    else:
        domains = found.get("domains") or ()
        rows = [[str(domain.get("domain")), str(domain.get("conclusion"))] for domain in domains]
        blocks.append(Table("Conclusions", ("domain", "conclusion"), rows, words=2))
        advice = [f"{domain.get('domain')}: {line}" for domain in domains for line in domain.get("reasons", ())]
    return [*blocks, *(Text(line) for line in advice[:ADVICE])]


def _name(source: Mapping[str, Any]) -> str:
    return str((source.get("diagnosis") or {}).get("name"))


def reasons_of(counts: Mapping[str, Any]) -> list[list[str]]:
    """Return counts as rows of a table, the largest first."""
    return [[name, number(count)] for name, count in Counter(counts).most_common()]
