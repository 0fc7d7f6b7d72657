"""Run model-written programs under kernel-enforced isolation (namespaces, seccomp, limits); refuse to run without it.

:class:`Sandbox` tests every isolation layer from the inside before the first program runs and raises
:class:`~fusion_plugins.errors.ScoringError` if one is missing: there is no weaker mode.
:mod:`~fusion_plugins.scoring.sandbox_launcher` describes the layers. They need no root, but user namespaces (Linux 5.14
or newer).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.scoring.code_tests import COUNTER

HERE = Path(__file__).parent
LAUNCHER = HERE / "sandbox_launcher.py"
RUNNER = HERE / "sandbox_runner.py"
#: exit status of the launcher when an isolation layer cannot be set up
LAUNCHER_FAILED = 70
#: seconds to set up the isolation layers and start the interpreter, on a loaded machine
GRACE_SECONDS = 60.0
SYSTEM_PATHS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/etc/ld.so.cache")
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
        cpu_seconds: processor time per test; does not depend on how busy the machine is.
        wall_seconds: time per test, which ends programs that sleep.
        total_seconds: time for all tests of one program.
        memory: bytes of address space per process.
        disk: bytes in /tmp, which is gone afterwards.
        file_size: bytes per file.
        processes: processes and threads at one time, including the three that the sandbox needs.
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
    """

    # pytest must not take the name for a test class.
    __test__ = False

    verdict: str
    error: str | None
    seconds: float


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
    """Runs programs against tests, each in a fresh sandbox.

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
        # The interpreter that a virtual environment links to, because only its own folder is visible inside.
        self._python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        visible = [*SYSTEM_PATHS, sys.base_prefix, *packages, *modules]
        self._spec: dict[str, Any] = {
            "runner": RUNNER.read_text(),
            "visible": _outermost(path for path in visible if os.path.lexists(path)),
            "path": [
                *map(os.path.abspath, packages),
                *dict.fromkeys(map(os.path.dirname, map(os.path.abspath, modules))),
            ],
            "limits": {name: value for name, value in asdict(self.limits).items() if not name.endswith("_seconds")},
        }
        self._running: set[subprocess.Popen[bytes]] = set()
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
        job = {
            "code": code,
            "setup": setup,
            "tests": list(tests),
            "counter": COUNTER,
            "cpu_seconds": self.limits.cpu_seconds,
            "wall_seconds": self.limits.wall_seconds,
            "total_seconds": self.limits.total_seconds,
        }
        try:
            request = json.dumps(job).encode()
            status, output, errors = self._start(request, self.limits.total_seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return Outcome(failure="the sandbox gave no verdict in time")
        if status == LAUNCHER_FAILED:
            raise ScoringError(f"the sandbox cannot be built: {errors}. {NEEDED}")
        try:
            found: dict[str, Any] = json.loads(output)
            return Outcome(found["static"], tuple(TestVerdict(**test) for test in found["tests"]))
        except (ValueError, KeyError, TypeError):
            return Outcome(failure=f"the sandbox ended with status {status}: {errors[-200:]}")

    def close(self) -> None:
        """Kill the programs that still run."""
        self._closed = True
        for process in list(self._running):
            process.kill()

    def _start(self, request: bytes, seconds: float) -> tuple[int, str, str]:
        spec = json.dumps(self._spec)
        command = [self._python, "-I", "-S", "-B", str(LAUNCHER), spec]
        # No environment, which holds keys and tokens; no open files; a session of its own, so that Ctrl-C reaches only
        # the driver, which then kills the program.
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
        # `close` may have run in another thread since the process was started.
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
    "no new namespaces": "assert libc.unshare(0x10000000) == -1",
    "memory limit": "import resource; assert resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY",
    "process limit": "import resource; assert resource.getrlimit(resource.RLIMIT_NPROC)[1] != resource.RLIM_INFINITY",
    "writable /tmp": "write('here')",
}
