"""Keys of the YAML file of ``fusion capture``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from fusion_plugins.column_names import ABOUT, ColumnNames
from fusion_plugins.inputs import Selection
from fusion_plugins.sources.backends.base import SourceSettings
from fusion_plugins.sources.context import ContextSettings
from fusion_plugins.sources.parts import Shard
from fusion_plugins.where import Where, checked_where


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
    columns: ColumnNames = Field(default_factory=ColumnNames, description=ABOUT)
    where: Where | None = Field(
        None,
        description="column -> a value, a list of values, or {min, max}: only rows that meet all conditions are "
        "captured; verdict is correct, incorrect or unknown, and trust is inside for one that a program can forge, "
        "else outside",
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
            return Selection(self.where, names=self.columns)
        return Selection(self.where, self.context.applied, self.context.columns, self.columns)

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
