"""Texts and prompts from JSONL or Parquet files.

First step of the way of the data. All of them are held in memory: their ids and what they hold together decide whether
a run may go on, before anything is loaded. A row has ``text`` or ``messages`` and usually an ``id``; without one, the
content's sha256 is the id. Prompts may also have ``domain``, ``reference`` (gold answer) and ``tests`` (code).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.text.content_id import content_id, texts_fingerprint
from fusion_plugins.errors import DataError

__all__ = [
    "SUFFIXES",
    "Prompt",
    "Text",
    "fingerprint",
    "prompts_fingerprint",
    "read_prompts",
    "read_row_file",
    "read_texts",
]

Messages = list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Text:
    """One text or chat.

    Attributes:
        id: unique within the set.
        content: the text, or the messages of a chat.
        digest: sha256 (hex) of the content.
    """

    id: str
    content: str | Messages
    digest: str

    @property
    def n_bytes(self) -> int:
        """Bytes of content, without what a template would add."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(len(str(message.get("content") or "").encode()) for message in self.content)


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
        path: ``.jsonl`` or ``.parquet`` files, or folders that hold such files (read in the order of their names).
        limit: stop after so many rows.

    Raises:
        DataError: a file is missing or broken, a row has no content, or an id stands twice.
    """
    return [text for text, _, _ in _read(path, limit)]


def read_prompts(path: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """Read prompts; like :func:`read_texts` with the columns of :class:`Prompt`.

    Raises:
        DataError: as :func:`read_texts`; or a chat that ends with the assistant's message.
    """
    prompts = []
    for text, row, where in _read(path, limit):
        if not isinstance(text.content, str) and text.content[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: expected a chat that ends with the user's message, came one that ends with the assistant's; "
                "drop the last message of each prompt"
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


def fingerprint(texts: Sequence[Text]) -> str:
    """Return the fingerprint of a set of texts: ids and contents, whatever their order."""
    return texts_fingerprint((text.id, text.digest) for text in texts)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the fingerprint of a set of prompts: also domains, references and tests, which rows are scored by."""
    return texts_fingerprint((prompt.text.id, _prompt_digest(prompt)) for prompt in prompts)


def _prompt_digest(prompt: Prompt) -> str:
    beside = [prompt.text.digest, prompt.domain, prompt.reference, prompt.tests]
    return hashlib.sha256(json.dumps(beside, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: str | Path | Sequence[str | Path], limit: int | None) -> Iterator[tuple[Text, dict[str, Any], str]]:
    seen: dict[str, str] = {}
    for where, row in _rows([path] if isinstance(path, str | Path) else path):
        if limit is not None and len(seen) >= limit:
            return
        text = _text(row, where)
        if text.id in seen:
            raise DataError(
                f"{where}: id {text.id!r} stands already at {seen[text.id]}; ids are unique, because stores are joined "
                "by them (rows without an id are named by their content: drop duplicates or give them ids)"
            )
        seen[text.id] = where
        yield text, row, where


def _text(row: dict[str, Any], where: str) -> Text:
    text, messages = row.get("text"), row.get("messages")
    if (text is None) == (messages is None):
        raise DataError(
            f"{where}: expected a column 'text' or a column 'messages', came {', '.join(sorted(row)) or 'an empty row'}"
        )
    content: str | Messages
    if text is not None:
        if not isinstance(text, str) or not text:
            raise DataError(f"{where}: expected a string that is not empty in 'text', came {text!r:.60}")
        content = text
    else:
        content = _messages(messages, where)
    try:
        digest = content_id(content)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: expected text that UTF-8 can write, came a lone surrogate: {error}") from error
    name = str(row["id"]) if row.get("id") is not None else digest
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(f"{where}: expected an id that UTF-8 can write, came one with a lone surrogate: {name!r:.80}")
    return Text(name, content, digest)


def _messages(messages: Any, where: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages that is not empty, came {messages!r:.60}")
    cleaned = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: expected messages with a role out of {', '.join(ROLES)}, came {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: expected text as a message's content, came {message.get('content')!r:.60}")
        cleaned.append({key: value for key, value in message.items() if value is not None})
    return cleaned


def _rows(paths: Sequence[str | Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in _files(paths):
        yield from read_row_file(file, not_utf8="expected UTF-8")


def _files(paths: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found or not all(file.is_file() and file.suffix in SUFFIXES for file in found):
            raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file, or a folder of them; found none")
        files += found
    return files


SUFFIXES = (".jsonl", ".parquet")
NOT_UTF8 = "expected one JSON object per line, in UTF-8"


def read_row_file(path: str | Path, *, not_utf8: str = NOT_UTF8) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:number`` and content of every row; lines of JSONL are counted from 1, empty ones are left out.

    Args:
        path: a file that ends in one of :data:`SUFFIXES`.
        not_utf8: what the message says of a line that is no UTF-8.

    Raises:
        DataError: the file is missing, of another kind, or broken; lines are named.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file that exists")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path, not_utf8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _jsonl_rows(path: Path, not_utf8: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))  # a byte order mark does no harm
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {not_utf8}: {error}; convert the file") from error
            except ValueError as error:
                raise DataError(f"{where}: expected one JSON object per line: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, came {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
