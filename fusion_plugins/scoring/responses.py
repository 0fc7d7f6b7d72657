"""Open what is to be scored, a folder of responses or files of them, and find scored rows that are out of date.

Files are written by other tools. Their rows need ``prompt_id``, ``source``, ``prompt`` (or ``messages``) and
``response``, and may have the other columns that `fusion sample` writes; further fields are left out.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.preferences.verdict import as_verdict
from fusion_plugins.core.text.finish_reason import ending, is_cut
from fusion_plugins.core.text.messages import REASONING_KEYS, as_messages
from fusion_plugins.core.text.reasoning import with_reasoning
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import is_hub
from fusion_plugins.row_files import SUFFIXES, readable_rows
from fusion_plugins.scoring.base import Row
from fusion_plugins.store.manifest import ColumnKind, RowManifest
from fusion_plugins.store.rows import RowStore, open_rows

Key = tuple[Any, ...]

FILE_COLUMNS: dict[str, ColumnKind] = {
    "prompt_id": "string",
    "source": "string",
    "index": "int64",
    "prompt": "json",
    "response": "string",
    "domain": "string",
    "reference": "string",
    "tests": "json",
    "dataset": "string",
    "finish_reason": "string",
    "correct": "bool",
}
EXPECTED = (
    "prompt_id, source, prompt (a text or messages; or a field messages) and response; optional are index, domain, "
    "reference, tests, dataset, finish_reason, correct and reasoning_content (or reasoning, or thinking)"
)
FOLDER_COLUMNS = ("prompt_id", "source", "index", "prompt", "response", "domain")
#: bits of a place that hold the number of the row; the others hold that of the file
PLACE_BITS = 40
#: columns that a score depends on
SCORED_BY = ("prompt", "response", "domain", "reference", "tests")


class ResponseFiles:
    """Responses in JSONL or Parquet files. Every row is checked before the first is returned.

    Attributes:
        path: the files, for messages.
        manifest: columns and key, as a folder of responses has them.

        unusable: place -> why of the rows that are left out.

    Args:
        paths: the files.
        on_unusable: ``raise`` an error at a row that lacks a field, has a wrong one, or is given twice, or ``skip`` it.

    Raises:
        DataError: a file is broken, or a row cannot be used; its line is named.
    """

    def __init__(self, paths: Sequence[str], on_unusable: Literal["raise", "skip"] = "raise") -> None:
        self.path = ", ".join(paths)
        self.manifest = RowManifest(stage="responses", columns=FILE_COLUMNS, key=("prompt_id", "source", "index"))
        self._paths, self._on_unusable = paths, on_unusable
        self.unusable: dict[str, str] = {}
        # A pass of its own, so that a wrong row is found before hours of scoring and not after.
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Millions of rows: a compact set has the number of responses of each group, and the place of each response.
        counts, seen = KeySet(), KeySet()
        for number, path in enumerate(self._paths):
            for where, found in readable_rows(path, (*FILE_COLUMNS, "messages", *REASONING_KEYS)):
                try:
                    row = _checked(found, where)
                    group = row["prompt_id"], row["source"]
                    row["index"] = _index(row["index"], counts.number(group) or 0, where)
                    key = (*group, row["index"])
                    if (place := seen.number(key)) is not None:
                        raise DataError(
                            f"{where}: expected one response with index {row['index']} of prompt {group[0]!r}, source "
                            f"{group[1]!r}, got a second one; the first is at {self._where(place)}. Number the "
                            "responses of a source to a prompt, or leave index out in all rows."
                        )
                except DataError as error:
                    if self._on_unusable == "raise":
                        raise
                    self.unusable[where] = str(error)
                else:
                    counts.add(group, (counts.number(group) or 0) + 1)
                    seen.add(key, number << PLACE_BITS | int(where.rpartition(":")[2]))
                    yield row

    def _where(self, place: int) -> str:
        return f"{Path(self._paths[place >> PLACE_BITS])}:{place & ((1 << PLACE_BITS) - 1)}"


Responses = RowStore | ResponseFiles


def open_responses(where: str | Sequence[str], on_unusable: Literal["raise", "skip"] = "raise") -> Responses:
    """Open a folder of responses, or one or several files of them.

    Args:
        where: the folder or the files.
        on_unusable: what becomes of rows of files that cannot be used.

    Raises:
        ConfigError: the folder lacks a column.
        StoreError: the folder holds no rows, or it is damaged.
        DataError: a file or one of its rows is wrong.
    """
    paths = [where] if isinstance(where, str) else list(where)
    path = Path(paths[0])
    if len(paths) > 1 or is_hub(path) or path.is_file() or (path.suffix in SUFFIXES and not path.is_dir()):
        return ResponseFiles(paths, on_unusable)
    responses = open_rows(path)
    missing = [name for name in FOLDER_COLUMNS if name not in responses.manifest.columns]
    if missing:
        raise ConfigError(
            f"{path}: expected columns {', '.join(FOLDER_COLUMNS)}, but {', '.join(missing)} is missing. "
            "Give the folder that `fusion sample` wrote."
        )
    return responses


def key_of(row: Row, manifest: RowManifest) -> Key:
    """Return the values of a row that identify it in its folder."""
    return tuple(row[name] for name in manifest.key)


def response_name(row: Row) -> str:
    """Return how reports name a response: by its prompt, its source and its index."""
    return f"{row['prompt_id']}, {row['source']}, sample {row.get('index', 0)}"


def outdated(
    responses: Responses, scored: Iterable[Row], scorers: Iterable[str], before: KeySet | None = None
) -> dict[Key, list[str]]:
    """Find scored rows whose response, prompt, tests or earlier scores have changed since.

    Args:
        responses: what is to be scored.
        scored: rows that were scored before, with the same key; iterated over twice.
        scorers: names of the scorers of this run; scores of others are part of what is scored.
        before: a set of the keys of what was scored, if there is one; it gets a number for each.

    Returns:
        key -> the columns that changed.
    """
    names, ours, manifest = (*SCORED_BY, "scores"), frozenset(scorers), responses.manifest
    # Two passes, so that the marks of all rows need not be held: one number per row finds those that have changed.
    before = KeySet() if before is None else before
    for row in scored:
        before.add(key_of(row, manifest), hash(_marks(row, ours)))
    now = {}
    for row in responses if len(before) else ():
        key, marks = key_of(row, manifest), _marks(row, ours)
        if before.number(key) not in (None, hash(marks)):
            now[key] = marks
    changed = {}
    for row in scored if now else ():
        if (key := key_of(row, manifest)) in now:
            pairs = zip(names, _marks(row, ours), now[key], strict=True)
            changed[key] = [name for name, old, new in pairs if old != new]
    return changed


def _marks(row: Row, ours: frozenset[str]) -> tuple[int, ...]:
    """Return one number per column; equal columns have equal numbers within this process."""
    others = {name: score for name, score in (row.get("scores") or {}).items() if name not in ours}
    values = [*(row.get(name) for name in SCORED_BY), others]
    # Hashes and not the values, because those of all scored rows are held at once.
    return tuple(hash(json.dumps(value, sort_keys=True)) for value in values)


def _checked(found: Row | DataError, where: str) -> dict[str, Any]:
    """Return the row of a file in the columns of a folder; its index is as the file has it."""
    if isinstance(found, DataError):
        raise found
    reasoning = _reasoning(found)
    missing = [name for name in ("prompt_id", "source", "response") if found.get(name) is None]
    if reasoning and "response" in missing:
        missing.remove("response")  # the thinking was too long for an answer
    given = [name for name in ("prompt", "messages") if found.get(name) is not None]
    if not given:
        missing.append("prompt or messages")
    if len(given) > 1:
        raise DataError(f"{where}: expected prompt or messages, got both. Remove one. Expected are {EXPECTED}.")
    if missing:
        raise DataError(f"{where}: expected {EXPECTED}; got no {', no '.join(missing)}. Add what is missing.")
    row = {
        "prompt_id": _text("prompt_id", found, where),
        "source": _text("source", found, where),
        "index": found.get("index"),
        "prompt": _prompt(found[given[0]], where),
        "response": _response(found, reasoning, where),
        "domain": _text("domain", found, where) or "instruction",
        "tests": found.get("tests"),
        **{name: _text(name, found, where) for name in ("reference", "dataset", "finish_reason")},
        "correct": _verdict(found.get("correct"), where),
    }
    if (end := ending(row["finish_reason"])) in ("stop", "length"):
        row["finish_reason"] = end  # other tools have other words, and later steps look for these
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected values that JSON and UTF-8 can write, got another: {error}. Correct the row."
        ) from error
    return row


def _text(name: str, found: Row, where: str) -> str | None:
    """Return a field as text; a number is accepted as an id and as a gold answer."""
    value = found.get(name)
    numbers = (int, float) if name == "reference" else int if name == "prompt_id" else ()
    if isinstance(value, numbers) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: expected text in {name!r}, got {value!r:.60}. Write it as a string.")
    return value


def _reasoning(found: Row) -> str:
    """Return the reasoning that is given beside a response; a column of such a name may hold something else."""
    named = map(found.get, REASONING_KEYS)
    return next((text for text in named if isinstance(text, str) and text.strip()), "")


def _response(found: Row, reasoning: str, where: str) -> str:
    """Return the response in the form of `fusion sample`: reasoning, if there is any, at its start."""
    text = _text("response", found, where)
    return with_reasoning(reasoning, text or (None if is_cut(found.get("finish_reason")) else ""))


def _verdict(value: Any, where: str) -> bool | None:
    try:
        return as_verdict(value)
    except DataError as error:
        raise DataError(f"{where}, field 'correct': {error}") from error


def _prompt(value: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a text or a list of messages as the prompt, got {value!r:.60}. Correct it.")
    for message in value:
        if not (isinstance(message, dict) and {type(message.get(name)) for name in ("role", "content")} == {str}):
            raise DataError(
                f"{where}: expected messages with role and content as text, got {message!r:.80}. Correct the message."
            )
    if value[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: expected a prompt that ends with the user's message, got the assistant's at the end; move that "
            "message into 'response'"
        )
    return as_messages(value)


def _index(value: Any, default: int, where: str) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise DataError(
            f"{where}: expected a number from 0 in 'index', got {value!r:.60}. Correct it, or leave index out."
        )
    return value
