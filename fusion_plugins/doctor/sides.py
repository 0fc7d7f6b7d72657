"""The two sides of an examination: the records of a model, out of its store, or of its tokenizer and texts."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.sampled import tokenize_answer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer, tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, FusionError, MismatchError
from fusion_plugins.inputs import InputSet
from fusion_plugins.model_names import missing_folder, reason_of
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shards import read_keys
from fusion_plugins.texts import Text

#: id -> text or messages, or files of them
Texts = Mapping[str, Any] | InputSet[Text]
#: bytes on disk per token that `fusion capture` can be expected to write at its default top_k of 64
EXPECTED_BYTES = 165.0


class Side:
    """The records of one model by text id: those of a store, or records made of a tokenizer and texts.

    Attributes:
        name: name in the report.
        table: the model's tokens.
        store: None where there is only a tokenizer.
        tokenizer: the Hugging Face tokenizer; None where only a store is at hand.
    """

    def __init__(self, name: str, table: TokenTable, store: Store | None, tokenizer: Any, texts: Texts) -> None:
        self.name, self.table, self.store, self.tokenizer, self._texts = name, table, store, tokenizer, texts

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per stored token; the expected number where there is no store."""
        return self.store.manifest.bytes / max(self.store.manifest.tokens, 1) if self.store else EXPECTED_BYTES

    def ids(self) -> Iterator[str]:
        """Yield the ids of all texts."""
        if self.store is not None:
            folder, codec = self.store.path, RecordCodec(self.store.manifest)
            return (id for shard in self.store.manifest.shards for id in read_keys(folder, shard, codec))
        return iter(self._texts) if isinstance(self._texts, Mapping) else (text.id for text in self._texts)

    def choose(self, ids: Collection[str]) -> None:
        """Read the contents of some texts, the only ones of which records are asked for, where files hold them."""
        if not isinstance(self._texts, Mapping):
            chosen = frozenset(ids)
            self._texts = {text.id: text for text in self._texts if text.id in chosen}

    def record(self, id: str) -> Record:
        """Return the stored record; without a store, that of a source that is certain of every next token."""
        if self.store:
            return self.store[id]
        assert isinstance(self._texts, Mapping)  # see `choose`
        given = self._texts[id]
        if isinstance(given, Text) and given.answer is not None:
            messages: Any = given.content
            chat = generated_spans(chat_renderer(self.tokenizer, given.tools), messages)
            return _certain_record(id, tokenize_answer(self.tokenizer, self.table, chat, given.answer)[0])
        content, tools = (given.content, given.tools) if isinstance(given, Text) else (given, None)
        return _certain_record(id, tokenize_content(self.tokenizer, self.table, content, tools=tools)[0])


def open_side(path: str, texts: Texts | None) -> Side:
    """Open a store, or load a tokenizer that will tokenize ``texts``.

    Raises:
        ConfigError: the path is not a store and there are no texts, or it is not a tokenizer either.
        StoreError: the store is damaged.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if (Path(path) / "manifest.json").exists():
        store = open_store(path)
        return Side(name, store.table, store, None, {})
    if texts is None:
        raise ConfigError(
            f"expected a store, got {path}, which has no manifest.json. Give the folder that `fusion capture` wrote, "
            "or a tokenizer together with --texts."
        )
    tokenizer, table = _load_tokenizer(path)
    return Side(name, table, None, tokenizer, texts)


def open_target(path: str, texts: Texts | None, tokenizer: str | None = None) -> Side:
    """Open the target's side, with a tokenizer for the ``first_token`` maps if one can be found.

    Args:
        path: a store or a tokenizer, as for :func:`open_side`.
        texts: as for :func:`open_side`.
        tokenizer: the tokenizer of the store; by default that of the captured model, if its folder still exists.

    Raises:
        ConfigError: as for :func:`open_side`; ``tokenizer`` is not one; or it is given and ``path`` is a tokenizer.
        MismatchError: the store was captured with another tokenizer.
    """
    side = open_side(path, texts)
    if side.store is not None:
        side.tokenizer = _tokenizer_of(side.store, tokenizer)
    elif tokenizer is not None:
        raise ConfigError(f"the target {path} is a tokenizer itself: leave out --tokenizer {tokenizer}")
    return side


def _load_tokenizer(path: str) -> tuple[Any, TokenTable]:
    from transformers import AutoTokenizer

    if problem := missing_folder(path):
        raise ConfigError(f"expected a store or a tokenizer, got {path}: {problem}. Correct the path.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("a")
    except Exception as error:
        raise ConfigError(
            f"expected a store or a tokenizer, got {path}, which is neither: {reason_of(error)}"
        ) from error
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def _tokenizer_of(store: Store, named: str | None) -> Any:
    """Return the tokenizer of a store; None where none was named and that of the captured model cannot be used."""
    path = named or store.manifest.model
    # The manifest may name a model of the hub; doctor downloads nothing.
    if named is None and not Path(path).is_dir():
        return None
    expected = store.manifest.tokenizer_fingerprint
    try:
        tokenizer, table = _load_tokenizer(path)
        if table.fingerprint != expected:
            raise MismatchError(
                f"{store.path}: expected the tokenizer it was captured with, {expected[:16]} ({store.manifest.model}); "
                f"got --tokenizer {named}, {table.fingerprint[:16]}. Name the one it was captured with."
            )
    except FusionError:
        # The captured model's folder was a guess. Without it the maps are made from bytes, and a note says so.
        if named is None:
            return None
        raise
    return tokenizer


def _certain_record(id: str, text: TokenizedText) -> Record:
    """Return the record of a source that is certain of every next token, so that only alignment and maps matter."""
    following = np.append(text.input_ids[1:], -1).astype(np.int32)[:, None]
    unknown = np.full(len(text.input_ids), np.nan, np.float32)
    return build_record(id, text, TopK(following, np.where(following >= 0, 0.0, -np.inf), unknown))
