"""A server with vLLM's /classify and /pooling and TEI's /predict, whose numbers a function of the test gives."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RewardServer(ThreadingHTTPServer):
    """``outputs`` gets token ids (vLLM) or a list of texts (TEI) and returns the head's outputs, or an HTTP status."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, outputs: Callable) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.outputs = outputs
        self.models: object = {"data": [{"id": "served", "root": "models/reward", "max_model_len": 256}]}
        self.info: object = {"model_id": "models/reward", "model_sha": "abc", "max_input_length": 256}
        #: an answer that is sent instead of a good one
        self.answer: object = None
        self.requests: list[tuple[str, dict]] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RewardServer

    def log_message(self, *arguments) -> None:
        pass

    def _send(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        told = {"/v1/models": self.server.models, "/info": self.server.info}.get(self.path)
        self._send(200 if told is not None else 404, told)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, body))
        self.server.keys.add(self.headers.get("authorization"))
        outputs = self.server.outputs(body["inputs"][0] if self.path == "/predict" else body["input"])
        if isinstance(outputs, int):
            self._send(outputs, {"error": f"status {outputs} for {self.headers.get('authorization')}"})
        elif self.server.answer is not None:
            self._send(200, self.server.answer)
        elif self.path == "/predict":
            scores = [{"score": value, "label": f"LABEL_{number}"} for number, value in enumerate(outputs)]
            # TEI puts the best label first.
            self._send(200, [sorted(scores, key=lambda score: -score["score"])])
        else:
            name = "probs" if self.path == "/classify" else "data"
            self._send(200, {"data": [{"index": 0, name: outputs}]})


@contextmanager
def running(outputs: Callable) -> Iterator[RewardServer]:
    """A server on a free port of this machine."""
    server = RewardServer(outputs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
