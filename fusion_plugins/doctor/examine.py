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

from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import Diagnosis, diagnose, figures
from fusion_plugins.errors import ConfigError, FusionError, MismatchError
from fusion_plugins.map_cache import cached_map
from fusion_plugins.store import Store, open_store

__all__ = ["DoctorReport", "Side", "SourceVerdict", "examine", "open_side", "open_target"]

#: training step that the memory estimate is for; ENTRIES is what `fusion capture` keeps by default
BATCH, TOKENS, ENTRIES = 1, 2048, 64
#: bytes on disk per token that `fusion capture` can be expected to write at its default top_k of 64
EXPECTED_BYTES = 117.0


class Side:
    """A store, or a tokenizer with texts, seen as a lookup of records by id."""

    def __init__(
        self, name: str, table: TokenTable, store: Store | None, tokenizer: Any, texts: dict[str, Any]
    ) -> None:
        self.name, self.table, self.store, self.tokenizer, self._texts = name, table, store, tokenizer, texts

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk per stored token; what is to be expected where there is no store yet."""
        return self.store.manifest.bytes / max(self.store.manifest.tokens, 1) if self.store else EXPECTED_BYTES

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
    """What was found about one source.

    Attributes:
        diagnosis: the counts.
        verdict: good, fair, poor, or own for the target's own store.
        advice: what stands in the way, and what to set.
        captured: whether there is a store, or a tokenizer alone.
        bytes_per_token: bytes on disk per token; an estimate where there is no store.
    """

    diagnosis: Diagnosis
    verdict: str
    advice: list[str]
    captured: bool
    bytes_per_token: float

    @property
    def store_per_text(self) -> float:
        """Bytes of the store per byte of text."""
        return self.bytes_per_token * self.diagnosis.tokens / max(self.diagnosis.n_bytes, 1)


@dataclass(frozen=True)
class DoctorReport:
    """The whole examination.

    Attributes:
        target: name of the target's side.
        texts: texts of the sample.
        vocabulary: method of the vocabulary maps.
        sources: one verdict per source.
        sparse_bytes: memory of the fused targets of one step of 1 x 2048 tokens with 64 entries per row.
        dense_bytes: memory of the same targets as a dense float32 tensor.
        notes: what the figures leave out.
    """

    target: str
    texts: int
    vocabulary: str
    sources: list[SourceVerdict]
    sparse_bytes: int
    dense_bytes: int
    notes: list[str]

    def to_json(self) -> str:
        """Return everything as JSON, per source also the figures of the table; what does not exist is null."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: clean(item) for key, item in value.items()}
            if isinstance(value, list):
                return [clean(item) for item in value]
            return None if isinstance(value, float) and not np.isfinite(value) else value

        fields = asdict(self)
        for source, found in zip(fields["sources"], self.sources, strict=True):
            source["figures"] = figures(found.diagnosis) | {"store bytes per byte of text": found.store_per_text}
        return json.dumps(clean(fields), indent=1, ensure_ascii=False)


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
    tokenizer, table = _load_tokenizer(path)
    return Side(name, table, None, tokenizer, texts)


def open_target(path: str, texts: dict[str, Any] | None, tokenizer: str | None = None) -> Side:
    """Open the target's side, with a tokenizer for the ``first_token`` maps wherever one can be had.

    Args:
        path: a store or a tokenizer, as for :func:`open_side`.
        texts: as for :func:`open_side`.
        tokenizer: the tokenizer of the store; by default that of the captured model, if its folder is still there.

    Raises:
        ConfigError: as for :func:`open_side`, or ``tokenizer`` is none, or ``path`` is a tokenizer itself.
        MismatchError: the store was captured with another tokenizer.
    """
    side = open_side(path, texts)
    if side.store is not None:
        side.tokenizer = _tokenizer_of(side.store, tokenizer)
    elif tokenizer is not None:
        raise ConfigError(f"the target {path} is a tokenizer itself: leave out --tokenizer {tokenizer}")
    return side


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
        mapping = cached_map(source.table, target.table, method=vocabulary, tokenizer=target.tokenizer)
        pairs = ((source.record(id), target.record(id)) for id in ids)
        found = diagnose(source.name, pairs, (source.table, target.table), mapping, options, advance)
        problems, captured = advice(found, options), source.store is not None
        verdicts.append(SourceVerdict(found, verdict(found, problems), problems, captured, source.bytes_per_token))
    return DoctorReport(
        target=target.name,
        texts=len(ids),
        vocabulary=vocabulary,
        sources=verdicts,
        sparse_bytes=BATCH * TOKENS * ENTRIES * (np.dtype(np.int32).itemsize + np.dtype(np.float32).itemsize),
        dense_bytes=BATCH * TOKENS * target.table.vocab_size * np.dtype(np.float32).itemsize,
        notes=_notes(verdicts, target),
    )


def _notes(verdicts: Sequence[SourceVerdict], target: Side) -> list[str]:
    if target.tokenizer is not None or all(found.diagnosis.vocabulary != "first_token" for found in verdicts):
        return []
    return [
        "The first_token map was made without the target's tokenizer, from the bytes of its tokens: the figures may "
        "differ slightly from training's. Name the tokenizer with --tokenizer."
    ]


def _sample(target: Side, sources: Sequence[Side], limit: int) -> list[str]:
    shared = set(target.ids()).intersection(*(side.ids() for side in sources))
    common = [id for id in target.ids() if id in shared]
    if not common:
        names = ", ".join(side.name for side in (target, *sources))
        raise MismatchError(
            f"expected texts that all of {names} have; they have none in common. Capture every store from the same "
            "texts: records are joined by id."
        )
    size = min(limit, len(common))
    return [common[index * len(common) // size] for index in range(size)]


def _load_tokenizer(path: str) -> tuple[Any, TokenTable]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is neither a store nor a tokenizer: {error}") from error
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def _tokenizer_of(store: Store, named: str | None) -> Any:
    """Load the tokenizer of a store; None where none was named and that of the captured model is gone."""
    if named is None and not Path(store.manifest.model).is_dir():
        return None
    try:
        tokenizer, table = _load_tokenizer(named or store.manifest.model)
    except FusionError:
        if named is None:
            return None
        raise
    if table.fingerprint == store.manifest.tokenizer_fingerprint:
        return tokenizer
    if named is None:
        return None
    raise MismatchError(
        f"{store.path} was captured with tokenizer {store.manifest.tokenizer_fingerprint[:16]} "
        f"({store.manifest.model}); --tokenizer {named} is {table.fingerprint[:16]}. Name the one it was captured with."
    )


def _record_of_tokens(id: str, text: TokenizedText) -> Record:
    """Make the record of a source that is certain of every next token, so that only alignment and maps matter."""
    following = np.append(text.input_ids[1:], -1).astype(np.int32)[:, None]
    unknown = np.full(len(text.input_ids), np.nan, np.float32)
    return build_record(id, text, TopK(following, np.where(following >= 0, 0.0, -np.inf), unknown))
