"""The program of a step: where it runs, how it starts and ends, and how a person repeats it."""

import http.client
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fusion_plugins.chain.settings import Chain, Step, is_url
from fusion_plugins.errors import ChainError, ConfigError
from fusion_plugins.escape import for_terminal
from fusion_plugins.redaction import is_secret, without_credentials
from fusion_plugins.store.files import make_folder

#: folder of the logs, beside the file of the chain
LOGS = "logs"
#: what a program may take to end after it was asked to
GRACE_SECONDS = 20.0
SERVER_SECONDS = 10.0
POLL_SECONDS = 0.1
#: bytes at the end of a log that are looked at
TAIL_BYTES = 16_384


@dataclass
class Running:
    """A step at work.

    Attributes:
        step: what runs.
        process: the program; it leads a process group of its own.
        log: file with what it says, after what earlier runs of it said.
        offset: bytes of the log that are from earlier runs.
        started: on the monotonic clock, seconds.
    """

    step: Step
    process: "subprocess.Popen[bytes]"
    log: Path
    offset: int
    started: float

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started


def environment_of(chain: Chain, step: Step) -> dict[str, str]:
    """Return the environment variables of a step; the programs of its environment are found first."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(chain.variables(step))
    where = chain.where(step)
    if where is None or is_url(where):
        programs = str(Path(sys.executable).parent)
    else:
        programs = str(Path(where, "bin"))
        environment["VIRTUAL_ENV"] = where
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    return environment


def check_programs(chain: Chain, steps: Iterable[Step]) -> None:
    """Look for the environment and the program of every step, before the first of them starts.

    Raises:
        ConfigError: one of them is not there.
    """
    for step in steps:
        where = chain.where(step)
        if where is not None and not is_url(where) and not Path(where, "bin").is_dir():
            raise ConfigError(
                f"{chain.path}: step {step.name}: expected the folder of a virtual environment or the URL of a server "
                f"as `env`, got {where}, which has no folder bin. Make the environment, or correct the name."
            )
        _program(chain, step, environment_of(chain, step))


def _program(chain: Chain, step: Step, environment: Mapping[str, str]) -> str:
    name = step.words[0]
    path = str(chain.folder / name) if os.sep in name else name
    found = shutil.which(path, path=environment["PATH"])
    if found is None:
        raise ConfigError(
            f"{chain.path}: step {step.name}: expected a program, got {name!r}, which is not in "
            f"{chain.where(step) or 'the environment of this command'}. Install it there, or set `env` of the step."
        )
    return found


def start(chain: Chain, step: Step, lock: int) -> Running:
    """Start a step.

    Args:
        chain: the step's.
        step: what to run.
        lock: open file that the program inherits.

    Raises:
        ChainError: its server does not answer, or the program cannot be started.
    """
    where = chain.where(step)
    if where is not None and is_url(where):
        _require_answer(step, where)
    environment = environment_of(chain, step)
    log = chain.home / LOGS / f"{step.name}.log"
    make_folder(log.parent)
    with log.open("ab") as output:
        output.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(step.words)}\n".encode())
        output.flush()
        offset = output.tell()
        answers: IO[bytes] = output
        if step.stdout is not None:
            place = Path(chain.place(step.stdout))
            make_folder(place.parent)
            answers = place.open("wb")
        try:
            process = subprocess.Popen(
                [_program(chain, step, environment), *step.words[1:]],
                cwd=chain.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=answers,
                stderr=output,
                # Ctrl-C reaches this process alone, which then ends each group as a whole.
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise ChainError(f"step {step.name}: cannot start {step.words[0]}: {error.strerror or error}") from error
        finally:
            if answers is not output:
                answers.close()
    return Running(step, process, log, offset, time.monotonic())


def _require_answer(step: Step, url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=SERVER_SECONDS):
            return
    except urllib.error.HTTPError:
        return  # it answers, if only to ask for a key
    except (OSError, ValueError, http.client.HTTPException) as error:
        # What is wrong with a URL is told with its parts, which may be a password.
        reason = "no URL" if isinstance(error, http.client.InvalidURL) else getattr(error, "reason", error)
        raise ChainError(
            f"step {step.name}: expected an answer of the server {without_credentials(url)}, got: "
            f"{reason}. Start the server, then run the same command again."
        ) from None


def stop(running: Iterable[Running]) -> None:
    """End programs and all that they started: ask them; force them after :data:`GRACE_SECONDS`, or asked once more."""
    left = list(running)
    for each in left:
        _signal(each, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    with suppress(KeyboardInterrupt, SystemExit):
        while time.monotonic() < until and any(each.process.poll() is None for each in left):
            time.sleep(POLL_SECONDS)
    for each in left:
        _signal(each, signal.SIGKILL)
        each.process.wait()


def _signal(running: Running, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(running.process.pid, number)


def sweep(running: Running) -> None:
    """End what a program that failed has left behind."""
    _signal(running, signal.SIGKILL)


def tail(running: Running, lines: int) -> list[str]:
    """Return the last lines that a step has said, without progress bars that were written over."""
    try:
        with running.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(running.offset, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    shown = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return [for_terminal(line) for line in shown if line.strip()][-lines:]


def by_hand(chain: Chain, step: Step) -> str:
    """Return the line of a shell that repeats a step alone; a token, a key or a password is left to the shell."""
    given = chain.variables(step).items()
    parts = [f'{name}="${name}"' if is_secret(name) else f"{name}={shlex.quote(value)}" for name, value in given]
    where = chain.where(step)
    if where is not None and not is_url(where):
        parts.append(f"PATH={shlex.quote(str(Path(where, 'bin')))}:$PATH")
    output = f" > {shlex.quote(step.stdout)}" if step.stdout else ""
    return f"cd {shlex.quote(str(chain.folder))} && {' '.join([*parts, shlex.join(step.words)])}{output}"
