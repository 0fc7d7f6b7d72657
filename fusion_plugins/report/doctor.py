"""``fusion doctor``: is it worth fusing these sources into this target, and what should be set otherwise?

Reads stores. A folder with a tokenizer may stand in place of a store: then only what depends on the tokenizers is
measured (coverage, vocabulary), on the texts that are given besides.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion_plugins.core.content import tokenize_content
from fusion_plugins.core.project import ProjectionOptions
from fusion_plugins.core.record import build_record
from fusion_plugins.core.token_table import Role, TokenTable
from fusion_plugins.core.types import Record, TokenizedText, VocabularyMap
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.report.diagnosis import Diagnosis, advice, diagnose, verdict
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.map_cache import cached_map

__all__ = ["DoctorReport", "Side", "SourceVerdict", "examine", "open_side"]

#: training step that the memory estimate is for
BATCH, TOKENS = 1, 2048


class Side:
    """A store, or a tokenizer with texts, seen as a lookup of records by id."""

    def __init__(
        self, name: str, table: TokenTable, store: Store | None, tokenizer: Any, texts: dict[str, Any]
    ) -> None:
        self.name, self.table, self.store, self.tokenizer, self._texts = name, table, store, tokenizer, texts

    @property
    def top_k(self) -> int:
        """Entries per row; 1 where there are no distributions."""
        return self.store.manifest.top_k if self.store else 1

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per stored token; nan where there is no store."""
        return self.store.manifest.bytes / max(self.store.manifest.tokens, 1) if self.store else float("nan")

    def ids(self) -> list[str]:
        """Return the ids of all texts."""
        return self.store.ids() if self.store else list(self._texts)

    def record(self, id: str) -> Record:
        """Return the stored record, or one that knows nothing but the tokens of the text."""
        if self.store:
            return self.store[id]
        text, _ = tokenize_content(self.tokenizer, self.table, self._texts[id])
        return _record_of_tokens(id, text)


@dataclass(frozen=True)
class SourceVerdict:
    """What was found about one source: the figures, the verdict in a word and the advice."""

    diagnosis: Diagnosis
    verdict: str
    advice: list[str]
    bytes_per_token: float
    top_k: int


@dataclass(frozen=True)
class DoctorReport:
    """The whole examination.

    Attributes:
        target: name of the target's side.
        texts: texts of the sample.
        scored: whether distributions were there, or tokenizers alone.
        vocabulary: method of the vocabulary maps.
        sources: one verdict per source.
        sparse_bytes: memory of the fused targets of one step of 1 x 2048 tokens.
        dense_bytes: memory of the same targets as a dense float32 tensor.
    """

    target: str
    texts: int
    scored: bool
    vocabulary: str
    sources: list[SourceVerdict]
    sparse_bytes: int
    dense_bytes: int

    def to_json(self) -> str:
        """Return everything as JSON; figures that do not exist are null."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: clean(item) for key, item in value.items()}
            if isinstance(value, list):
                return [clean(item) for item in value]
            return None if isinstance(value, float) and not np.isfinite(value) else value

        return json.dumps(clean(asdict(self)), indent=1, ensure_ascii=False)


def open_side(path: str, texts: dict[str, Any] | None) -> Side:
    """Open a store, or load a tokenizer to be tried on ``texts`` (id -> text or messages).

    Raises:
        ConfigError: the path is no store and there are no texts, or it holds no tokenizer.
        StoreError: the store is damaged.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1]
    if (Path(path) / "manifest.json").exists():
        store = open_store(path)
        return Side(name, store.table, store, None, {})
    if texts is None:
        raise ConfigError(
            f"{path} is not a store (it has no manifest.json). Give the folder that `fusion capture` wrote, or a "
            "tokenizer together with --texts."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is neither a store nor a tokenizer: {error}") from error
    return Side(name, TokenTable.from_tokenizer(tokenizer), None, tokenizer, texts)


def examine(
    target: Side,
    sources: Sequence[Side],
    *,
    vocabulary: str = "first_token",
    options: ProjectionOptions = ProjectionOptions(),
    limit: int = 200,
    advance: Any = lambda: None,
) -> DoctorReport:
    """Examine every source against the target on a sample of the texts that all of them have.

    Args:
        target: the model that is to be trained.
        sources: at least one.
        vocabulary: method of the vocabulary maps; ``statistics`` is counted in training and cannot be tried here.
        options: options of the projection.
        limit: texts of the sample, spread evenly over the set.
        advance: called after each text of each source.

    Raises:
        MismatchError: the sides have no text in common.
    """
    ids = _sample(target, sources, limit)
    verdicts = []
    for source in sources:
        mapping = _vocabulary(source.table, target, vocabulary)
        pairs = ((source.record(id), target.record(id)) for id in ids)
        found = diagnose(source.name, pairs, (source.table, target.table), mapping, options, advance)
        problems = advice(found, options, source.top_k) if source.store else _tokenizer_advice(found)
        verdicts.append(SourceVerdict(found, verdict(found, problems), problems, source.bytes_per_token, source.top_k))
    width = max(source.top_k for source in sources)
    return DoctorReport(
        target=target.name,
        texts=len(ids),
        scored=all(side.store for side in (target, *sources)),
        vocabulary=vocabulary,
        sources=verdicts,
        sparse_bytes=BATCH * TOKENS * width * (np.dtype(np.int32).itemsize + np.dtype(np.float32).itemsize),
        dense_bytes=BATCH * TOKENS * target.table.vocab_size * np.dtype(np.float32).itemsize,
    )


def _sample(target: Side, sources: Sequence[Side], limit: int) -> list[str]:
    shared = set(target.ids()).intersection(*(side.ids() for side in sources))
    common = [id for id in target.ids() if id in shared]
    if not common:
        names = ", ".join(side.name for side in (target, *sources))
        raise MismatchError(
            f"expected texts that all of {names} have; they have none in common. Capture every store from the same "
            "texts: records are joined by id."
        )
    step = max(len(common) // limit, 1)
    return common[::step][:limit]


def _vocabulary(source: TokenTable, target: Side, method: str) -> VocabularyMap:
    turn_ends = {table.id_of_role(Role.END_OF_TURN) for table in (source, target.table)}
    if source.fingerprint == target.table.fingerprint and len(turn_ends) == 1:
        ids = np.arange(source.vocab_size, dtype=np.int32)
        return VocabularyMap(ids, np.zeros_like(ids), "identity")
    return cached_map(source, target.table, method=method, tokenizer=target.tokenizer)


def _record_of_tokens(id: str, text: TokenizedText) -> Record:
    """Make the record of a source that is certain of the token that follows: what alignment does to it is seen."""
    following = np.append(text.input_ids[1:], -1).astype(np.int32)[:, None]
    return build_record(
        id, text, following, np.where(following >= 0, 0.0, -np.inf), np.full(len(text.input_ids), np.nan, np.float32)
    )


def _tokenizer_advice(found: Diagnosis) -> list[str]:
    coverage = found.projection.coverage
    return [f"only {coverage:.0%} of the rows can be taught by this tokenizer"] if coverage < 0.5 else []
