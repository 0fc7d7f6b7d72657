"""What runs inside the sandbox: each test in a process of its own, and one JSON verdict for each.

Its source is handed to ``python -c``; standard library only. Standard input: a JSON object with ``code``, ``tests``,
``cpu_seconds`` and ``wall_seconds`` (per test) and ``total_seconds``. Standard output: one JSON object.

A verdict counts only with a word that this process draws anew for each test, so neither ``exit(0)`` nor printing helps
a program to pass. A program that searches the interpreter's memory for the word could still cheat; it gets no further.
"""

import json
import os
import resource
import secrets
import select
import signal
import sys
import time
import types
from typing import Any

ERROR_CHARACTERS = 200


def run_program(sources: list[str], result: int, word: str) -> None:
    """Compile all sources, then run them one after the other in one namespace; report to ``result``."""
    # A registered module, because dataclasses and pickle look their own module up. Not "__main__": what a response
    # does under that name is a demonstration.
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        programs = [compile(source, f"<{name}>", "exec") for name, source in zip(("response", "test"), sources)]  # noqa: B905
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        report(result, word, "unreadable", error)
        return
    try:
        for program in programs:
            exec(program, module.__dict__)
    except BaseException as error:
        report(result, word, "failed", error)
    else:
        report(result, word, "passed", None)


def report(result: int, word: str, verdict: str, error: BaseException | None) -> None:
    """Write the word and the verdict."""
    text = None if error is None else f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
    os.write(result, json.dumps([word, verdict, text]).encode())


def run_apart(sources: list[str], job: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Run sources in a forked process and return its verdict."""
    word = secrets.token_hex(16)
    result_read, result_write = os.pipe()
    folder = f"/tmp/{secrets.token_hex(4)}"
    os.mkdir(folder)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(folder)
            nothing = os.open("/dev/null", os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            os.close(result_read)
            seconds = job["cpu_seconds"]
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            run_program(sources, result_write, word)
        finally:
            os._exit(0)
    os.close(result_write)
    said = read_until(result_read, min(started + job["wall_seconds"], deadline))
    os.close(result_read)
    status, cpu_seconds = end_everything(child)
    seconds = round(time.monotonic() - started, 3)
    try:
        given, verdict, error = json.loads(said or b"")
    except ValueError:
        given, verdict, error = None, None, None
    if given != word:
        out_of_time = said is None or status == -signal.SIGXCPU or cpu_seconds >= job["cpu_seconds"]
        verdict, error = verdict_without_word(status, out_of_time)
    return {"verdict": verdict, "error": error, "seconds": seconds}


def verdict_without_word(status: int, out_of_time: bool) -> tuple[str, str]:
    """Name what happened to a process that did not report."""
    if out_of_time:
        return "timeout", "the time limit was reached"
    if status < 0:
        return "crashed", f"ended by signal {-status}"
    return "failed", "ended without reaching the end of the test"


def read_until(descriptor: int, deadline: float) -> bytes | None:
    """Return everything until the end of the pipe; None when the time is over first."""
    said = b""
    while len(said) < 1 << 16:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return said or None
        data = os.read(descriptor, 4096)
        said += data
        if not data or data.endswith(b"]"):
            return said
    return said


def end_everything(child: int) -> tuple[int, float]:
    """Kill all processes but this one, which is process 1 here; return how ``child`` ended and its CPU seconds."""
    for _ in range(20):
        # A process that has reported gets the moment it needs to end by itself.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    status, cpu_seconds = 0, 0.0
    while True:
        try:
            ended, code, usage = os.wait3(0)
        except ChildProcessError:
            return status, cpu_seconds
        if ended == child:
            status, cpu_seconds = os.waitstatus_to_exitcode(code), usage.ru_utime + usage.ru_stime


def main() -> None:
    """Read the job, run it, write the verdicts."""
    # As process 1 we are deaf to signals from inside unless there is a handler: Python's own for Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path[:0] = json.loads(sys.argv[1])
    job = json.load(sys.stdin)
    deadline = time.monotonic() + job["total_seconds"]
    outcome: dict[str, Any] = {"static": None, "tests": []}
    checked = run_apart_check(job, deadline)
    if checked["verdict"] != "passed":
        outcome["static"] = checked["error"]
    else:
        for test in job["tests"]:
            if time.monotonic() >= deadline:
                outcome["tests"].append({"verdict": "not_run", "error": "the total time was over", "seconds": 0.0})
            else:
                outcome["tests"].append(run_apart([job["code"], test], job, deadline))
    print(json.dumps(outcome), flush=True)  # noqa: T201


def run_apart_check(job: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Compile the response, without running any of it."""
    source = f"compile({job['code']!r}, '<response>', 'exec')"
    return run_apart([source], job, deadline)


if __name__ == "__main__":
    main()
