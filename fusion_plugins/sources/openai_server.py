"""The ``openai`` backend: any OpenAI-compatible server, several of them at once.

Sampling takes chat completions (plain completions with ``template: plain``). Capture takes what vLLM adds to
completions: prompts of token ids, and the top k of every prompt position.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import openai
from pydantic import BaseModel, ConfigDict, Field

from fusion_plugins.config import validate
from fusion_plugins.core.types import TokenizedText
from fusion_plugins.errors import ConfigError, SourceError
from fusion_plugins.sources.base import Place, Purpose, Response, Rows, SampleRequest, SourceSettings
from fusion_plugins.sources.entries import rows_of_entries, spare_entries
from fusion_plugins.sources.loading import load_tokenizer, vocabulary_size
from fusion_plugins.sources.servers import ServerPool, Trouble

__all__ = ["ServerOptions", "ServerSource", "open_source"]

Item = TypeVar("Item")
Result = TypeVar("Result")
PROBE_TEXT = "Zoë's 1,234 naïve tests:\n\tdef f(x): return x  # 数学"


class ServerOptions(BaseModel):
    """Keys of ``options`` for this backend. Keys of servers never stand in a YAML file."""

    model_config = ConfigDict(extra="forbid")

    base_url: str | list[str] = Field(description="URL of the server's API, usually ending in /v1, or several")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the key; may be unset")
    api_key_file: str | None = Field(None, description="file with the key; wins over the variable")
    concurrency: int = Field(32, ge=1, description="requests in flight per server")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for one answer")
    patience: float = Field(900.0, gt=0, description="seconds of failures after which the run ends")
    rest_after: int = Field(5, ge=1, description="failures in a row after which a server is left alone")
    rest_seconds: float = Field(20.0, gt=0, description="how long it is left alone")
    send_seed: bool = Field(True, description="off for servers that refuse `seed`; responses then do not repeat")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="more fields of every sampling request")


def open_source(settings: SourceSettings, purpose: Purpose) -> "ServerSource":
    """Connect to the servers; see :func:`fusion_plugins.sources.base.open_source`."""
    return ServerSource(settings, purpose)


class ServerSource:
    """One model on one or more servers."""

    whole_units = False

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        where = f"options of source {settings.source_name!r}"
        self._options = validate(ServerOptions, settings.options, where=where)
        self._settings = settings
        self.tokenizer = _tokenizer(settings, purpose)
        self._vocab_size = vocabulary_size(self.tokenizer) if self.tokenizer is not None else 0
        urls = [self._options.base_url] if isinstance(self._options.base_url, str) else self._options.base_url
        key = _api_key(self._options)
        self._pool = ServerPool(
            [_client(url, key, self._options) for url in urls],
            concurrency=self._options.concurrency,
            rest_after=self._options.rest_after,
            rest_seconds=self._options.rest_seconds,
            patience=self._options.patience,
            redact=lambda message: message.replace(key, "***") if key else message,
        )
        described = [_describe(server.client, settings.model) for server in self._pool.servers]
        known = [length for length, _ in described if length is not None]
        context = min(known) - (purpose == "capture") if known else None
        self.max_length: int | None = settings.max_length or context
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
            "servers": [server.address for server in self._pool.servers],
        }

    def capture(self, units: Iterable[Sequence[TokenizedText]], top_k: int) -> Iterator[tuple[Place, Rows]]:
        """Yield the rows of each text."""
        asked = min(top_k + spare_entries(self._width, self._vocab_size), self._width)
        return self._all(units, lambda text: self._capture_one(text, top_k, asked))

    def sample(self, units: Iterable[Sequence[SampleRequest]]) -> Iterator[tuple[Place, Response]]:
        """Yield the responses as they come; each request has its own seed."""
        return self._all(units, self._sample_one)

    def close(self) -> None:
        """Close the connections."""
        self._pool.stop()

    def _capture_one(self, text: TokenizedText, top_k: int, asked: int) -> Rows:
        body = {
            "model": self._settings.model,
            "prompt": text.input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked,
        }
        positions = self._pool.post("/completions", body, lambda answer: _positions(answer, text.input_ids))
        return _rows(positions, text.input_ids, top_k, self._vocab_size)

    def _sample_one(self, request: SampleRequest) -> Response:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._settings.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if self._options.send_seed:
            body["seed"] = request.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        # Not every server knows these two: they are sent only where they say something.
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            body["repetition_penalty"] = sampling.repetition_penalty
        body |= self._options.extra_body
        if sampling.template == "plain":
            if not isinstance(request.content, str):
                raise ConfigError("template 'plain' takes prompts with 'text', came one with 'messages'")
            return self._pool.post("/completions", body | {"prompt": request.content}, _response)
        messages = (
            [{"role": "user", "content": request.content}] if isinstance(request.content, str) else request.content
        )
        if sampling.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": sampling.system}, *messages]
        return self._pool.post("/chat/completions", body | {"messages": messages}, _response)

    def _all(self, units: Iterable[Sequence[Item]], answer: Callable[[Item], Result]) -> Iterator[tuple[Place, Result]]:
        """Keep as many requests in flight as allowed, across units; the first error ends all."""
        waiting = (((number, index), item) for number, unit in enumerate(units) for index, item in enumerate(unit))
        in_flight = self._options.concurrency * len(self._pool.servers)
        running: dict[Future[Result], Place] = {}
        with ThreadPoolExecutor(in_flight) as executor:
            try:
                while True:
                    for place, item in islice(waiting, in_flight - len(running)):
                        running[executor.submit(answer, item)] = place
                    if not running:
                        return
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    for future in sorted(done, key=lambda future: future.exception() is not None):
                        yield running.pop(future), future.result()
            except BaseException:
                self._pool.stop()
                raise


def _response(answer: dict[str, Any]) -> Response:
    choices = answer.get("choices") or [{}]
    reason = choices[0].get("finish_reason")
    if reason is None:
        raise Trouble("half an answer: no finish_reason")
    text = choices[0]["message"].get("content") if "message" in choices[0] else choices[0].get("text")
    usage = answer.get("usage") or {}
    return Response(text or "", reason, usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0)


def _positions(answer: dict[str, Any], input_ids: np.ndarray) -> list[dict[str, Any]]:
    choices = answer.get("choices") or [{}]
    positions = choices[0].get("prompt_logprobs")
    if choices[0] and "prompt_logprobs" not in choices[0]:
        raise SourceError(
            "the server gives no prompt_logprobs: capture needs vLLM's server (or the `vllm` or `transformers` backend)"
        )
    if positions is None or len(positions) != len(input_ids):
        raise Trouble(f"half an answer: {0 if positions is None else len(positions)} positions of {len(input_ids)}")
    if any(str(token) not in position for token, position in zip(input_ids[1:], positions[1:], strict=True)):
        raise Trouble("half an answer: a position lacks its own token")
    return positions[1:]


def _rows(positions: list[dict[str, Any]], input_ids: np.ndarray, top_k: int, vocab_size: int) -> Rows:
    width = max((len(position) for position in positions), default=0)
    ids = np.full((len(positions), width), -1, np.int32)
    logprobs = np.full((len(positions), width), -np.inf, np.float32)
    gold = np.empty(len(positions), np.float32)
    for row, position in enumerate(positions):
        entries = position.items()
        ids[row, : len(position)] = [int(token) for token, _ in entries]
        logprobs[row, : len(position)] = [entry["logprob"] for _, entry in entries]
        gold[row] = position[str(input_ids[row + 1])]["logprob"]
    return rows_of_entries(ids, logprobs, gold, top_k, vocab_size)


def _tokenizer(settings: SourceSettings, purpose: Purpose) -> Any:
    if purpose == "sample" and settings.tokenizer is None:
        return None
    if settings.tokenizer is None:
        raise ConfigError(
            f"source {settings.source_name!r}: capture through a server needs `tokenizer`, the folder or hub name of "
            "the served model's tokenizer"
        )
    return load_tokenizer(settings)


def _api_key(options: ServerOptions) -> str:
    if options.api_key_file is None:
        return os.environ.get(options.api_key_env, "")
    try:
        return Path(options.api_key_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"cannot read api_key_file {options.api_key_file!r}: {error.strerror}") from error


def _client(url: str, key: str, options: ServerOptions) -> openai.OpenAI:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"expected a base_url such as http://host:8000/v1, came {url!r}")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"base_url of {parts.hostname!r} carries a user name, a password or a query: URLs are recorded, so give "
            "the key in the environment variable `api_key_env` or the file `api_key_file`"
        )
    return openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=options.timeout)


def _describe(client: openai.OpenAI, model: str) -> tuple[int | None, str]:
    """Return the model's context in tokens, where the server says it, and what the server is."""
    listed = _ask(client, str(client.base_url).rstrip("/") + "/models").get("data") or []
    found: dict[str, Any] = next((entry for entry in listed if entry.get("id") == model), {})
    version = _ask(client, _root(client) + "/version").get("version", "")
    return found.get("max_model_len"), f"{found.get('owned_by') or 'unknown'} {version}".strip()


def _root(client: openai.OpenAI) -> str:
    return str(client.base_url).rstrip("/").removesuffix("/v1")


def _ask(client: openai.OpenAI, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask what not every server answers; without an answer, the first real request will tell."""
    try:
        answer = client.get(url, cast_to=object) if body is None else client.post(url, body=body, cast_to=object)
    except openai.AuthenticationError:
        raise SourceError(
            f"{client.base_url} refuses the key; give it in the environment variable `api_key_env` or the file "
            "`api_key_file`"
        ) from None
    except (openai.APIError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _check_tokenizer(client: openai.OpenAI, model: str, tokenizer: Any) -> None:
    """Compare a few ids with the server's own tokenizer, where it offers it."""
    body = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    theirs = _ask(client, _root(client) + "/tokenize", body).get("tokens")
    ours = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    if theirs is not None and theirs != ours:
        raise SourceError(
            f"{client.base_url} serves {model!r} with another tokenizer than {tokenizer.name_or_path!r}: the same text "
            f"begins with ids {theirs[:5]} there and {ours[:5]} here; name the right one in `tokenizer`"
        )


def _logits_width(settings: SourceSettings) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.tokenizer, revision=settings.revision)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)
