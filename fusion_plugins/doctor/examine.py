"""Examine sources against a target: take a sample of texts, and judge every source on it.

A folder with a tokenizer may take the place of a store (:mod:`~fusion_plugins.doctor.sides`). Then only what depends on
the tokenizers is measured (coverage, vocabulary), on texts that are given separately.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import itemgetter
from typing import Literal

import numpy as np
from pydantic import Field

from fusion_plugins.column_names import ABOUT, ColumnNames
from fusion_plugins.config import Settings
from fusion_plugins.core.fusion.project import Projection, ProjectionOptions
from fusion_plugins.core.fusion.teachers import NOTHING
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.text.round_trip import PREFIX_SPACE, text_changes
from fusion_plugins.doctor.advice import advice, verdict
from fusion_plugins.doctor.diagnosis import Diagnosis, diagnose, figures
from fusion_plugins.doctor.report_json import report_json
from fusion_plugins.doctor.responses import holds_responses
from fusion_plugins.doctor.sides import Side, Texts
from fusion_plugins.errors import ConfigError, MismatchError
from fusion_plugins.map_cache import cached_map
from fusion_plugins.progress import meter
from fusion_plugins.where import DOMAIN

#: the training step whose memory is reported; ENTRIES is what `fusion capture` keeps by default
BATCH, TOKENS, ENTRIES = 1, 2048, 64
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
    columns: ColumnNames = Field(default_factory=ColumnNames, description=ABOUT)
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
