"""``fusion sample``: prompts x sources x n -> rows of responses.

The key of a row is (prompt id, source, sample index, sampling fingerprint). Its seed follows from the first three, so
that a response does not depend on which others are drawn, nor on when.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from fusion_plugins.config import Settings
from fusion_plugins.errors import MismatchError, SourceError
from fusion_plugins.inputs import Prompt, Unusable, prompts_fingerprint, read_prompts
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
from fusion_plugins.sources.batches import commit_batches, missing_batches
from fusion_plugins.sources.fingerprints import sampling_fingerprint
from fusion_plugins.sources.loading import load_tokenizer, split_prompts
from fusion_plugins.sources.presets import DEFAULT_SAMPLES, PRESETS, SAMPLES_PER_PROMPT
from fusion_plugins.store import ColumnKind, RowManifest, RowWriter

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
    "seed": "int64",
    "model": "string",
    "fingerprint": "string",
}


class SampledSource(SourceSettings, Sampling):
    """One entry of ``sources``: a model, what runs it, and how to sample from it."""

    preset: str | None = Field(None, description="published settings to start from; keys beside it win")
    domains: list[str] | None = Field(None, description="domains that this source answers; default: all")
    n: int | dict[str, int] | None = Field(None, description="samples per prompt, or per domain; default: the run's")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if name is None:
            return values
        if name not in PRESETS:
            raise ValueError(f"expected one of the presets {', '.join(PRESETS)}, got {name!r}; name one of them")
        return {**PRESETS[name], **values}

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

    prompts: str | list[str] = Field(description=".jsonl or .parquet files, or folders of them")
    out: str = Field(description="folder of the responses")
    sources: list[SampledSource] = Field(min_length=1, description="the models to ask, each with its own settings")
    n: int | dict[str, int] = Field(
        default_factory=lambda: dict(SAMPLES_PER_PROMPT), description="samples per prompt and source, or per domain"
    )
    seed: int = Field(0, description="of the whole run")
    limit: int | None = Field(None, ge=1, description="answer only this many prompts, from the start")
    only: list[str] | None = Field(None, description="names of the sources to ask in this run; default: all")
    batch_requests: int = Field(256, ge=1, description="responses that are drawn and committed together")
    on_unusable: Literal["raise", "skip"] = Field(
        "raise",
        description="rows that are no prompts, prompts that are too long, or that a source refuses or always fails on: "
        "raise, or skip and report",
    )

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
        index: number among the responses of the source to the prompt.
        request: what the source is asked for.
    """

    prompt: Prompt
    index: int
    request: SampleRequest

    @property
    def key(self) -> tuple[str, int]:
        """Prompt id and index: different for all draws of a source."""
        return self.prompt.text.id, self.index


def response_seed(seed: int, prompt_id: str, source: str, index: int) -> int:
    """Return the seed of one response, in [0, 2**31); the same on every machine and in every run.

    Example:
        >>> response_seed(0, "p1", "llama", 0) == response_seed(0, "p1", "llama", 0)
        True
    """
    digest = hashlib.sha256(json.dumps([seed, prompt_id, source, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def planned_draws(config: SampleConfig, settings: SampledSource, prompts: Sequence[Prompt]) -> list[Draw]:
    """Return the responses to draw from one source, prompt by prompt."""
    n = config.n if settings.n is None else settings.n
    sampling = settings.sampling
    draws = []
    for prompt in prompts:
        if settings.domains is not None and prompt.domain not in settings.domains:
            continue
        for index in range(n if isinstance(n, int) else n.get(prompt.domain, DEFAULT_SAMPLES)):
            seed = response_seed(config.seed, prompt.text.id, settings.source_name, index)
            draws.append(Draw(prompt, index, SampleRequest(prompt.text.content, sampling, seed)))
    return draws


def sample_prompts(config: SampleConfig) -> SampleReport:
    """Draw the responses of every source; resume where an earlier run with the same settings stopped.

    Raises:
        DataError: a prompt is broken.
        MismatchError: the folder holds responses to other prompts, or of a source with other settings.
        SourceError: a model cannot be loaded, a server fails for good, or a source cannot take a prompt (with
            ``on_unusable: raise``).
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    prompts = read_prompts(config.prompts, unusable=unusable)
    manifest = RowManifest(
        stage="responses",
        columns=COLUMNS,
        key=KEY,
        facts={"prompts_fingerprint": prompts_fingerprint(prompts), "seed": config.seed},
        provenance={"prompts": config.prompts},
    )
    skipped = {("all sources", name): reason for name, reason in (unusable or {}).items()}
    repaired: list[tuple[str, str]] = []
    present = tokens = 0
    seconds = 0.0
    with RowWriter(config.out, manifest) as rows:
        before = len(rows.done_keys)
        # The settings of all sources are compared with the folder before the first model is loaded.
        fingerprints = [_checked_fingerprint(settings, rows) for settings in config.chosen_sources]
        for settings, fingerprint in zip(config.chosen_sources, fingerprints, strict=True):
            draws = planned_draws(config, settings, prompts[: config.limit])
            done = _done(rows, settings)
            present += sum(draw.key in done for draw in draws)
            if all(draw.key in done for draw in draws):
                continue
            progress = _draw_missing(config, settings, fingerprint, draws, rows, skipped, repaired)
            tokens, seconds = tokens + progress.tokens, seconds + progress.seconds
        drawn = len(rows.done_keys) - before
        if config.limit is None and config.only is None:
            rows.finish()
    return SampleReport(Path(config.out), drawn, present, skipped, tokens, seconds, len(repaired))


def _checked_fingerprint(settings: SampledSource, rows: RowWriter) -> str:
    """Return the sampling fingerprint of a source; refuse a folder with responses of the source under another one."""
    tokenizer = None if settings.backend == "openai" else load_tokenizer(settings)
    fingerprint = sampling_fingerprint(settings, settings.sampling, tokenizer)
    name = settings.source_name
    other = next((key[3] for key in rows.done_keys if key[1] == name and key[3] != fingerprint), None)
    if other is not None:
        raise MismatchError(
            f"{rows.path} holds responses of source {name!r} with the sampling fingerprint {other}, expected "
            f"{fingerprint}: the model, its chat template, its dtype or its sampling settings have changed. Give the "
            "source another name, or write the new responses into a folder of their own."
        )
    return fingerprint


def _done(rows: RowWriter, settings: SampledSource) -> set[tuple[str, int]]:
    """Return prompt id and index of the responses of a source that are in the folder now."""
    return {(prompt, index) for prompt, source, index, _ in rows.done_keys if source == settings.source_name}


def _draw_missing(
    config: SampleConfig,
    settings: SampledSource,
    fingerprint: str,
    draws: Sequence[Draw],
    rows: RowWriter,
    skipped: dict[tuple[str, str], str],
    repaired: list[tuple[str, str]],
) -> Meter:
    """Load a source and draw the responses that are missing.

    Prompts that the source refuses are added to ``skipped``, those of repaired responses to ``repaired``.
    """
    name, done = settings.source_name, _done(rows, settings)

    def refuse(prompt_id: str, reason: str) -> None:
        if config.on_unusable == "raise":
            raise SourceError(
                f"prompt {prompt_id!r}, source {name!r}: {reason}. Leave such prompts out with `on_unusable: skip`, or "
                "change them."
            )
        skipped[name, prompt_id] = reason

    source = open_source(settings, "sample")
    try:
        too_long = _too_long(source, draws)
        for prompt_id, reason in too_long.items():
            refuse(prompt_id, reason)
        usable = [draw for draw in draws if draw.prompt.text.id not in too_long]
        batches = missing_batches(
            usable, lambda draw: 1, config.batch_requests, lambda draw: draw.key in done, whole=source.whole_batches
        )

        def responses() -> Iterator[tuple[Place, Response | Refusal]]:
            for (number, index), response in source.sample([[draw.request for draw in batch] for batch in batches]):
                if isinstance(response, Refusal):
                    refuse(batches[number][index].prompt.text.id, response.reason)
                else:
                    progress.advance(1, response.n_tokens)
                yield (number, index), response

        def commit(number: int, batch: Mapping[int, Response | Refusal]) -> None:
            for index, response in batch.items():
                draw = batches[number][index]
                # A batch that is done again has some of the responses already.
                if isinstance(response, Response) and draw.key not in done:
                    rows.write(_row(draw, response, settings, fingerprint, source.facts.get("seeded", True)))
                    repaired.extend([(name, draw.prompt.text.id)] * response.repaired)
            rows.flush()

        present = sum(draw.key in done for draw in usable)
        with meter(f"sample {name}", len(usable), present, unit="responses") as progress:
            commit_batches(batches, responses(), commit)
        return progress
    finally:
        source.close()


def _too_long(source: Source, draws: Sequence[Draw]) -> dict[str, str]:
    """Return prompt id -> reason of the prompts that are too long, before hours are spent on the others.

    Servers tokenize prompts themselves: theirs are found on the way.
    """
    if source.tokenizer is None:
        return {}
    by_prompt = {draw.prompt.text.id: draw.request for draw in draws}
    prompt_ids = list(by_prompt)
    _, refused = split_prompts(source.tokenizer, list(by_prompt.values()), source.max_length)
    return {prompt_ids[index]: refusal.reason for index, refusal in refused.items()}


def _row(draw: Draw, response: Response, settings: SampledSource, fingerprint: str, seeded: bool) -> dict[str, Any]:
    prompt = draw.prompt
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
        "seed": draw.request.seed if seeded else None,
        "model": settings.model,
        "fingerprint": fingerprint,
    }
