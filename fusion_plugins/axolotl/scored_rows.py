"""Scored responses as axolotl loads them -> candidates of the sources, and of the target itself.

Columns: ``prompt_id``, ``source``, ``index``, ``prompt``, ``response``, and where there are any ``reward``,
``correct``, ``domain``, ``dataset``, ``finish_reason``; from the folder of `fusion score`, or JSONL or Parquet files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.preference_rows import Row, Unusable, leave_out
from fusion_plugins.axolotl.response_args import PairArgs
from fusion_plugins.core.preferences.candidates import (
    Candidate,
    CandidateGroups,
    as_candidate,
    clean,
    is_own,
    is_prompt,
)
from fusion_plugins.core.preferences.verdict import may_be_forged
from fusion_plugins.core.preferences.worth import response_of
from fusion_plugins.core.preferences.worth_types import Response
from fusion_plugins.core.text.finish_reason import is_cut
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.terminal import say

Columns = Mapping[str, Sequence[Any]]


def candidates_of(columns: Columns) -> tuple[list[Candidate], list[Unusable]]:
    """Turn a table into candidates.

    Args:
        columns: name -> values of all rows.

    Returns:
        The candidates, and the rows that lack a value or have one of the wrong type.
    """
    columns = {name: _prompts(values) if name == "prompt" else values for name, values in columns.items()}
    candidates, unusable = [], []
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        row = dict(zip(columns, values, strict=True))
        if is_cut(row.get("finish_reason")) and row.get("response") is None:
            row["response"] = ""  # it was cut before the first word
        try:
            candidates.append(as_candidate(row, number))
        except DataError as error:
            unusable.append(Unusable(f"row {number}", str(error)))
    return candidates, unusable


@dataclass(frozen=True)
class Scored:
    """The candidates of a table: those of the sources, those of the target itself, and rows that are none.

    Apart, because the first stage has no own answers yet: whatever follows from the sources' answers, such as which
    prompts train which stage, must not change when own answers are added.

    ``responses`` are those of both, as they were sampled: with repetitions and what was cut.
    """

    sources: CandidateGroups
    own: CandidateGroups
    unusable: list[Row]
    responses: list[Response]


def read_scored(columns: Columns, block: FusionBlock) -> Scored:
    """Return the candidates of a table that the settings let in.

    Raises:
        DataError: a row cannot be used (with ``on_unusable: raise``), or none is left.
        ConfigError: ``leave_out_sources`` names a source that has no response, or all of them.
    """
    candidates, unusable = candidates_of(columns)
    left_out = leave_out(unusable, len(candidates) + len(unusable), block.on_unusable)
    own_source = (block.pairs or PairArgs()).own_source
    candidates = _without_sources(candidates, block.leave_out_sources)
    if block.min_trust == "outside":
        candidates = _without_forgeable(candidates)
    own = [candidate for candidate in candidates if is_own(candidate, own_source)]
    others = [candidate for candidate in candidates if not is_own(candidate, own_source)] if own else candidates
    sources, targets = (clean(each, keep_truncated=block.keep_truncated) for each in (others, own))
    return Scored(sources, targets, left_out, [response_of(candidate, own_source) for candidate in candidates])


def _without_forgeable(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates, without the verdicts of checks that ran inside the program."""
    inside = [may_be_forged(candidate.extra.get("scores")) for candidate in candidates]
    if any(inside):
        say(
            f"fusion.min_trust: {sum(inside)} of {len(inside)} responses have a verdict that does not count",
            stderr=True,
        )
    return [
        replace(candidate, correct=None) if not_sure else candidate
        for candidate, not_sure in zip(candidates, inside, strict=True)
    ]


def _without_sources(candidates: list[Candidate], names: Sequence[str]) -> list[Candidate]:
    present = {candidate.source for candidate in candidates}
    if unknown := sorted(set(names) - present):
        raise ConfigError(
            f"fusion.leave_out_sources: expected sources of the responses ({', '.join(sorted(present))}), got "
            f"{', '.join(unknown)}. Correct or remove them."
        )
    left = [candidate for candidate in candidates if candidate.source not in names] if names else candidates
    if candidates and not left:
        raise ConfigError(
            f"fusion.leave_out_sources: expected at least one source to stay, got all of {', '.join(sorted(present))}. "
            "Remove one that is worth training on; `fusion doctor` compares them with the target."
        )
    return left


def _prompts(values: Sequence[Any]) -> Sequence[Any]:
    """Return prompts as texts or messages. A row folder stores them as JSON text, which all values then are."""
    try:
        parsed = [json.loads(value) for value in values]
    except (TypeError, ValueError, RecursionError):
        # One value that is not JSON shows that the others, too, are texts that only look like JSON.
        return values
    return parsed if all(is_prompt(prompt) for prompt in parsed) else values
