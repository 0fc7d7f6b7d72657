"""``fusion capture``: texts and one source model -> a store of top-k log-probabilities.

Texts are cut into batches, and each batch is committed as one shard. A run skips what earlier runs have committed,
before it tokenizes anything. While the source works on a batch, the next one is read and tokenized and the one before
is compressed and written, in threads. Texts are read anew for every step: a run holds a few of them, and an index.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.model_rows import beyond_the_model
from fusion_plugins.core.text.round_trip import text_changes
from fusion_plugins.core.text.sampled import AnswerCounts, How, last_turns, tokenize_answer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer, tokenize_chat, tokenize_many
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, DataError, SourceError, TokenizerError
from fusion_plugins.inputs import InputSet, Selection, Text, Unusable, open_texts
from fusion_plugins.model_names import is_same_model
from fusion_plugins.progress import Meter, meter
from fusion_plugins.sources.asked import Asked, require_answers
from fusion_plugins.sources.backends.base import Place, Refusal, Source, SourceSettings, least, open_source
from fusion_plugins.sources.background import Background
from fusion_plugins.sources.batches import LazyBatches, commit_batches, missing_batches, plan_batches
from fusion_plugins.sources.context import ContextSettings
from fusion_plugins.sources.fingerprints import revision_of
from fusion_plugins.sources.loading import capture_tokenizer, chat_template_hash, embedding_rows
from fusion_plugins.sources.parts import Shard, chosen, require_part
from fusion_plugins.store import Manifest, StoreWriter
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.manifest import MANIFEST_NAME, PART
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shards import read_keys
from fusion_plugins.where import Where, checked_where

#: what a dry run captures to measure speed and size: bytes in one round, of the first texts, in about this time
PROBE_BYTES = 32_768
PROBE_TEXTS = 1024
PROBE_SECONDS = 30.0

Tokenize = Callable[[Sequence[Text]], list[TokenizedText]]
Beyond = Callable[[list[int]], str | None]
#: what a source said about a text; None where it refused it
Answer = tuple[TokenizedText, TopK] | None


class CaptureConfig(SourceSettings):
    """Keys of the YAML file of ``fusion capture``."""

    MOVED: ClassVar[Mapping[str, str]] = {
        "unit_bytes": "now batch_bytes",
        "unusable": "now on_unusable, with the values raise (was: stop) and skip",
    }

    texts: str | list[str] = Field(
        description=".jsonl or .parquet files, folders of them, hf:ORG/NAME[:SPLIT][:COLUMN], or folders of responses, "
        "whose answers are captured"
    )
    where: Where | None = Field(
        None,
        description="column -> a value, a list of values, or {min, max}: only rows that meet all conditions are "
        "captured; verdict is correct, incorrect or unknown",
    )
    context: ContextSettings | None = Field(
        None,
        description="what this source reads before the answers in place of the texts' own messages: system, examples, "
        "question",
    )
    out: str = Field(description="folder of the store")
    top_k: int | Literal["all"] = Field(64, description="entries per position; all: the whole vocabulary")
    ask_ids: str | None = Field(
        None,
        description="store of the target model, captured from the same texts: the source is asked for the target's own "
        "top k too, where these are tokens of the source; as many entries per position are added",
    )
    limit: int | None = Field(None, ge=1, description="capture only this many texts, from the start")
    shard: Shard | None = Field(
        None, description="capture only part i of n of the texts, such as 2/3; `fusion store merge` joins the parts"
    )
    batch_bytes: int = Field(262_144, ge=1, description="bytes of text that are captured and committed together")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise",
        description="rows that are no texts, texts that are too long, chats that the template refuses, tokens that the "
        "model lacks: raise, or skip and report",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, such as enable_thinking or a date"
    )

    _check_where = field_validator("where")(checked_where)

    @property
    def selection(self) -> Selection:
        """Which rows of the texts are read, and how."""
        if self.context is None:
            return Selection(self.where)
        return Selection(self.where, self.context.applied, self.context.columns)

    @property
    def template_options(self) -> dict[str, Any]:
        """What decides, besides the chat template, how a chat is written."""
        context = {} if self.context is None else {"context": self.context.model_dump(exclude_defaults=True)}
        return {**self.chat_template_kwargs, **context}

    @field_validator("top_k")
    @classmethod
    def _check_top_k(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a number of entries, at least 1, or 'all'")
        return value

    @model_validator(mode="after")
    def _check_ask_ids(self) -> "CaptureConfig":
        if self.ask_ids is not None and self.top_k == "all":
            raise ValueError("ask_ids: with top_k: all every token is there already; remove one of them")
        return self


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
    with _opened(config, texts, out) as opened:
        skipped = _unusable(config, opened, _asked(config, texts), _held(out))

        def usable() -> Iterator[Text]:
            return (text for text in _asked(config, texts) if text.id not in refused)

        refused = frozenset(skipped)
        with StoreWriter(out, opened.manifest, opened.table) as store:
            present, progress = _Job(config, opened, store, usable, skipped).run()
            captured = store.manifest.rows - present
            if config.limit is None:
                store.finish()
    skipped = {**(unusable or {}), **skipped}
    return CaptureReport(
        *(out, captured, present, skipped, opened.changes, progress.tokens, progress.seconds),
        answers=opened.tokenize.answers,
        without_text=dict(texts.left_out),
    )


def _asked(config: CaptureConfig, texts: Iterable[Text]) -> Iterator[Text]:
    """The texts of this run."""
    return chosen(texts, config.limit, config.shard)


def _held(folder: Path) -> KeySet:
    """Return the ids of a store, which is made only later if it is not there."""
    if not (folder / MANIFEST_NAME).exists():
        return KeySet()
    manifest = Manifest.load(folder)
    codec = RecordCodec(manifest)
    return KeySet(id for shard in manifest.shards for id in read_keys(folder, shard, codec))


def estimate_capture(config: CaptureConfig) -> dict[str, float]:
    """Capture a few texts into a temporary folder and estimate what all of them will take.

    Rounds grow, from one short text on, while they should end within :data:`PROBE_SECONDS`. The speed is that of the
    last round, so that the start of the model does not count.

    Returns:
        ``texts``, ``tokens``, ``bytes`` (of the store), ``hours``, ``tokens_per_second``; all but the first are
        estimates.

    Raises:
        DataError, SourceError: as :func:`capture_texts`; or no text can be captured.
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    texts = open_texts(config.texts, unusable=unusable, selection=config.selection)
    skipped = dict(unusable or {})
    whole = config.limit is None and config.shard is None
    total = texts.n_bytes if whole else sum(map(_n_bytes, _asked(config, texts)))
    first = list(islice(_asked(config, texts), PROBE_TEXTS))
    with tempfile.TemporaryDirectory() as folder:
        with (
            _opened(config, texts, Path(folder)) as opened,
            StoreWriter(folder, opened.manifest, opened.table) as store,
        ):
            n_bytes, n_tokens, speed = _probe(config, opened, store, first, skipped)
        shards = Manifest.load(Path(folder)).shards
    if not n_tokens:
        reason = next(iter(skipped.values()), "there is none")
        raise DataError(f"{config.texts}: expected at least one text that can be captured, got none: {reason}")
    tokens = n_tokens * total / n_bytes
    largest = max(shards, key=lambda shard: shard.tokens)  # every file has a part that does not grow
    return {
        "texts": len(texts) if whole else sum(1 for _ in _asked(config, texts)),
        "tokens": tokens,
        "bytes": tokens * largest.bytes / largest.tokens,
        "hours": tokens / speed / 3600,
        "tokens_per_second": speed,
    }


@dataclass(frozen=True)
class _Opened:
    """A source, ready to capture a set of texts, and what the writer of its store needs.

    Attributes:
        beyond: says which of the token ids of a text the model has no row for; None where it has one for all.
        changes: what the tokenizer does to texts.
        top_k: how many of the most probable entries the source is asked for; a store that holds others too has more.
    """

    source: Source
    tokenize: "_Tokenizer"
    manifest: Manifest
    table: TokenTable
    beyond: Beyond | None
    changes: tuple[str, ...]
    top_k: int


class _Tokenizer:
    """Turns texts into the source's tokens.

    Attributes:
        answers: how the answers that were captured became tokens.
    """

    def __init__(self, config: CaptureConfig, tokenizer: Any, table: TokenTable, asked: Asked | None) -> None:
        self._config, self._tokenizer, self._table, self._asked = config, tokenizer, table, asked
        self.answers = AnswerCounts()

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Return the tokens of texts and chats.

        Raises:
            DataError, TokenizerError: one of them cannot be tokenized.
        """
        return [tokens for tokens, _ in self._made(texts)]

    def counted(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Return the same, of texts that are captured now, with the ids that are asked for."""
        made = list(self._made(texts))
        for _, how in made:
            if how is not None:
                self.answers += AnswerCounts.of(how)
        tokenized = [tokens for tokens, _ in made]
        return tokenized if self._asked is None else self._asked.of_texts(texts, tokenized)

    def _made(self, texts: Sequence[Text]) -> Iterator[tuple[TokenizedText, How | None]]:
        plain = [text.content for text in texts if isinstance(text.content, str)]
        of_plain = iter(tokenize_many(self._tokenizer, self._table, plain))
        for text in texts:
            yield (next(of_plain), None) if isinstance(text.content, str) else self._chat(text)

    def _chat(self, text: Text) -> tuple[TokenizedText, How | None]:
        messages: Any = text.content if text.read_as is None else text.read_as
        chat = generated_spans(chat_renderer(self._tokenizer, text.tools, self._config.chat_template_kwargs), messages)
        if text.answer is None:
            return tokenize_chat(self._tokenizer, self._table, last_turns(chat, text.turns)), None
        own = is_same_model(text.answer.model, self._config.model)
        tokens, _, how = tokenize_answer(self._tokenizer, self._table, chat, text.answer, own=own)
        return tokens, how


@contextmanager
def _opened(config: CaptureConfig, texts: InputSet[Text], out: Path) -> Iterator[_Opened]:
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

    tokenize = _Tokenizer(config, tokenizer, table, asked)
    beyond: Beyond | None = None
    if rows is not None and rows < table.vocab_size:
        beyond = partial(beyond_the_model, tokenizer, rows=rows)
        if config.on_unusable == "raise":
            held = _held(out)
            missing = (text for text in _asked(config, texts) if text.id not in held)
            for part in plan_batches(missing, _n_bytes, config.batch_bytes):
                for text, problem in zip(part, _problems(config, part, tokenize, None, beyond), strict=True):
                    _require(text, problem)
    source = open_source(config, "capture")
    try:
        facts = dict(source.facts)
        if asked is not None:
            require_answers(source, config.source_name)
            # Beside the dtype, with what else changes the numbers.
            facts["options"] = {**facts.get("options", {}), "ask_ids": asked.store.manifest.identity_digest[:16]}
        yield _Opened(source, tokenize, _manifest(config, identity, facts), table, beyond, changes, top_k)
    finally:
        source.close()


def _probe(
    config: CaptureConfig, opened: _Opened, store: StoreWriter, texts: Sequence[Text], skipped: dict[str, str]
) -> tuple[int, int, float]:
    """Capture some of the texts in growing rounds; return their bytes and tokens, and the last round's tokens/s."""
    # The first round is the shortest text, so that it ends soon even where a model is slow; then in order.
    first = min(range(len(texts)), key=lambda number: texts[number].n_bytes, default=0)
    waiting = [*texts[first : first + 1], *texts[:first], *texts[first + 1 :]]
    n_bytes = n_tokens = 0
    speed, budget, left = 0.0, 1, PROBE_SECONDS
    while waiting and left > 0:
        part = next(plan_batches(waiting, _n_bytes, budget))
        skipped |= _unusable(config, opened, part, KeySet())
        usable = [text for text in part if text.id not in skipped]
        _, progress = _Job(config, opened, store, partial(iter, usable), skipped, "probe").run()
        waiting = waiting[len(part) :]
        if progress.tokens:
            captured = sum(text.n_bytes for text in usable if text.id not in skipped)
            n_bytes, n_tokens = n_bytes + captured, n_tokens + progress.tokens
            seconds = max(progress.seconds, 1e-9)
            speed, left = progress.tokens / seconds, left - seconds
            budget = int(min(8 * captured, PROBE_BYTES - n_bytes, captured / seconds * left))
            # A text that is longer than the budget would be a round of its own.
            waiting = [text for text in waiting if text.n_bytes <= budget]
    return n_bytes, n_tokens, speed


def _first_entries(topk: TopK, width: int) -> TopK:
    """Return the first entries; those that were asked for may be more than the vocabulary has tokens."""
    if topk.ids.shape[1] <= width:
        return topk
    return TopK(topk.ids[:, :width], topk.logprobs[:, :width], topk.token_logprobs)


def _n_bytes(text: Text) -> int:
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
    return {key: value for key, value in (("where", config.where), ("context", context)) if value}


def _unusable(config: CaptureConfig, opened: _Opened, texts: Iterable[Text], held: KeySet) -> dict[str, str]:
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
    for part in plan_batches(missing, _n_bytes, config.batch_bytes):
        for text, problem in zip(part, _problems(config, part, opened.tokenize, limit, opened.beyond), strict=True):
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


def _problems(
    config: CaptureConfig, texts: Sequence[Text], tokenize: Tokenize, limit: int | None, beyond: Beyond | None
) -> Iterator[str | None]:
    """Yield why the source cannot take each of the texts, None for one that it can take."""
    try:
        tokenized = tokenize(texts)
    except (DataError, TokenizerError) as error:
        if len(texts) == 1:
            yield str(error)
            return
        for text in texts:
            yield from _problems(config, [text], tokenize, limit, beyond)
        return
    for tokens in tokenized:
        ids = tokens.input_ids
        if limit is not None and len(ids) > limit:
            yield f"expected at most {limit} tokens of source {config.source_name!r}, got {len(ids)}."
            continue
        problem = beyond(ids.tolist()) if beyond else None
        yield problem and f"source {config.source_name!r}: {problem}."


@dataclass
class _Job:
    """What one source is to say about a set of texts.

    Attributes:
        texts: starts to yield all texts that can be captured, the same each time.
        skipped: takes the texts that the source refuses, id -> why.
        label: for the progress bar.
    """

    config: CaptureConfig
    opened: _Opened
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
        return missing_batches(texts, _n_bytes, self.config.batch_bytes, self._is_done, whole=whole)

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
