"""Connections to servers: how they are reached, and many requests in flight at once."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from fusion_plugins.config import Settings
from fusion_plugins.errors import ConfigError
from fusion_plugins.sources.backends.base import Place, Refusal
from fusion_plugins.sources.backends.http import HttpClient
from fusion_plugins.sources.backends.servers import Refused, ServerPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class ConnectionOptions(Settings):
    """How to reach servers. API keys are never written in a YAML file."""

    base_url: str | list[str] = Field(
        min_length=1, description="URL of the server's API, usually ending in /v1, or several"
    )
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable with the key; may be unset")
    api_key_file: str | None = Field(None, description="file with the key; wins over the variable")
    concurrency: int = Field(32, ge=1, description="requests in flight per server")
    timeout: float = Field(600.0, gt=0, description="seconds for one answer, to its last byte")
    patience: float = Field(900.0, gt=0, description="seconds of failures after which a request is given up")
    rest_after: int = Field(5, ge=1, description="consecutive failures after which a server rests")
    rest_seconds: float = Field(20.0, gt=0, description="how long a server rests before one request tries it")


def open_pool(options: ConnectionOptions) -> ServerPool:
    """Return the servers that the options name; nothing is sent yet.

    Raises:
        ConfigError: a URL is none, or the key cannot be read.
    """
    urls = [options.base_url] if isinstance(options.base_url, str) else options.base_url
    key = _api_key(options)
    return ServerPool(
        [_client(url, key, options) for url in urls],
        concurrency=options.concurrency,
        rest_after=options.rest_after,
        rest_seconds=options.rest_seconds,
        patience=options.patience,
        key=key,
    )


def answers_in_flight(
    pool: ServerPool, most: int, batches: Iterable[Sequence[Item]], answer: Callable[[Item], Result]
) -> Iterator[tuple[Place, Result | Refusal]]:
    """Keep as many requests in flight as allowed, across batches; the first error ends all.

    After an error the answers that have arrived are still yielded, and requests under way are not waited for.

    Args:
        pool: the servers; stopped when this ends early.
        most: requests in flight.
        batches: what to ask.
        answer: asks for one item; what it raises as :class:`Refused` becomes a refusal.
    """
    waiting = (((number, index), item) for number, batch in enumerate(batches) for index, item in enumerate(batch))
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
        pool.stop()
        raise
    except BaseException:
        pool.stop()
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


def _api_key(options: ConnectionOptions) -> str:
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


def _client(url: str, key: str, options: ConnectionOptions) -> HttpClient:
    # A URL that we cannot read may hold a key anywhere before its last "@".
    _, at, rest = url.rpartition("@")
    shown = re.split("[?#]", f"***@{rest}" if at else url)[0]
    try:
        parts = urlsplit(url)
        whole = parts.hostname and (parts.port is None or parts.port > 0) and not re.search(r"\s", url)
        known = parts.scheme in ("http", "https") and whole
    except ValueError:
        known = False
    if not known:
        raise ConfigError(
            f"expected a base_url such as http://host:8000/v1, got {shown!r}. Correct `options.base_url`."
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"base_url of {parts.hostname!r}: expected a plain URL, but it carries a user name, a password or a query. "
            "URLs are recorded: give the key in the environment variable `api_key_env` or the file `api_key_file`."
        )
    try:
        return HttpClient(url, key, options.timeout)
    except ValueError as error:
        raise ConfigError(f"base_url: expected a URL, got {shown!r}: {error}. Correct `options.base_url`.") from None
