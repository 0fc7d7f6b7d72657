"""What runs inside the sandbox: each test in a process of its own, with one verdict for each.

Its source is passed to ``python -c``, so that no file of ours is visible inside; standard library only. Standard input:
a JSON object with ``code``, ``tests``, ``cpu_seconds`` and ``wall_seconds`` (per test) and ``total_seconds``. Standard
output: one JSON object with ``static`` (why the code does not compile) and ``tests``.

A verdict counts only with a word that is drawn for each test, so that neither ``exit(0)`` nor printing passes a test. A
program that searches the interpreter's memory for the word could still claim to have passed; it cannot do more.
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
    """Compile all sources, then run them one after the other in one namespace; write the verdict to ``result``."""
    # A registered module, because dataclasses and pickle look up the module of a class. Not "__main__", because
    # responses put their demonstrations under that guard.
    module = sys.modules["solution"] = types.ModuleType("solution")
    # All are compiled before any runs: a test that is no program is "unreadable", whatever the response does.
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
    """Write the word, the verdict and the error to the pipe ``result``."""
    text = None if error is None else f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
    os.write(result, json.dumps([word, verdict, text]).encode())


def run_apart(sources: list[str], job: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Run sources in a forked process and return its verdict, error and seconds."""
    word = secrets.token_hex(16)
    result_read, result_write = os.pipe()
    folder = f"/tmp/{secrets.token_hex(4)}"
    os.mkdir(folder)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            # A folder and a process for each test, so that no test sees what another has left.
            os.chdir(folder)
            nothing = os.open("/dev/null", os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
            os.close(result_read)
            seconds = job["cpu_seconds"]
            # SIGXCPU at the first limit; SIGKILL at the second for a program that ignores it.
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            run_program(sources, result_write, word)
        finally:
            # Without Python's clean-up, in which code of the program (atexit) would run after the verdict.
            os._exit(0)
    os.close(result_write)
    received = read_until(result_read, min(started + job["wall_seconds"], deadline))
    os.close(result_read)
    status, cpu_seconds = end_everything(child)
    seconds = round(time.monotonic() - started, 3)
    try:
        given, verdict, error = json.loads(received or b"")
    except (ValueError, TypeError):  # the program may have written anything, such as a number
        given, verdict, error = None, None, None
    if given != word:
        out_of_time = received is None or status == -signal.SIGXCPU or cpu_seconds >= job["cpu_seconds"]
        verdict, error = verdict_without_word(status, out_of_time)
    return {"verdict": verdict, "error": error, "seconds": seconds}


def verdict_without_word(status: int, out_of_time: bool) -> tuple[str, str]:
    """Return verdict and error of a process that wrote no verdict."""
    if out_of_time:
        return "timeout", "the time limit was reached"
    if status < 0:
        return "crashed", f"ended by signal {-status}"
    return "failed", "ended without reaching the end of the test"


def read_until(descriptor: int, deadline: float) -> bytes | None:
    """Return what is written until the pipe or one JSON list ends; None when the time is over and there is nothing."""
    received = b""
    while len(received) < 1 << 16:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return received or None
        data = os.read(descriptor, 4096)
        received += data
        # A verdict ends with "]". Children of the program hold the pipe open, so that its end may never come.
        if not data or data.endswith(b"]"):
            return received
    return received


def end_everything(child: int) -> tuple[int, float]:
    """Kill all processes but this one, which is process 1 here; return how ``child`` ended and its CPU seconds."""
    for _ in range(20):
        # A process that has written its verdict may end by itself, in 20 ms; WNOWAIT leaves it to be reaped below.
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
    # The kernel delivers a signal from inside to process 1 only if that has a handler. Python installs one for SIGINT,
    # with which a program could interrupt the runner.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path[:0] = json.loads(sys.argv[1])
    job = json.load(sys.stdin)
    deadline = time.monotonic() + job["total_seconds"]
    outcome: dict[str, Any] = {"static": None, "tests": []}
    # Apart as well, because compiling can take all memory; the code is a string in this program and does not run.
    checked = run_apart([f"compile({job['code']!r}, '<response>', 'exec')"], job, deadline)
    if checked["verdict"] != "passed":
        outcome["static"] = checked["error"]
    else:
        for test in job["tests"]:
            if time.monotonic() >= deadline:
                outcome["tests"].append({"verdict": "not_run", "error": "the total time was over", "seconds": 0.0})
            else:
                outcome["tests"].append(run_apart([job["code"], test], job, deadline))
    print(json.dumps(outcome), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
