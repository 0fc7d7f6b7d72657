"""Which responses train which stage, by the rules of the ``fusion:`` block, and the account of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusion_plugins.axolotl.args import FusionBlock, PairArgs, SftArgs
from fusion_plugins.axolotl.scored import candidates_of
from fusion_plugins.core.preferences.candidates import Candidate, Pair
from fusion_plugins.core.preferences.pairs import (
    SelectionReport,
    best_with_report,
    length_statistics,
    pairs_with_report,
)
from fusion_plugins.core.preferences.split import Split, split_prompts
from fusion_plugins.errors import DataError
from fusion_plugins.plugins import lookup

__all__ = ["choose_best", "choose_pairs", "write_report"]

Report = dict[str, Any]


def choose_pairs(columns: Mapping[str, Sequence[Any]], block: FusionBlock) -> tuple[list[Pair], Report]:
    """Build the preference pairs of a table of scored responses.

    Raises:
        DataError: not one pair is left; the message says why.
    """
    candidates, truncated = candidates_of(columns, keep_truncated=block.keep_truncated)
    pairs, report = _pairs(candidates, block)
    facts = _facts(report, truncated)
    if block.split is not None:
        split = _split(candidates, pairs, block)
        kept = set(split.dpo)
        pairs = [pair for pair in pairs if pair.chosen.prompt_id in kept]
        facts["split"] = {"sft": len(split.sft), "dpo": len(split.dpo), "dropped": dict(split.dropped)}
    facts |= {"pairs": len(pairs), "lengths": _lengths(pairs)}
    if not pairs:
        raise DataError(
            f"no preference pair is left: {json.dumps(facts)}. The limits 0.01 and 0.1 of the reward gap belong to "
            "ArmoRM; for another reward model set fusion.pairs.min_gap and max_gap, or `gap_unit: quantile`; for "
            "verdicts without rewards `rule: verdict`."
        )
    return pairs, facts


def choose_best(columns: Mapping[str, Sequence[Any]], block: FusionBlock) -> tuple[list[Candidate], Report]:
    """Choose the best response to each prompt of a table of scored responses.

    Raises:
        DataError: not one is left; the message says why.
    """
    candidates, truncated = candidates_of(columns, keep_truncated=block.keep_truncated)
    best, report = best_with_report(candidates, (block.sft or SftArgs()).rule)
    facts = _facts(report, truncated)
    chosen = [candidate for candidate in best.values() if candidate is not None]
    if block.split is not None:
        split = _split(candidates, _pairs(candidates, block)[0], block)
        kept = set(split.sft)
        chosen = [candidate for candidate in chosen if candidate.prompt_id in kept]
        facts["split"] = {"sft": len(split.sft), "dpo": len(split.dpo), "dropped": dict(split.dropped)}
    sources = sorted(candidate.source for candidate in chosen)
    facts |= {"answers": len(chosen), "by_source": {name: sources.count(name) for name in dict.fromkeys(sources)}}
    if not chosen:
        raise DataError(f"no answer is left: {json.dumps(facts)}")
    return chosen, facts


def write_report(report: Report, path: Path, title: str) -> None:
    """Print a report as a table and write it as JSON."""
    table = Table("", "", title=title, show_header=False)
    for name, value in report.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    Console().print(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _pairs(candidates: list[Candidate], block: FusionBlock) -> tuple[list[Pair], SelectionReport]:
    rules = block.pairs or PairArgs()
    return pairs_with_report(
        candidates,
        lookup("pair_rules", rules.rule),
        window=rules.window(),
        per_prompt=rules.per_prompt,
        options=rules.options,
    )


def _split(candidates: list[Candidate], pairs: list[Pair], block: FusionBlock) -> Split:
    """The same division in both stages: it needs the best answers and the pairs of all prompts."""
    assert block.split is not None
    best, _ = best_with_report(candidates, (block.sft or SftArgs()).rule)
    return split_prompts(best, pairs, block.split.rule())


def _facts(report: SelectionReport, truncated: int) -> Report:
    facts = {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(report).items()}
    if truncated:
        facts["dropped_responses"] = {**facts["dropped_responses"], "truncated": truncated}
    return facts


def _lengths(pairs: Sequence[Pair]) -> Report:
    return {
        f"{domain}/{source}/{side}": {"count": found.count, "mean": round(found.mean, 1), "median": found.median}
        for (domain, source, side), found in length_statistics(pairs).items()
    }
