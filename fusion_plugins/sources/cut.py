"""``fusion cut``: long texts -> pieces that fit the context of every model, whatever its tokenizer.

Sources and target must see the same pieces, so texts are cut once, before anything is captured or trained on. A piece
ends where tokenizers end a token anyway (after an empty line, after a line, before a space), never inside a
character. A letter and its combining marks are separated only where such a run alone is too long. Each piece is
tokenized with every tokenizer before it is written.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fusion_plugins.column_names import ABOUT, ColumnNames
from fusion_plugins.config import Settings
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import Selection, Unusable, open_texts
from fusion_plugins.row_files import row_files
from fusion_plugins.sources.backends.base import SourceSettings
from fusion_plugins.sources.loading import load_tokenizer
from fusion_plugins.store.files import FolderLock, leftovers, new_file
from fusion_plugins.texts import Text

Count = Callable[[str], int]
#: good places to end a piece, the best first: after an empty line, after a line, before the first of several spaces
PLACES = (re.compile(r"\n[ \t]*\n+"), re.compile(r"\n"), re.compile(r"(?=(?<! ) )"))
#: a good place is used when the piece then has at least this share of the characters that fit
LEAST_SHARE = 0.5
#: characters per token in the first piece that is tried: few texts have more on average
CHARACTERS_PER_TOKEN = 8


class CutConfig(Settings):
    """Keys of the YAML file of ``fusion cut``."""

    texts: str | list[str] = Field(
        description=".jsonl or .parquet files, folders of them, hf:ORG/NAME[:SPLIT][:COLUMN]"
    )
    columns: ColumnNames = Field(default_factory=ColumnNames, description=ABOUT)
    out: str = Field(description=".jsonl file to write")
    tokenizers: list[str] = Field(min_length=1, description="folders or hub names of all sources and targets")
    max_length: int = Field(ge=16, description="longest piece in tokens, begin and end tokens included")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a tokenizer")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise", description="rows that are no texts, and chats that are too long: raise, or skip and report"
    )


@dataclass(frozen=True)
class CutReport:
    """What was written.

    Attributes:
        out: the file.
        texts: texts read.
        pieces: rows written.
        skipped: id or place -> why it was left out (``on_unusable: skip`` only).
    """

    out: Path
    texts: int
    pieces: int
    skipped: dict[str, str] = field(default_factory=dict)


def cut_texts(config: CutConfig) -> CutReport:
    """Cut a set of texts. A text that fits keeps its id; the pieces of ``x`` are ``x#0``, ``x#1``, ...

    Raises:
        ConfigError: ``out`` cannot be a file, or is one of the texts.
        DataError: a chat is too long (chats are not cut), or a piece cannot be made short enough.
        StoreError: another run writes this file, or it cannot be written.
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    texts = open_texts(config.texts, unusable=unusable, selection=Selection(names=config.columns))
    skipped = dict(unusable or {})
    counters = [_counter(name, config) for name in config.tokenizers]
    out = Path(config.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"out: expected a file in a folder that exists, got {config.out!r}. Name another or make it.")
    if out.exists() and any(file.exists() and out.samefile(file) for file in row_files(config.texts)):
        raise ConfigError(f"out: expected another file than the texts, got {config.out!r}. Name a new one.")
    pieces = 0
    with closing(FolderLock(out.parent, out.name)):
        for left in leftovers(out):  # of a run that was killed
            with suppress(OSError):
                left.unlink()
        with new_file(out) as file:
            for text in texts:
                try:
                    rows = list(_rows(text, counters, config))
                except DataError as error:
                    if config.on_unusable == "raise":
                        raise DataError(f"{text.where}: {error}") from error
                    skipped[text.id] = str(error)
                    continue
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                pieces += len(rows)
    return CutReport(out, len(texts), pieces, skipped)


def cut_text(text: str, max_length: int, counters: Sequence[Count]) -> Iterator[str]:
    """Yield the pieces of a text; together they are the text.

    Args:
        text: the text.
        max_length: most tokens of a piece.
        counters: one function per tokenizer, from text to number of tokens.

    Raises:
        DataError: not even a few characters fit.
    """
    reach = CHARACTERS_PER_TOKEN * max_length
    while text:
        size = len(text) if len(text) <= reach else _end(text, reach)
        while (longest := max(count(text[:size]) for count in counters)) > max_length:
            # In proportion to the tokens, and 5 % less: tokenizing is slow, so that one more round costs more than a
            # slightly short piece.
            size = _end(text, min(size - 1, max(1, int(size * max_length / longest * 0.95))))
            if size < 1:
                raise DataError(
                    f"expected that a few characters fit into {max_length} tokens, but {text[:8]!r} needs more. Raise "
                    "max_length."
                )
        yield text[:size]
        text = text[size:]
        reach = max(2 * size, max_length)  # a text is of one kind: the next piece will not be many times as long


def _counter(name: str, config: CutConfig) -> Callable[..., int]:
    tokenizer = load_tokenizer(
        SourceSettings.model_validate({"model": name, "trust_remote_code": config.trust_remote_code})
    )
    table = TokenTable.from_tokenizer(tokenizer)
    return lambda content, tools=None: len(tokenize_content(tokenizer, table, content, tools=tools)[0].input_ids)


def _rows(text: Text, counters: Sequence[Callable[..., int]], config: CutConfig) -> Iterator[dict[str, Any]]:
    if not isinstance(text.content, str):
        longest = max(count(text.content, text.tools) for count in counters)
        if longest > config.max_length:
            raise DataError(
                f"chat {text.id!r}: expected at most {config.max_length} tokens, got {longest}; chats are not cut. "
                "Leave such chats out with `on_unusable: skip`, or raise max_length."
            )
        # As JSON, because schemas of different tools are not one type of column.
        tools = {"tools": json.dumps(text.tools, ensure_ascii=False)} if text.tools else {}
        yield {"id": text.id, "messages": text.content, **tools}
        return
    pieces = list(cut_text(text.content, config.max_length, counters))
    for number, piece in enumerate(pieces):
        yield {"id": text.id if len(pieces) == 1 else f"{text.id}#{number}", "text": piece}


def _end(text: str, limit: int) -> int:
    """Return the best place to end a piece of at most ``limit`` characters."""
    least = int(limit * LEAST_SHARE)
    for pattern in PLACES:
        ends = [match.end() for match in pattern.finditer(text, 0, limit + 1) if least <= match.end() <= limit]
        if ends:
            return ends[-1]
    end = limit
    while end > 0 and _joins(text, end):
        end -= 1
    return end or limit  # one run of marks that is longer than the limit has to be cut somewhere


def _joins(text: str, place: int) -> bool:
    """Whether the character at ``place`` belongs to the one before it (marks, joiners, variation selectors)."""
    after, before = text[place], text[place - 1]
    return unicodedata.category(after) in ("Mn", "Me", "Mc") or "\u200d" in (before, after) or before == "\r"
