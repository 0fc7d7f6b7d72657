"""Scored responses as axolotl loads them -> the candidates that core's rules choose from.

Columns: ``prompt_id``, ``source``, ``index``, ``prompt``, ``response``, and where there are any ``reward``,
``correct``, ``domain``, ``dataset``, ``finish_reason``; from the folder of `fusion score`, or JSONL or Parquet files.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.errors import DataError

__all__ = ["candidates_of"]

_REQUIRED = ("prompt_id", "source", "prompt", "response")


def candidates_of(columns: Mapping[str, Sequence[Any]], *, keep_truncated: bool = False) -> tuple[list[Candidate], int]:
    """Turn a table into candidates.

    Args:
        columns: name -> values of all rows.
        keep_truncated: keep responses that stopped only because they were too long (``finish_reason`` "length"); an
            end of turn after such a response would teach to stop in the middle.

    Returns:
        The candidates, and how many truncated responses were left out.

    Raises:
        DataError: a column is missing, or a row lacks a value.
    """
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"expected scored responses with the columns {', '.join(_REQUIRED)}; {', '.join(missing)} is missing, the "
            f"data set has {', '.join(columns)}. Give the output folder of `fusion score`."
        )
    columns = {**columns, "prompt": _prompts(columns["prompt"])}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    kept = [row for row in rows if keep_truncated or row.get("finish_reason") != "length"]
    return [_candidate(row, number) for number, row in enumerate(kept)], len(rows) - len(kept)


def _candidate(row: dict[str, Any], number: int) -> Candidate:
    empty = [name for name in _REQUIRED if row[name] is None]
    if empty:
        raise DataError(f"scored response {number} (prompt {row['prompt_id']!r}) has no {', '.join(empty)}")
    return Candidate(
        prompt_id=str(row["prompt_id"]),
        source=str(row["source"]),
        index=int(row.get("index") or 0),
        prompt=row["prompt"],
        response=row["response"],
        reward=row.get("reward"),
        correct=row.get("correct"),
        domain=row.get("domain") or "instruction",
        extra={"dataset": row["dataset"]} if row.get("dataset") is not None else {},
    )


def _prompts(values: Sequence[Any]) -> list[Any]:
    """Prompts as text or messages. A row folder stores them as JSON text, which all values then are."""
    parsed = [_json(value) for value in values]
    if values and all(value is not None for value in parsed):
        return parsed
    return [_without_nulls(value) for value in values]


def _json(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ('"', "["):
        return None
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return None
    chat = isinstance(parsed, list) and all(isinstance(message, dict) for message in parsed)
    return parsed if chat or isinstance(parsed, str) else None


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [{name: part for name, part in message.items() if part is not None} for message in value]
