"""``fusion capture``: texts + one source model -> a store of top-k log-probabilities.

Texts are cut into units; a unit is captured as a whole and committed as one shard. What a killed run had committed is
skipped by the next one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, DataError, SourceError
from fusion_plugins.inputs import Text, fingerprint, read_texts
from fusion_plugins.progress import Meter, meter
from fusion_plugins.sources.backends.base import Place, Refusal, Source, SourceSettings, least, open_source
from fusion_plugins.sources.batches import MadeUnits, plan_units, run_units
from fusion_plugins.sources.fingerprints import revision_of
from fusion_plugins.sources.loading import capture_tokenizer, chat_template_hash
from fusion_plugins.store import Manifest, StoreWriter
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.manifest import MANIFEST_NAME

__all__ = ["CaptureConfig", "CaptureReport", "capture_texts", "estimate_capture"]

#: bytes of text that a dry run captures to learn the speed and the size
PROBE_BYTES = 32_768


class CaptureConfig(SourceSettings):
    """Keys of the YAML file of ``fusion capture``."""

    texts: str | list[str] = Field(description=".jsonl or .parquet files, or folders of them")
    out: str = Field(description="folder of the store")
    top_k: int | Literal["all"] = Field(64, description="entries per row; all: the whole vocabulary")
    limit: int | None = Field(None, ge=1, description="capture the first so many texts only")
    unit_bytes: int = Field(262_144, ge=1, description="bytes of text that are captured and committed together")
    unusable: Literal["stop", "skip"] = Field(
        "stop", description="texts that are too long, or chats that the template changes: stop, or leave them out"
    )

    @field_validator("top_k")
    @classmethod
    def _check_top_k(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a number of entries, at least 1, or 'all'")
        return value


@dataclass(frozen=True)
class CaptureReport:
    """What a run did.

    Attributes:
        out: the store.
        captured: records written by this run.
        present: records that were there before.
        skipped: id -> why it was left out (``unusable: skip`` only).
        tokens: tokens captured by this run.
        seconds: what that took, without loading the model.
    """

    out: Path
    captured: int
    present: int
    skipped: dict[str, str]
    tokens: int
    seconds: float


def capture_texts(config: CaptureConfig) -> CaptureReport:
    """Capture a set of texts, going on where an earlier run of the same settings stopped.

    Raises:
        DataError: a text is broken, or too long for the source (with ``unusable: stop``).
        MismatchError: the folder holds a store of another model, text set, top_k, ...
        SourceError: the model cannot be loaded or fails.
    """
    texts = read_texts(config.texts)
    chosen = texts[: config.limit]
    plan = _Plan(config, texts)
    _check_folder(plan)
    source = open_source(config, "capture")
    try:
        job = _Job(plan, source)
        skipped = _check_lengths(job, chosen)
        usable = [text for text in chosen if text.id not in skipped]
        with StoreWriter(config.out, job.manifest, plan.table) as store:
            report = _run(job, store, usable, skipped)
            if config.limit is None:
                store.finish()
        return report
    finally:
        source.close()


def estimate_capture(config: CaptureConfig) -> dict[str, float]:
    """Capture a few texts into a temporary folder and say what all of them will take.

    Returns:
        ``texts``, ``tokens``, ``bytes`` (of the store), ``hours``, ``tokens_per_second``; estimates but for the first.
    """
    texts = read_texts(config.texts, config.limit)
    sample = next(plan_units(texts, lambda text: text.n_bytes, PROBE_BYTES), [])
    if not sample:
        raise DataError(f"{config.texts}: expected at least one text, found none")
    plan = _Plan(config, texts)
    source = open_source(config, "capture")
    try:
        job = _Job(plan, source)
        skipped = _check_lengths(job, sample)
        with tempfile.TemporaryDirectory() as folder, StoreWriter(folder, job.manifest, plan.table) as store:
            report = _run(job, store, [text for text in sample if text.id not in skipped], skipped)
            store.flush()
            stored = store.manifest.bytes
    finally:
        source.close()
    scale = sum(text.n_bytes for text in texts) / sum(text.n_bytes for text in sample)
    speed = report.tokens / max(report.seconds, 1e-9)
    tokens = report.tokens * scale
    return {
        "texts": len(texts),
        "tokens": tokens,
        "bytes": stored * scale,
        "hours": tokens / max(speed, 1e-9) / 3600,
        "tokens_per_second": speed,
    }


class _Plan:
    """What is known before the model is loaded: its tokenizer, and most of what the manifest will say."""

    def __init__(self, config: CaptureConfig, texts: Sequence[Text]) -> None:
        self.config = config
        self.tokenizer = capture_tokenizer(config)
        self.table = TokenTable.from_tokenizer(self.tokenizer)
        has_chats = any(not isinstance(text.content, str) for text in texts)
        if has_chats and not self.tokenizer.chat_template:
            raise ConfigError(
                f"{config.texts} holds chats, but the tokenizer of source {config.source_name!r} has no chat template; "
                "name a file with one in `chat_template`"
            )
        size = self.table.vocab_size
        self.identity: dict[str, Any] = {
            "model": config.model,
            "tokenizer_fingerprint": self.table.fingerprint,
            "vocab_size": size,
            "top_k": size if config.top_k == "all" else min(config.top_k, size),
            "texts_fingerprint": fingerprint(texts),
            "template_hash": chat_template_hash(self.tokenizer) if has_chats else None,
        }

    def tokenized(self, text: Text) -> TokenizedText:
        """Tokenize a text, or a chat rendered with the source's own template."""
        return tokenize_content(self.tokenizer, self.table, text.content)[0]


class _Job:
    """A plan and the source that carries it out."""

    def __init__(self, plan: _Plan, source: Source) -> None:
        self.plan, self.config, self.source = plan, plan.config, source
        facts = dict(source.facts)
        # What else changes the numbers stands beside the dtype: `bfloat16 quantization=fp8`.
        options = [f"{name}={value}" for name, value in facts.pop("options", {}).items()]
        self.manifest = Manifest(
            **plan.identity,
            revision=revision_of(plan.config, facts.pop("revision", None)),
            logits_width=facts.pop("logits_width", None) or plan.table.vocab_size,
            dtype=" ".join([facts.pop("dtype"), *options]),
            engine=facts.pop("engine"),
            engine_version=facts.pop("engine_version"),
            provenance={"source": plan.config.source_name, "texts": plan.config.texts, **facts},
        )


def _check_folder(plan: _Plan) -> None:
    """Refuse what the store would refuse anyway, before hours are spent on loading the model."""
    folder = Path(plan.config.out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: expected a folder, came {plan.config.out!r}, which is a file")
    if not (folder / MANIFEST_NAME).exists():
        return
    FolderLock(folder).close()
    cure = "Run with the settings it was made with, give another folder, or delete this one to start afresh."
    Manifest.load(folder).require(folder, cure, **plan.identity)


def _check_lengths(job: _Job, texts: Sequence[Text]) -> dict[str, str]:
    """Find texts that the source cannot take, before hours are spent on the others."""
    problems = {}
    for text in texts:
        problem = _problem(job, text)
        if problem is None:
            continue
        if job.config.unusable == "stop":
            raise DataError(
                f"text {text.id!r}: {problem}; cut the texts shorter (`fusion cut`), or leave such texts out with "
                "`unusable: skip`"
            )
        problems[text.id] = problem
    return problems


def _problem(job: _Job, text: Text) -> str | None:
    limit = least(job.config.max_length, job.source.max_length)
    plain = isinstance(text.content, str)
    # A token is a byte at least, so most plain texts need no second look. Templates may add much and refuse chats.
    if plain and (limit is None or text.n_bytes + 8 <= limit):
        return None
    try:
        length = len(job.plan.tokenized(text).input_ids)
    except DataError as error:
        return str(error)
    if limit is not None and length > limit:
        return f"expected at most {limit} tokens of source {job.config.source_name!r}, came {length}"
    return None


def _run(job: _Job, store: StoreWriter, texts: Sequence[Text], skipped: dict[str, str]) -> CaptureReport:
    done = set(store.done_ids)
    units = list(plan_units(texts, lambda text: text.n_bytes, job.config.unit_bytes))
    if not job.source.whole_units:
        units = [[text for text in unit if text.id not in done] for unit in units]
    units = [unit for unit in units if not all(text.id in done for text in unit)]
    ready = sum(text.n_bytes for text in texts if text.id in done)
    with meter(f"capture {job.config.source_name}", sum(text.n_bytes for text in texts), ready) as progress:
        records = _records(job, units, progress, skipped)
        run_units(units, records, lambda _, unit: _commit(store, done, list(unit.values())))
    present = sum(text.id in done for text in texts)
    captured = sum(text.id in store.done_ids for text in texts) - present
    return CaptureReport(store.path, captured, present, skipped, progress.tokens, progress.seconds)


def _records(
    job: _Job, units: list[list[Text]], progress: Meter, skipped: dict[str, str]
) -> Iterator[tuple[Place, Record | None]]:
    """Yield records; None for a text that the source refuses (``unusable: skip`` only)."""
    tokenized: dict[Place, TokenizedText] = {}

    def tokenize_unit(number: int, unit: Sequence[Text]) -> list[TokenizedText]:
        texts = [job.plan.tokenized(text) for text in unit]
        tokenized.update({(number, index): text for index, text in enumerate(texts)})
        return texts

    for place, topk in job.source.capture(MadeUnits(units, tokenize_unit), job.manifest.top_k):
        text = units[place[0]][place[1]]
        tokens = tokenized.pop(place)
        if isinstance(topk, Refusal):
            if job.config.unusable == "stop":
                raise SourceError(f"text {text.id!r}: {topk.reason}; or leave such texts out with `unusable: skip`")
            skipped[text.id] = topk.reason
            yield place, None
            continue
        progress.advance(text.n_bytes, len(tokens.input_ids))
        yield place, build_record(text.id, tokens, topk)


def _commit(store: StoreWriter, done: set[str], records: list[Record | None]) -> None:
    for record in records:
        if record is not None and record.id not in done:
            store.write(record)
    store.flush()


def describe_estimate(estimate: dict[str, Any]) -> str:
    """Say a dry run's numbers in one line."""
    return (
        f"{estimate['texts']:,} texts, about {estimate['tokens']:,.0f} tokens, {estimate['bytes'] / 1e6:,.1f} MB, "
        f"{estimate['hours']:,.2f} hours at the measured {estimate['tokens_per_second']:,.0f} tokens/s"
    )
