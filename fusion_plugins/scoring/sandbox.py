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
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.scoring.code_tests import COUNTER
from fusion_plugins.scoring.sandbox_checks import same_output
from fusion_plugins.scoring.sandbox_usage import usage

HERE = Path(__file__).parent
LAUNCHER = HERE / "sandbox_launcher.py"
#: seconds to set up the isolation layers and start the interpreter, on a loaded machine
GRACE_SECONDS = 60.0
#: between two looks at what a program uses
LOOK_SECONDS = 0.05
SYSTEM_PATHS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/etc/ld.so.cache")
#: exit status of checks whose program has ended
PROGRAM_ENDED = 3
#: kept by the driver and not by the kernel
_DRIVER_LIMITS = ("wall_seconds", "total_seconds")
#: closes every message about a missing isolation layer
NEEDED = (
    "Model-written code is not run without isolation. Needed: Linux 5.14 or newer on x86-64 or ARM64, with user "
    "namespaces allowed (sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone, AppArmor's "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows unshare and mount)."
)


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        cpu_seconds: processor time per test, of all its processes; does not depend on how busy the machine is.
        wall_seconds: time per test, which ends programs that sleep.
        total_seconds: time for all tests of one program.
        memory: bytes per test: of address space of one process, and in use by all of them.
        disk: bytes in /tmp, which each test has for itself and which is gone afterwards.
        file_size: bytes per file.
        processes: processes and threads at one time, including the four that the sandbox needs.
        open_files: file descriptors per process.

    Raises:
        ConfigError: a limit is not above 0.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    total_seconds: float = 60.0
    memory: int = 512 << 20
    disk: int = 32 << 20
    file_size: int = 16 << 20
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        wrong = [name for name, value in asdict(self).items() if value <= 0]
        if wrong:
            given = ", ".join(f"{name}: {getattr(self, name)}" for name in wrong)
            raise ConfigError(f"scorers.code: expected limits above 0, got {given}; leave a limit out for its default")


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
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._try_layers()

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
        except (_Failed, OSError) as error:
            return Outcome(failure=str(error))
        return Outcome(tests=tuple(verdicts[: len(tests)]))

    def close(self) -> None:
        """Kill the programs that still run."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()

    def _run_test(self, code: str, test: Mapping[str, Any], setup: str, deadline: float) -> TestVerdict:
        started = time.monotonic()
        until = min(started + self.limits.wall_seconds, deadline)
        with self._worker() as worker:
            mode = "stdio" if test["kind"] == "stdio" else "outside" if test.get("outside") else "inside"
            verdict, error = _run_in(worker, mode, code, test, setup, self.limits, until)
            if verdict == "inside":
                mode = "inside"
                verdict, error = _run_in(worker, mode, code, test, setup, self.limits, until)
        trust = "inside" if mode == "inside" else "outside"
        return TestVerdict(verdict, error, round(time.monotonic() - started, 3), trust)

    @contextlib.contextmanager
    def _worker(self) -> "Iterator[_Worker]":
        """Give a process that is warm, or a new one; one that fails is not used again."""
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = _Worker(self._spec)
            with self._lock:
                self._all.add(worker)
                if self._closed:
                    worker.kill()
        try:
            worker.wait_until_ready()
            yield worker
        except BaseException:
            with self._lock:
                self._all.discard(worker)
            worker.kill()
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


class _Failed(Exception):
    """The sandbox itself has no result for a test."""


class _Worker:
    """A process that holds a warm sandbox and runs one test at a time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The interpreter that a virtual environment links to, because only its own folder is visible inside.
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        # An environment of its own, because this one holds keys and tokens; no open files; a session of its own, so
        # that Ctrl-C reaches only the driver, which then kills the program.
        with theirs:
            self._process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(LAUNCHER), json.dumps(spec)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        self._ready = False

    def wait_until_ready(self) -> None:
        """Wait until programs can run.

        Raises:
            ScoringError: an isolation layer is missing.
        """
        if not self._ready and self._receive(GRACE_SECONDS) != b"ready":
            self.kill()
            raise ScoringError(f"the sandbox cannot be built: {self._last_words()}. {NEEDED}")
        self._ready = True

    def ask(
        self, mode: str, files: Sequence[int], limits: Limits, deadline: float
    ) -> tuple[dict[str, Any], str | None]:
        """Run a test in files; return how its processes ended and which limit of all of them together was reached.

        Raises:
            _Failed: the process that holds the sandbox has ended, or does not answer.
        """
        try:
            socket.send_fds(self._control, [mode.encode()], list(files))
            reply, reached = None, None
            while reply is None and reached is None:
                reply = self._receive(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
                reached = self._reached(limits, deadline) if reply is None else None
            if reply is None:
                self._control.send(b"end")
                reply = self._receive(GRACE_SECONDS)
        except OSError:
            reply = b""
        if reply is None:
            raise _Failed("the sandbox gave no verdict in time")
        if not reply:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
            self.kill()
            raise _Failed(f"the sandbox ended with status {self._process.wait()}: {self._last_words()[-200:]}")
        found: dict[str, Any] = json.loads(reply)
        if "broken" in found:
            raise ScoringError(f"the sandbox cannot be built: {found['broken']}. {NEEDED}")
        return found, reached

    def kill(self) -> None:
        """Kill the process and all that runs inside."""
        self._process.kill()

    def _reached(self, limits: Limits, deadline: float) -> str | None:
        if time.monotonic() >= deadline:
            return "time"
        memory, cpu_seconds = usage(self._process.pid)
        if memory > limits.memory:
            return "memory"
        return "time" if cpu_seconds > limits.cpu_seconds else None

    def _receive(self, seconds: float) -> bytes | None:
        """Return the next message; None when the time is over, nothing when the process has ended."""
        self._control.settimeout(max(seconds, 1e-6))
        try:
            return self._control.recv(1 << 16)
        except TimeoutError:
            return None
        except OSError:
            return b""

    def _last_words(self) -> str:
        _, errors = self._process.communicate()
        self._control.close()
        return errors.decode(errors="replace").strip()


def _run_in(
    worker: _Worker, mode: str, code: str, test: Mapping[str, Any], setup: str, limits: Limits, deadline: float
) -> tuple[str, str | None]:
    """Run a test in one of the modes of the runner; return verdict and error."""
    word = secrets.token_hex(16)
    outside = test.get("outside") or {}
    known = {"counter": COUNTER, "test": {**test, "outside": None}}
    program: dict[str, Any] = {"code": code, "setup": setup}
    if mode == "inside":
        program |= known | {"word": word}
    elif mode == "stdio":
        program |= {"counter": COUNTER, "word": word, "test": {"kind": "stdio"}}
    with contextlib.ExitStack() as stack:

        def file(content: str = "") -> int:
            # In memory, and without a name: a full disk is no concern, and nothing is left behind.
            made = os.memfd_create("sandbox")
            stack.callback(os.close, made)
            os.write(made, content.encode(errors="surrogatepass"))
            os.lseek(made, 0, os.SEEK_SET)
            return made

        files = [file(json.dumps(program)), file()]
        if mode == "outside":
            setup = outside.get("setup", setup)
            files += [file(json.dumps(known | {"names": outside["names"], "setup": setup})), file()]
        elif mode == "stdio":
            files += [file(test["stdin"]), file()]
        ended, reached = worker.ask(mode, files, limits, deadline)
        results = [_read(made) for made in files]
    if reached == "memory":
        return "crashed", f"used more than {limits.memory >> 20} MiB of memory in all its processes"
    said = _said(results[1])
    if said.get("static"):
        return "static", str(said["static"])[:200]
    if mode == "outside":
        return _verdict_of_checks(ended, reached, _said(results[3]), limits)
    status, cpu_seconds = ended["program"]
    if said.get("word") == word:
        verdict, error = str(said.get("verdict")), said.get("error")
    else:
        verdict, error = _without_verdict(status, reached, cpu_seconds, limits)
    if mode == "inside":
        return verdict, error
    # What a whole program has written decides, also where it ends itself.
    if said.get("word") != word and verdict == "failed" and status == 0:
        verdict, error = "passed", None
    output = results[3].decode(errors="replace")
    if verdict == "passed" and not same_output(output, test["stdout"]):
        return "failed", f"expected output {test['stdout'].strip()!r:.80}, got {output.strip()!r:.80}"
    return verdict, error


def _verdict_of_checks(
    ended: Mapping[str, Any], reached: str | None, said: Mapping[str, Any], limits: Limits
) -> tuple[str, str | None]:
    """Return verdict and error of checks that ran outside of the program."""
    status, cpu_seconds = ended["checks"]
    if "verdict" not in said:
        return _without_verdict(status, reached, cpu_seconds, limits)
    if status == PROGRAM_ENDED:
        return _without_verdict(ended["program"][0], reached, ended["program"][1], limits)
    return said["verdict"], said["error"]


def _without_verdict(status: int, reached: str | None, cpu_seconds: float, limits: Limits) -> tuple[str, str]:
    """Return verdict and error of a process that wrote no verdict."""
    if reached == "time" or status == -signal.SIGXCPU or cpu_seconds >= limits.cpu_seconds:
        return "timeout", "the time limit was reached"
    if status < 0:
        return "crashed", f"ended by signal {-status}"
    return "failed", "ended without reaching the end of the test"


def _read(file: int) -> bytes:
    size = os.fstat(file).st_size
    return os.pread(file, size, 0)


def _said(result: bytes) -> dict[str, Any]:
    """Return what a process has written as its result; nothing where it is none."""
    try:
        found = json.loads(result)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    "no new namespaces": "assert libc.unshare(0x10000000) == -1",
    "memory limit": "import resource; assert resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY",
    "process limit": "import resource; assert resource.getrlimit(resource.RLIMIT_NPROC)[1] != resource.RLIM_INFINITY",
    "writable /tmp": "write('here')",
}
