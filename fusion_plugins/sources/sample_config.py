"""Keys of the YAML file of ``fusion sample``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fusion_plugins.column_names import ABOUT_PROMPTS, PromptColumns
from fusion_plugins.config import Settings, with_preset
from fusion_plugins.core.text.messages import REASONING_KEYS
from fusion_plugins.sources.backends.base import Sampling, SourceSettings
from fusion_plugins.sources.parts import Shard
from fusion_plugins.sources.presets import PRESETS, SAMPLES_PER_PROMPT
from fusion_plugins.store import ColumnKind

#: of a folder of responses
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
#: columns that mean something else in such a folder, or that scoring adds
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
    columns: PromptColumns = Field(default_factory=PromptColumns, description=ABOUT_PROMPTS)
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
