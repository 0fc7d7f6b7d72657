"""Programs that hand their command over to one process that has imported the hosts, and wait for it.

:func:`warm_programs` makes a folder like that of a virtual environment, whose ``axolotl``, ``fusion``,
``mergekit-yaml`` and ``python`` take the same arguments as the real ones. A command runs in a fork of the one process,
with the folder, the environment and the files of its caller, and without seconds of imports. It ends with its caller,
killed or not. Where the process is no more, the programs are the real ones.
"""

import json
import os
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fusion_lab import ROOT, warm

__all__ = ["serve", "warm_programs"]

#: what a program is: it starts in milliseconds, so it imports nothing of this package
PROGRAM = """
import json, os, socket, struct, sys
_, address, real, *words = sys.argv
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(address)
except OSError:
    os.execv(real, [real, *words[1:]])
request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
try:
    socket.send_fds(connection, [struct.pack("!q", len(request))], [0, 1, 2])
    connection.sendall(request)
    status = connection.recv(1)
except OSError:
    status = b""
sys.exit(status[0] if status else "the process that runs the commands has ended; its last words are in logs/warm.log")
"""


def _python(arguments: Sequence[str]) -> None:
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


ENTRIES: dict[str, Callable[[Sequence[str]], None]] = {**warm.ENTRIES, "python": _python}


@contextmanager
def warm_programs(folder: Path, log: Path) -> Iterator[None]:
    """Make the programs in ``folder/bin``, and have a process that answers them as long as the context lasts.

    Args:
        folder: of the programs.
        log: file with what the process itself says.
    """
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    # The path of a socket must be short; that of the folder need not be.
    with tempfile.TemporaryDirectory(prefix="warm-") as private, log.open("ab") as output:
        address = str(Path(private, "socket"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            for name in ENTRIES:
                real = str(Path(sys.executable).parent / name)
                words = [sys.executable, "-S", "-E", "-c", PROGRAM, address, real, name]
                program = folder / "bin" / name
                program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
                program.chmod(0o755)
            paths = [str(ROOT / "lab"), *filter(None, [os.environ.get("PYTHONPATH")])]
            process = subprocess.Popen(
                [sys.executable, "-m", "fusion_lab.handover", str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=(listener.fileno(),),
                start_new_session=True,  # Ctrl-C ends the programs, and each of them its command
            )
        assert process.stdin is not None
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()


def serve(listener: socket.socket) -> None:
    """Answer programs until the standard input ends, which it does with the process that waits for them."""
    warm.warm_up()
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            break
        caller, _ = listener.accept()
        if not os.fork():
            listener.close()
            os._exit(_answer(caller))
        caller.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    listener.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _answer(caller: socket.socket) -> int:
    """Run a command in a session of its own, which ends if the caller does; tell the caller its status."""
    head, files, _, _ = socket.recv_fds(caller, 8, 3)
    (size,) = struct.unpack("!q", head)
    request = json.loads(_read(caller, size))
    ended, held = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.close(ended)
        caller.close()
        os._exit(_run(request, files))
    for file in (held, *files):
        os.close(file)
    ready, _, _ = select.select([caller, ended], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # what the command has started, if it was there long enough to
            os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        caller.sendall(bytes([code if code >= 0 else 128 - code]))
    return 0


def _read(caller: socket.socket, size: int) -> bytes:
    parts = []
    while size and (part := caller.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _run(request: dict[str, Any], files: Sequence[int]) -> int:
    """Run a command as the program of its first word would; return its status."""
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = request["words"]
        ENTRIES[sys.argv[0]](sys.argv[1:])
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
