"""The part of the Hugging Face hub that `huggingface_hub` talks to when it pushes and pulls a dataset repository."""

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> path -> content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str | None] = set()
        #: an answer to every request in the place of a good one
        self.status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str) -> str:
        """The name of the state of a repository."""
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.files[repo].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, parts = self._body(), urlsplit(self.path).path.strip("/").split("/")
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.status is not None:
            return self._json({"error": "no"}, self.server.status)
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.server.files:
                return self._json({"error": "exists", "url": f"{self.server.url}/datasets/{name}"}, 409)
            self.server.files[name], self.server.private[name] = (
                {},
                wanted.get("private") or wanted.get("visibility") == "private",
            )
            return self._json({"url": f"{self.server.url}/datasets/{name}"})
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action == "paths-info":
            return self._json([])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            if entry["key"] == "deletedFile":
                del self.server.files[repo][entry["value"]["path"]]
        commit = self.server.commit(repo)
        return self._json({"commitUrl": f"{self.server.url}/datasets/{repo}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.server.status is not None:
            return self._json({"error": "no"}, self.server.status)
        if parts[0] == "api" and "/".join(parts[2:4]) in self.server.files:
            repo = "/".join(parts[2:4])
            files = self.server.files[repo]
            if len(parts) > 4 and parts[4] == "tree":
                return self._json(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                        for path, data in files.items()
                    ]
                )
            siblings = [{"rfilename": path} for path in files]
            return self._json(
                {"id": repo, "sha": self.server.commit(repo), "siblings": siblings, "private": False, "tags": []}
            )
        repo = "/".join(parts[1:3])
        path = "/".join(parts[5:])
        if parts[0] == "datasets" and path in self.server.files.get(repo, {}):
            data = self.server.files[repo][path]
            return self._send(200, data, ETag=f'"{_etag(data)}"', X_Repo_Commit=self.server.commit(repo))
        return self._send(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def matching(files: dict[str, bytes], pattern: str) -> list[str]:
    """Paths that match a pattern."""
    return sorted(fnmatch.filter(files, pattern))


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
