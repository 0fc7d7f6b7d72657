"""Runs programs that a model wrote, behind walls that the kernel keeps, or not at all.

:class:`Sandbox` tries its walls from the inside before the first program runs and raises
:class:`~fusion_plugins.errors.ScoringError` when one is missing: there is no weaker mode. What the walls are stands in
:mod:`~fusion_plugins.scoring.sandbox_launcher`; no root is needed, but user namespaces are (Linux 5.14 or newer).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.errors import ConfigError, ScoringError

__all__ = ["Limits", "Outcome", "Sandbox", "TestVerdict"]

HERE = Path(__file__).parent
LAUNCHER = HERE / "sandbox_launcher.py"
RUNNER = HERE / "sandbox_runner.py"
#: seconds that walls and interpreter may take, on a loaded machine
GRACE_SECONDS = 60.0
SYSTEM_PATHS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/etc/ld.so.cache")
CURE = (
    "Model-written code is not run without isolation. Needed: Linux 5.14 or newer on x86-64 or ARM64, with user "
    "namespaces allowed (sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone, AppArmor's "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows unshare and mount)."
)


@dataclass(frozen=True)
class Limits:
    """What one program may use; a value that is not above 0 is a ConfigError.

    Attributes:
        cpu_seconds: processor time per test; does not depend on how busy the machine is.
        wall_seconds: time per test, for programs that sleep.
        total_seconds: time for all tests of one program.
        memory: bytes of address space per process.
        disk: bytes in /tmp, which vanishes afterwards.
        file_size: bytes per file.
        processes: processes and threads at one time, with the three that the sandbox needs.
        open_files: file descriptors per process.
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
            raise ConfigError(f"sandbox limits: expected numbers above 0, but {', '.join(wrong)} is not")


@dataclass(frozen=True)
class TestVerdict:
    """What one test said.

    Attributes:
        verdict: passed | failed | timeout | crashed | not_run | unreadable (the test itself does not compile).
        error: the exception, or what happened; None when passed.
        seconds: wall time.
    """

    # pytest must not take the name for a test class.
    __test__ = False

    verdict: str
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Attributes:
        static: why the program does not even compile; None when it does.
        tests: one verdict per test, in order; empty when it does not compile.
        failure: why there is no verdict although the program compiles or may compile; None normally.
    """

    static: str | None = None
    tests: tuple[TestVerdict, ...] = ()
    failure: str | None = None


class Sandbox:
    """Runs programs against tests, each in a fresh sandbox.

    Args:
        limits: of each program.
        packages: folders that programs may import from, read-only; without any, only the standard library. For a
            driver that runs as root they must be readable by everybody.

    Raises:
        ScoringError: the walls cannot be built here, or one of them does not hold.
    """

    def __init__(self, limits: Limits | None = None, packages: Sequence[str] = ()) -> None:
        self.limits = limits or Limits()
        # The interpreter behind a virtual environment: its folder is all that a program needs to see.
        self._python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        visible = [*SYSTEM_PATHS, sys.base_prefix, *packages]
        self._spec: dict[str, Any] = {
            "runner": RUNNER.read_text(),
            "visible": _outermost(path for path in visible if os.path.lexists(path)),
            "path": [os.path.abspath(path) for path in packages],
            "limits": {name: value for name, value in asdict(self.limits).items() if not name.endswith("_seconds")},
        }
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        self._try_walls()

    def run(self, code: str, tests: Sequence[str]) -> Outcome:
        """Run ``code`` followed by each test; a test passes when it ends without an exception.

        Raises:
            ScoringError: the walls can no longer be built.
        """
        job = {
            "code": code,
            "tests": list(tests),
            "cpu_seconds": self.limits.cpu_seconds,
            "wall_seconds": self.limits.wall_seconds,
            "total_seconds": self.limits.total_seconds,
        }
        try:
            request = json.dumps(job).encode()
            status, output, errors = self._start(request, self.limits.total_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(failure="the sandbox gave no verdict in time")
        if status == 70:
            raise ScoringError(f"the sandbox cannot be built: {errors}. {CURE}")
        try:
            said: dict[str, Any] = json.loads(output)
            return Outcome(said["static"], tuple(TestVerdict(**test) for test in said["tests"]))
        except (ValueError, KeyError, TypeError):
            return Outcome(failure=f"the sandbox ended with status {status}: {errors[-200:]}")

    def close(self) -> None:
        """End what still runs."""
        self._closed = True
        for process in list(self._running):
            process.kill()

    def _start(self, request: bytes, seconds: float) -> tuple[int, str, str]:
        spec = json.dumps(self._spec)
        command = [self._python, "-I", "-S", "-B", str(LAUNCHER), spec]
        # No environment, no open files, and a session of its own: Ctrl-C is for the driver, which then kills it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        self._running.add(process)
        if self._closed:
            process.kill()
        try:
            output, errors = process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        finally:
            self._running.discard(process)
        return process.returncode, output.decode(errors="replace"), errors.decode(errors="replace").strip()

    def _try_walls(self) -> None:
        if sys.platform != "linux":
            raise ScoringError(f"the sandbox cannot be built: this is {sys.platform}. {CURE}")
        home = str(Path.home())
        shown = {path[len(home) :].split("/")[1] for path in self._spec["visible"] if path.startswith(home + "/")}
        outcome = self.run(WALLS_CODE.format(home=home, shown=shown), list(WALLS.values()))
        if outcome.failure or outcome.static:
            raise ScoringError(f"the sandbox does not work: {outcome.failure or outcome.static}. {CURE}")
        broken = [
            f"{name} ({test.error})"
            for name, test in zip(WALLS, outcome.tests, strict=True)
            if test.verdict != "passed"
        ]
        if broken:
            raise ScoringError(f"the sandbox does not isolate: {'; '.join(broken)}. {CURE}")


def _outermost(paths: Any) -> list[str]:
    """Drop paths that lie inside another one; keep links as they are."""
    found = sorted({os.path.abspath(path) for path in paths}, key=len)
    kept: list[str] = []
    for path in found:
        if not any(path == other or path.startswith(other.rstrip("/") + "/") for other in kept):
            kept.append(path)
    return kept


WALLS_CODE = """
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
#: wall -> test that passes only while it stands
WALLS = {
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
