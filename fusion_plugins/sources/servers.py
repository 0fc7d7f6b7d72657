"""Several servers that offer the same model: which one to ask, when to leave one alone, when to give up.

Retrying is tenacity's work and HTTP is the openai client's; this module only decides.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import tenacity

from fusion_plugins.errors import SourceError

__all__ = ["Server", "ServerPool", "Trouble"]

#: answers that another attempt may turn into good ones; all other errors are final
RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 30.0
#: seconds between looks for a free place while other servers rest
BUSY_PAUSE = 0.05


class Trouble(Exception):
    """A request failed in a way that may pass: no connection, time-out, overload, half an answer."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Server:
    """One server and what is known about its health.

    Attributes:
        client: talks to it.
        in_flight: requests that wait for its answer.
        failures: failed requests in a row.
        resting_until: time before which it is left alone.
    """

    client: openai.OpenAI
    in_flight: int = 0
    failures: int = 0
    resting_until: float = 0.0

    @property
    def address(self) -> str:
        """Where it is, for messages."""
        return str(self.client.base_url).rstrip("/")


class ServerPool:
    """Sends requests to the least busy healthy server, until one answers or patience ends.

    Args:
        clients: one per server, with their own retries turned off.
        concurrency: requests in flight per server, at most.
        rest_after: failures in a row after which a server is left alone for a while (circuit breaker).
        rest_seconds: how long.
        patience: seconds after which a request that always fails ends the run.
        redact: removes secrets from messages.
    """

    def __init__(
        self,
        clients: list[openai.OpenAI],
        *,
        concurrency: int,
        rest_after: int,
        rest_seconds: float,
        patience: float,
        redact: Callable[[str], str],
    ) -> None:
        self.servers = [Server(client) for client in clients]
        self._concurrency, self._patience = concurrency, patience
        self._rest_after, self._rest_seconds = rest_after, rest_seconds
        self._redact = redact
        self._stopped = threading.Event()
        self._choosing = threading.Lock()

    def stop(self) -> None:
        """End all requests; threads that wait for another attempt return at once."""
        self._stopped.set()
        for server in self.servers:
            server.client.close()

    def post(self, path: str, body: dict[str, Any], check: Callable[[dict[str, Any]], Any]) -> Any:
        """Send a request until ``check`` accepts the answer.

        Args:
            path: below the server's base URL.
            body: JSON.
            check: turns the answer into the result; raises :class:`Trouble` for half an answer.

        Raises:
            SourceError: the server refuses the request, or patience has ended.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Trouble),
            stop=tenacity.stop_after_delay(self._patience) | tenacity.stop_when_event_set(self._stopped),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(self._stopped),
            reraise=True,
        )
        try:
            return attempts(self._attempt, path, body, check)
        except Trouble as trouble:
            raise SourceError(
                f"no server gave an answer within {self._patience:.0f} s; the last trouble was: {trouble}. What is "
                "done is kept: see to the servers, then run the same command again."
            ) from trouble

    @staticmethod
    def _wait(state: tenacity.RetryCallState) -> float:
        trouble = state.outcome.exception() if state.outcome else None
        grown = tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)(state)
        return max(grown, trouble.retry_after if isinstance(trouble, Trouble) else 0.0)

    def _attempt(self, path: str, body: dict[str, Any], check: Callable[[dict[str, Any]], Any]) -> Any:
        with self._chosen() as server:
            try:
                answer = server.client.post(path, body=body, cast_to=object)
                if not isinstance(answer, dict):
                    raise Trouble(f"{server.address}: expected a JSON object, came {answer!r:.80}")
                return check(answer)
            except openai.APIStatusError as error:
                raise self._translated(server, error) from None
            except openai.APIConnectionError as error:  # time-outs are among them
                raise Trouble(f"{server.address}: {type(error).__name__}: {error.__cause__ or error}") from None
            except (RuntimeError, ValueError) as error:
                # A body that is no JSON, or a client that was closed meanwhile.
                raise Trouble(f"{server.address}: {type(error).__name__}: {error}") from None

    def _translated(self, server: Server, error: openai.APIStatusError) -> Exception:
        message = self._redact(f"{server.address}: status {error.status_code}: {error.message:.500}")
        if error.status_code in RETRIED_STATUS:
            return Trouble(message, _retry_after(error.response.headers))
        return SourceError(message + _cure(error.status_code))

    @contextmanager
    def _chosen(self) -> Iterator[Server]:
        server = self._choose()
        try:
            yield server
        except Trouble:
            with self._choosing:
                server.failures += 1
                if server.failures >= self._rest_after:
                    server.resting_until = time.monotonic() + self._rest_seconds
            raise
        else:
            server.failures = 0
        finally:
            with self._choosing:
                server.in_flight -= 1

    def _choose(self) -> Server:
        while True:
            with self._choosing:
                now = time.monotonic()
                awake = [server for server in self.servers if server.resting_until <= now]
                free = [server for server in awake if server.in_flight < self._concurrency]
                if free:
                    server = min(free, key=lambda server: server.in_flight)
                    server.in_flight += 1
                    if server.failures >= self._rest_after:
                        # Its rest is over: one request tries it, the others wait for the outcome.
                        server.resting_until = now + self._rest_seconds
                    return server
                pause = BUSY_PAUSE if awake else min(server.resting_until for server in self.servers) - now
            if self._stopped.wait(pause):
                raise SourceError("stopped")


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(float(headers.get("retry-after", 0)), LONGEST_WAIT)
    except ValueError:
        return 0.0


def _cure(status: int) -> str:
    if status in (401, 403):
        return "; give the key in the environment variable `api_key_env` or the file `api_key_file`"
    if status == 404:
        return "; check `base_url` (it usually ends in /v1) and `model` (the name that the server lists)"
    return ""
