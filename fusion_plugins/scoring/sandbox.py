"""Run model-written programs under kernel-enforced isolation (namespaces, seccomp, limits); refuse to run without it.

:class:`Sandbox` tests every isolation layer from the inside before the first program runs and raises
:class:`~fusion_plugins.errors.ScoringError` if one is missing: there is no weaker mode.
:mod:`~fusion_plugins.scoring.sandbox_launcher` describes the layers. They need no root, but user namespaces (Linux 5.14
or newer).

A test runs in one of two ways. *Outside*: its checks run in a process that the program cannot reach, and get values
from it. *Inside*: in the program's own interpreter, which a program that is written to do so can deceive. Who makes the
tests decides (:mod:`~fusion_plugins.scoring.trust`); a test that hands an object to the program, which is no value, is
moved inside.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.sandbox_limits import Limits, children
from fusion_plugins.scoring.sandbox_modes import run_in
from fusion_plugins.scoring.sandbox_worker import NEEDED, Failed, Worker

__all__ = ["Limits", "Outcome", "Sandbox", "TestVerdict"]

SYSTEM_PATHS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/etc/ld.so.cache")
#: kept by the driver and not by the kernel
_DRIVER_LIMITS = ("wall_seconds", "total_seconds")


@dataclass(frozen=True)
class TestVerdict:
    """Result of one test.

    Attributes:
        verdict: passed | failed | timeout | crashed | not_run | unreadable (the test itself does not compile) |
            unchecked (it ended well, but reached no check).
        error: the exception, or how the process ended; None when passed.
        seconds: wall time.
        trust: outside | inside: where its checks ran.
    """

    # pytest must not take the name for a test class.
    __test__ = False

    verdict: str
    error: str | None
    seconds: float
    trust: str = "inside"


@dataclass(frozen=True)
class Outcome:
    """Result of one program.

    Attributes:
        static: why the program does not compile; None when it does.
        tests: one verdict per test, in order; empty when the program does not compile.
        failure: why the sandbox has no result; None normally.
    """

    static: str | None = None
    tests: tuple[TestVerdict, ...] = ()
    failure: str | None = None


class Sandbox:
    """Runs programs against tests, each in processes of its own.

    Args:
        limits: of each program.
        packages: folders that programs may import from, read-only; without any, only the standard library. A driver
            that runs as root needs them readable by everybody, because its programs run as user 65534.
        modules: folders of single packages that programs may import; nothing beside them is visible.

    Raises:
        ScoringError: the isolation layers cannot be set up here, or one of them does not hold.
    """

    def __init__(self, limits: Limits | None = None, packages: Sequence[str] = (), modules: Sequence[str] = ()) -> None:
        self.limits = limits or Limits()
        visible = [*SYSTEM_PATHS, sys.base_prefix, *packages, *modules]
        self._spec: dict[str, Any] = {
            "visible": _outermost(path for path in visible if os.path.lexists(path)),
            "path": [
                *map(os.path.abspath, packages),
                *dict.fromkeys(map(os.path.dirname, map(os.path.abspath, modules))),
            ],
            "limits": {name: value for name, value in asdict(self.limits).items() if name not in _DRIVER_LIMITS},
        }
        # The last that was used is taken first: few programs at one time start few processes.
        self._idle: LifoQueue[Worker] = LifoQueue()
        self._all: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._try_layers()
        except BaseException:
            self.close()
            raise

    def run(self, code: str, tests: Sequence[str | Mapping[str, Any]], setup: str = "") -> Outcome:
        """Run ``code`` with each test.

        Args:
            code: the program.
            tests: programs, each of which passes when it ends without an exception, or tests of
                :class:`~fusion_plugins.scoring.code_tests.Suite`.
            setup: a program that runs before ``code`` as far as it can, and as a whole between ``code`` and the test.

        Raises:
            ScoringError: the isolation layers can no longer be set up.
        """
        deadline = time.monotonic() + self.limits.total_seconds
        verdicts: list[TestVerdict] = []
        try:
            for test in tests or [{"kind": "program", "source": ""}]:
                test = {"kind": "program", "source": test} if isinstance(test, str) else test
                if time.monotonic() >= deadline:
                    verdicts.append(TestVerdict("not_run", "the total time was over", 0.0))
                    continue
                verdict = self._run_test(code, test, setup, deadline)
                if verdict.verdict == "static":
                    return Outcome(static=verdict.error)
                verdicts.append(verdict)
        except (Failed, OSError) as error:
            return Outcome(failure=str(error))
        return Outcome(tests=tuple(verdicts[: len(tests)]))

    def processes(self) -> list[int]:
        """Return the processes in which rooms are made."""
        with self._lock:
            return [child for worker in self._all for child in children(worker.process.pid)]

    def close(self) -> None:
        """Kill the programs that still run."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()
        # Those that a thread still waits for are ended there.
        with contextlib.suppress(Empty):
            while True:
                self._idle.get_nowait().end()

    def _run_test(self, code: str, test: Mapping[str, Any], setup: str, deadline: float) -> TestVerdict:
        started = time.monotonic()
        until = min(started + self.limits.wall_seconds, deadline)
        with self._worker() as worker:
            mode = "stdio" if test["kind"] == "stdio" else "outside" if test.get("outside") else "inside"
            verdict, error = run_in(mode, worker, code, test, setup, self.limits, until)
            if verdict == "inside":
                mode = "inside"
                verdict, error = run_in(mode, worker, code, test, setup, self.limits, until)
        trust = "inside" if mode == "inside" else "outside"
        return TestVerdict(verdict, error, round(time.monotonic() - started, 3), trust)

    @contextlib.contextmanager
    def _worker(self) -> "Iterator[Worker]":
        """Give a process that is warm, or a new one; one that fails is not used again."""
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = Worker(self._spec)
            with self._lock:
                self._all.add(worker)
                if self._closed:
                    worker.kill()
        try:
            worker.wait_until_ready()
            yield worker
        except BaseException as error:
            with self._lock:
                self._all.discard(worker)
            worker.end()
            if self._closed:
                raise Failed("the sandbox is closed") from error
            raise
        self._idle.put(worker)

    def _try_layers(self) -> None:
        if sys.platform != "linux":
            raise ScoringError(f"the sandbox cannot be built: this is {sys.platform}. {NEEDED}")
        # Python or a package may lie in the home folder: then its first folder there is visible, and nothing beside it.
        home = str(Path.home())
        shown = {path[len(home) :].split("/")[1] for path in self._spec["visible"] if path.startswith(home + "/")}
        outcome = self.run(LAYERS_CODE.format(home=home, shown=shown), list(LAYERS.values()))
        if outcome.failure or outcome.static:
            raise ScoringError(f"the sandbox does not work: {outcome.failure or outcome.static}. {NEEDED}")
        broken = [
            f"{name} ({test.error})"
            for name, test in zip(LAYERS, outcome.tests, strict=True)
            if test.verdict != "passed"
        ]
        if broken:
            raise ScoringError(f"the sandbox does not isolate; broken isolation layers: {'; '.join(broken)}. {NEEDED}")


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not lie inside another one.

    Links stay links: where /lib64 points to /usr/lib64, the launcher makes the same link.
    """
    found = sorted({os.path.abspath(path) for path in paths}, key=len)
    kept: list[str] = []
    for path in found:
        if not any(path == other or path.startswith(other.rstrip("/") + "/") for other in kept):
            kept.append(path)
    return kept


#: runs before each test of :data:`LAYERS`
LAYERS_CODE = """
import ctypes, os, socket, threading

def refused(action):
    try:
        action()
    except OSError:
        return True
    return False

def write(path):
    with open(path, "w") as file:
        file.write("x")

home, shown = {home!r}, {shown!r}
libc = ctypes.CDLL(None)
"""
#: isolation layer -> test that passes only if it holds
LAYERS = {
    "network": "assert refused(socket.socket)",
    "unprivileged user": "assert os.getuid() == os.geteuid() == 1000 and refused(lambda: os.setuid(0))",
    "process namespace": "assert os.getpid() < 100 and refused(lambda: os.kill(100000, 0))",
    "read-only file system": (
        "assert all(refused(lambda: write(folder + '/x')) for folder in ('/', '/dev', os.path.dirname(os.__file__)))"
    ),
    "hidden file system": (
        "assert not os.path.exists('/proc/1') and not os.path.exists('/etc/passwd') and "
        "(home == '/' or not os.path.exists(home) or set(os.listdir(home)) <= shown)"
    ),
    "empty environment": "assert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'PYTHONHASHSEED', 'LC_CTYPE'}",
    "no capabilities": "assert refused(lambda: os.chroot('/tmp')) and refused(lambda: os.setgroups([]))",
    "no new namespaces": "assert libc.unshare(0x10000000) == -1",
    "memory limit": "import resource; assert resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY",
    "process limit": "import resource; assert resource.getrlimit(resource.RLIMIT_NPROC)[1] != resource.RLIM_INFINITY",
    "writable /tmp": "write('here')",
}
