"""The ``openai`` backend: any OpenAI-compatible server, several of them at once.

Sampling takes chat completions (plain completions with ``template: plain``). Capture takes what vLLM adds to
completions: prompts of token ids, and the top k of every prompt position.
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
from pydantic import BaseModel, ConfigDict, Field

from fusion_plugins.config import validate
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, SourceError
from fusion_plugins.sources.backends.base import (
    Place,
    Purpose,
    Refusal,
    Response,
    SampleRequest,
    SourceSettings,
    Units,
    least,
)
from fusion_plugins.sources.backends.entries import rows_of_entries, spare_entries
from fusion_plugins.sources.backends.servers import Refused, ServerPool, Trouble
from fusion_plugins.sources.loading import capture_tokenizer, vocabulary_size

__all__ = ["ServerOptions", "ServerSource", "open_source"]

Item = TypeVar("Item")
Result = TypeVar("Result")
#: what ends an answer for good, by server; anything else ("abort", "error", nothing) was cut short by an accident
FINAL_REASONS = ("stop", "length", "content_filter", "eos_token", "stop_sequence", "model_length")
#: settings of local sources; capture renders and cuts here, and records what it is told about dtype and revision
SERVERS_OWN = ("chat_template", "dtype", "revision", "max_length")
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
    """Connect to the servers; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return ServerSource(settings, purpose)


class ServerSource:
    """One model on one or more servers."""

    whole_units = False

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        where = f"options of source {settings.source_name!r}"
        self._options = validate(ServerOptions, settings.options, where=where)
        self._settings = settings
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

    def capture(self, units: Units[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield the rows of each text."""
        asked = min(top_k + spare_entries(self._width, self._vocab_size), self._width)
        return self._all(units, lambda text: self._capture_one(text, top_k, asked))

    def sample(self, units: Units[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses as they come; each request has its own seed."""
        return self._all(units, self._sample_one)

    def close(self) -> None:
        """Close the connections."""
        self._pool.stop()

    def _capture_one(self, text: TokenizedText, top_k: int, asked: int) -> TopK:
        body = {
            "model": self._settings.model,
            "prompt": text.input_ids.tolist(),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": asked,
        }
        return self._pool.post(
            "/completions", body, lambda answer: _prompt_rows(answer, text.input_ids, top_k, self._vocab_size)
        )

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

    def _all(
        self, units: Iterable[Sequence[Item]], answer: Callable[[Item], Result]
    ) -> Iterator[tuple[Place, Result | Refusal]]:
        """Keep as many requests in flight as allowed, across units; the first error ends all.

        When it ends early, what has come is still handed out, and nobody waits for the requests under way.
        """
        waiting = (((number, index), item) for number, unit in enumerate(units) for index, item in enumerate(unit))
        most = self._options.concurrency * len(self._pool.servers)
        finished: SimpleQueue[tuple[Place, Future[Result | Refusal]]] = SimpleQueue()
        running = 0
        try:
            while True:
                for place, item in islice(waiting, most - running):
                    # Threads of an executor would hold the process up until slow servers have answered.
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
        raise Trouble(f"half an answer: no choices in {answer!r:.200}")
    return choice


def _response(answer: dict[str, Any]) -> Response:
    choice = _first_choice(answer)
    reason = choice.get("finish_reason")
    if reason not in FINAL_REASONS:
        raise Trouble(f"half an answer: expected finish_reason {', '.join(FINAL_REASONS)}, came {reason!r:.80}")
    said = choice.get("message") if "message" in choice else {"content": choice.get("text")}
    text = said.get("content") if isinstance(said, dict) else said
    if not isinstance(said, dict) or not isinstance(text, str | None):
        raise Trouble(f"half an answer: expected a text, came {text!r:.80}")
    return Response(text or "", reason, _count(answer, "completion_tokens"), _count(answer, "prompt_tokens"))


def _count(answer: dict[str, Any], name: str) -> int:
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0


def _prompt_rows(answer: dict[str, Any], input_ids: np.ndarray, top_k: int, vocab_size: int) -> TopK:
    choice = _first_choice(answer)
    if "prompt_logprobs" not in choice:
        raise SourceError(
            "the server gives no prompt_logprobs: capture needs vLLM's server (or the `vllm` or `transformers` backend)"
        )
    positions = choice["prompt_logprobs"]
    count = len(positions) if isinstance(positions, list) else 0
    if count != len(input_ids):
        raise Trouble(f"half an answer: {count} positions of {len(input_ids)}")
    try:
        entries = [
            {int(token): float(entry["logprob"]) for token, entry in position.items()} for position in positions[1:]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Trouble(f"half an answer: a position is no mapping of ids to log-probabilities ({error})") from None
    if any(token not in entry for token, entry in zip(input_ids[1:].tolist(), entries, strict=True)):
        raise Trouble("half an answer: a position lacks its own token")
    return _rows(entries, input_ids, top_k, vocab_size)


def _rows(positions: list[dict[int, float]], input_ids: np.ndarray, top_k: int, vocab_size: int) -> TopK:
    width = max((len(position) for position in positions), default=0)
    ids = np.full((len(positions), width), -1, np.int32)
    logprobs = np.full((len(positions), width), -np.inf, np.float32)
    for row, position in enumerate(positions):
        ids[row, : len(position)] = list(position)
        logprobs[row, : len(position)] = list(position.values())
    gold = [position[token] for token, position in zip(input_ids[1:].tolist(), positions, strict=True)]
    return rows_of_entries(ids, logprobs, np.array(gold, np.float32), top_k, vocab_size)


def _check_settings(settings: SourceSettings) -> None:
    """Refuse what a server decides by itself when it samples."""
    ignored = [name for name in SERVERS_OWN if getattr(settings, name) != SourceSettings.model_fields[name].default]
    if ignored:
        raise ConfigError(
            f"source {settings.source_name!r}: {', '.join(ignored)} cannot be chosen here when a server samples; drop "
            "the setting and start the server with it"
        )


def _api_key(options: ServerOptions) -> str:
    if options.api_key_file is None:
        where, key = f"environment variable {options.api_key_env!r}", os.environ.get(options.api_key_env, "")
    else:
        where = f"api_key_file {options.api_key_file!r}"
        try:
            key = Path(options.api_key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {where}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: expected text, came bytes that are no UTF-8") from None
    key = key.strip()
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"{where}: expected one key of printable ASCII characters without spaces, came something else"
        )
    return key


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
        config = AutoConfig.from_pretrained(settings.tokenizer)
    except (OSError, ValueError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)
