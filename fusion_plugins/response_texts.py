"""Responses, scored or not, as texts: each is the chat of its prompt and of the response.

So `fusion capture` can say how probable a source finds the answers of any model. Equal answers to one prompt are one
text, and an answer without a word is none. The id of a text is the sha256 of its chat, which
:func:`~fusion_plugins.core.preferences.candidates.answer_id` gives for a candidate.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion_plugins.core.preferences.candidates import as_candidate, chat_of
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.messages import REASONING_KEYS
from fusion_plugins.errors import DataError
from fusion_plugins.store.manifest import MANIFEST_NAME, RowManifest, load_manifest
from fusion_plugins.store.rows import open_rows

Row = dict[str, Any]

#: columns of a response that are part of its text, or name it
ANSWER_COLUMNS = ("prompt_id", "source", "index", "prompt", "response", "tool_calls", *REASONING_KEYS)
_NEEDED = ("prompt", "response")


def is_response_folder(path: str | Path) -> bool:
    """Return whether a path is a folder that `fusion sample` or `fusion score` wrote.

    Raises:
        StoreError: it has a manifest that is damaged.
    """
    if not Path(path, MANIFEST_NAME).is_file():
        return False
    manifest = load_manifest(Path(path))
    return isinstance(manifest, RowManifest) and manifest.columns.keys() >= set(_NEEDED)


def response_rows(folder: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield place and content of every row of a folder of responses.

    Raises:
        StoreError: the folder is damaged.
    """
    rows = open_rows(folder)
    for row in rows:
        names = ", ".join(f"{name} {row[name]!r}" for name in rows.manifest.key if name != "fingerprint")
        yield f"{folder}: {names}", row


def answers_as_texts(rows: Iterable[tuple[str, Row | DataError]]) -> Iterator[tuple[str, Row | DataError]]:
    """Yield rows with ``messages`` in the place of responses; rows of another kind as they are."""
    seen: set[str] = set()
    for number, (where, row) in enumerate(rows):
        if isinstance(row, DataError) or not _is_response(row):
            yield where, row
            continue
        try:
            candidate = as_candidate(row, number)
            messages, tools = chat_of(candidate)
            digest = content_id(messages, tools)
        except (DataError, UnicodeEncodeError) as error:
            yield where, DataError(f"{where}: {error}")
            continue
        if digest in seen or not (candidate.response.strip() or candidate.extra.get("tool_calls")):
            continue
        seen.add(digest)
        yield where, {"messages": messages, "tools": tools}


def _is_response(row: Row) -> bool:
    other = row.get("text") is not None or row.get("messages") is not None
    answered = row.get("response") is not None or row.get("tool_calls") is not None
    return not other and row.get("prompt") is not None and answered
