"""Responses, scored or not, as texts: each is the chat of its prompt and of the response.

So a source can say what it thinks of the answers of any model, and a model can learn on its own answers. The messages
are those that the model read: with the system prompt that it was sampled with. Equal answers to one prompt are one text
of a store, however often they were sampled; an answer without a word is none. The id of a text is the response's own:
the sha256 of its chat, which :func:`~fusion_plugins.core.preferences.candidates.answer_id` gives for a candidate, and
of the fact that it was cut (by a length limit, or an interruption), where it was.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.core.preferences.candidates import as_candidate, chat_of
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.finish_reason import is_cut
from fusion_plugins.core.text.messages import REASONING_KEYS
from fusion_plugins.core.text.sampled import SampledAnswer, as_answer
from fusion_plugins.errors import DataError
from fusion_plugins.store.manifest import MANIFEST_NAME, RowManifest, load_manifest
from fusion_plugins.store.rows import open_rows

Row = dict[str, Any]

#: columns of a response that are part of its text, name it, or say how it was sampled
ANSWER_COLUMNS = (
    *("prompt_id", "source", "index", "prompt", "response", "tool_calls", *REASONING_KEYS),
    *("system", "finish_reason", "token_ids", "tokenizer", "model", "n_tokens", "correct", "reward", "domain"),
)
#: key of a row of :func:`answers_as_texts` that holds how its last message was sampled
ANSWER = "fusion_answer"
#: responses without a text of their own: they say nothing, or what another one says
EMPTY, REPEATED = "empty", "repeated"
_NEEDED = ("prompt", "response")


@dataclass(frozen=True)
class AnswerText:
    """One response as a text.

    Attributes:
        id: see the module.
        messages: of the prompt and of the answer.
        tools: schemas of the tools that may be called, or None.
        answer: how the last message was sampled.
        empty: it says nothing.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: SampledAnswer
    empty: bool


def is_response_folder(path: str | Path) -> bool:
    """Return whether a path is a folder that `fusion sample` or `fusion score` wrote.

    Raises:
        StoreError: it has a manifest that is damaged.
    """
    if not Path(path, MANIFEST_NAME).is_file():
        return False
    manifest = load_manifest(Path(path))
    return isinstance(manifest, RowManifest) and manifest.columns.keys() >= set(_NEEDED)


def require_responses(paths: Iterable[str | Path]) -> None:
    """Raise DataError for a folder of responses that has none yet."""
    for path in paths:
        if is_response_folder(path) and not RowManifest.load(Path(path)).rows:
            raise DataError(
                f"{path}: expected responses, got a folder that has none yet. Sample some, or name another."
            )


def json_columns(path: str | Path) -> tuple[str, ...]:
    """Return which columns of the files of a folder of responses hold JSON text; none for another path."""
    if not is_response_folder(path):
        return ()
    return tuple(name for name, kind in RowManifest.load(Path(path)).columns.items() if kind == "json")


def response_rows(folder: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield place and content of every row of a folder of responses.

    Raises:
        StoreError: the folder is damaged.
    """
    rows = open_rows(folder)
    for row in rows:
        names = ", ".join(f"{name} {row[name]!r}" for name in rows.manifest.key if name != "fingerprint")
        yield f"{folder}: {names}", row


def answers_as_texts(
    rows: Iterable[tuple[str, Row | DataError]], left_out: Counter[str] | None = None
) -> Iterator[tuple[str, Row | DataError]]:
    """Yield rows with ``messages`` in the place of responses; rows of another kind as they are.

    Args:
        rows: place and content.
        left_out: takes how many responses have no text of their own: those that are :data:`EMPTY` or :data:`REPEATED`.
    """
    seen: set[str] = set()
    left_out = Counter() if left_out is None else left_out
    for number, (where, row) in enumerate(rows):
        if isinstance(row, DataError) or not is_response(row):
            yield where, row
            continue
        try:
            text = answer_text(row, number)
        except DataError as error:
            yield where, DataError(f"{where}: {error}")
            continue
        if text.empty or text.id in seen:
            left_out[EMPTY if text.empty else REPEATED] += 1
            continue
        seen.add(text.id)
        yield where, row | {"id": text.id, "messages": text.messages, "tools": text.tools, ANSWER: text.answer}


def answer_text(row: Mapping[str, Any], number: int) -> AnswerText:
    """Return the text that a response is.

    Args:
        row: the response; ``system`` is the system prompt that was put before a prompt without one of its own.
        number: its position in the file or table, counted from 0; for the error message.

    Raises:
        DataError: a required value is missing, a value has the wrong type, or a text holds a lone surrogate.
    """
    candidate = as_candidate(row, number)
    messages, tools = chat_of(candidate)
    system = row.get("system")
    if isinstance(system, str) and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    finished = not is_cut(row.get("finish_reason"))
    try:
        digest = content_id(messages, tools)
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected text that UTF-8 can encode, got a lone surrogate: {error}. Remove it from the response."
        ) from error
    if not finished:
        digest = hashlib.sha256(json.dumps([digest, "length"]).encode()).hexdigest()
    empty = not (candidate.response.strip() or candidate.extra.get("tool_calls"))
    return AnswerText(digest, messages, tools, as_answer(row, finished), empty)


def is_response(row: Mapping[str, Any]) -> bool:
    """Return whether a row holds a prompt and a response, and neither a text nor messages."""
    other = row.get("text") is not None or row.get("messages") is not None
    answered = row.get("response") is not None or row.get("tool_calls") is not None
    return not other and row.get("prompt") is not None and answered


def refuse_unread_response(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a chat that waits for an answer which the row holds in another column: it would not be read.

    Raises:
        DataError: the last of some messages is not the assistant's, and the row has a response.
    """
    if messages and messages[-1].get("role") != "assistant" and row.get("response") is not None:
        raise DataError(
            "expected a chat that ends with the assistant's message, got one that ends before it, and an answer in the "
            "column 'response', which belongs to a prompt. Rename the column 'messages' to 'prompt' (and give "
            "'prompt_id' and 'source'), or remove the column 'response'."
        )


def is_table_of_responses(columns: Collection[str]) -> bool:
    """Return whether the rows of a table with these columns are responses."""
    return {"prompt", "response"} <= {*columns} and not {"text", "messages"} & {*columns}


def described_responses(left_out: Mapping[str, int]) -> str:
    """Return how many responses have no text of their own, and why; empty where there are none.

    Example:
        >>> described_responses({"empty": 2, "repeated": 1})
        '2 (they say nothing), 1 (the same text as another response)'
    """
    said = {EMPTY: "they say nothing", REPEATED: "the same text as another response"}
    return ", ".join(f"{left_out[kind]:,} ({what})" for kind, what in said.items() if left_out.get(kind))
