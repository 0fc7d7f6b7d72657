"""An HTTP client whose requests end: after a time, at a size, and on the host that was named.

httpx limits the time between two reads, so it waits without end for a server that sends a byte now and then. A
coroutine can be cancelled at any point: requests run on an event loop in a thread of its own, each within one total
time.
"""

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any

import httpx

#: bytes of an answer that are read at most, unless more are expected
MOST_BYTES = 16 * 2**20
#: idle connections that are kept; a connection is opened for every request in flight
KEPT_CONNECTIONS = 64


class NoAnswer(Exception):
    """There is no whole answer: no connection, out of time, too large, not HTTP."""


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        status: of HTTP; redirects are not followed, so 3xx is one too.
        headers: names in lower case.
        body: bytes as sent.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ValueError: it is something else, or nested too deeply.
        """
        try:
            return json.loads(self.body)
        except RecursionError:
            raise ValueError("JSON that is nested too deeply") from None


class HttpClient:
    """Asks one server; for any number of threads.

    Args:
        base_url: where paths begin.
        key: sent as a bearer token; empty for none.
        timeout: seconds for one request, from the connection to the last byte of the answer.

    Raises:
        ValueError: no client can be made for the URL.
    """

    def __init__(self, base_url: str, key: str, timeout: float) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout = timeout
        # Without compression, the bytes that are read are all that memory has to hold.
        headers = {"accept": "application/json", "accept-encoding": "identity", "content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        try:
            httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS)
        self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False)
        self._loop = asyncio.new_event_loop()
        self._closing, self._closed = Lock(), False
        Thread(target=self._run, daemon=True, name="http").start()

    def get(self, url: str, *, seconds: float | None = None) -> Answer:
        """Return the answer to a GET; see :meth:`post`."""
        return self._ask("GET", url, None, MOST_BYTES, seconds)

    def post(self, url: str, body: Any, *, most_bytes: int = MOST_BYTES, seconds: float | None = None) -> Answer:
        """Send JSON and return the answer, whatever its status.

        Args:
            url: the whole URL.
            body: values that JSON can write.
            most_bytes: size of the longest answer that is taken.
            seconds: instead of the client's ``timeout``, if that is longer.

        Raises:
            NoAnswer: there is no whole answer.
        """
        # In ASCII: whatever characters the texts have, they can be written.
        return self._ask("POST", url, json.dumps(body).encode(), most_bytes, seconds)

    def close(self) -> None:
        """End all requests and connections; does not wait."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        finally:
            self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _ask(self, method: str, url: str, content: bytes | None, most: int, seconds: float | None) -> Answer:
        limit = self._timeout if seconds is None else min(seconds, self._timeout)
        # What is handed to the loop before its end was asked for is cancelled there; what came later would never end.
        with self._closing:
            if self._closed:
                raise NoAnswer("the client is closed")
            asked = asyncio.run_coroutine_threadsafe(self._request(method, url, content, most, limit), self._loop)
        try:
            return asked.result()
        except CancelledError:
            raise NoAnswer("the connection was closed") from None

    async def _request(self, method: str, url: str, content: bytes | None, most: int, seconds: float) -> Answer:
        try:
            async with asyncio.timeout(seconds), self._client.stream(method, url, content=content) as answer:
                if answer.headers.get("content-encoding", "identity").lower() != "identity":
                    raise NoAnswer("expected an answer that is not compressed, got a compressed one")
                body = bytearray()
                async for part in answer.aiter_raw():
                    body += part
                    if len(body) > most:
                        raise NoAnswer(f"expected an answer of at most {most / 2**20:,.0f} MiB, got a larger one")
                return Answer(answer.status_code, dict(answer.headers), bytes(body))
        except TimeoutError:
            raise NoAnswer(f"no whole answer within {seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
