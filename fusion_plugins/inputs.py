"""Rows of JSONL and Parquet files, and the texts and prompts in them.

First step of the data flow. A row has ``text``, or ``messages`` and perhaps ``tools``, and usually an ``id``; without
one, the sha256 of the content is the id. Prompts may also have ``domain``, ``reference`` (gold answer) and ``tests``
(code). Other columns are not read, so nothing in them can be in the way.

A set of texts is read twice or more: once to check every row and to make the fingerprint, which decides whether a run
may resume before any model is loaded, and again by whoever works on the texts (:class:`InputSet`). So a set of any size
takes little memory.
"""

import hashlib
import heapq
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion_plugins.core.text.content_id import content_id, sorted_fingerprint, texts_fingerprint
from fusion_plugins.core.text.messages import REASONING_KEYS, as_messages, as_tools
from fusion_plugins.core.text.sampled import SampledAnswer
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import hub_rows, is_hub
from fusion_plugins.response_texts import (
    ANSWER,
    ANSWER_COLUMNS,
    EMPTY,
    answers_as_texts,
    is_response_folder,
    response_rows,
)
from fusion_plugins.where import Where, columns_of, require_columns, selects

#: ends of the names of files that can be read
SUFFIXES = (".jsonl", ".parquet")
#: columns of texts and prompts
COLUMNS = ("id", "text", "messages", "tools", "domain", "reference", "tests")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

#: rows after which a set of texts is looked at, whether its files have changed
ROWS_BETWEEN_LOOKS = 4096
#: ids that are Python strings at a time while a set is sorted
SORTED_AT_ONCE = 1 << 14

_WEIGHED = ("content", "tool_calls", *REASONING_KEYS)

Row = dict[str, Any]
#: place or id of a row that cannot be used -> why
Unusable = dict[str, str]
Item = TypeVar("Item")
#: messages of a chat and its row -> the messages that a source reads
Context = Callable[[list[dict[str, Any]], Row], list[dict[str, Any]]]


@dataclass(frozen=True)
class Selection:
    """Which rows of a set of texts are read, and how.

    Attributes:
        where: conditions that they meet; None for all rows.
        context: puts other messages before the answers of a chat.
        columns: that the context looks at.
    """

    where: Where | None = None
    context: Context | None = None
    columns: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Columns that are read besides those of every text."""
        return (*columns_of(self.where), *self.columns)


EVERYTHING = Selection()


@dataclass(frozen=True)
class Text:
    """One text or chat.

    Attributes:
        id: unique within the set.
        content: the text, or the messages of a chat.
        content_id: sha256 (hex) of the content and the tools.
        tools: schemas of the tools that the chat may call, or None.
        where: file and row that it was read from.
        answer: how the last message of a chat was sampled, which alone is supervised then; None where every message of
            the assistant is.
        read_as: the messages that a source reads in place of the chat (see
            :mod:`fusion_plugins.sources.context`); None for the chat itself.
        domain: what the row says that it is about; None where it does not.
    """

    id: str
    content: str | list[dict[str, Any]]
    content_id: str
    tools: list[dict[str, Any]] | None = None
    where: str = field(default="", compare=False)
    answer: SampledAnswer | None = None
    read_as: list[dict[str, Any]] | None = None
    domain: str | None = field(default=None, compare=False)

    @property
    def turns(self) -> int:
        """How many turns of a chat are supervised, from the last one back."""
        return 1 if self.answer else sum(message["role"] == "assistant" for message in self.content)  # type: ignore[index]

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that decides what is captured of the text; the content's where that is all."""
        parts: list[Any] = []
        if self.answer and (self.answer.token_ids or not self.answer.finished):
            parts.append([self.answer.finished, self.answer.token_ids, self.answer.tokenizer])
        if self.read_as is not None:
            parts.append(content_id(self.read_as))
        if not parts:
            return self.content_id
        return hashlib.sha256(json.dumps([self.content_id, *parts]).encode()).hexdigest()

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
        kept: other columns that the responses get, as far as the row has them.
    """

    text: Text
    domain: str = "instruction"
    reference: str | None = None
    tests: Any = None
    kept: Row = field(default_factory=dict)


class InputSet(Generic[Item]):
    """Texts or prompts of files, read anew by every iteration, so that few of them are in memory.

    Attributes:
        fingerprint: sha256 (hex) of all ids and contents, whatever their order; for prompts also of what their
            responses are scored by.
        n_bytes: bytes of all texts, see :attr:`Text.n_bytes`.
        has_chats: whether one of them is a chat.
        left_out: how many responses have no text of their own, see
            :func:`~fusion_plugins.response_texts.answers_as_texts`.

    Args:
        path: as for :func:`read_texts`.
        make: turns place, row and text of a row into an item.
        pair: item -> its text, and the sha256 (hex) that stands for it in the fingerprint.
        unusable: takes the rows that cannot be used; without it, the first of them is an error.
        selection: which rows are read.

    Raises:
        DataError: as for :func:`read_texts`; or all responses say nothing; while iterating: a file has changed since.
        ConfigError: no row has a column that the selection names.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        make: Callable[[str, Row, Text], Item],
        pair: Callable[[Item], tuple[Text, str]],
        unusable: Unusable | None = None,
        selection: Selection = EVERYTHING,
    ) -> None:
        self._path, self._make, self._pair, self._selection = path, make, pair, selection
        self._stamps = {file: _stamp(file) for file in row_files(path)}
        # A dict of all ids and their places would be larger than all the rest. Only ids that turn out to appear twice,
        # or that rows which cannot be used have, are looked for by place, in a second pass.
        self._watched: frozenset[str] = frozenset()
        self._watched = self._check(unusable) | frozenset(unusable or ())
        if self._watched:
            if unusable is not None:
                unusable.clear()
            self._check(unusable)
        if not self._count and (silent := self.left_out[EMPTY]):
            raise DataError(
                f"{path}: expected responses that say something, got {silent} that say nothing. Sample them again, for "
                "example with a larger max_tokens, or choose others."
            )

    def _check(self, unusable: Unusable | None) -> frozenset[str]:
        """Read all rows, and return the ids that appear twice."""
        index, self._count, self.n_bytes, self.has_chats = _Index(), 0, 0, False
        self.left_out = Counter[str]()
        for item in self._read(unusable, self.left_out):
            text, digest = self._pair(item)
            index.add(text.id, digest)
            self._count += 1
            self.n_bytes += text.n_bytes
            self.has_chats |= not isinstance(text.content, str)
        self.fingerprint, twice = index.close()
        return twice

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        return self._read({})

    def _read(self, unusable: Unusable | None, left_out: Counter[str] | None = None) -> Iterator[Item]:
        return _items(self._open(left_out), unusable, self._make, self._watched)

    def _open(self, left_out: Counter[str] | None) -> Iterator[tuple[str, Row | DataError]]:
        for number, row in enumerate(_rows(self._path, self._selection, left_out)):
            if number % ROWS_BETWEEN_LOOKS == 0:
                self._require_unchanged()
            yield row
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise DataError(
                    f"{file}: expected the file as it was when this run began, got another one. Leave the texts alone "
                    "while a run reads them. Put the file back and run the same command again, or start with the new "
                    "texts in a new folder."
                )


def open_texts(
    path: str | Path | Sequence[str | Path], *, unusable: Unusable | None = None, selection: Selection = EVERYTHING
) -> InputSet[Text]:
    """Check texts as :func:`read_texts` does, and return them as a set that is read anew by every iteration.

    Raises:
        DataError: as for :func:`read_texts`.
        ConfigError: no row has a column that the selection names.
    """

    def make(where: str, row: Row, text: Text) -> Text:
        if selection.context is None:
            return text
        if isinstance(text.content, str):
            raise DataError(
                f"{where}: context: expected a chat, got a plain text, which has nothing before it. Give messages."
            )
        try:
            return replace(text, read_as=selection.context(text.content, row))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    return InputSet(path, make, lambda text: (text, text.digest), unusable, selection)


def open_prompts(
    path: str | Path | Sequence[str | Path], *, unusable: Unusable | None = None, keep: Sequence[str] = ()
) -> InputSet[Prompt]:
    """Check prompts as :func:`read_prompts` does, and return them as a set that is read anew by every iteration.

    Args:
        path: as for :func:`read_texts`.
        unusable: as for :func:`read_texts`.
        keep: names of other columns that the prompts have in :attr:`Prompt.kept`.

    Raises:
        DataError: as for :func:`read_prompts`.
        ConfigError: no row has one of the columns to keep.
    """
    missing = set(keep)

    def make(where: str, row: Row, text: Text) -> Prompt:
        prompt = _prompt(where, row, text, keep)
        missing.difference_update(prompt.kept)
        return prompt

    prompts = InputSet(
        path, make, lambda prompt: (prompt.text, _prompt_digest(prompt)), unusable, Selection(columns=tuple(keep))
    )
    if missing and len(prompts):
        raise ConfigError(
            f"keep_columns: expected columns of {path}, got {', '.join(sorted(missing))}, in which no row has a value. "
            "Correct the name, or add the column."
        )
    return prompts


def read_texts(
    path: str | Path | Sequence[str | Path], limit: int | None = None, *, unusable: Unusable | None = None
) -> list[Text]:
    """Read the texts of one file, a folder of files, or several of them, in order.

    Args:
        path: ``.jsonl`` or ``.parquet`` files, or folders of such files (read in the order of their names), or folders
            of responses, whose texts are the chats of prompt and response, or datasets of the hub (``hf:ORG/NAME``).
        limit: stop after this many texts.
        unusable: takes the rows that cannot be used; without it, the first of them is an error.

    Raises:
        DataError: a file is missing or broken; or a row has no content, or the id of another row.
    """
    return list(islice(_items(_rows(path), unusable, lambda where, row, text: text), limit))


def read_prompts(
    path: str | Path | Sequence[str | Path], limit: int | None = None, *, unusable: Unusable | None = None
) -> list[Prompt]:
    """Read prompts; like :func:`read_texts`, with the columns of :class:`Prompt`.

    Raises:
        DataError: as :func:`read_texts`; or a chat that ends with a message of the assistant, or tests that JSON cannot
            write.
    """
    return list(islice(_items(_rows(path), unusable, _prompt), limit))


def prompt_rows(path: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, Row, Prompt | DataError]]:
    """Yield place, all columns and the prompt of every row, or why it is none; two rows may have the same id."""
    for file in row_files(path):
        for where, row in readable_rows(file):
            columns = {} if isinstance(row, DataError) else row
            try:
                yield where, columns, _prompt(where, columns, _checked(row, where, {}))
            except DataError as error:
                yield where, columns, error


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 (hex) of a set of prompts, with the domains, references and tests that responses are scored by.

    The order of the prompts does not matter.
    """
    return texts_fingerprint((prompt.text.id, _prompt_digest(prompt)) for prompt in prompts)


def _prompt_digest(prompt: Prompt) -> str:
    parts: list[Any] = [prompt.text.content_id, prompt.domain, prompt.reference, prompt.tests]
    if prompt.kept:
        parts.append(prompt.kept)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_row_file(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ``file:number`` and content of every row; lines of JSONL are counted from 1, empty lines are left out.

    Args:
        path: a file that ends in one of :data:`SUFFIXES`, or a dataset of the hub.
        columns: what to read of a Parquet file; the others are None. Default: all.

    Raises:
        DataError: the file is missing, of another kind, or broken; the message names the line.
    """
    for where, row in readable_rows(path, columns):
        if isinstance(row, DataError):
            raise row
        yield where, row


def readable_rows(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Row | DataError]]:
    """Yield every row as :func:`read_row_file` does, and an error in the place of a row that cannot be read.

    Raises:
        DataError: the file is missing, of another kind, or broken as a whole.
    """
    if is_hub(path):
        yield from hub_rows(path, columns)
        return
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        got = f"a file with the ending {path.suffix!r}" if path.is_file() else "none"
        raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file, got {got}. Name another file.")
    try:
        yield from _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Repair the permission or the disk.") from error


def _rows(
    path: str | Path | Sequence[str | Path], selection: Selection = EVERYTHING, left_out: Counter[str] | None = None
) -> Iterator[tuple[str, Row | DataError]]:
    """Yield place and content of the selected rows of files, folders of files and folders of responses."""
    rows = _plain_rows(path, selection.read)
    yield from answers_as_texts(_selected(rows, selection.where, str(path)) if selection.where else rows, left_out)


def _plain_rows(
    path: str | Path | Sequence[str | Path], more: Sequence[str] = ()
) -> Iterator[tuple[str, Row | DataError]]:
    for part in [path] if isinstance(path, str | Path) else path:
        if is_response_folder(part):
            yield from response_rows(part)
        else:
            for file in row_files(part):
                yield from readable_rows(file, (*COLUMNS, *ANSWER_COLUMNS, *more))


def _selected(
    rows: Iterable[tuple[str, Row | DataError]], where: Where, path: str
) -> Iterator[tuple[str, Row | DataError]]:
    """Yield the rows that meet conditions, and those that cannot be read; every column must be in some row."""
    found: set[str] = set()
    kept = False
    for place, row in rows:
        if not isinstance(row, DataError):
            found |= row.keys()
            try:
                if not selects(where, row):
                    continue
            except DataError as error:
                row = DataError(f"{place}: {error}")
        kept = True
        yield place, row
    require_columns(where, found, path)
    if not kept:
        conditions = "; ".join(f"{column}: {condition}" for column, condition in where.items())
        raise DataError(f"{path}: where: expected some rows with {conditions}, got none. Change the conditions.")


def _items(
    rows: Iterable[tuple[str, Row | DataError]],
    unusable: Unusable | None,
    make: Callable[[str, Row, Text], Item],
    watched: Container[str] | None = None,
) -> Iterator[Item]:
    """Yield what ``make`` makes of place, row and text of every row; refuse an id that appears twice.

    With ``watched``, only those ids are looked for; the places of all others need not be remembered.
    """
    seen: dict[str, str] = {}
    for where, row in rows:
        try:
            text = _checked(row, where, seen)
            item = make(where, row if isinstance(row, dict) else {}, text)
        except DataError as error:
            if unusable is None:
                raise
            unusable[_name(row, where, seen)] = str(error)
        else:
            if watched is None or text.id in watched:
                seen[text.id] = where
            yield item


class _Index:
    """Ids and digests of many texts, in 48 bytes each and the bytes of the id; an id that is the digest takes none."""

    def __init__(self) -> None:
        self._names, self._stops, self._named = bytearray(), array("q", [0]), bytearray()
        self._unnamed = bytearray()

    def add(self, id: str, digest: str) -> None:
        if id == digest:
            self._unnamed += bytes.fromhex(digest)
        else:
            self._names += id.encode()
            self._stops.append(len(self._names))
            self._named += bytes.fromhex(digest)

    def close(self) -> tuple[str, frozenset[str]]:
        """Return the fingerprint, where each id counts once, and the ids that appear twice."""
        twice: set[str] = set()

        def once() -> Iterator[tuple[str, str]]:
            before = None
            for id, digest in heapq.merge(self._sorted_named(), self._sorted_unnamed()):
                if id == before:
                    twice.add(id)
                else:
                    yield id, digest
                before = id

        return sorted_fingerprint(once()), frozenset(twice)

    def _sorted_named(self) -> Iterator[tuple[str, str]]:
        names = pa.LargeStringArray.from_buffers(
            len(self._stops) - 1, pa.py_buffer(self._stops), pa.py_buffer(self._names)
        )
        digests = np.frombuffer(self._named, np.uint8).reshape(-1, 32)
        order = pc.sort_indices(names)  # by the bytes of UTF-8, which is the order of Python's strings
        for start in range(0, len(order), SORTED_AT_ONCE):
            part = order.slice(start, SORTED_AT_ONCE)
            for id, place in zip(names.take(part).to_pylist(), part.to_pylist(), strict=True):
                yield id, digests[place].tobytes().hex()

    def _sorted_unnamed(self) -> Iterator[tuple[str, str]]:
        digests = np.frombuffer(self._unnamed, np.uint8).reshape(-1, 32)
        words = digests.view(">u8")
        for place in np.lexsort(words.T[::-1]):
            digest = digests[place].tobytes().hex()
            yield digest, digest


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = os.stat(file)
    except OSError:  # whoever opens it says what is wrong
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _checked(row: Row | DataError, where: str, seen: Mapping[str, str]) -> Text:
    """Return the text of a row that can be used."""
    if isinstance(row, DataError):
        raise row
    try:
        text = _text(row, where)
    except RecursionError:
        raise DataError(f"{where}: expected text or messages, got values nested too deeply. Flatten them.") from None
    if text.id in seen:
        raise DataError(
            f"{where}: expected an id that no other row has, got {text.id!r}, which is also the id of {seen[text.id]}. "
            "Stores are joined by ids: give each row its own. (A row without an id has its content's sha256 for one: "
            "drop the duplicate, or give both rows ids.)"
        )
    return text


def _name(row: Row | DataError, where: str, seen: Mapping[str, str]) -> str:
    """Return what a row that cannot be used is called: its id, or its place if it has none of its own."""
    name = where if isinstance(row, DataError) or row.get("id") is None else str(row["id"])
    return where if name in seen else name


def row_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that :func:`read_texts` reads, in order; names of datasets on the hub as they are.

    Raises:
        DataError: one of them is missing or of another kind, or a folder holds none.
    """
    files: list[Path] = []
    for part in [path] if isinstance(path, str | Path) else path:
        path = Path(part)
        if is_hub(path):
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found and is_response_folder(path):
            raise DataError(
                f"{path}: expected responses, got a folder that has none yet. Sample some, or name another."
            )
        if not found or not all(file.is_file() and file.suffix in SUFFIXES for file in found):
            raise DataError(
                f"{path}: expected a {' or '.join(SUFFIXES)} file or a folder of them, got none. Name another."
            )
        files += found
    return files


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_row(line, where)


def _json_row(line: bytes, where: str) -> Row | DataError:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        return DataError(f"{where}: expected one JSON object per line, in UTF-8, got other bytes: {error}. Convert it.")
    except ValueError as error:
        return DataError(
            f"{where}: expected one JSON object per line, got other text: {error!s:.200}. Correct the line."
        )
    except RecursionError:
        return DataError(f"{where}: expected one JSON object per line, got one that is nested too deeply. Flatten it.")
    if not isinstance(row, dict):
        return DataError(f"{where}: expected a JSON object, got {type(row).__name__}. Correct the line.")
    return row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Row | DataError]]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        read = [name for name in names if columns is None or name in columns]
        if not read:
            raise DataError(f"{path}: expected some of the columns {', '.join(columns or ())}, got {', '.join(names)}.")
        others = dict.fromkeys(names)
        for batch in file.iter_batches(columns=read):
            for row in _values(batch):
                number += 1
                where = f"{path}:{number}"
                yield where, others | row if isinstance(row, dict) else DataError(f"{where}: {row}. Correct the row.")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected a Parquet file, got other bytes behind row {number}: {error!s:.200}. Write it again."
        ) from error


def _values(batch: pa.RecordBatch) -> Iterator[Row | str]:
    """Yield the rows of a batch, and what is wrong with those that Python cannot hold (a year 294247, no UTF-8)."""
    try:
        rows: list[Row | str] = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _values(batch.slice(number, 1))
            return
        rows = [f"expected values that can be read, got others: {error!s:.200}"]
    yield from rows


def _text(row: Row, where: str) -> Text:
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
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected messages of values that JSON can write, got others: {error}. Correct the messages."
        ) from error
    given = _given(row, "id")
    name = digest if given is None else str(given)
    # The first test is fast and true for nearly all ids; it is false for all with surrogates.
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(
            f"{where}: expected an id that UTF-8 can encode, got one with a lone surrogate: {name!r:.80}. Rename it."
        )
    domain = _given(row, "domain")
    about = None if domain in (None, "") else str(domain)
    return Text(name, content, digest, tools, where, row.get(ANSWER), domain=about)


def _prompt(where: str, row: Row, text: Text, keep: Sequence[str] = ()) -> Prompt:
    if not isinstance(text.content, str) and text.content[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: expected a prompt that ends with a message of the user, got one that ends with the "
            "assistant's. Drop the last message of each prompt."
        )
    reference = _given(row, "reference")
    prompt = Prompt(
        text=text,
        domain=str(_given(row, "domain") or "instruction"),
        reference=None if reference is None else str(reference),
        tests=_given(row, "tests"),
        kept={name: value for name in keep if (value := _given(row, name)) is not None},
    )
    try:
        json.dumps([prompt.domain, prompt.reference, prompt.tests, prompt.kept], ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected a domain, a reference, tests and columns to keep that JSON and UTF-8 can write, got "
            f"others: {error}. Correct the row."
        ) from error
    return prompt


def _given(row: Row, name: str) -> Any:
    """Return a value; None where there is none, also where another tool wrote that as a number that is no number."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


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
