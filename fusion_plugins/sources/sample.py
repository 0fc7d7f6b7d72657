"""``fusion sample``: prompts x sources x n -> rows of responses.

The key of a row is (prompt id, source, sample index, sampling fingerprint). Its seed follows from the first three, so
that a response does not depend on which others are drawn, nor on when.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fusion_plugins.config import Settings, with_preset
from fusion_plugins.core.text.messages import REASONING_KEYS
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.errors import MismatchError, SourceError
from fusion_plugins.inputs import InputSet, Prompt, Unusable, open_prompts
from fusion_plugins.progress import Meter, meter
from fusion_plugins.sources.backends.base import (
    Place,
    Refusal,
    Response,
    SampleRequest,
    Sampling,
    Source,
    SourceSettings,
    open_source,
)
from fusion_plugins.sources.background import Background
from fusion_plugins.sources.batches import LazyBatches, commit_batches, missing_batches, plan_batches
from fusion_plugins.sources.fingerprints import sampling_fingerprint
from fusion_plugins.sources.loading import load_tokenizer, split_prompts
from fusion_plugins.sources.parts import Shard, chosen, require_part
from fusion_plugins.sources.presets import DEFAULT_SAMPLES, PRESETS, SAMPLES_PER_PROMPT
from fusion_plugins.store import ColumnKind, RowManifest, RowWriter
from fusion_plugins.store.manifest import PART

#: prompts that are tokenized at a time before a source begins, to see whether they fit
CHECKED_AT_ONCE = 256
KEY = ("prompt_id", "source", "index", "fingerprint")
COLUMNS: dict[str, ColumnKind] = {
    "prompt_id": "string",
    "source": "string",
    "index": "int64",
    "prompt": "json",
    "response": "string",
    "domain": "string",
    "reference": "string",
    "tests": "json",
    "finish_reason": "string",
    "n_tokens": "int64",
    "n_prompt_tokens": "int64",
    "system": "string",
    "token_ids": "int32s",
    "token_logprobs": "float32s",
    "tokenizer": "string",
    "seed": "int64",
    "model": "string",
    "fingerprint": "string",
}
#: columns that mean something else in a folder of responses, or that scoring adds
TAKEN = ("id", "text", "messages", "tools", "tool_calls", *REASONING_KEYS, "reward", "correct", "scores", "is_target")


class SampledSource(SourceSettings, Sampling):
    """One entry of ``sources``: a model, what runs it, and how to sample from it."""

    preset: str | None = Field(None, description="published settings to start from; keys beside it win")
    domains: list[str] | None = Field(None, description="domains that this source answers; default: all")
    n: int | dict[str, int] | None = Field(None, description="samples per prompt, or per domain; default: the run's")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_preset(values, PRESETS)

    @property
    def sampling(self) -> Sampling:
        """The sampling settings alone; they remember which of them were written, here or in the preset."""
        return Sampling(**{key: getattr(self, key) for key in Sampling.model_fields if key in self.model_fields_set})


class SampleConfig(Settings):
    """Keys of the YAML file of ``fusion sample``."""

    MOVED: ClassVar[Mapping[str, str]] = {
        "unit_requests": "now batch_requests",
        "unusable": "now on_unusable, with the values raise (was: stop) and skip",
    }

    prompts: str | list[str] = Field(
        description=".jsonl or .parquet files, folders of them, hf:ORG/NAME[:SPLIT][:COLUMN]"
    )
    out: str = Field(description="folder of the responses")
    sources: list[SampledSource] = Field(min_length=1, description="the models to ask, each with its own settings")
    n: int | dict[str, int] = Field(
        default_factory=lambda: dict(SAMPLES_PER_PROMPT), description="samples per prompt and source, or per domain"
    )
    seed: int = Field(0, description="of the whole run")
    limit: int | None = Field(None, ge=1, description="answer only this many prompts, from the start")
    shard: Shard | None = Field(
        None, description="answer only part i of n of the prompts, such as 2/3; `fusion store merge` joins the parts"
    )
    keep_columns: list[str] = Field(
        default_factory=list,
        description="other columns of the prompts that the responses get too, for `where` and `context` later on",
    )
    only: list[str] | None = Field(None, description="names of the sources to ask in this run; default: all")
    batch_requests: int = Field(256, ge=1, description="responses that are drawn and committed together")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise",
        description="rows that are no prompts, prompts that are too long, or that a source refuses or always fails on: "
        "raise, or skip and report",
    )

    @field_validator("keep_columns")
    @classmethod
    def _check_columns(cls, names: list[str]) -> list[str]:
        if taken := sorted({*names} & {*COLUMNS, *TAKEN}):
            raise ValueError(f"expected columns of another name, got {', '.join(taken)}, which a response has anyway")
        return names

    @model_validator(mode="after")
    def _check_names(self) -> "SampleConfig":
        names = [source.source_name for source in self.sources]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"expected different names, got {', '.join(sorted(doubled))} twice: set `name` of one")
        unknown = set(self.only or []) - set(names)
        if unknown:
            raise ValueError(f"only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}; correct it")
        return self

    @property
    def chosen_sources(self) -> list[SampledSource]:
        """The sources of this run."""
        return [source for source in self.sources if self.only is None or source.source_name in self.only]


@dataclass(frozen=True)
class SampleReport:
    """What a run did.

    Attributes:
        out: the folder of rows.
        drawn: responses written by this run.
        present: responses that were there before.
        skipped: (source, prompt id) -> why there is no response (``on_unusable: skip`` only); for a row that is no
            prompt, ``all sources`` and its id, or its place if it has none.
        tokens: tokens generated by this run.
        seconds: time of sampling, without loading the models.
        repaired: responses of this run with half characters, which are U+FFFD now, or with impossible counts of tokens.
    """

    out: Path
    drawn: int
    present: int
    skipped: dict[tuple[str, str], str]
    tokens: int
    seconds: float
    repaired: int = 0


@dataclass(frozen=True)
class Draw:
    """One response to draw from one source.

    Attributes:
        prompt: the prompt to answer.
        source: name of the source.
        index: number among the responses of the source to the prompt.
        sampling: how to draw.
        run_seed: seed of the whole run.
    """

    prompt: Prompt
    source: str
    index: int
    sampling: Sampling
    run_seed: int

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and index: different for all draws of a source."""
        return self.prompt.text.id, self.index

    @property
    def request(self) -> SampleRequest:
        """What the source is asked for."""
        return SampleRequest(self.prompt.text.content, self.sampling, self.seed)

    @cached_property
    def seed(self) -> int:
        """The seed of this response alone."""
        return response_seed(self.run_seed, self.prompt.text.id, self.source, self.index)


def response_seed(seed: int, prompt_id: str, source: str, index: int) -> int:
    """Return the seed of one response, in [0, 2**31); the same on every machine and in every run.

    Example:
        >>> response_seed(0, "p1", "llama", 0) == response_seed(0, "p1", "llama", 0)
        True
    """
    digest = hashlib.sha256(json.dumps([seed, prompt_id, source, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def planned_draws(config: SampleConfig, settings: SampledSource, prompts: Iterable[Prompt]) -> Iterator[Draw]:
    """Yield the responses to draw from one source, prompt by prompt."""
    n = config.n if settings.n is None else settings.n
    sampling = settings.sampling
    for prompt in prompts:
        if settings.domains is not None and prompt.domain not in settings.domains:
            continue
        for index in range(n if isinstance(n, int) else n.get(prompt.domain, DEFAULT_SAMPLES)):
            yield Draw(prompt, settings.source_name, index, sampling, config.seed)


def sample_prompts(config: SampleConfig) -> SampleReport:
    """Draw the responses of every source; resume where an earlier run with the same settings stopped.

    Raises:
        DataError: a prompt is broken.
        MismatchError: the folder holds responses to other prompts, or of a source with other settings.
        SourceError: a model cannot be loaded, a server fails for good, or a source cannot take a prompt (with
            ``on_unusable: raise``).
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    prompts = open_prompts(config.prompts, unusable=unusable, keep=config.keep_columns)
    manifest = RowManifest(
        stage="responses",
        columns=COLUMNS | dict.fromkeys(config.keep_columns, "json"),
        key=KEY,
        facts={"prompts_fingerprint": prompts.fingerprint, "seed": config.seed},
        provenance={"prompts": config.prompts, **({PART: config.shard} if config.shard else {})},
    )
    require_part(Path(config.out), config.shard)
    skipped = {("all sources", name): reason for name, reason in (unusable or {}).items()}
    repaired: list[tuple[str, str]] = []
    present = tokens = 0
    seconds = 0.0
    with RowWriter(config.out, manifest) as rows:
        before = rows.manifest.rows
        # The settings of all sources are compared with the folder before the first model is loaded.
        found = {(source, fingerprint) for _, source, _, fingerprint in rows.keys()}
        fingerprints = [_checked_fingerprint(settings, rows, found) for settings in config.chosen_sources]
        for settings, fingerprint in zip(config.chosen_sources, fingerprints, strict=True):
            job = _Job(config, settings, fingerprint, prompts, rows, skipped, repaired)
            there, missing = job.count()
            present += there
            if missing:
                progress = job.run()
                tokens, seconds = tokens + progress.tokens, seconds + progress.seconds
        drawn = rows.manifest.rows - before
        if config.limit is None and config.only is None:
            rows.finish()
    return SampleReport(Path(config.out), drawn, present, skipped, tokens, seconds, len(repaired))


def _checked_fingerprint(settings: SampledSource, rows: RowWriter, found: set[tuple[str, str]]) -> str:
    """Return the sampling fingerprint of a source; refuse a folder with responses of the source under another one.

    Args:
        settings: of the source.
        rows: the folder.
        found: name and fingerprint of every source that it has responses of.
    """
    tokenizer = None if settings.backend == "openai" else load_tokenizer(settings)
    fingerprint = sampling_fingerprint(settings, settings.sampling, tokenizer)
    name = settings.source_name
    other = next((other for source, other in sorted(found) if source == name and other != fingerprint), None)
    if other is not None:
        raise MismatchError(
            f"{rows.path} holds responses of source {name!r} with the sampling fingerprint {other}, expected "
            f"{fingerprint}: the model, its chat template, its dtype or its sampling settings have changed. Give the "
            "source another name, or write the new responses into a folder of their own."
        )
    return fingerprint


@dataclass
class _Job:
    """The responses of one source.

    Attributes:
        skipped: takes the prompts that the source refuses.
        repaired: takes the prompts of repaired responses.
    """

    config: SampleConfig
    settings: SampledSource
    fingerprint: str
    prompts: InputSet[Prompt]
    rows: RowWriter
    skipped: dict[tuple[str, str], str]
    repaired: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return self.settings.source_name

    def draws(self, refused: Container[str] = ()) -> Iterator[Draw]:
        """Start to yield all responses to draw, but of prompts that are refused."""
        asked = chosen(self.prompts, self.config.limit, self.config.shard)
        prompts = (prompt for prompt in asked if prompt.text.id not in refused)
        return planned_draws(self.config, self.settings, prompts)

    def is_done(self, draw: Draw) -> bool:
        return self.rows.holds((draw.prompt.text.id, self.name, draw.index, self.fingerprint))

    def count(self, refused: Container[str] = ()) -> tuple[int, int]:
        """Return how many responses are there, and how many are missing."""
        counts = Counter(map(self.is_done, self.draws(refused)))
        return counts[True], counts[False]

    def refuse(self, prompt_id: str, reason: str) -> None:
        if self.config.on_unusable == "raise":
            raise SourceError(
                f"prompt {prompt_id!r}, source {self.name!r}: {reason}. Leave such prompts out with `on_unusable: "
                "skip`, or change them."
            )
        self.skipped[self.name, prompt_id] = reason

    def run(self) -> Meter:
        """Load the source and draw the responses that are missing."""
        source = open_source(self.settings, "sample")
        try:
            refused = self._too_long(source)
            present, missing = self.count(refused)

            def batches() -> Iterator[list[Draw]]:
                budget = self.config.batch_requests
                return missing_batches(
                    self.draws(refused), lambda draw: 1, budget, self.is_done, whole=source.whole_batches
                )

            asked = LazyBatches(
                sum(1 for _ in batches()), batches(), lambda number, batch: [draw.request for draw in batch]
            )
            facts = _Facts.of(self.settings, source)

            def responses() -> Iterator[tuple[Place, Response | Refusal]]:
                for (number, index), response in source.sample(asked) if missing else ():
                    writing.check()
                    if isinstance(response, Refusal):
                        self.refuse(asked.under_way[number][index].prompt.text.id, response.reason)
                    else:
                        progress.advance(1, response.n_tokens)
                    yield (number, index), response

            def commit(batch: Sequence[Draw], found: Mapping[int, Response | Refusal]) -> None:
                writing.submit(partial(self._write, batch, found, facts))

            title = f"sample {self.name}"
            with meter(title, present + missing, present, unit="responses") as progress, Background() as writing:
                commit_batches(asked.under_way, responses(), commit)
            return progress
        finally:
            source.close()

    def _write(self, batch: Sequence[Draw], found: Mapping[int, Response | Refusal], facts: "_Facts") -> None:
        for index, response in found.items():
            draw = batch[index]
            # A batch that is done again has some of the responses already.
            if isinstance(response, Response) and not self.is_done(draw):
                self.rows.write(_row(draw, response, self.settings, self.fingerprint, facts))
                self.repaired.extend([(self.name, draw.prompt.text.id)] * response.repaired)
        self.rows.flush()

    def _too_long(self, source: Source) -> frozenset[str]:
        """Refuse the prompts that are too long, before hours are spent on the others; return their ids.

        Servers tokenize prompts themselves: theirs are found on the way. Prompts that are answered are not looked at.
        """
        if source.tokenizer is None:
            return frozenset()
        refused = []
        # The responses to a prompt follow each other: it is looked at once, for the first that is missing.
        missing = (draw for draw in self.draws() if not self.is_done(draw))
        first = (next(draws) for _, draws in groupby(missing, lambda draw: draw.prompt.text.id))
        for part in plan_batches(first, lambda draw: 1, CHECKED_AT_ONCE):
            _, found = split_prompts(source.tokenizer, [draw.request for draw in part], source.max_length)
            for index, refusal in sorted(found.items()):
                self.refuse(part[index].prompt.text.id, refusal.reason)
                refused.append(part[index].prompt.text.id)
        return frozenset(refused)


@dataclass(frozen=True)
class _Facts:
    """What the rows of one source say about it.

    Attributes:
        seeded: it obeys seeds.
        system: the system prompt that it reads before prompts without one of their own.
        tokenizer: fingerprint of its tokenizer, of which the ids of its responses are; None for a server.
    """

    seeded: bool
    system: str | None
    tokenizer: str | None

    @classmethod
    def of(cls, settings: SampledSource, source: Source) -> "_Facts":
        own = source.tokenizer
        plain = settings.template == "plain" or (own is not None and not own.chat_template)
        fingerprint = None if own is None else TokenTable.from_tokenizer(own, check=False).fingerprint
        return cls(source.facts.get("seeded", True), None if plain else settings.system, fingerprint)

    def system_of(self, content: str | list[dict[str, Any]]) -> str | None:
        """Return the system prompt that was put before a prompt."""
        own = not isinstance(content, str) and content[0]["role"] == "system"
        return None if own else self.system


def _row(draw: Draw, response: Response, settings: SampledSource, fingerprint: str, facts: _Facts) -> dict[str, Any]:
    prompt = draw.prompt
    ids, logprobs = response.token_ids, response.token_logprobs
    return {
        "prompt_id": prompt.text.id,
        "source": settings.source_name,
        "index": draw.index,
        "prompt": prompt.text.content,
        "response": response.text,
        "domain": prompt.domain,
        "reference": prompt.reference,
        "tests": prompt.tests,
        "finish_reason": response.finish_reason,
        "n_tokens": response.n_tokens,
        "n_prompt_tokens": response.n_prompt_tokens,
        "system": facts.system_of(prompt.text.content),
        "token_ids": None if ids is None else list(ids),
        "token_logprobs": None if logprobs is None else list(logprobs),
        "tokenizer": None if ids is None else facts.tokenizer,
        "seed": draw.seed if facts.seeded else None,
        "model": settings.model,
        "fingerprint": fingerprint,
        **prompt.kept,
    }
