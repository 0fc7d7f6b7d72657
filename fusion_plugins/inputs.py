"""Sets of texts and prompts, out of files, folders of files, datasets of the hub and folders of responses.

First step of the data flow. :mod:`fusion_plugins.row_files` reads the rows, and :mod:`fusion_plugins.texts` makes texts
and prompts of them.

A set of texts is read twice or more: once to check every row and to make the fingerprint, which decides whether a run
may resume before any model is loaded, and again by whoever works on the texts (:class:`InputSet`). So a set of any size
takes little memory.
"""

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from fusion_plugins.column_names import ColumnNames, PromptColumns
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import CONTENTS, hub_dataset, is_hub
from fusion_plugins.response_texts import (
    ANSWER_COLUMNS,
    EMPTY,
    answers_as_texts,
    is_response_folder,
    refuse_unread_response,
    require_responses,
    response_rows,
)
from fusion_plugins.row_files import Row, readable_rows, row_files
from fusion_plugins.text_index import TextIndex
from fusion_plugins.texts import COLUMNS, Prompt, Text, as_prompt, as_text, prompt_digest
from fusion_plugins.where import Where, columns_of, require_columns, selects

#: rows after which a set of texts is looked at, whether its files have changed
ROWS_BETWEEN_LOOKS = 4096
#: place or id of a row that cannot be used -> why
Unusable = dict[str, str]
Item = TypeVar("Item")
Names = TypeVar("Names", bound=ColumnNames)
#: messages of a chat and its row -> the messages that a source reads
Context = Callable[[list[dict[str, Any]], Row], list[dict[str, Any]]]


@dataclass(frozen=True)
class Selection:
    """Which rows of a set of texts are read, and how.

    Attributes:
        where: conditions that they meet; None for all rows.
        context: puts other messages before the answers of a chat.
        columns: that the context looks at.
        names: where the text or chat of a row stands.
    """

    where: Where | None = None
    context: Context | None = None
    columns: tuple[str, ...] = ()
    names: ColumnNames = field(default_factory=ColumnNames)

    @property
    def read(self) -> tuple[str, ...]:
        """Columns that are read besides those of every text."""
        return (*columns_of(self.where), *self.columns)


EVERYTHING = Selection()


class InputSet(Generic[Item]):
    """Texts or prompts of files, read anew by every iteration, so that few of them are in memory.

    Attributes:
        fingerprint: sha256 (hex) of all ids and contents, whatever their order; for prompts also of what their
            responses are scored by.
        n_bytes: bytes of all texts, see :attr:`Text.n_bytes`.
        has_chats: whether one of them is a chat.
        left_out: how many responses have no text of their own, see
            :func:`~fusion_plugins.response_texts.answers_as_texts`.
        unread: of prompts, the other columns that some rows have.

    Args:
        path: as for :func:`read_texts`.
        make: turns place, row and text of a row into an item.
        pair: item -> its text, and the sha256 (hex) that stands for it in the fingerprint.
        unusable: takes the rows that cannot be used; without it, the first of them is an error.
        selection: which rows are read.

    Raises:
        DataError: as for :func:`read_texts`; or a folder has no responses, or all of them say nothing; while
            iterating: a file has changed since.
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
        self.unread: tuple[str, ...] = ()
        require_responses([path] if isinstance(path, str | Path) else path)
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
        index, self._count, self.n_bytes, self.has_chats = TextIndex(), 0, 0, False
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
    found: set[str] = set()

    def make(where: str, row: Row, text: Text) -> Text:
        found.update(row)
        _as_text(where, row, text)
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

    texts = InputSet(path, make, lambda text: (text, text.digest), unusable, selection)
    _require_named(selection.names, found, path)
    return texts


def _require_named(names: ColumnNames, found: set[str], path: Any) -> None:
    """Refuse the name of a column that no row has: of a wrong one for the text itself each row would be an error."""
    missing = {name: column for name, column in names.given.items() if column not in found}
    if missing and found:
        said = ", ".join(f"{name}: {column}" for name, column in missing.items())
        raise ConfigError(
            f"columns: expected columns of {path}, got {said}, which no row has. Correct the name, or remove it."
        )


def open_prompts(
    path: str | Path | Sequence[str | Path],
    *,
    unusable: Unusable | None = None,
    keep: Sequence[str] = (),
    names: PromptColumns | None = None,
) -> InputSet[Prompt]:
    """Check prompts as :func:`read_prompts` does, and return them as a set that is read anew by every iteration.

    Args:
        path: as for :func:`read_texts`.
        unusable: as for :func:`read_texts`.
        keep: names of other columns that the prompts have in :attr:`Prompt.kept`.
        names: where the prompt of a row, its gold answer and the rest stand; None: under their own names.

    Raises:
        DataError: as for :func:`read_prompts`.
        ConfigError: no row has one of the columns to keep; it may be null in all of them.
    """
    found: set[str] = set()

    def make(where: str, row: Row, text: Text) -> Prompt:
        prompt = as_prompt(where, row, text, keep)
        found.update(row)
        return prompt

    def pair(prompt: Prompt) -> tuple[Text, str]:
        return prompt.text, prompt_digest(prompt)

    names = names or PromptColumns()
    prompts = InputSet(path, make, pair, unusable, Selection(columns=tuple(keep), names=names))
    if (missing := set(keep) - found) and len(prompts):
        raise ConfigError(
            f"keep_columns: expected columns of {path}, got {', '.join(sorted(missing))}, which no row has. "
            "Correct the name, or add the column."
        )
    _require_named(names, found, path)
    prompts.unread = tuple(sorted(found - {*keep, *COLUMNS, *names.columns}))
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
    return list(islice(_items(_rows(path), unusable, _as_text), limit))


def _as_text(where: str, row: Row, text: Text) -> Text:
    if text.answer is None and not isinstance(text.content, str):
        try:
            refuse_unread_response(row, text.content)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    return text


def read_prompts(
    path: str | Path | Sequence[str | Path], limit: int | None = None, *, unusable: Unusable | None = None
) -> list[Prompt]:
    """Read prompts; like :func:`read_texts`, with the columns of :class:`Prompt`.

    Raises:
        DataError: as :func:`read_texts`; or a chat that ends with a message of the assistant, or tests that JSON cannot
            write.
    """
    return list(islice(_items(_rows(path), unusable, as_prompt), limit))


def prompt_rows(
    path: str | Path | Sequence[str | Path], names: PromptColumns
) -> Iterator[tuple[str, Row, Prompt | DataError]]:
    """Yield place, all columns and the prompt of every row, or why it is none; two rows may have the same id."""
    for file in row_files(path):
        own = _names_of(file, names)
        for where, row in readable_rows(file, needed=(own.field, own.field_messages, *CONTENTS)):
            columns = {} if isinstance(row, DataError) else row
            known = row if isinstance(row, DataError) else own.renamed(row)
            try:
                text = _checked(known, where, {})
                yield where, columns, as_prompt(where, known if isinstance(known, dict) else {}, text)
            except DataError as error:
                yield where, columns, error


def _names_of(file: str | Path, names: Names) -> Names:
    """Return the names of columns in a file; the column in `hf:ORG/NAME:SPLIT:COLUMN` wins."""
    if not is_hub(file) or hub_dataset(file).column is None:
        return names
    return names.model_copy(update={"field": "text", "field_messages": "messages"})


def _rows(
    path: str | Path | Sequence[str | Path], selection: Selection = EVERYTHING, left_out: Counter[str] | None = None
) -> Iterator[tuple[str, Row | DataError]]:
    """Yield place and content of the selected rows of files, folders of files and folders of responses."""
    rows = _plain_rows(path, selection.read, selection.names)
    yield from answers_as_texts(_selected(rows, selection.where, str(path)) if selection.where else rows, left_out)


def _plain_rows(
    path: str | Path | Sequence[str | Path], more: Sequence[str], names: ColumnNames
) -> Iterator[tuple[str, Row | DataError]]:
    for part in [path] if isinstance(path, str | Path) else path:
        if is_response_folder(part):
            yield from response_rows(part)
        else:
            for file in row_files(part):
                own = _names_of(file, names)
                read = dict.fromkeys((*own.columns, *COLUMNS, *ANSWER_COLUMNS, *more))
                for where, row in readable_rows(file, [*read], needed=(own.field, own.field_messages, *CONTENTS)):
                    yield where, row if isinstance(row, DataError) else own.renamed(row)


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
                cure = "With `on_unusable: skip`, `fusion capture`, `sample` and `cut` leave such rows out."
                raise DataError(f"{error} {cure}") from error
            unusable[_name(row, where, seen, unusable)] = str(error)
        else:
            if watched is None or text.id in watched:
                seen[text.id] = where
            yield item


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
        text = as_text(where, row)
    except RecursionError:
        raise DataError(f"{where}: expected text or messages, got values nested too deeply. Flatten them.") from None
    if text.id in seen:
        raise DataError(
            f"{where}: expected an id that no other row has, got {text.id!r}, which is also the id of {seen[text.id]}. "
            "Stores are joined by ids: give each row its own. (A row without an id has its content's sha256 for one: "
            "drop the duplicate, or give both rows ids.)"
        )
    return text


def _name(row: Row | DataError, where: str, *taken: Container[str]) -> str:
    """Return what a row that cannot be used is called: its id, or its place if it has none of its own."""
    name = where if isinstance(row, DataError) or row.get("id") is None else str(row["id"])
    return where if any(name in names for names in taken) else name
