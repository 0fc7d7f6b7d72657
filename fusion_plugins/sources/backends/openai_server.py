"""The ``openai`` backend: any OpenAI-compatible server, or several of them at once.

Sampling uses chat completions (plain completions with ``template: plain``). Capture uses what vLLM's server adds to
completions: prompts of token ids, and the top-k at every position of the prompt.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import Field, field_validator

from fusion_plugins.config import validate
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, SourceError
from fusion_plugins.sources.backends.base import (
    Batches,
    Place,
    Purpose,
    Refusal,
    Response,
    SampleRequest,
    Sampling,
    SourceSettings,
    least,
)
from fusion_plugins.sources.backends.completions import parse_response, parse_topk, quoted
from fusion_plugins.sources.backends.connections import ConnectionOptions, Item, Result, answers_in_flight, open_pool
from fusion_plugins.sources.backends.http import MOST_BYTES, HttpClient, NoAnswer
from fusion_plugins.sources.backends.topk import spare_entries
from fusion_plugins.sources.loading import capture_tokenizer, chat_messages, plain_text, vocabulary_size

#: settings that a server decides itself when it samples
DECIDED_BY_SERVER = ("chat_template", "dtype", "revision", "max_length")
#: sampling settings that OpenAI itself does not know; these servers know them all
BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty")
KNOW_BEYOND_OPENAI = ("vllm", "sglang")
#: fields of a request that ``extra_body`` may not replace
OWN_FIELDS = ("model", "messages", "prompt", "stream", "n", "prompt_logprobs")
#: seconds for a question about the server itself
DESCRIBE_SECONDS = 30.0
#: bytes of an answer per token, and per token and entry of a capture; JSON takes 60 to 100
TOKEN_BYTES, ENTRY_BYTES = 4096, 256
PROBE_TEXT = "Zoë's 1,234 naïve tests:\n\tdef f(x): return x  # 数学"


class ServerOptions(ConnectionOptions):
    """Keys of ``options`` for this backend. API keys are never written in a YAML file."""

    send_seed: bool = Field(True, description="off for servers that refuse `seed`; responses then do not repeat")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="more fields of every sampling request")

    @field_validator("extra_body")
    @classmethod
    def _check_extra_body(cls, value: dict[str, Any]) -> dict[str, Any]:
        own = sorted(set(value) & set(OWN_FIELDS))
        if own:
            raise ValueError(f"expected further fields of a request, got {', '.join(own)}, which we set; remove it")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected values that JSON can write: {error}") from None
        return value


def open_source(settings: SourceSettings, purpose: Purpose) -> "ServerSource":
    """Connect to the servers; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return ServerSource(settings, purpose)


class ServerSource:
    """One model on one or more servers."""

    whole_batches = False

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        where = f"options of source {settings.source_name!r}"
        self._options = validate(ServerOptions, settings.options, where=where)
        self._model = settings.model
        _check_settings(settings, self._options, purpose)
        self.tokenizer = capture_tokenizer(settings) if purpose == "capture" else None
        self._vocab_size = vocabulary_size(self.tokenizer) if self.tokenizer is not None else 0
        self._pool = open_pool(self._options)
        described = [_describe(server.client, settings.model) for server in self._pool.servers]
        # A server that applies the model's own generation config is told every setting, if it knows them all.
        self._tells_all = all(version.split()[0].lower() in KNOW_BEYOND_OPENAI for _, version in described)
        known = [length for length, _ in described if length is not None]
        # A capture request generates one token, and needs room for it.
        context = min(known) - (purpose == "capture") if known else None
        self.max_length = least(settings.max_length, context)
        width = _logits_width(settings) if purpose == "capture" else None
        self._width = width or self._vocab_size
        if purpose == "capture":
            for server in self._pool.servers:
                _check_tokenizer(server.client, settings.model, self.tokenizer)
        self.facts: dict[str, Any] = {
            "engine": "openai",
            "engine_version": ", ".join(sorted({version for _, version in described})),
            "dtype": settings.dtype,
            "logits_width": self._width,
            "revision": settings.revision,
            "seeded": self._options.send_seed and "seed" not in self._options.extra_body,
            "servers": [server.address for server in self._pool.servers],
        }

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield the top-k of each text as the answers arrive."""
        asked = min(top_k + spare_entries(self._width, self._vocab_size), self._width)
        return self._answers(batches, lambda text: self._capture_one(text, top_k, asked))

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses as they arrive; each request has its own seed."""
        return self._answers(batches, self._sample_one)

    def close(self) -> None:
        """Close the connections."""
        self._pool.stop()

    def _answers(
        self, batches: Iterable[Sequence[Item]], answer: Callable[[Item], Result]
    ) -> Iterator[tuple[Place, Result | Refusal]]:
        most = self._options.concurrency * len(self._pool.servers)
        return answers_in_flight(self._pool, most, batches, answer)

    def _capture_one(self, text: TokenizedText, top_k: int, asked: int) -> TopK:
        body = {
            "model": self._model,
            "prompt": text.input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked,
        }
        return self._pool.post(
            "/completions",
            body,
            lambda answer: parse_topk(answer, text.input_ids, top_k, self._vocab_size),
            most_bytes=MOST_BYTES + len(text.input_ids) * (asked + 1) * ENTRY_BYTES,
        )

    def _sample_one(self, request: SampleRequest) -> Response:
        sampling = request.sampling
        body = {"model": self._model, **sampling_fields(sampling, tell_all=self._tells_all)}
        if self._options.send_seed:
            body["seed"] = request.seed
        body |= self._options.extra_body
        if sampling.template == "plain":
            path, body["prompt"] = "/completions", plain_text(request.content)
        else:
            path, body["messages"] = "/chat/completions", chat_messages(request.content, sampling.system)
            if sampling.chat_template_kwargs:
                body["chat_template_kwargs"] = sampling.template_options
        most = MOST_BYTES + sampling.max_tokens * TOKEN_BYTES
        return self._pool.post(path, body, parse_response, most_bytes=most)


def sampling_fields(sampling: Sampling, *, tell_all: bool) -> dict[str, Any]:
    """Return the fields of a request that say how to sample.

    What the user wrote is sent, also where it is our default: a server would otherwise apply the model's own generation
    config. Other servers than vLLM's may refuse fields that OpenAI does not know, so these are sent only if written.

    Args:
        sampling: how to sample.
        tell_all: send the settings that were not written too.

    Example:
        >>> sampling_fields(Sampling(top_k=0, max_tokens=9), tell_all=False)
        {'temperature': 1.0, 'top_p': 1.0, 'max_tokens': 9, 'top_k': 0}
    """
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in ("temperature", "top_p", "max_tokens")}
    fields |= {name: getattr(sampling, name) for name in BEYOND_OPENAI if tell_all or name in sampling.model_fields_set}
    if "top_k" in fields and "top_k" not in sampling.model_fields_set:
        fields["top_k"] = -1  # "no limit" for all who know the field; some refuse 0
    if "stop" in sampling.model_fields_set:
        fields["stop"] = list(sampling.stop)
    return fields


def _check_settings(settings: SourceSettings, options: ServerOptions, purpose: Purpose) -> None:
    """Refuse settings that have no effect, and those that are given in two places."""
    if purpose == "capture":
        if options.extra_body:
            raise ConfigError(
                f"source {settings.source_name!r}: extra_body is for sampling, and a capture does not send it. Remove "
                "it."
            )
        return
    ignored = [n for n in DECIDED_BY_SERVER if getattr(settings, n) != SourceSettings.model_fields[n].default]
    if ignored:
        raise ConfigError(
            f"source {settings.source_name!r}: {', '.join(ignored)} cannot be chosen here when a server samples. "
            "Remove the setting, and start the server with it."
        )
    twice = sorted(settings.model_fields_set & set(options.extra_body))
    if twice:
        raise ConfigError(
            f"source {settings.source_name!r}: {', '.join(twice)} is set both for the source and in extra_body. Remove "
            "one."
        )


def _describe(client: HttpClient, model: str) -> tuple[int | None, str]:
    """Return the model's context in tokens, where the server tells it, and name and version of the server."""
    listed = _ask(client, client.base_url + "/models").get("data")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    found: dict[str, Any] = next((entry for entry in entries if entry.get("id") == model), {})
    length, owner = found.get("max_model_len"), found.get("owned_by")
    version = _ask(client, _root(client) + "/version").get("version")
    usable = isinstance(length, int) and not isinstance(length, bool) and length > 0
    return length if usable else None, f"{_word(owner) or 'unknown'} {_word(version)}".strip()


def _word(value: Any) -> str:
    """Return a name that a server gives itself, short enough for a manifest; nothing else that it may send."""
    return value.strip()[:80] if isinstance(value, str) and value.isprintable() else ""


def _root(client: HttpClient) -> str:
    return client.base_url.removesuffix("/v1")


def _ask(client: HttpClient, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask for what not every server offers; {} without an answer (if the server is down, the first request fails)."""
    try:
        if body is None:
            answer = client.get(url, seconds=DESCRIBE_SECONDS)
        else:
            answer = client.post(url, body, seconds=DESCRIBE_SECONDS)
        if answer.status == 401:
            raise SourceError(
                f"{client.base_url} refuses the key. Give the right one in the environment variable `api_key_env` or "
                "the file `api_key_file`."
            )
        found = answer.json() if answer.status == 200 else {}
    except (NoAnswer, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_tokenizer(client: HttpClient, model: str, tokenizer: Any) -> None:
    """Compare a few ids with those of the server's own tokenizer, where it offers that."""
    body = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    theirs = _ask(client, _root(client) + "/tokenize", body).get("tokens")
    ours = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    if isinstance(theirs, list) and theirs != ours:
        raise SourceError(
            f"{client.base_url} serves {model!r} with another tokenizer than {tokenizer.name_or_path!r}: the same text "
            f"begins with ids {quoted(theirs[:5])} there and {ours[:5]} here. Name the right one in `tokenizer`."
        )


def _logits_width(settings: SourceSettings) -> int | None:
    """Return the width of the model's output, from the configuration beside the tokenizer; None without one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    except Exception:  # none there, or one that transformers cannot read
        return None
    return getattr(config.get_text_config(), "vocab_size", None)
