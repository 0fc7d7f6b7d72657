"""The ``openai`` backend: any OpenAI-compatible server, or several of them at once.

Sampling uses chat completions (plain completions with ``template: plain``). Capture uses what vLLM's server adds to
completions: prompts of token ids, and the top-k at every position of the prompt.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import openai
from pydantic import Field

from fusion_plugins.config import Settings, validate
from fusion_plugins.core.arrays import IntArray
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
    SourceSettings,
    least,
)
from fusion_plugins.sources.backends.servers import Refused, ServerPool, Trouble
from fusion_plugins.sources.backends.topk import spare_entries, topk_of_entries
from fusion_plugins.sources.loading import capture_tokenizer, chat_messages, plain_text, vocabulary_size

Item = TypeVar("Item")
Result = TypeVar("Result")
#: how a complete response ends, by server; any other reason ("abort", "error", none) means that it was interrupted
FINAL_REASONS = ("stop", "length", "content_filter", "eos_token", "stop_sequence", "model_length")
#: settings that a server decides itself when it samples
DECIDED_BY_SERVER = ("chat_template", "dtype", "revision", "max_length")
PROBE_TEXT = "Zoë's 1,234 naïve tests:\n\tdef f(x): return x  # 数学"


class ServerOptions(Settings):
    """Keys of ``options`` for this backend. API keys are never written in a YAML file."""

    base_url: str | list[str] = Field(description="URL of the server's API, usually ending in /v1, or several")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the key; may be unset")
    api_key_file: str | None = Field(None, description="file with the key; wins over the variable")
    concurrency: int = Field(32, ge=1, description="requests in flight per server")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for one answer")
    patience: float = Field(900.0, gt=0, description="seconds of failures after which a request is given up")
    rest_after: int = Field(5, ge=1, description="consecutive failures after which a server rests")
    rest_seconds: float = Field(20.0, gt=0, description="how long a server rests before one request tries it")
    send_seed: bool = Field(True, description="off for servers that refuse `seed`; responses then do not repeat")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="more fields of every sampling request")


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
        if purpose == "sample":
            _check_settings(settings)
        self.tokenizer = capture_tokenizer(settings) if purpose == "capture" else None
        self._vocab_size = vocabulary_size(self.tokenizer) if self.tokenizer is not None else 0
        urls = [self._options.base_url] if isinstance(self._options.base_url, str) else self._options.base_url
        key = _api_key(self._options)
        self._pool = ServerPool(
            [_client(url, key, self._options) for url in urls],
            concurrency=self._options.concurrency,
            rest_after=self._options.rest_after,
            rest_seconds=self._options.rest_seconds,
            patience=self._options.patience,
            key=key,
        )
        described = [_describe(server.client, settings.model) for server in self._pool.servers]
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

    def _capture_one(self, text: TokenizedText, top_k: int, asked: int) -> TopK:
        body = {
            "model": self._model,
            "prompt": text.input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked,
        }
        return self._pool.post(
            "/completions", body, lambda answer: _topk(answer, text.input_ids, top_k, self._vocab_size)
        )

    def _sample_one(self, request: SampleRequest) -> Response:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if self._options.send_seed:
            body["seed"] = request.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        # Not every server knows these two: they are sent only where they change something.
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            body["repetition_penalty"] = sampling.repetition_penalty
        body |= self._options.extra_body
        if sampling.template == "plain":
            return self._pool.post("/completions", body | {"prompt": plain_text(request.content)}, _response)
        body["messages"] = chat_messages(request.content, sampling.system)
        return self._pool.post("/chat/completions", body, _response)

    def _answers(
        self, batches: Iterable[Sequence[Item]], answer: Callable[[Item], Result]
    ) -> Iterator[tuple[Place, Result | Refusal]]:
        """Keep as many requests in flight as allowed, across batches; the first error ends all.

        After an error the answers that have arrived are still yielded, and requests under way are not waited for.
        """
        waiting = (((number, index), item) for number, batch in enumerate(batches) for index, item in enumerate(batch))
        most = self._options.concurrency * len(self._pool.servers)
        finished: SimpleQueue[tuple[Place, Future[Result | Refusal]]] = SimpleQueue()
        running = 0
        try:
            while True:
                for place, item in islice(waiting, most - running):
                    # An executor joins its threads when the process exits, so a slow server would hold up Ctrl-C.
                    Thread(target=_work, args=(answer, item, place, finished), daemon=True).start()
                    running += 1
                if not running:
                    return
                place, future = finished.get()
                running -= 1
                yield place, future.result()
        except GeneratorExit:
            self._pool.stop()
            raise
        except BaseException:
            self._pool.stop()
            while not finished.empty():
                place, future = finished.get()
                if future.exception() is None:
                    yield place, future.result()
            raise


def _work(
    answer: Callable[[Item], Result], item: Item, place: Place, finished: SimpleQueue[tuple[Place, Future[Any]]]
) -> None:
    future: Future[Result | Refusal] = Future()
    try:
        future.set_result(answer(item))
    except Refused as refused:
        future.set_result(Refusal(str(refused)))
    except BaseException as error:
        future.set_exception(error)
    finished.put((place, future))


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Trouble(f"incomplete answer: expected choices, got {answer!r:.200}")
    return choice


def _response(answer: dict[str, Any]) -> Response:
    choice = _first_choice(answer)
    reason = choice.get("finish_reason")
    if reason not in FINAL_REASONS:
        raise Trouble(f"incomplete answer: expected finish_reason {', '.join(FINAL_REASONS)}, got {reason!r:.80}")
    message = choice.get("message") if "message" in choice else {"content": choice.get("text")}
    text = message.get("content") if isinstance(message, dict) else message
    if not isinstance(message, dict) or not isinstance(text, str | None):
        raise Trouble(f"incomplete answer: expected a text, got {text!r:.80}")
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("completion_tokens", "prompt_tokens")]
    return Response(text or "", reason, *(count if isinstance(count, int) else 0 for count in counts))


def _topk(answer: dict[str, Any], input_ids: IntArray, top_k: int, vocab_size: int) -> TopK:
    positions = _positions(answer, len(input_ids))
    following = input_ids[1:].tolist()
    if any(token not in position for token, position in zip(following, positions, strict=True)):
        raise Trouble("incomplete answer: expected the prompt's own token at every position, got one without it")
    width = max((len(position) for position in positions), default=0)
    ids = np.full((len(positions), width), -1, np.int32)
    logprobs = np.full((len(positions), width), -np.inf, np.float32)
    for number, position in enumerate(positions):
        ids[number, : len(position)] = list(position)
        logprobs[number, : len(position)] = list(position.values())
    token_logprobs = [position[token] for token, position in zip(following, positions, strict=True)]
    return topk_of_entries(ids, logprobs, np.array(token_logprobs, np.float32), top_k, vocab_size)


def _positions(answer: dict[str, Any], n_tokens: int) -> list[dict[int, float]]:
    """Return id -> log-probability at each position but the last, as the server gives them."""
    choice = _first_choice(answer)
    if "prompt_logprobs" not in choice:
        raise SourceError(
            "expected prompt_logprobs, but the server gives no prompt_logprobs: capture needs vLLM's server. Use it, "
            "or the `vllm` or `transformers` backend."
        )
    positions = choice["prompt_logprobs"]
    count = len(positions) if isinstance(positions, list) else 0
    if count != n_tokens:
        raise Trouble(f"incomplete answer: expected {n_tokens} positions, got {count}")
    try:
        # The server lists the distribution over token t at t, so the first is empty.
        return [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in positions[1:]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Trouble(f"incomplete answer: expected a log-probability per id, got something else ({error})") from None


def _check_settings(settings: SourceSettings) -> None:
    """Refuse settings that have no effect when a server samples."""
    ignored = [n for n in DECIDED_BY_SERVER if getattr(settings, n) != SourceSettings.model_fields[n].default]
    if ignored:
        raise ConfigError(
            f"source {settings.source_name!r}: {', '.join(ignored)} cannot be chosen here when a server samples. "
            "Remove the setting, and start the server with it."
        )


def _api_key(options: ServerOptions) -> str:
    if options.api_key_file is None:
        where, key = f"environment variable {options.api_key_env!r}", os.environ.get(options.api_key_env, "")
    else:
        where = f"api_key_file {options.api_key_file!r}"
        try:
            key = Path(options.api_key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {where}: {error.strerror}. Check path and permission.") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: expected text, got bytes that are not UTF-8. Name a text file.") from None
    key = key.strip()
    # What an HTTP header cannot hold fails deep in the client, with a message that repeats the key.
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"{where}: expected one key of printable ASCII characters without spaces, got other characters. Put the "
            "key alone there."
        )
    return key


def _client(url: str, key: str, options: ServerOptions) -> openai.OpenAI:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"expected a base_url such as http://host:8000/v1, got {url!r}. Correct `options.base_url`.")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            f"base_url of {parts.hostname!r}: expected a plain URL, but it carries a user name, a password or a query. "
            "URLs are recorded: give the key in the environment variable `api_key_env` or the file `api_key_file`."
        )
    return openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=options.timeout)


def _describe(client: openai.OpenAI, model: str) -> tuple[int | None, str]:
    """Return the model's context in tokens, where the server tells it, and name and version of the server."""
    listed = _ask(client, str(client.base_url).rstrip("/") + "/models").get("data") or []
    found: dict[str, Any] = next((entry for entry in listed if entry.get("id") == model), {})
    version = _ask(client, _root(client) + "/version").get("version", "")
    return found.get("max_model_len"), f"{found.get('owned_by') or 'unknown'} {version}".strip()


def _root(client: openai.OpenAI) -> str:
    return str(client.base_url).rstrip("/").removesuffix("/v1")


def _ask(client: openai.OpenAI, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Ask for what not every server offers; {} without an answer (if the server is down, the first request fails)."""
    try:
        answer = client.get(url, cast_to=object) if body is None else client.post(url, body=body, cast_to=object)
    except openai.AuthenticationError:
        raise SourceError(
            f"{client.base_url} refuses the key. Give the right one in the environment variable `api_key_env` or the "
            "file `api_key_file`."
        ) from None
    except (openai.APIError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _check_tokenizer(client: openai.OpenAI, model: str, tokenizer: Any) -> None:
    """Compare a few ids with those of the server's own tokenizer, where it offers that."""
    body = {"model": model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    theirs = _ask(client, _root(client) + "/tokenize", body).get("tokens")
    ours = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    if theirs is not None and theirs != ours:
        raise SourceError(
            f"{client.base_url} serves {model!r} with another tokenizer than {tokenizer.name_or_path!r}: the same text "
            f"begins with ids {theirs[:5]} there and {ours[:5]} here. Name the right one in `tokenizer`."
        )


def _logits_width(settings: SourceSettings) -> int | None:
    """Return the width of the model's output, from the configuration beside the tokenizer; None without one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.tokenizer)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)
