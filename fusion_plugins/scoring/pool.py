"""Processes that answer one JSON line with one JSON line, each request within a time limit that is kept by killing.

Alarms and threads (math-verify's own limit) fail inside long C calls and outside the main thread; a process can always
be killed, and a killed one is replaced before its next request. One thread waits for all of them.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fusion_plugins
from fusion_plugins.errors import ScoringError

__all__ = ["Failure", "Reply", "WorkerPool"]

START_SECONDS = 300.0
Request = Mapping[str, Any]
Reply = dict[str, Any]


class Failure(str):
    """Why a request has no reply; the process that had it is gone."""


class WorkerPool:
    """A fixed number of processes, started when first needed.

    Args:
        module: what ``python -m`` runs; it prints ``ready`` once it can serve.
        workers: number of processes.
        timeout: seconds per request.
    """

    def __init__(self, module: str, *, workers: int, timeout: float) -> None:
        self._workers = [_Worker(module, timeout) for _ in range(workers)]

    def map(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Return one reply or failure per request, in order.

        Raises:
            ScoringError: the processes do not start.
        """
        replies: dict[int, Reply | Failure] = {}
        waiting = deque(enumerate(requests))
        while len(replies) < len(requests):
            for worker in self._workers:
                if waiting and worker.job is None:
                    worker.take(*waiting.popleft())
            replies.update(self._next_replies())
        return [replies[index] for index in range(len(requests))]

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()

    def _next_replies(self) -> Iterator[tuple[int, Reply | Failure]]:
        """Wait until at least one process has something to say or is out of time."""
        busy = [worker for worker in self._workers if worker.job is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            until = min(worker.deadline for worker in busy)
            ready = [key.data for key, _ in selector.select(max(0.0, until - time.monotonic()))]
        for worker in ready:
            yield from worker.read()
        for worker in busy:
            if worker not in ready and worker.deadline <= time.monotonic():
                yield from worker.give_up()


class _Worker:
    """One process and the request that it has. ``deadline`` is that of the start until it has said ``ready``."""

    def __init__(self, module: str, timeout: float) -> None:
        # The process's own alarm is for the case that this one was killed and can no longer kill.
        self._command = [sys.executable, "-P", "-m", module, str(int(timeout) + 5)]
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._serves = False
        self._rest = b""
        self.job: tuple[int, Request] | None = None
        self.deadline = 0.0

    @property
    def stdout(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def take(self, index: int, request: Request) -> None:
        self.job = (index, request)
        if self._process is not None and self._process.poll() is not None:
            self.kill()
        if self._process is None:
            self._start()
        else:
            self._send(request)

    def read(self) -> Iterator[tuple[int, Reply | Failure]]:
        data = os.read(self.stdout, 1 << 16)
        if not data:
            yield from self.give_up()
            return
        self._rest += data
        if b"\n" not in self._rest:
            return
        line, _, self._rest = self._rest.partition(b"\n")
        assert self.job is not None
        index, request = self.job
        if self._serves:
            self.job = None
            yield index, json.loads(line)
        else:
            self._serves = True
            self._send(request)

    def give_up(self) -> Iterator[tuple[int, Reply | Failure]]:
        assert self._process is not None
        assert self.job is not None
        index, _ = self.job
        served, late = self._serves, self.deadline <= time.monotonic()
        errors = self.kill()
        if not served:
            raise ScoringError(
                f"the process {' '.join(self._command)} does not start: {errors[-1] if errors else 'no message'}. "
                "Is everything installed that it imports? pip install 'fusion-plugins[score]'"
            )
        yield index, Failure(f"no verdict within {self._timeout:g} s" if late else "the verifier's process died")

    def kill(self) -> list[str]:
        """End the process; return the lines that it wrote to stderr."""
        process, self._process, self.job = self._process, None, None
        if process is None:
            return []
        process.kill()
        process.communicate()
        with self._errors as errors:
            errors.seek(0)
            return errors.read().decode(errors="replace").strip().splitlines()

    def _start(self) -> None:
        root = str(Path(fusion_plugins.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._serves, self._rest = False, b""
        self.deadline = time.monotonic() + START_SECONDS
        # A file, because nobody empties a pipe while the process works.
        self._errors = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C is for the driver, which then closes the pool.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def _send(self, request: Request) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self.deadline = time.monotonic() + self._timeout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It has just died: reading will find the end of its output.
            pass
