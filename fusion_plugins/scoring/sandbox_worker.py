"""A process that holds a warm sandbox, as the driver sees it: files in, how the processes ended out."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_plugins.errors import ScoringError
from fusion_plugins.scoring.sandbox_limits import Limits, can_be_watched, usage

LAUNCHER = Path(__file__).parent / "sandbox_launcher.py"
#: seconds to set up the isolation layers and start the interpreter, on a loaded machine
GRACE_SECONDS = 60.0
#: between two looks at what a program uses
LOOK_SECONDS = 0.05
#: closes every message about a missing isolation layer
NEEDED = (
    "Model-written code is not run without isolation. Needed: Linux 5.14 or newer on x86-64 or ARM64, with user "
    "namespaces allowed (sysctl user.max_user_namespaces and kernel.unprivileged_userns_clone, AppArmor's "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that allows unshare and mount)."
)


class Failed(Exception):
    """The sandbox itself has no result for a test."""


class Worker:
    """A process that holds a warm sandbox and runs one test at a time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The interpreter that a virtual environment links to, because only its own folder is visible inside.
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        # An environment of its own, because this one holds keys and tokens; no open files; a session of its own, so
        # that Ctrl-C reaches only the driver, which then kills the program.
        with theirs:
            self.process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(LAUNCHER), json.dumps(spec)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        self._ready = False
        self._last_words: str | None = None

    def wait_until_ready(self) -> None:
        """Wait until programs can run.

        Raises:
            ScoringError: an isolation layer is missing.
        """
        if self._ready:
            return
        if self._receive(GRACE_SECONDS) != b"ready":
            raise ScoringError(f"the sandbox cannot be built: {self.end()}. {NEEDED}")
        if not can_be_watched(self.process.pid):
            raise ScoringError(
                "the sandbox cannot be built: /proc does not tell the children of a process and their memory, so that "
                "limits of all of them together would not hold; it has to be mounted without hidepid"
            )
        self._ready = True

    def ask(
        self, mode: str, files: Sequence[int], limits: Limits, deadline: float
    ) -> tuple[dict[str, Any], str | None]:
        """Run a test in files; return how its processes ended and which limit of all of them together was reached.

        Raises:
            Failed: the process that holds the sandbox has ended, or does not answer.
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
            raise Failed("the sandbox gave no verdict in time")
        if not reply:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
            last_words = self.end()
            raise Failed(f"the sandbox ended with status {self.process.returncode}: {last_words[-200:]}")
        found: dict[str, Any] = json.loads(reply)
        if "broken" in found:
            raise ScoringError(f"the sandbox cannot be built: {found['broken']}. {NEEDED}")
        return found, reached

    def kill(self) -> None:
        """Kill the process and all that runs inside; another thread may be waiting for it."""
        self.process.kill()

    def end(self) -> str:
        """Kill the process and close what is open to it; return what it wrote to stderr."""
        if self._last_words is None:
            self.process.kill()
            _, errors = self.process.communicate()
            self._control.close()
            self._last_words = errors.decode(errors="replace").strip()
        return self._last_words

    def _reached(self, limits: Limits, deadline: float) -> str | None:
        if time.monotonic() >= deadline:
            return "time"
        memory, cpu_seconds = usage(self.process.pid)
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
