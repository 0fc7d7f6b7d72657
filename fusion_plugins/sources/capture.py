"""``fusion capture``: texts and one source model -> a store of top-k log-probabilities.

Texts are cut into batches, and each batch is committed as one shard. A run skips what earlier runs have committed,
before it tokenizes anything. While the source works on a batch, the next one is read and tokenized and the one before
is compressed and written, in threads. Texts are read anew for every step: a run holds a few of them, and an index.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.core.text.round_trip import text_changes
from fusion_plugins.core.text.sampled import AnswerCounts
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, DataError, SourceError
from fusion_plugins.inputs import InputSet, Unusable, open_texts
from fusion_plugins.progress import Meter, meter
from fusion_plugins.sources.asked import Asked, require_answers
from fusion_plugins.sources.backends.base import Place, Refusal, Source, least, open_source
from fusion_plugins.sources.background import Background
from fusion_plugins.sources.batches import LazyBatches, commit_batches, missing_batches, plan_batches
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.capture_tokens import Beyond, CaptureTokenizer, problems_of_texts
from fusion_plugins.sources.fingerprints import revision_of
from fusion_plugins.sources.loading import capture_tokenizer, chat_template_hash, embedding_rows
from fusion_plugins.sources.parts import chosen, require_part
from fusion_plugins.store import Manifest, StoreWriter
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.manifest import MANIFEST_NAME, PART
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shards import read_keys
from fusion_plugins.texts import Text

#: what a source said about a text; None where it refused it
Answer = tuple[TokenizedText, TopK] | None


@dataclass(frozen=True)
class CaptureReport:
    """What a run did.

    Attributes:
        out: the store.
        captured: records written by this run.
        present: records that were there before.
        skipped: id -> why it was left out (``on_unusable: skip`` only).
        text_changes: what the tokenizer does to texts before it cuts them (NFC, a space before the text, ...).
        tokens: tokens captured by this run.
        seconds: time of the capture, without loading the model.
        answers: how the answers among them became tokens.
        without_text: how many responses say nothing (``empty``), or what another one says (``repeated``).
    """

    out: Path
    captured: int
    present: int
    skipped: dict[str, str]
    text_changes: tuple[str, ...]
    tokens: int
    seconds: float
    answers: AnswerCounts = AnswerCounts()
    without_text: Mapping[str, int] = field(default_factory=dict)


def capture_texts(config: CaptureConfig) -> CaptureReport:
    """Capture a set of texts; resume where an earlier run with the same settings stopped.

    Raises:
        DataError: a text is broken, or too long for the source (with ``on_unusable: raise``).
        MismatchError: the folder holds a store of another model, text set, top_k, ...
        SourceError: the model cannot be loaded or fails.
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    texts = open_texts(config.texts, unusable=unusable, selection=config.selection)
    out = Path(config.out)
    with open_capture(config, texts, out) as opened:
        skipped = unusable_texts(config, opened, texts_of_run(config, texts), _held(out))

        def usable() -> Iterator[Text]:
            return (text for text in texts_of_run(config, texts) if text.id not in refused)

        refused = frozenset(skipped)
        with StoreWriter(out, opened.manifest, opened.table) as store:
            present, progress = CaptureJob(config, opened, store, usable, skipped).run()
            captured = store.manifest.rows - present
            if config.limit is None:
                store.finish()
    skipped = {**(unusable or {}), **skipped}
    return CaptureReport(
        *(out, captured, present, skipped, opened.changes, progress.tokens, progress.seconds),
        answers=opened.tokenize.answers,
        without_text=dict(texts.left_out),
    )


def texts_of_run(config: CaptureConfig, texts: Iterable[Text]) -> Iterator[Text]:
    """Start to yield the texts of this run: those up to the limit, of its part."""
    return chosen(texts, config.limit, config.shard)


def _held(folder: Path) -> KeySet:
    """Return the ids of a store, which is made only later if it is not there."""
    if not (folder / MANIFEST_NAME).exists():
        return KeySet()
    manifest = Manifest.load(folder)
    codec = RecordCodec(manifest)
    return KeySet(id for shard in manifest.shards for id in read_keys(folder, shard, codec))


@dataclass(frozen=True)
class OpenedCapture:
    """A source, ready to capture a set of texts, and what the writer of its store needs.

    Attributes:
        beyond: says which of the token ids of a text the model has no row for; None where it has one for all.
        changes: what the tokenizer does to texts.
        top_k: how many of the most probable entries the source is asked for; a store that holds others too has more.
    """

    source: Source
    tokenize: CaptureTokenizer
    manifest: Manifest
    table: TokenTable
    beyond: Beyond | None
    changes: tuple[str, ...]
    top_k: int


@contextmanager
def open_capture(config: CaptureConfig, texts: InputSet[Text], out: Path) -> Iterator[OpenedCapture]:
    """Open the source; refuse a folder of something else before that."""
    tokenizer = capture_tokenizer(config)
    table = TokenTable.from_tokenizer(tokenizer)
    changes = text_changes(tokenizer, table.spell).known
    rows = embedding_rows(config)
    asked = None if config.ask_ids is None else Asked.of(config.ask_ids, table, config.backend, rows)
    identity = _identity(config, texts, tokenizer, table)
    top_k: int = identity["top_k"]
    if asked is not None:
        identity["top_k"] = min(identity["top_k"] + asked.width, table.vocab_size)
    _check_folder(out, identity)
    require_part(out, config.shard)

    tokenize = CaptureTokenizer(config, tokenizer, table, asked)
    beyond: Beyond | None = None
    if rows is not None and rows < table.vocab_size:
        beyond = partial(beyond_the_model, tokenizer, rows=rows)
        if config.on_unusable == "raise":
            held = _held(out)
            missing = (text for text in texts_of_run(config, texts) if text.id not in held)
            for part in plan_batches(missing, size_of, config.batch_bytes):
                for text, problem in zip(part, problems_of_texts(config, part, tokenize, None, beyond), strict=True):
                    _require(text, problem)
    source = open_source(config, "capture")
    try:
        facts = dict(source.facts)
        if asked is not None:
            require_answers(source, config.source_name)
            # Beside the dtype, with what else changes the numbers.
            facts["options"] = {**facts.get("options", {}), "ask_ids": asked.store.manifest.identity_digest[:16]}
        yield OpenedCapture(source, tokenize, _manifest(config, identity, facts), table, beyond, changes, top_k)
    finally:
        source.close()


def _first_entries(topk: TopK, width: int) -> TopK:
    """Return the first entries; those that were asked for may be more than the vocabulary has tokens."""
    if topk.ids.shape[1] <= width:
        return topk
    return TopK(topk.ids[:, :width], topk.logprobs[:, :width], topk.token_logprobs)


def size_of(text: Text) -> int:
    """Return the bytes of a text, by which batches are cut."""
    return text.n_bytes


def _identity(config: CaptureConfig, texts: InputSet[Text], tokenizer: Any, table: TokenTable) -> dict[str, Any]:
    """Return the fields of the manifest that are known before the model is loaded."""
    if texts.has_chats and not tokenizer.chat_template:
        raise ConfigError(
            f"{config.texts}: expected a chat template, because there are chats, but the tokenizer of source "
            f"{config.source_name!r} has no chat template. Name a file with one in `chat_template`."
        )
    size = table.vocab_size
    return {
        "model": config.model,
        "tokenizer_fingerprint": table.fingerprint,
        "vocab_size": size,
        "top_k": size if config.top_k == "all" else min(config.top_k, size),
        "texts_fingerprint": texts.fingerprint,
        "template_hash": chat_template_hash(tokenizer, config.template_options) if texts.has_chats else None,
    }


def _check_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse what the store would refuse anyway, but before the model is loaded."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: expected a folder, got {str(folder)!r}, which is a file. Name another folder.")
    if not (folder / MANIFEST_NAME).exists():
        return
    FolderLock(folder).close()
    cure = "Run with the settings it was made with, name another folder, or delete this one to start again."
    Manifest.load(folder).require(folder, cure, **identity)


def _manifest(config: CaptureConfig, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> Manifest:
    facts = dict(facts)
    # Options that change the numbers are recorded beside the dtype: `bfloat16 quantization=fp8`.
    options = [f"{name}={value}" for name, value in facts.pop("options", {}).items()]
    return Manifest(
        **identity,
        revision=revision_of(config, facts.pop("revision", None)),
        logits_width=facts.pop("logits_width", None) or identity["vocab_size"],
        dtype=" ".join([facts.pop("dtype"), *options]),
        engine=facts.pop("engine"),
        engine_version=facts.pop("engine_version"),
        provenance={
            "source": config.source_name,
            "texts": config.texts,
            **({PART: config.shard} if config.shard else {}),
            **_conditions(config),
            **facts,
        },
    )


def _conditions(config: CaptureConfig) -> dict[str, Any]:
    """Return what the notes of a store say about which rows were captured, and what the source read before them."""
    context = None if config.context is None else config.context.model_dump(exclude_defaults=True)
    notes = {"columns": config.columns.model_dump(exclude_defaults=True), "where": config.where, "context": context}
    return {key: value for key, value in notes.items() if value}


def unusable_texts(config: CaptureConfig, opened: OpenedCapture, texts: Iterable[Text], held: KeySet) -> dict[str, str]:
    """Return id -> problem of the texts that the source cannot take, before hours are spent on the others.

    Those of which the store has a record are not looked at.
    """
    limit = least(config.max_length, opened.source.max_length)

    def doubtful(text: Text) -> bool:
        # A token is at least one byte, so most plain texts need not be tokenized to know that they fit; 8 is room for
        # begin and end tokens. A template may add much to a chat, or refuse it.
        short = limit is None or text.n_bytes + 8 <= limit
        return not (isinstance(text.content, str) and short and opened.beyond is None)

    problems = {}
    missing = (text for text in texts if doubtful(text) and text.id not in held)
    for part in plan_batches(missing, size_of, config.batch_bytes):
        for text, problem in zip(
            part, problems_of_texts(config, part, opened.tokenize, limit, opened.beyond), strict=True
        ):
            if config.on_unusable == "raise":
                _require(text, problem)
            elif problem:
                problems[text.id] = problem
    return problems


def _require(text: Text, problem: str | None) -> None:
    if problem:
        raise DataError(
            f"{text.where}: text {text.id!r}: {problem} Leave such texts out with `on_unusable: skip`, or cut long "
            "ones (`fusion cut`)."
        )


@dataclass
class CaptureJob:
    """What one source is to say about a set of texts.

    Attributes:
        texts: starts to yield all texts that can be captured, the same each time.
        skipped: takes the texts that the source refuses, id -> why.
        label: for the progress bar.
    """

    config: CaptureConfig
    opened: OpenedCapture
    store: StoreWriter
    texts: Callable[[], Iterator[Text]]
    skipped: dict[str, str]
    label: str = "capture"

    def run(self) -> tuple[int, Meter]:
        """Capture what the store does not have yet; return how many records were there, and what was done."""
        present, ready, total, count = self._count()
        # The tokens of the batches that the source has taken, until their results arrive.
        waiting: dict[Place, TokenizedText] = {}

        def tokenize(number: int, batch: Sequence[Text]) -> list[TokenizedText]:
            tokenized = self.opened.tokenize.counted(batch)
            waiting.update({(number, index): tokens for index, tokens in enumerate(tokenized)})
            return tokenized

        batches = LazyBatches(count, self._missing(self.texts()), tokenize)

        def answers() -> Iterator[tuple[Place, Answer]]:
            for (number, index), topk in self._asked(batches):
                writing.check()
                text, tokens = batches.under_way[number][index], waiting.pop((number, index))
                if isinstance(topk, Refusal):
                    self._refuse(text, topk.reason)
                    yield (number, index), None
                else:
                    progress.advance(text.n_bytes, len(tokens.input_ids))
                    yield (number, index), (tokens, _first_entries(topk, self.store.manifest.top_k))

        def commit(batch: Sequence[Text], answers: Mapping[int, Answer]) -> None:
            writing.submit(partial(self._write, batch, answers))

        title = f"{self.label} {self.config.source_name}"
        with meter(title, total, ready, unit="bytes") as progress, Background() as writing:
            commit_batches(batches.under_way, answers(), commit)
        return present, progress

    def _is_done(self, text: Text) -> bool:
        return self.store.holds(text.id)

    def _missing(self, texts: Iterable[Text]) -> Iterator[list[Text]]:
        whole = self.opened.source.whole_batches
        return missing_batches(texts, size_of, self.config.batch_bytes, self._is_done, whole=whole)

    def _count(self) -> tuple[int, int, int, int]:
        """Return texts and bytes that are there, bytes of all texts, and the number of batches to be done."""
        present = ready = total = 0

        def counted() -> Iterator[Text]:
            nonlocal present, ready, total
            for text in self.texts():
                n_bytes, there = text.n_bytes, self._is_done(text)
                present, ready, total = present + there, ready + there * n_bytes, total + n_bytes
                yield text

        count = sum(1 for _ in self._missing(counted()))
        return present, ready, total, count

    def _asked(self, batches: LazyBatches[Text, TokenizedText]) -> Iterator[tuple[Place, TopK | Refusal]]:
        return self.opened.source.capture(batches, self.opened.top_k) if len(batches) else iter(())

    def _refuse(self, text: Text, reason: str) -> None:
        if self.config.on_unusable == "raise":
            raise SourceError(
                f"{text.where}: text {text.id!r}: {reason}. Leave such texts out with `on_unusable: skip`, or change "
                "them."
            )
        self.skipped[text.id] = reason

    def _write(self, batch: Sequence[Text], answers: Mapping[int, Answer]) -> None:
        for index, answer in answers.items():
            text = batch[index]
            if answer is not None and not self._is_done(text):  # a batch that is done again has some of them already
                self.store.write(build_record(text.id, *answer))
        self.store.flush()
