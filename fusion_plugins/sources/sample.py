"""``fusion sample``: prompts x sources x n -> rows of responses.

A row is named by (prompt id, source, sample index, sampling fingerprint), and its seed follows from the first three: a
response does not depend on which others are drawn, nor on when.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusion_plugins.errors import MismatchError, SourceError
from fusion_plugins.sources.base import (
    Place,
    Refusal,
    Response,
    SampleRequest,
    Sampling,
    Source,
    SourceSettings,
    open_source,
)
from fusion_plugins.sources.identity import sampling_fingerprint
from fusion_plugins.sources.loading import load_tokenizer, split_prompts
from fusion_plugins.sources.presets import DEFAULT_SAMPLES, PRESETS, SAMPLES_PER_PROMPT
from fusion_plugins.sources.progress import Meter, meter
from fusion_plugins.sources.texts import Prompt, prompts_fingerprint, read_prompts
from fusion_plugins.sources.units import MadeUnits, plan_units, run_units
from fusion_plugins.store import RowManifest, RowWriter

__all__ = ["SampleConfig", "SampleReport", "SampledSource", "estimate_samples", "response_seed", "sample_prompts"]

KEY = ("prompt_id", "source", "index", "fingerprint")
COLUMNS = {
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
#: a dry run draws so many responses, then four times as many, ... while the next round ends within so many seconds
PROBE_REQUESTS, PROBE_SECONDS = 4, 20.0


class SampledSource(SourceSettings, Sampling):
    """One entry of ``sources``: a model, what runs it, and how to sample from it."""

    model_config = ConfigDict(extra="forbid")

    preset: str | None = Field(None, description="published settings to start from; keys beside it win")
    domains: list[str] | None = Field(None, description="domains that this source answers; default: all")
    n: int | dict[str, int] | None = Field(None, description="samples per prompt, or per domain; default: as above")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if name is None:
            return values
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
        return {**PRESETS[name], **values}

    @property
    def sampling(self) -> Sampling:
        """The sampling settings alone."""
        return Sampling(**{key: getattr(self, key) for key in Sampling.model_fields})


class SampleConfig(BaseModel):
    """Keys of the YAML file of ``fusion sample``."""

    model_config = ConfigDict(extra="forbid")

    prompts: str | list[str] = Field(description=".jsonl or .parquet files, or folders of them")
    out: str = Field(description="folder of the responses")
    sources: list[SampledSource] = Field(min_length=1)
    n: int | dict[str, int] = Field(
        default_factory=lambda: dict(SAMPLES_PER_PROMPT), description="samples per prompt and source, or per domain"
    )
    seed: int = Field(0, description="of the whole run")
    limit: int | None = Field(None, ge=1, description="answer the first so many prompts only")
    only: list[str] | None = Field(None, description="names of the sources to ask in this run; default: all")
    unit_requests: int = Field(256, ge=1, description="responses that are drawn and committed together")
    unusable: Literal["stop", "skip"] = Field(
        "stop", description="prompts that are too long, or that a source always fails on: stop, or leave them out"
    )

    @model_validator(mode="after")
    def _check_names(self) -> "SampleConfig":
        names = [source.source_name for source in self.sources]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"sources need different names; {', '.join(sorted(doubled))} stands twice: set `name`")
        unknown = set(self.only or []) - set(names)
        if unknown:
            raise ValueError(f"no source named {', '.join(sorted(unknown))}; known: {', '.join(names)}")
        return self


@dataclass(frozen=True)
class SampleReport:
    """What a run did.

    Attributes:
        out: the folder of rows.
        drawn: responses written by this run.
        present: responses that were there before.
        skipped: (source, prompt id) -> why there is no response (``unusable: skip`` only).
        tokens: tokens generated by this run.
        seconds: what that took, without loading the models.
    """

    out: Path
    drawn: int
    present: int
    skipped: dict[tuple[str, str], str]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Item:
    prompt: Prompt
    index: int

    @property
    def name(self) -> tuple[str, int]:
        return self.prompt.text.id, self.index


def response_seed(seed: int, prompt_id: str, source: str, index: int) -> int:
    """Return the seed of one response, in [0, 2**31); the same on every machine and in every run.

    Example:
        >>> response_seed(0, "p1", "llama", 0) == response_seed(0, "p1", "llama", 0)
        True
    """
    digest = hashlib.sha256(json.dumps([seed, prompt_id, source, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def sample_prompts(config: SampleConfig) -> SampleReport:
    """Draw the responses of every source, going on where an earlier run of the same settings stopped.

    Raises:
        DataError: a prompt is broken.
        MismatchError: the folder holds responses to other prompts, or of a source with other settings.
        SourceError: a model cannot be loaded, a server fails for good, or a source cannot take a prompt (with
            ``unusable: stop``).
    """
    prompts = read_prompts(config.prompts)
    skipped: dict[tuple[str, str], str] = {}
    drawn = present = tokens = 0
    seconds = 0.0
    with RowWriter(config.out, _manifest(config, prompts)) as rows:
        # Nothing is loaded before all settings were compared with what is there.
        jobs = [_job(config, settings, rows, prompts[: config.limit], skipped) for settings in _chosen(config)]
        for job in jobs:
            present += sum(item.name in job.done for item in job.items)
            _run(job)
            drawn, tokens, seconds = drawn + job.drawn, tokens + job.tokens, seconds + job.seconds
        if config.limit is None and config.only is None:
            rows.finish()
    return SampleReport(Path(config.out), drawn, present, skipped, tokens, seconds)


def estimate_samples(config: SampleConfig) -> dict[str, dict[str, float]]:
    """Draw some responses of each source, keep none, and say what all of them will take.

    Rounds grow up to the width of a unit, so that the speed is that of a real run.

    Returns:
        source -> ``responses``, ``tokens``, ``bytes``, ``hours``, ``tokens_per_second``; estimates but for the first.
    """
    prompts = read_prompts(config.prompts, config.limit)
    estimates = {}
    for settings in _chosen(config):
        items = _items(config, settings, prompts)
        if not items:
            continue
        source = open_source(settings, "sample")
        try:
            probed, speed = _probe(config, settings, source, items)
        finally:
            source.close()
        tokens = _extrapolated(items, probed, lambda response: response.n_tokens)
        estimates[settings.source_name] = {
            "responses": len(items),
            "tokens": tokens,
            "bytes": _extrapolated(items, probed, lambda response: len(response.text.encode())),
            "hours": tokens / max(speed, 1e-9) / 3600,
            "tokens_per_second": speed,
        }
    return estimates


Probed = list[tuple[_Item, Response]]


def _probe(config: SampleConfig, settings: SampledSource, source: Source, items: list[_Item]) -> tuple[Probed, float]:
    """Return what was drawn, and the tokens per second of the widest round."""
    order = _spread(items)
    domains = len({item.prompt.domain for item in items})
    probed: Probed = []
    start, width = 0, max(PROBE_REQUESTS, domains)
    while True:
        part = order[start : start + width]
        with meter(f"probe {settings.source_name}", len(part)) as progress:
            results = list(source.sample([[_request(config, settings, item) for item in part]]))
            seconds = progress.seconds
        drawn = [(part[index], response) for (_, index), response in results if isinstance(response, Response)]
        probed += drawn
        speed = sum(response.n_tokens for _, response in drawn) / max(seconds, 1e-9)
        start += width
        width = min(4 * width, config.unit_requests)
        # As if nothing ran side by side: the next round may take four times as long.
        if start >= len(order) or 4 * seconds > PROBE_SECONDS or len(part) >= config.unit_requests:
            return probed, speed


def _spread(items: list[_Item]) -> list[_Item]:
    """Return the items at random, always in the same way, one of each domain first."""
    mixed = random.Random(0).sample(items, len(items))
    first = {item.prompt.domain: item for item in reversed(mixed)}
    chosen = {item.name for item in first.values()}
    return [*first.values(), *(item for item in mixed if item.name not in chosen)]


def _extrapolated(items: list[_Item], probed: Probed, size: Callable[[Response], int]) -> float:
    """Sum of the sizes of all responses: those of a domain are as large as the drawn ones of it are on average."""
    sizes = defaultdict(list)
    for item, response in probed:
        sizes[item.prompt.domain].append(size(response))
    overall = fmean(value for values in sizes.values() for value in values) if sizes else 0.0
    means = {domain: fmean(values) for domain, values in sizes.items()}
    return sum(means.get(item.prompt.domain, overall) for item in items)


def _manifest(config: SampleConfig, prompts: Sequence[Prompt]) -> RowManifest:
    return RowManifest(
        stage="responses",
        columns=COLUMNS,
        key=KEY,
        facts={"prompts_fingerprint": prompts_fingerprint(prompts), "seed": config.seed},
        provenance={"prompts": config.prompts},
    )


def _chosen(config: SampleConfig) -> list[SampledSource]:
    return [source for source in config.sources if config.only is None or source.source_name in config.only]


def _items(config: SampleConfig, settings: SampledSource, prompts: Sequence[Prompt]) -> list[_Item]:
    n = config.n if settings.n is None else settings.n
    items = []
    for prompt in prompts:
        if settings.domains is not None and prompt.domain not in settings.domains:
            continue
        count = n if isinstance(n, int) else n.get(prompt.domain, DEFAULT_SAMPLES)
        items += [_Item(prompt, index) for index in range(count)]
    return items


@dataclass
class _Job:
    """What one source has to do in this run."""

    config: SampleConfig
    settings: SampledSource
    items: list[_Item]
    tokenizer: Any
    fingerprint: str
    rows: RowWriter
    done: set[tuple[str, int]]
    skipped: dict[tuple[str, str], str]
    seeded: bool = True
    drawn: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def refuse(self, item: _Item, reason: str) -> None:
        """Note that there will be no response, or end the run."""
        prompt, name = item.prompt.text.id, self.settings.source_name
        if self.config.unusable == "stop":
            raise SourceError(
                f"prompt {prompt!r}, source {name!r}: {reason}; or leave such prompts out with `unusable: skip`"
            )
        self.skipped[name, prompt] = reason


def _job(
    config: SampleConfig,
    settings: SampledSource,
    rows: RowWriter,
    prompts: Sequence[Prompt],
    skipped: dict[tuple[str, str], str],
) -> _Job:
    tokenizer = None if settings.backend == "openai" else load_tokenizer(settings)
    mark = sampling_fingerprint(settings, settings.sampling, tokenizer)
    name = settings.source_name
    _check_fingerprint(rows, name, mark)
    done = {(key[0], key[2]) for key in rows.done_keys if key[1] == name}
    return _Job(config, settings, _items(config, settings, prompts), tokenizer, mark, rows, done, skipped)


def _run(job: _Job) -> None:
    """Draw what is missing; the model is not loaded when nothing is."""
    present = sum(item.name in job.done for item in job.items)
    if present == len(job.items):
        return
    source = open_source(job.settings, "sample")
    try:
        job.seeded = source.facts.get("seeded", True)
        items = _usable(job, source)
        units = list(plan_units(items, lambda item: 1, job.config.unit_requests))
        if not source.whole_units:
            units = [[item for item in unit if item.name not in job.done] for unit in units]
        units = [unit for unit in units if not all(item.name in job.done for item in unit)]
        with meter(f"sample {job.settings.source_name}", len(items), present) as progress:
            responses = _responses(job, source, units, progress)
            run_units(units, responses, lambda number, unit: _commit(job, units[number], unit))
        job.tokens, job.seconds = progress.tokens, progress.seconds
    finally:
        source.close()


def _usable(job: _Job, source: Source) -> list[_Item]:
    """Leave out prompts that are too long, or refuse them, before hours are spent on the others."""
    if job.tokenizer is None:
        return job.items
    ids = {item.prompt.text.id: item for item in job.items}
    requests = [_request(job.config, job.settings, item) for item in ids.values()]
    _, refused = split_prompts(job.tokenizer, requests, source.max_length)
    firsts = list(ids.values())
    for index, refusal in refused.items():
        job.refuse(firsts[index], refusal.reason)
    names = {firsts[index].prompt.text.id for index in refused}
    return [item for item in job.items if item.prompt.text.id not in names]


def _responses(
    job: _Job, source: Source, units: list[list[_Item]], progress: Meter
) -> Iterator[tuple[Place, Response | Refusal]]:
    requests = MadeUnits(units, lambda _, unit: [_request(job.config, job.settings, item) for item in unit])
    for place, response in source.sample(requests):
        if isinstance(response, Refusal):
            job.refuse(units[place[0]][place[1]], response.reason)
        else:
            progress.advance(1, response.n_tokens)
        yield place, response


def _commit(job: _Job, unit: list[_Item], responses: Mapping[int, Response | Refusal]) -> None:
    for index, response in responses.items():
        if isinstance(response, Response) and unit[index].name not in job.done:
            job.rows.write(_row(job, unit[index], response))
            job.drawn += 1
    job.rows.flush()


def _request(config: SampleConfig, settings: SampledSource, item: _Item) -> SampleRequest:
    text = item.prompt.text
    return SampleRequest(
        text.content, settings.sampling, response_seed(config.seed, text.id, settings.source_name, item.index)
    )


def _row(job: _Job, item: _Item, response: Response) -> dict[str, Any]:
    prompt = item.prompt
    return {
        "prompt_id": prompt.text.id,
        "source": job.settings.source_name,
        "index": item.index,
        "prompt": prompt.text.content,
        "response": response.text,
        "domain": prompt.domain,
        "reference": prompt.reference,
        "tests": prompt.tests,
        "finish_reason": response.finish_reason,
        "n_tokens": response.n_tokens,
        "n_prompt_tokens": response.n_prompt_tokens,
        "seed": _request(job.config, job.settings, item).seed if job.seeded else None,
        "model": job.settings.model,
        "fingerprint": job.fingerprint,
    }


def _check_fingerprint(rows: RowWriter, name: str, mark: str) -> None:
    other = next((key[3] for key in rows.done_keys if key[1] == name and key[3] != mark), None)
    if other is not None:
        raise MismatchError(
            f"{rows.path} holds responses of source {name!r} with the sampling fingerprint {other}, now it is {mark}: "
            "the model, its chat template, its dtype or its sampling settings changed. Give the source another name, "
            "or use a folder of its own for the new responses."
        )
