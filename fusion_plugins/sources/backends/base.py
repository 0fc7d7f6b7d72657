"""What every source model offers, whatever runs it: distributions over texts, and responses to prompts.

A backend is a module with a function from settings to a :class:`Source`; :func:`open_source` picks it by name. Work is
handed over in batches (see :mod:`fusion_plugins.sources.batches`). Backends yield results one at a time, each with its
place, so that finished results can be kept when a later one fails.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from fusion_plugins.config import Settings
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.install import missing_package_error

#: what a source is opened for; an engine sets its memory accordingly
Purpose = Literal["capture", "sample"]

#: number of the batch, index within it
Place = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")
Content = TypeVar("Content", covariant=True)

#: backend -> module that defines ``open_source(settings, purpose) -> Source``
BACKENDS: dict[str, str] = {
    "transformers": "fusion_plugins.sources.backends.transformers_local",
    "vllm": "fusion_plugins.sources.backends.vllm_engine",
    "openai": "fusion_plugins.sources.backends.openai_server",
    "ray": "fusion_plugins.sources.backends.ray_data",
}


class SourceSettings(Settings):
    """Which model, and what runs it."""

    model: str = Field(description="folder or hub name of the model; for a server, the name it serves")
    name: str | None = Field(None, description="short name of the source; default: last part of `model`")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer, if it is not `model`")
    chat_template: str | None = Field(None, description="file with a Jinja chat template to use instead of the model's")
    backend: Literal[tuple(BACKENDS)] = Field(  # type: ignore[valid-type]  # known at run time only
        "transformers",
        description="what runs the model: transformers or vllm in this process, openai for servers, ray for actors",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as in the checkpoint")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    max_length: int | None = Field(None, ge=2, description="longest text in tokens; default: the model's context")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the backend")

    @property
    def source_name(self) -> str:
        """The name of the source in stores and responses."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


class Sampling(Settings):
    """How to sample from one source."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    temperature: float = Field(
        1.0, ge=0, description="0 takes the most probable token; between 0 and 0.01 is refused, as vLLM would take 0.01"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: draw from the smallest set of top tokens whose probability reaches this",
    )
    top_k: int = Field(0, ge=-1, description="draw from the K most probable tokens; 0 or -1: no limit")
    min_p: float = Field(
        0.0, ge=0, le=1, description="draw only tokens with at least this share of the most probable one's probability"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens that already occurred get less probable")
    max_tokens: int = Field(2048, ge=1, description="longest response in tokens")
    stop: tuple[str, ...] = Field((), description="strings that end a response; they are cut off")
    system: str | None = Field(None, description="system prompt put before prompts that have none")
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the source's chat template; plain: the text itself; auto: chat where there is one"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, such as enable_thinking or a date"
    )

    def __hash__(self) -> int:
        # pydantic's own would ask the mapping for one.
        return hash(self.model_dump_json())

    @property
    def template_options(self) -> dict[str, Any]:
        """``chat_template_kwargs`` as JSON has them, so that a date is the same text for every backend."""
        options: dict[str, Any] = self.model_dump(mode="json", include={"chat_template_kwargs"})["chat_template_kwargs"]
        return options

    @field_validator("temperature")
    @classmethod
    def _refuse_what_vllm_changes(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError("expected 0, or at least 0.01: vLLM takes 0.01 in place of less")
        return value

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template == "plain" and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs has no effect with `template: plain`; remove one of the two")
        return self


@dataclass(frozen=True)
class SampleRequest:
    """One response to draw.

    Attributes:
        content: the prompt's text, or its messages.
        sampling: how to draw.
        seed: of this response alone, so that it does not depend on what else is drawn.
    """

    content: str | list[dict[str, Any]]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        text: without the prompt, special tokens and stop strings. Reasoning, if there is any, is at its start, as
            ``<think>...</think>``, whatever the backend.
        finish_reason: stop | length.
        n_tokens: tokens generated; 0 where the server does not tell.
        n_prompt_tokens: tokens of the prompt; likewise.
        repaired: half characters were replaced, or a count that cannot be was left out.
        token_ids: the generated tokens, with the one that ended the response; None where the engine does not give them,
            and where the text is not what they spell (a stop string was cut off, reasoning got another form).
        token_logprobs: natural log-probability of each of them under the model itself, before temperature, penalties
            and top-p; None likewise.
    """

    text: str
    finish_reason: str
    n_tokens: int
    n_prompt_tokens: int
    repaired: bool = False
    token_ids: tuple[int, ...] | None = None
    token_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Refusal:
    """Stands for a result that a source cannot give, now or later; the other results are not affected.

    Attributes:
        reason: why, without the name of the text or prompt.
    """

    reason: str


class Batches(Protocol[Content]):
    """Batches of work whose number is known before they are made."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __iter__(self) -> Iterator[Sequence[Content]]:
        """Make one batch after the other."""
        ...


class Source(Protocol):
    """A source model, ready to be asked.

    Attributes:
        tokenizer: the source's Hugging Face tokenizer; None for a server that only samples.
        max_length: longest sequence in tokens, prompt and response together; None where unknown.
        whole_batches: True if results depend (in the last bits) on which texts share a batch; an incomplete batch is
            then repeated as a whole.
        facts: what the manifest records. Required: engine, engine_version, dtype. Optional: logits_width, revision,
            options (settings that change numbers), seeded (False if the server ignores seeds); other keys are kept as
            notes.

    A source whose attribute ``asks_ids`` is true also says what it gives the ids that an
    :class:`~fusion_plugins.core.fusion.asked.AskedText` asks for, among its entries.
    """

    tokenizer: Any
    max_length: int | None
    whole_batches: bool
    facts: dict[str, Any]

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield (place of the text, its distributions), in any order. A batch is made when the source needs it."""
        ...

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield (place of the request, its response), in any order."""
        ...

    def close(self) -> None:
        """Free memory, processes and connections."""
        ...


def least(*limits: int | None) -> int | None:
    """Return the smallest of the limits that are known."""
    return min((limit for limit in limits if limit is not None), default=None)


def in_turn(
    batches: Iterable[Sequence[Item]], answer: Callable[[Sequence[Item]], Iterator[tuple[int, Result]]]
) -> Iterator[tuple[Place, Result]]:
    """Answer one batch after the other; ``answer`` yields (index within the batch, result)."""
    for number, batch in enumerate(batches):
        for index, result in answer(batch):
            yield (number, index), result


def open_source(settings: SourceSettings, purpose: Purpose) -> Source:
    """Start the source that ``settings`` describe.

    Args:
        settings: model and backend.
        purpose: which of the two methods will be called.

    Raises:
        ConfigError: the backend's packages are not installed here.
        SourceError: the model cannot be loaded, or the server does not answer.
    """
    try:
        module = import_module(BACKENDS[settings.backend])
    except ModuleNotFoundError as error:
        what = f"source {settings.source_name!r}: backend {settings.backend!r}"
        otherwise = f"Or choose another backend of {', '.join(BACKENDS)}."
        raise missing_package_error(error, what, otherwise) from error
    source: Source = module.open_source(settings, purpose)
    return source
