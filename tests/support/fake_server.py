"""An OpenAI-compatible server of a few lines that can misbehave in every way that a real one was seen to."""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler", dict], None]


class FakeServer(ThreadingHTTPServer):
    """Answers chats with their last message, reversed. ``trouble(number, body)`` may name what goes wrong instead."""

    daemon_threads = True

    request_queue_size = 64

    def __init__(self, trouble: Callable[[int, dict], str | int | None] = lambda number, body: None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble = trouble
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self.tokenize: Callable[[str], list[int]] | None = None
        self.closing = threading.Event()
        #: what /models and /version answer, whatever that is
        self.models: object = {"data": [{"id": "served", "owned_by": "fake", "max_model_len": 128}]}
        self.version: object = None
        #: bytes that answer every completion instead of HTTP
        self.raw = b""
        #: where redirects lead
        self.elsewhere, self.moved_status = "", 307
        #: the choice, and the usage, of every good answer
        self.choice: dict | None = None
        self.usage: object = None
        #: prompt -> what a good answer says
        self.reply: Callable[[str], str] = lambda said: said[::-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def send(self, status: int, value: object, headers: dict[str, str] | None = None, cut: int = 0) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        self.close_connection = bool(cut)

    def do_GET(self) -> None:
        server: FakeServer = self.server
        if self.path == "/v1/models":
            self.send(200, server.models)
        elif self.path == "/version" and server.version is not None:
            self.send(200, server.version)
        else:
            self.send(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server: FakeServer = self.server
        if self.path == "/tokenize" and server.tokenize is not None:
            self.send(200, {"tokens": server.tokenize(body["prompt"])})
            return
        if not self.path.endswith("completions"):
            self.send(404, {"error": {"message": "not here"}})
            return
        with server.lock:
            number = len(server.requests)
            server.requests.append(body)
            server.keys.add(self.headers.get("authorization"))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(0.01)
            trouble = server.trouble(number, body) or "good"
            if isinstance(trouble, int):
                self.send(trouble, {"error": {"message": f"status {trouble}"}})
            else:
                getattr(self, trouble)(body)
        finally:
            with server.lock:
                server.at_once -= 1

    def good(self, body: dict) -> None:
        said = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        answer = {"index": 0, "finish_reason": "stop"}
        answer |= (
            {"message": {"role": "assistant", "content": self.server.reply(said)}}
            if "messages" in body
            else {"text": self.server.reply(said)}
        )
        self.send(200, {"choices": [answer], "usage": {"completion_tokens": len(said), "prompt_tokens": 2}})

    def chosen(self, body: dict) -> None:
        """The choice that the test sets."""
        usage = {"completion_tokens": 3, "prompt_tokens": 2} if self.server.usage is None else self.server.usage
        self.send(200, {"choices": [self.server.choice], "usage": usage})

    def anything(self, body: dict) -> None:
        """The bytes that the test sets, instead of HTTP."""
        self.wfile.write(self.server.raw)
        self.close_connection = True

    def dripping(self, body: dict) -> None:
        """One byte now and then, and no end."""
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self._drip(b" ")

    def dripping_headers(self, body: dict) -> None:
        """As above, before the headers have ended."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nx-more: ")
        self._drip(b"a")

    def _drip(self, byte: bytes) -> None:
        self.close_connection = True
        while not self.server.closing.wait(0.05):
            try:
                self.wfile.write(byte)
            except OSError:
                return

    def endless(self, body: dict) -> None:
        """More bytes than memory holds."""
        self.send_response(200)
        self.send_header("content-length", str(1 << 40))
        self.end_headers()
        self.close_connection = True
        try:
            while True:
                self.wfile.write(bytes(1 << 20))
        except OSError:
            return

    def compressed(self, body: dict) -> None:
        """A gzip bomb."""
        data = gzip.compress(bytes(64 << 20))
        self.send_response(200)
        self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def moved(self, body: dict) -> None:
        """The prompt is to go elsewhere."""
        self.send(self.server.moved_status, {}, {"location": self.server.elsewhere})

    def overloaded(self, body: dict) -> None:
        self.send(429, {"error": {"message": "slow down"}}, {"retry-after": "0.3"})

    def broken(self, body: dict) -> None:
        self.send(500, {"error": {"message": "out of memory"}})

    def half(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": {"content": "half of it"}, "finish_reason": "stop"}]}, cut=20)

    def unfinished(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": {"content": "half of"}, "finish_reason": None}]})

    def empty(self, body: dict) -> None:
        self.send(200, {"choices": []})

    def aborted(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": {"content": "half of"}, "finish_reason": "abort"}]})

    def failed(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": {"content": "half of"}, "finish_reason": "error"}]})

    def no_message(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": None, "finish_reason": "stop"}]})

    def no_text(self, body: dict) -> None:
        self.send(200, {"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]})

    def no_choice(self, body: dict) -> None:
        self.send(200, {"choices": [None]})

    def no_object(self, body: dict) -> None:
        self.send(200, [1, 2])

    def no_json(self, body: dict) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")

    def dropped(self, body: dict) -> None:
        self.close_connection = True
        self.connection.close()

    def slowly(self, body: dict) -> None:
        time.sleep(0.1)
        self.good(body)

    def slow(self, body: dict) -> None:
        time.sleep(1.5)
        self.good(body)

    def hangs(self, body: dict) -> None:
        self.server.closing.wait(60)

    def refused(self, body: dict) -> None:
        self.send(400, {"error": {"message": "max_tokens is too large"}})

    def unauthorized(self, body: dict) -> None:
        self.send(401, {"error": {"message": f"wrong key {self.headers.get('authorization')}"}})

    def talkative(self, body: dict) -> None:
        """Words without end, with the key at every place where they may be cut."""
        self.send(400, {"error": {"message": f"{self.headers.get('authorization')} " * 60}})


@contextmanager
def running(trouble: Callable[[int, dict], str | int | None] = lambda number, body: None) -> Iterator[FakeServer]:
    """A fake server on a free port of this machine."""
    server = FakeServer(trouble)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
