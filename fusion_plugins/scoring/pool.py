"""Worker processes that answer one JSON line with one JSON line, each request within a time limit kept by killing.

Alarms and threads (math-verify's own limit) do not interrupt a long C call; a process can always be killed. ``pebble``
does not do this job (5.2, measured): a worker that dies between two requests breaks its whole pool, and as a fork of a
process with CUDA and threads can hang it needs ``spawn``, which runs the caller's main module again in every worker, so
that scripts without a main guard, or on standard input, fail. ``concurrent.futures`` has no limit per request.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from queue import LifoQueue
from typing import Any

import fusion_plugins
from fusion_plugins.errors import ScoringError
from fusion_plugins.install import install_command

#: time to import the verifier, on a loaded machine with a cold disk
START_SECONDS = 300.0
Request = Mapping[str, Any]
Reply = dict[str, Any]


class Failure(str):
    """Why a request has no reply; its process is dead."""


class WorkerPool:
    """A fixed number of processes, started when first needed and replaced when they die.

    Args:
        module: what ``python -m`` runs; it prints the line ``ready`` once it can serve. Its argument is the number of
            seconds after which it should end itself.
        workers: number of processes.
        timeout: seconds per request.
    """

    def __init__(self, module: str, *, workers: int, timeout: float) -> None:
        self._workers = [_Worker(module, timeout) for _ in range(workers)]
        # The last that was used is taken first: few requests start few processes.
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def map(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """Return one reply or failure per request, in order.

        Raises:
            ScoringError: the processes do not start.
        """
        return list(self._threads.map(self._ask, requests))

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.interrupt()
        # Their threads now find the end of the output, so that this takes no time.
        self._threads.shutdown(wait=True)
        for worker in self._workers:
            worker.end()

    def _ask(self, request: Request) -> Reply | Failure:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process. All methods but :meth:`interrupt` are for one thread at a time."""

    def __init__(self, module: str, timeout: float) -> None:
        # Its own alarm ends a process that hangs after this one was killed and can no longer kill. -P: the working
        # directory may hold modules that are named like ours.
        self._command = [sys.executable, "-P", "-m", module, str(int(timeout) + 5)]
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._interrupted = False

    def ask(self, request: Request) -> Reply | Failure:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return Failure(f"what is to be verified cannot be written as JSON: {error!s:.200}")
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = json.loads(self._read_line(self._timeout))
            if isinstance(reply, dict):
                return reply
            failure = "the verifier's reply is not one of ours"
        except TimeoutError:
            failure = f"no verdict within {self._timeout:g} s"
        except (EOFError, BrokenPipeError):
            failure = "the verifier's process died"
        except (ValueError, RecursionError):
            failure = "the verifier's reply is not JSON"
        self.end()
        return Failure(failure)

    def interrupt(self) -> None:
        """Kill the process, and the one that another thread may be about to start."""
        self._interrupted = True
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> str:
        """Kill the process, if there is one; return the last line that it wrote to stderr."""
        process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        process.communicate()
        with self._errors as errors:
            errors.seek(0)
            return errors.read().decode(errors="replace").strip().rpartition("\n")[2]

    def _start(self) -> None:
        root = str(Path(fusion_plugins.__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A file, because nobody empties a pipe while the process works.
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Ctrl-C is for the driver, which then closes the pool.
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        if self._interrupted:
            self._process.kill()
        try:
            self._read_line(START_SECONDS)
        except (TimeoutError, EOFError):
            error = self.end()
            raise ScoringError(
                f"expected the line 'ready' of the process {' '.join(self._command)} within {START_SECONDS:g} s, got "
                f"{error or 'no message'}. Install what it imports: {install_command('score')}"
            ) from None

    def _read_line(self, seconds: float) -> bytes:
        """Return the process's next line; a process writes no other before it is asked again.

        Raises:
            TimeoutError: the time is over.
            EOFError: the process has ended.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        stdout, deadline, line = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not wait([stdout], max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            data = os.read(stdout, 1 << 16)
            if not data:
                raise EOFError
            line += data
        return line
