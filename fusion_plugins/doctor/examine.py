"""Examine sources against a target: open stores and tokenizers, take a sample of texts, and judge every source.

A folder with a tokenizer may take the place of a store. Then only what depends on the tokenizers is measured (coverage,
vocabulary), on texts that are given separately.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion_plugins.config import Settings
from fusion_plugins.core.fusion.project import Projection, ProjectionOptions
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.round_trip import PREFIX_SPACE, text_changes
from fusion_plugins.core.text.sampled import tokenize_answer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer, tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import Diagnosis, diagnose, figures
from fusion_plugins.doctor.report_json import report_json
from fusion_plugins.doctor.responses import holds_responses
from fusion_plugins.errors import ConfigError, FusionError, MismatchError
from fusion_plugins.inputs import InputSet
from fusion_plugins.map_cache import cached_map
from fusion_plugins.model_names import missing_folder, reason_of
from fusion_plugins.progress import meter
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shards import read_keys
from fusion_plugins.texts import Text
from fusion_plugins.where import DOMAIN

#: id -> text or messages, or files of them
Texts = Mapping[str, Any] | InputSet[Text]
#: the training step whose memory is reported; ENTRIES is what `fusion capture` keeps by default
BATCH, TOKENS, ENTRIES = 1, 2048, 64
#: bytes on disk per token that `fusion capture` can be expected to write at its default top_k of 64
EXPECTED_BYTES = 165.0
NOTHING = "(no source)"
_APART = (
    "The sources have no text in common: each is examined on the texts that it shares with the target, so that their "
    "columns are about different texts."
)


class DoctorConfig(Settings):
    """Keys of the YAML file of ``fusion doctor``; ``vocabulary_map`` and ``chain`` as in ``fusion.projection``."""

    MOVED = {"vocabulary": "now vocabulary_map"}

    sources: list[str] = Field(
        min_length=1, description="stores of the sources, or their tokenizers; or one folder of scored responses"
    )
    target: str | None = Field(
        None,
        description="store of the target, or its tokenizer; null for the last of sources. With scored responses the "
        "source that is the target; null for the one whose rows have is_target",
    )
    texts: str | list[str] | None = Field(
        None,
        description=".jsonl or .parquet files, folders of them or of responses: needed where tokenizers take the place "
        "of stores, and for figures by domain",
    )
    tokenizer: str | None = Field(None, description="tokenizer of the target's store; null for that of its model")
    vocabulary_map: Literal["first_token", "min_edit", "exact"] = Field(
        "first_token", description="method of the vocabulary maps; those by counts are made in training only"
    )
    chain: bool = Field(
        True,
        description="chain correction: where tokens split differently, give the next token the product of the source's "
        "probabilities of its pieces",
    )
    limit: int = Field(200, ge=1, description="texts of the sample")
    out: str = Field("doctor", description="folder for doctor.json, doctor.html and doctor.png")

    def of_responses(self) -> bool:
        """Return whether scored responses are examined, and not stores.

        Raises:
            ConfigError: there are other sources beside them, or keys that are of no use with them.
            StoreError: a folder is damaged.
        """
        folders = [path for path in self.sources if holds_responses(path)]
        if not folders:
            return False
        if len(self.sources) > 1:
            raise ConfigError(
                f"expected stores and tokenizers, or one folder of scored responses, got the folder of responses "
                f"{folders[0]} among {len(self.sources)} sources; give it alone"
            )
        if useless := sorted(self.model_fields_set - {"sources", "target", "out"}):
            raise ConfigError(
                f"{', '.join(useless)}: expected only target and out with scored responses ({folders[0]}); remove "
                f"{'it' if len(useless) == 1 else 'them'}"
            )
        return True

    def sides(self) -> tuple[str, list[str]]:
        """Return the target and the sources.

        Raises:
            ConfigError: there is one side only.
        """
        if self.target is not None:
            return self.target, self.sources
        if len(self.sources) == 1:
            raise ConfigError(
                f"expected a target and at least one source, or a folder of scored responses; got {self.sources[0]!r} "
                "alone. Give both sides."
            )
        return self.sources[-1], self.sources[:-1]


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


@dataclass(frozen=True)
class SourceVerdict:
    """The result for one source.

    Attributes:
        diagnosis: the counts.
        verdict: good, fair, poor, or own for the target's own store.
        advice: the problems, and the settings that help.
        captured: True for a store, False for a tokenizer alone.
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
        vocabulary_map: method of the vocabulary maps.
        sources: one verdict per source.
        sparse_bytes: memory of the fused distributions of one step of 1 x 2048 tokens with 64 entries per position.
        dense_bytes: memory of the same distributions as a dense float32 tensor.
        notes: what makes the figures inexact.
        taught: domain -> source, or that there is none -> positions of the sample that it would teach: in each text
            those of the source with the lowest cross-entropy among the ones that have it.
    """

    target: str
    texts: int
    vocabulary_map: str
    sources: list[SourceVerdict]
    sparse_bytes: int
    dense_bytes: int
    notes: list[str]
    taught: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything as JSON, with the figures of the table per source; null for what cannot be measured."""
        fields = asdict(self)
        for source, found in zip(fields["sources"], self.sources, strict=True):
            source["figures"] = figures(found.diagnosis) | {"store bytes per byte of text": found.store_per_text}
            for count in source["diagnosis"]["classes"].values():  # these two keys of the file are older than the names
                count |= {"gold": count.pop("label"), "own": count.pop("target_label")}
        return report_json(fields)


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


def examine(
    target: Side,
    sources: Sequence[Side],
    *,
    vocabulary_map: str = "first_token",
    options: ProjectionOptions = ProjectionOptions(),
    limit: int = 200,
    texts: Texts | None = None,
) -> DoctorReport:
    """Examine every source against the target on a sample of the texts that all of them have; shows a progress bar.

    Where the sources have been captured from different texts, each is examined on those that it shares with the target.

    Args:
        target: the model to train.
        sources: at least one.
        vocabulary_map: method of the vocabulary maps, one that needs no counts.
        options: options of the projection.
        limit: texts of the sample, spread evenly over the set.
        texts: files of the texts, whose rows have a domain; None where the domains do not matter.

    Raises:
        MismatchError: the sides have no text in common.
    """
    samples = _samples(target, sources, limit)
    every = dict.fromkeys(id for ids in samples for id in ids)
    for side in (target, *sources):
        side.choose(every)
    verdicts, taught = [], _Taught(_domains(texts, every))
    with meter("examine", sum(map(len, samples)), unit="records") as progress:
        for source, ids in zip(sources, samples, strict=True):
            tables = source.table, target.table
            vocabulary = cached_map(*tables, method=vocabulary_map, tokenizer=target.tokenizer)
            pairs = ((source.record(id), target.record(id)) for id in ids)
            seen = partial(taught.add, source.name)
            found = diagnose(source.name, pairs, tables, vocabulary, options, progress.advance, seen)
            problems, captured = advice(found, options), source.store is not None
            verdicts.append(SourceVerdict(found, verdict(found, problems), problems, captured, source.bytes_per_token))
    apart = any(ids != samples[0] for ids in samples)
    return DoctorReport(
        target=target.name,
        texts=len(every),
        vocabulary_map=vocabulary_map,
        sources=verdicts,
        sparse_bytes=BATCH * TOKENS * ENTRIES * (np.dtype(np.int32).itemsize + np.dtype(np.float32).itemsize),
        dense_bytes=BATCH * TOKENS * target.table.vocab_size * np.dtype(np.float32).itemsize,
        notes=[*_notes(verdicts, target), *_text_changes([target, *sources]), *[_APART] * apart],
        taught=taught.positions(),
    )


class _Taught:
    """Which source would teach how many positions, by domain.

    Args:
        domains: id -> domain.
    """

    def __init__(self, domains: Mapping[str, str]) -> None:
        self._domains = domains
        self._texts: dict[str, list[tuple[float, str, int, int]]] = {}

    def add(self, name: str, record: Record, projection: Projection) -> None:
        """Add what one source says of one text."""
        cost = record.ce_per_byte if np.isfinite(record.ce_per_byte) else np.inf
        counts = projection.report
        self._texts.setdefault(record.id, []).append((cost, name, counts.used, counts.positions))

    def positions(self) -> dict[str, dict[str, int]]:
        """Return domain -> source -> positions; the first of sources with equal cross-entropies teaches a text."""
        found: dict[str, dict[str, int]] = {}
        for id, said in self._texts.items():
            _, name, used, _ = min(said, key=itemgetter(0))
            total = max(positions for *_, positions in said)
            own = found.setdefault(self._domains.get(id, ""), {})
            for key, count in ((name, used), (NOTHING, total - used)):
                if count:
                    own[key] = own.get(key, 0) + count
        return found


def _domains(texts: Texts | None, ids: Collection[str]) -> dict[str, str]:
    if texts is None or isinstance(texts, Mapping):
        return {}
    return {text.id: text.domain or DOMAIN for text in texts if text.id in ids}


def _notes(verdicts: Sequence[SourceVerdict], target: Side) -> list[str]:
    notes = []
    if target.tokenizer is None and any(found.diagnosis.vocabulary_map == "first_token" for found in verdicts):
        notes.append(
            "The first_token map was made from the bytes of the target's tokens, because its tokenizer was not found: "
            "the figures may differ slightly from training's. Name the tokenizer with --tokenizer."
        )
    uncaptured = [found.diagnosis.name for found in verdicts if not found.captured]
    if uncaptured:
        notes.append(
            f"Without a store, a tokenizer ({', '.join(uncaptured)}) is examined as a source that is certain of every "
            "next token: its label probability says how often that token reaches the target's label."
        )
    return notes


def _text_changes(sides: Sequence[Side]) -> list[str]:
    notes = []
    for side in sides:
        known = text_changes(side.tokenizer, side.table.spell).known if side.tokenizer is not None else ()
        # A space before the text has no width and changes no figure.
        if changes := [change for change in known if change != PREFIX_SPACE]:
            notes.append(f"The tokenizer of {side.name} changes texts: {'; '.join(changes)}.")
    return notes


def _samples(target: Side, sources: Sequence[Side], limit: int) -> list[list[str]]:
    """Return the ids that each source is examined on: the same ones, or its own where not all have a text in common."""
    held = [KeySet(side.ids()) for side in sources]
    common = _sample(target, held, limit)
    samples = [common] * len(sources) if common else [_sample(target, [own], limit) for own in held]
    if not all(samples):
        without = [side.name for side, ids in zip(sources, samples, strict=True) if not ids]
        raise MismatchError(
            f"expected texts that {', '.join([target.name, *without])} have; they have none in common. "
            "Capture every store from the texts that you train on, because records are joined by id."
        )
    return samples


def _sample(target: Side, held: Sequence[KeySet], limit: int) -> list[str]:
    """Return ids, spread evenly over those that the target and all sources have."""

    def common() -> Iterator[str]:
        return (id for id in target.ids() if all(id in ids for ids in held))

    count = sum(1 for _ in common())
    size = min(limit, count)
    places = {index * count // size for index in range(size)}
    return [id for place, id in enumerate(common()) if place in places]


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
