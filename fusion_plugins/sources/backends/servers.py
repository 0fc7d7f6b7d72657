"""Several servers that offer the same model: which one to ask, what to retry, when to give up.

tenacity retries and :mod:`fusion_plugins.sources.backends.http` speaks HTTP; this module only decides.
"""

import html
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

import tenacity

from fusion_plugins.core.text.reasoning import whole_characters
from fusion_plugins.errors import SourceError
from fusion_plugins.sources.backends.health import ServerHealth
from fusion_plugins.sources.backends.http import MOST_BYTES, Answer, HttpClient, NoAnswer

Result = TypeVar("Result")

TOO_MANY_REQUESTS = 429
#: refusals that another attempt may turn into an answer; so may all from 500 on, except for the two below
RETRIED_STATUS = (408, 409, 425, TOO_MANY_REQUESTS)
FINAL_STATUS = (501, 505)
#: refusals of one request because of what is in it; any other refusal concerns all requests
REQUEST_STATUS = (400, 413, 422)
#: seconds between two attempts, at most
LONGEST_WAIT = 30.0
#: seconds for which a server's `Retry-After` is obeyed, at most
LONGEST_RETRY_AFTER = 300.0
#: characters of a server's own message that ours repeats, at most
MOST_QUOTED = 500


class Trouble(Exception):
    """A request failed in a way that may pass: no connection, time-out, overload, incomplete answer.

    Attributes:
        busy: the server works but has too many requests.
        retry_after: seconds that it asks us to wait.
    """

    def __init__(self, message: str, *, busy: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.busy, self.retry_after = busy, retry_after


class Refused(SourceError):
    """The servers answer other requests but not this one."""


@dataclass
class Server:
    """One server.

    Attributes:
        client: its HTTP client.
        health: decides whether it may be asked.
        in_flight: requests that wait for its answer.
    """

    client: HttpClient
    health: ServerHealth
    in_flight: int = 0

    @property
    def address(self) -> str:
        """Its base URL, for messages."""
        return self.client.base_url


def without_key(message: str, key: str) -> str:
    """Return the message with ``***`` for the key, however it is written there (raw, ``repr``, JSON, URL, HTML)."""
    texts = {key, repr(key)[1:-1], json.dumps(key)[1:-1], html.escape(key), html.escape(key, quote=False)}
    # Some write / as \/ in JSON; in a URL it may stay as it is.
    texts |= {text.replace("/", "\\/") for text in texts} | {quote(key), quote(key, safe=""), quote_plus(key)}
    # The longest first: a short one may be a part of it.
    for spelling in sorted(texts - {""}, key=len, reverse=True):
        message = message.replace(spelling, "***")
    return message


class ServerPool:
    """Sends requests to the least busy healthy server, until one answers or patience ends.

    Args:
        clients: one per server.
        concurrency: requests in flight per server, at most.
        rest_after: consecutive failures after which a server is left alone for a while.
        rest_seconds: how long.
        patience: seconds after which a request that always fails is given up. A request that only fails because the
            servers are busy (429) keeps waiting while they answer others.
        key: the secret that no message may contain.
    """

    def __init__(
        self,
        clients: list[HttpClient],
        *,
        concurrency: int,
        rest_after: int,
        rest_seconds: float,
        patience: float,
        key: str,
    ) -> None:
        self.servers = [Server(client, ServerHealth(rest_after, rest_seconds)) for client in clients]
        self._concurrency, self._patience, self._key = concurrency, patience, key
        self._last_answer = float("-inf")
        self._stopped = threading.Event()
        #: guards the servers and the time of the last answer; notified when a server may be free
        self._changed = threading.Condition()

    def stop(self) -> None:
        """End all requests; threads that wait for their next attempt return at once."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        for server in self.servers:
            server.client.close()

    def post(
        self,
        path: str,
        body: dict[str, Any],
        check: Callable[[Any], Result],
        *,
        most_bytes: int = MOST_BYTES,
        kind: type = dict,
    ) -> Result:
        """Send a request until ``check`` accepts the answer.

        Args:
            path: below the server's base URL.
            body: JSON.
            check: turns the answer into the result; raises :class:`Trouble` for an incomplete answer.
            most_bytes: size of the longest answer that is taken.
            kind: what the JSON of an answer is: an object (dict) or an array (list).

        Raises:
            Refused: the servers refuse this request, or always fail on it while they answer others.
            SourceError: they refuse all requests, or patience has ended.
        """
        started = time.monotonic()
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Trouble),
            stop=lambda state: self._stopped.is_set() or self._out_of_patience(started, state),
            # Whatever a server asks for, a request does not sleep longer than it would be tried.
            wait=lambda state: min(_wait(state), self._patience),
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return attempts(self._attempt, path, body, check, most_bytes, kind)
        except Trouble as trouble:
            # If other requests were answered meanwhile, the servers work and this request is the cause.
            if self._last_answer > started:
                raise Refused(f"no answer within {self._patience:.0f} s; the last failure was: {trouble}") from None
            raise SourceError(
                f"expected an answer within {self._patience:.0f} s, got none from any server; the last failure was: "
                f"{trouble}. What is done is kept: repair the servers, then run the same command again."
            ) from None

    def _out_of_patience(self, started: float, state: tenacity.RetryCallState) -> bool:
        trouble = state.outcome.exception() if state.outcome else None
        busy = isinstance(trouble, Trouble) and trouble.busy
        # A busy server makes requests wait for their turn, however long; only if nobody is answered is it time to end.
        since = max(started, self._last_answer) if busy else started
        return time.monotonic() - since >= self._patience

    def _attempt(
        self, path: str, body: dict[str, Any], check: Callable[[Any], Result], most_bytes: int, kind: type
    ) -> Result:
        with self._chosen() as server:
            answer = self._answer(server, path, body, most_bytes, kind)
            try:
                return check(answer)
            except (Trouble, Refused) as problem:
                raise type(problem)(self._message(server, str(problem))) from None

    def _answer(self, server: Server, path: str, body: dict[str, Any], most_bytes: int, kind: type) -> Any:
        try:
            answer = server.client.post(server.address + path, body, most_bytes=most_bytes)
        except NoAnswer as problem:
            if self._stopped.is_set():
                raise SourceError("stopped") from None
            raise Trouble(self._message(server, str(problem))) from None
        if not 200 <= answer.status < 300:
            raise self._status_error(server, answer)
        try:
            found = answer.json()
        except ValueError as error:
            raise Trouble(self._message(server, f"expected JSON, got something else: {error}")) from None
        if not isinstance(found, kind):
            wanted = "object" if kind is dict else "array"
            raise Trouble(self._message(server, f"expected a JSON {wanted}, got {type(found).__name__}"))
        return found

    def _status_error(self, server: Server, answer: Answer) -> Exception:
        status = answer.status
        said = answer.body[: 4 * MOST_QUOTED].decode(errors="replace").strip()
        message = self._message(server, f"status {status}: {said}")
        if status in RETRIED_STATUS or (status >= 500 and status not in FINAL_STATUS):
            return Trouble(message, busy=status == TOO_MANY_REQUESTS, retry_after=_retry_after(answer.headers))
        return Refused(message) if status in REQUEST_STATUS else SourceError(message + _hint(status))

    def _message(self, server: Server, text: str) -> str:
        # The key is removed first: once the text is cut, a part of a key would no longer be found.
        return f"{server.address}: {whole_characters(without_key(text, self._key)):.{MOST_QUOTED}}"

    @contextmanager
    def _chosen(self) -> Iterator[Server]:
        """Choose a server for the request in the block, and note afterwards whether the request failed."""
        server, sent = self._choose()
        failed = answered = False
        try:
            yield server
            answered = True
        except Trouble as trouble:
            failed = not trouble.busy
            raise
        finally:
            with self._changed:
                server.in_flight -= 1
                now = time.monotonic()
                if failed:
                    server.health.failed(sent, now)
                else:  # an overload and a refusal are answers too: the server is alive
                    server.health.succeeded()
                if answered:
                    self._last_answer = now
                self._changed.notify_all()

    def _choose(self) -> tuple[Server, float]:
        """Wait for a server that may be asked; return it, and the time from which the request counts as sent."""
        with self._changed:
            while not self._stopped.is_set():
                now = time.monotonic()
                awake = [server for server in self.servers if server.health.allows(now)]
                free = [server for server in awake if server.in_flight < self._concurrency]
                if free:
                    server = min(free, key=lambda server: server.in_flight)
                    server.in_flight += 1
                    server.health.sent(now)
                    return server, now
                # A thread whose request ends notifies the others. Nobody notifies at the end of a rest: wake up then.
                resting = [server.health.resting_until - now for server in self.servers if server not in awake]
                self._changed.wait(min(resting, default=None))
        raise SourceError("stopped")


def _wait(state: tenacity.RetryCallState) -> float:
    """Return seconds that grow with the attempts, at random: what failed together must not be retried together."""
    trouble = state.outcome.exception() if state.outcome else None
    asked = trouble.retry_after if isinstance(trouble, Trouble) else 0.0
    return asked + tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state) / (4 if asked else 1)


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, min(float(headers.get("retry-after", 0)), LONGEST_RETRY_AFTER))
    except ValueError:
        return 0.0


def _hint(status: int) -> str:
    if 300 <= status < 400:
        return ". Redirects are not followed: prompts go only to the host in `base_url`. Give the new URL there."
    if status in (401, 403):
        return ". Give the key in the environment variable `api_key_env` or the file `api_key_file`."
    if status == 404:
        return ". Check `base_url` (it usually ends in /v1) and `model` (the name that the server lists)."
    return ""
