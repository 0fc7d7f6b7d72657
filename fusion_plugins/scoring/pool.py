"""Processes that answer one JSON line with one JSON line, each request within a time limit that is kept by killing.

Threads with alarms (math-verify's own limit) fail inside long C calls and outside the main thread; a process can always
be killed, and a killed one is replaced before the next request.
"""

import json
import os
import queue
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fusion_plugins
from fusion_plugins.errors import ScoringError

__all__ = ["Failure", "Reply", "WorkerPool"]

START_SECONDS = 300.0
Reply = dict[str, Any]


class Failure(str):
    """Why a request has no reply; the worker that had it is gone."""


class WorkerPool:
    """A fixed number of worker processes, started when first needed.

    Args:
        module: what ``python -m`` runs; it prints ``ready`` once it can serve.
        workers: number of processes.
        timeout: seconds per request.
    """

    def __init__(self, module: str, *, workers: int, timeout: float) -> None:
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._all = [_Worker(module, timeout) for _ in range(workers)]
        for worker in self._all:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=module.rpartition(".")[2])

    def map(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply | Failure]:
        """Return one reply or failure per request, in order.

        Raises:
            ScoringError: the workers do not start.
        """
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.kill()

    def _ask(self, request: Mapping[str, Any]) -> Reply | Failure:
        worker = self._free.get()
        try:
            return worker.ask(request)
        finally:
            self._free.put(worker)


class _Worker:
    def __init__(self, module: str, timeout: float) -> None:
        # The worker's own alarm is for the case that this process was killed and can no longer kill.
        self._command = [sys.executable, "-P", "-m", module, str(int(timeout) + 5)]
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def ask(self, request: Mapping[str, Any]) -> Reply | Failure:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(self._timeout)
        except BrokenPipeError:
            line = None
        if line is not None:
            reply: Reply = json.loads(line)
            return reply
        ended = self._process.poll()
        self.kill()
        if ended is None:
            return Failure(f"no verdict within {self._timeout:g} s")
        return Failure(f"the verifier's process ended with status {ended}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        root = str(Path(fusion_plugins.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A session of its own: Ctrl-C is for the driver, which then closes the pool.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._rest = b""
        if self._read_line(START_SECONDS) != b"ready":
            self._process.kill()
            errors = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
            self._process = None
            raise ScoringError(
                f"the process {' '.join(self._command)} does not start: {errors[-1] if errors else 'no message'}. "
                "Is everything installed that it imports? pip install 'fusion-plugins[score]'"
            )

    def _read_line(self, seconds: float) -> bytes | None:
        """Return the next line of stdout, or None when the time is over or the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    self._process.wait()
                    return None
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line
