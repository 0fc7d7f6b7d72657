"""One test of a program in one of three modes: what its processes get to read, and what their end and results say.

``outside``: the checks run in a process of their own. ``inside``: they run in the program's. ``stdio``: the program is
run as a whole, and what it wrote is compared here.
"""

import contextlib
import json
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_plugins.scoring.check_counts import COUNTER
from fusion_plugins.scoring.sandbox_checks import same_output
from fusion_plugins.scoring.sandbox_limits import Limits
from fusion_plugins.scoring.sandbox_worker import Worker

#: exit status of checks whose program has ended
PROGRAM_ENDED = 3
Verdict = tuple[str, str | None]


def run_in(
    mode: str, worker: Worker, code: str, test: Mapping[str, Any], setup: str, limits: Limits, deadline: float
) -> Verdict:
    """Return verdict and error of a test. Verdict ``static``: the program does not compile; ``inside``: run it there.

    Raises:
        Failed: the sandbox has no result.
        OSError: there is no memory for what is to be run.
    """
    word = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        files = [_file(content, stack) for content in _contents(mode, word, code, test, setup)]
        ended, reached = worker.ask(mode, files, limits, deadline)
        results = [os.pread(file, os.fstat(file).st_size, 0) for file in files]
    if reached == "memory":
        return "crashed", f"used more than {limits.memory >> 20} MiB of memory in all its processes"
    said = _said(results[1])
    if said.get("static"):
        return "static", str(said["static"])[:200]
    if mode == "outside":
        return _outside(ended, reached, _said(results[3]), limits)
    found = (str(said.get("verdict")), said.get("error")) if said.get("word") == word else None
    if mode == "inside":
        return found or _without_verdict(ended["program"], reached, limits)
    return _stdio(ended, reached, found, results[3].decode(errors="replace"), test["stdout"], limits)


def _contents(mode: str, word: str, code: str, test: Mapping[str, Any], setup: str) -> list[str]:
    """Return what the files of a test hold: job and result of the program, then of the checks, or input and output."""
    known = {"counter": COUNTER, "test": {**test, "outside": None}}
    program: dict[str, Any] = {"code": code, "setup": setup}
    if mode == "inside":
        return [json.dumps(program | known | {"word": word}), ""]
    if mode == "stdio":
        about = {"counter": COUNTER, "word": word, "test": {"kind": "stdio"}}
        return [json.dumps(program | about), "", test["stdin"], ""]
    return [json.dumps(program), "", json.dumps(known | dict(test["outside"])), ""]


def _file(content: str, stack: contextlib.ExitStack) -> int:
    """Return a file in memory without a name: a full disk is no concern, and nothing is left behind."""
    made = os.memfd_create("sandbox")
    stack.callback(os.close, made)
    with open(made, "wb", closefd=False) as file:
        file.write(content.encode(errors="surrogatepass"))
    os.lseek(made, 0, os.SEEK_SET)
    return made


def _outside(ended: Mapping[str, Any], reached: str | None, said: Mapping[str, Any], limits: Limits) -> Verdict:
    if "verdict" not in said:
        return _without_verdict(ended["checks"], reached, limits)
    if ended["checks"][0] == PROGRAM_ENDED:
        return _without_verdict(ended["program"], reached, limits)
    return said["verdict"], said["error"]


def _stdio(
    ended: Mapping[str, Any], reached: str | None, found: Verdict | None, output: str, expected: str, limits: Limits
) -> Verdict:
    verdict, error = found or _without_verdict(ended["program"], reached, limits)
    # What a whole program has written decides, also where it ends itself.
    if found is None and verdict == "failed" and ended["program"][0] == 0:
        verdict, error = "passed", None
    if verdict == "passed" and not same_output(output, expected):
        return "failed", f"expected output {expected.strip()!r:.80}, got {output.strip()!r:.80}"
    return verdict, error


def _without_verdict(ended: Sequence[Any], reached: str | None, limits: Limits) -> Verdict:
    """Return verdict and error of a process that wrote no verdict."""
    status, cpu_seconds = ended
    if reached == "time" or status == -signal.SIGXCPU or cpu_seconds >= limits.cpu_seconds:
        return "timeout", "the time limit was reached"
    if status < 0:
        return "crashed", f"ended by signal {-status}"
    return "failed", "ended without reaching the end of the test"


def _said(result: bytes) -> dict[str, Any]:
    """Return what a process has written as its result; nothing where it is none."""
    try:
        found = json.loads(result)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
