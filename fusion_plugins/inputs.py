"""Rows of JSONL and Parquet files, and the texts and prompts in them.

First step of the data flow. A row has ``text``, or ``messages`` and perhaps ``tools``, and usually an ``id``; without
one, the sha256 of the content is the id. Prompts may also have ``domain``, ``reference`` (gold answer) and ``tests``
(code). All texts are held in memory: their ids and contents together decide whether a run may resume, before any model
is loaded.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.text.content_id import content_id, texts_fingerprint
from fusion_plugins.core.text.messages import REASONING_KEYS, as_messages, as_tools
from fusion_plugins.errors import DataError

#: ends of the names of files that can be read
SUFFIXES = (".jsonl", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_WEIGHED = ("content", "tool_calls", *REASONING_KEYS)


@dataclass(frozen=True)
class Text:
    """One text or chat.

    Attributes:
        id: unique within the set.
        content: the text, or the messages of a chat.
        content_id: sha256 (hex) of the content and the tools.
        tools: schemas of the tools that the chat may call, or None.
        where: file and row that it was read from.
    """

    id: str
    content: str | list[dict[str, Any]]
    content_id: str
    tools: list[dict[str, Any]] | None = None
    where: str = field(default="", compare=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of content, without what a chat template adds."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(len(str(message.get(key) or "").encode()) for message in self.content for key in _WEIGHED)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: id and content; a chat ends with a message of the user.
        domain: instruction | math | code | chinese | any name.
        reference: the gold answer, or None.
        tests: what a code scorer runs, or None.
    """

    text: Text
    domain: str = "instruction"
    reference: str | None = None
    tests: Any = None


def read_texts(path: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Text]:
    """Read the texts of one file, a folder of files, or several of them, in order.

    Args:
        path: ``.jsonl`` or ``.parquet`` files, or folders of such files (read in the order of their names).
        limit: stop after this many rows.

    Raises:
        DataError: a file is missing or broken, a row has no content, or two rows have the same id.
    """
    return [text for _, _, text in _read(path, limit)]


def read_prompts(path: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """Read prompts; like :func:`read_texts`, with the columns of :class:`Prompt`.

    Raises:
        DataError: as :func:`read_texts`; or a chat that ends with a message of the assistant.
    """
    prompts = []
    for where, row, text in _read(path, limit):
        if not isinstance(text.content, str) and text.content[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: expected a prompt that ends with a message of the user, got one that ends with the "
                "assistant's. Drop the last message of each prompt."
            )
        reference = row.get("reference")
        prompts.append(
            Prompt(
                text=text,
                domain=str(row.get("domain") or "instruction"),
                reference=None if reference is None else str(reference),
                tests=row.get("tests"),
            )
        )
    return prompts


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 (hex) of a set of prompts, with the domains, references and tests that responses are scored by.

    The order of the prompts does not matter.
    """
    pairs = []
    for prompt in prompts:
        parts = [prompt.text.content_id, prompt.domain, prompt.reference, prompt.tests]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        pairs.append((prompt.text.id, digest))
    return texts_fingerprint(pairs)


def read_row_file(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:number`` and content of every row; lines of JSONL are counted from 1, empty lines are left out.

    Args:
        path: a file that ends in one of :data:`SUFFIXES`.

    Raises:
        DataError: the file is missing, of another kind, or broken; the message names the line.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        got = f"a file with the ending {path.suffix!r}" if path.is_file() else "none"
        raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file, got {got}. Name another file.")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Repair the permission or the disk.") from error


def _read(path: str | Path | Sequence[str | Path], limit: int | None) -> Iterator[tuple[str, dict[str, Any], Text]]:
    """Yield place, row and text of every row; refuse an id that appears twice."""
    seen: dict[str, str] = {}
    for file in _files([path] if isinstance(path, str | Path) else path):
        for where, row in read_row_file(file):
            if limit is not None and len(seen) >= limit:
                return
            text = _text(row, where)
            if text.id in seen:
                raise DataError(
                    f"{where}: expected an id that no other row has, got {text.id!r}, which is also the id of "
                    f"{seen[text.id]}. Stores are joined by ids: give each row its own. (A row without an id has its "
                    "content's sha256 for one: drop the duplicate, or give both rows ids.)"
                )
            seen[text.id] = where
            yield where, row, text


def _files(paths: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found or not all(file.is_file() and file.suffix in SUFFIXES for file in found):
            raise DataError(
                f"{path}: expected a {' or '.join(SUFFIXES)} file or a folder of them, got none. Name another."
            )
        files += found
    return files


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: expected one JSON object per line, in UTF-8, got other bytes: {error}. Convert it."
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where}: expected one JSON object per line, got other text: {error!s:.200}. Correct the line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}. Correct the line.")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    # A file may hold what Arrow reads and Python cannot: text that is not UTF-8, a time beyond the year 9999.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected a Parquet file, got other bytes behind row {number}: {error!s:.200}. Write it again."
        ) from error


def _text(row: dict[str, Any], where: str) -> Text:
    text, messages = row.get("text"), row.get("messages")
    if (text is None) == (messages is None):
        got = ", ".join(sorted(row)) or "an empty row"
        raise DataError(
            f"{where}: expected either a column 'text' or a column 'messages', got {got}. Rename or remove a column."
        )
    content: str | list[dict[str, Any]]
    if messages is not None:
        content = _messages(messages, where)
    elif isinstance(text, str) and text:
        content = text
    else:
        raise DataError(f"{where}: expected a string that is not empty in 'text', got {text!r:.60}. Drop the row.")
    try:
        tools = as_tools(row.get("tools")) if messages is not None else None
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    try:
        digest = content_id(content, tools)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text that UTF-8 can encode, got a lone surrogate: {error}. Remove it from the text."
        ) from error
    name = str(row["id"]) if row.get("id") is not None else digest
    # The first test is fast and true for nearly all ids; it is false for all with surrogates.
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(
            f"{where}: expected an id that UTF-8 can encode, got one with a lone surrogate: {name!r:.80}. Rename it."
        )
    return Text(name, content, digest, tools, where)


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"{where}: expected messages as a list or its JSON, got {error}. Correct it.") from error
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages that is not empty, got {messages!r:.60}. Drop the row.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(
                f"{where}: expected messages with a role out of {', '.join(ROLES)}, got {message!r:.80}. Correct it."
            )
    try:
        chat = as_messages(messages)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    for message in chat:
        if not isinstance(message.get("content"), str) and not _says_without_content(message):
            raise DataError(
                f"{where}: expected text as a message's content (or tool_calls or reasoning beside it), got "
                f"{message.get('content')!r:.60}. Use a string."
            )
    return chat


def _says_without_content(message: dict[str, Any]) -> bool:
    """Whether an assistant's message without a content calls tools or reasons."""
    says = any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
    return message["role"] == "assistant" and message.get("content") is None and says
