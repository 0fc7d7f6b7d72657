"""What runs inside the sandbox: each test in a process of its own, with one verdict for each.

Its source is passed to ``python -c``, so that no file of ours is visible inside; standard library only. Standard input:
a JSON object with ``code``, ``setup``, ``tests``, ``counter``, ``cpu_seconds`` and ``wall_seconds`` (per test) and
``total_seconds``. Standard output: one JSON object with ``static`` (why the code does not compile) and ``tests``.

A test is a program, or a mapping with ``kind``: a program whose checks are counted (asserts, check, unittest, pytest),
a call of a function (calls), or what a whole program reads and writes (stdio), which is compared outside its process.

A verdict counts only with a word that is drawn for each test, so that neither ``exit(0)`` nor printing passes a test. A
program that searches the interpreter's memory for the word could still claim to have passed; it cannot do more.
"""

import ast
import builtins
import json
import math
import os
import re
import resource
import secrets
import select
import signal
import sys
import tempfile
import time
import types
from itertools import chain
from typing import Any

ERROR_CHARACTERS = 200


def run_test(job: dict[str, Any], test: Any) -> tuple[str, str | None]:
    """Run the setup, the response and one test in one namespace; return verdict and error."""
    kind, source = (test["kind"], test.get("source", "")) if isinstance(test, dict) else ("program", test)
    # A registered module, because dataclasses and pickle look up the module of a class, and test files import it. Not
    # "__main__" but for a whole program, because responses put their demonstrations under that guard.
    name = "__main__" if kind == "stdio" else "solution"
    module = sys.modules[name] = types.ModuleType(name)
    # All are compiled before any runs: a test that is no program is "unreadable", whatever the response does.
    try:
        check, setup, code = (
            compile(text, f"<{part}>", "exec", dont_inherit=True)
            for part, text in (("test", source), ("setup", job["setup"]), ("response", job["code"]))
        )
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return "unreadable", describe(error)
    reached = [0]

    def count() -> None:
        reached[0] += 1

    setattr(builtins, job["counter"], count)
    # Python's module "site" gives programs these two; it is not loaded here.
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)
    try:
        prepare(job["setup"], module)
        exec(code, module.__dict__)
        exec(setup, module.__dict__)
        failure = run_kind(kind, test, check, module)
    except BaseException as error:
        # A whole program may end itself.
        if kind != "stdio" or not isinstance(error, SystemExit) or error.code not in (None, 0):
            return "failed", describe(error)
        failure = None
    if kind == "stdio":
        end_of_program()
    if failure is not None:
        return "failed", failure[:ERROR_CHARACTERS]
    return ("passed" if reached[0] or kind in ("program", "calls", "stdio") else "unchecked"), None


def run_kind(kind: str, test: Any, check: types.CodeType, module: types.ModuleType) -> str | None:
    """Run a test after the response; return why it fails, or raise what it raises."""
    if kind == "unittest":
        return run_test_cases(check, test["classes"], module)
    if kind == "pytest":
        return run_test_functions(test["source"], module)
    if kind == "calls":
        return run_call(test, module)
    exec(check, module.__dict__)
    return None


def prepare(setup: str, module: types.ModuleType) -> None:
    """Run those statements of the setup that need nothing of the response: its annotations may need theirs."""
    for statement in ast.parse(setup).body:
        try:
            exec(compile(ast.Module([statement], []), "<setup>", "exec"), module.__dict__)
        except Exception:
            continue  # the whole setup runs again after the response, and then every error counts


def run_test_cases(check: types.CodeType, classes: list[str], module: types.ModuleType) -> str | None:
    """Run the test cases that a program defines with unittest; return the last line of the first failure."""
    import unittest

    # The program may run its tests by itself at the end; here they run below.
    unittest.main = lambda *args, **kwargs: None  # type: ignore[assignment, misc]
    exec(check, module.__dict__)
    found = [module.__dict__[name] for name in classes]
    cases = [case for case in found if isinstance(case, type) and issubclass(case, unittest.TestCase)]
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    result = unittest.TestSuite(load(case) for case in cases).run(unittest.TestResult())
    problems = [text for _, text in result.failures + result.errors]
    if problems:
        return problems[0].strip().rpartition("\n")[2]
    return "unexpected success" if result.unexpectedSuccesses else None


def run_test_functions(source: str, module: types.ModuleType) -> str | None:
    """Run a test file with pytest; return the last line of the first failure."""
    import pytest

    # The tests may use the names of the response with or without importing them.
    names = f"globals().update({{k: v for k, v in vars(__import__({module.__name__!r})).items() if k[:2] != '__'}})\n"
    with open("test_solution.py", "w") as file:
        file.write(names + source)
    problems = []

    class Reports:
        def pytest_collectreport(self, report: Any) -> None:
            self.pytest_runtest_logreport(report)

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                crash, errorstring = (getattr(report.longrepr, name, None) for name in ("reprcrash", "errorstring"))
                text = crash.message if crash else errorstring
                problems.append(text.strip().partition("\n")[0] if text else str(report.longrepr).rpartition("\n")[2])

    options = ["--noconftest", "-c", "/dev/null", "--rootdir", "."]
    options += [word for name in ("cacheprovider", "faulthandler", "terminal") for word in ("-p", f"no:{name}")]
    status = pytest.main([*options, "test_solution.py"], plugins=[Reports()])
    if problems:
        return problems[0]
    # 5: there was nothing to run
    return None if status in (0, 5) else f"pytest ended with status {int(status)}"


def run_call(test: dict[str, Any], module: types.ModuleType) -> str | None:
    """Call a function of the response; return how its result differs from the expected one."""
    found = eval(test["function"], module.__dict__)(*test["arguments"])
    if any(same_value(found, expected) for expected in test["results"]):
        return None
    return f"expected {test['results'][0]!r:.80}, got {found!r:.80}"


def same_value(found: Any, expected: Any) -> bool:
    """Return whether a result is the expected one: tuples count as lists, floats are compared to six digits."""
    if isinstance(expected, list | tuple):
        same_length = isinstance(found, list | tuple) and len(found) == len(expected)
        return same_length and all(map(same_value, found, expected))
    if isinstance(expected, dict):
        # JSON turns the keys of a mapping into text.
        texts = {str(key): value for key, value in found.items()} if isinstance(found, dict) else None
        return (
            texts is not None
            and texts.keys() == {str(key) for key in expected}
            and all(same_value(texts[str(key)], value) for key, value in expected.items())
        )
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
    # A class of the response may call itself equal to everything.
    return not isinstance(type(found).__eq__, types.FunctionType) and bool(found == expected)


def same_output(found: str, expected: str) -> bool:
    """Return whether a program wrote what was expected: line by line, where numbers with a point may differ by 1e-6."""
    lines, others = ([line.split() for line in text.strip().splitlines()] for text in (found, expected))
    if [len(line) for line in lines] != [len(line) for line in others]:
        return False
    words, expectations = (chain.from_iterable(text) for text in (lines, others))
    return all(map(same_word, words, expectations))


def same_word(found: str, expected: str) -> bool:
    """Return whether two words are equal, or numbers of which one has a point and which differ by at most 1e-6."""
    if found == expected:
        return True
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?"
    if not all(re.fullmatch(number, word) for word in (found, expected)) or not re.search(r"[.eE]", found + expected):
        return False
    return math.isclose(float(found), float(expected), rel_tol=1e-6, abs_tol=1e-6)


def end_of_program() -> None:
    """Do what an interpreter does at its end: wait for threads, run exit functions, write what is left."""
    import atexit
    import threading

    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]


def report(result: int, word: str, verdict: str, error: str | None) -> None:
    """Write the word, the verdict and the error to the pipe ``result``."""
    os.write(result, json.dumps([word, verdict, error]).encode())


def run_apart(job: dict[str, Any], test: Any, deadline: float) -> dict[str, Any]:
    """Run the response and one test in a forked process and return its verdict, error and seconds."""
    word = secrets.token_hex(16)
    result_read, result_write = os.pipe()
    folder = f"/tmp/{secrets.token_hex(4)}"
    os.mkdir(folder)
    stdio = test if isinstance(test, dict) and test["kind"] == "stdio" else None
    # Files without a name: the program reads one and writes the other, and nothing of them is left behind.
    given = tempfile.TemporaryFile() if stdio else open("/dev/null", "rb")
    written = tempfile.TemporaryFile() if stdio else open("/dev/null", "wb")
    if stdio:
        given.write(stdio["stdin"].encode())
        given.seek(0)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            # A folder and a process for each test, so that no test sees what another has left.
            os.chdir(folder)
            nothing = os.open("/dev/null", os.O_RDWR)
            for descriptor, target in enumerate((given.fileno(), written.fileno(), nothing)):
                os.dup2(target, descriptor)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
            os.close(result_read)
            seconds = job["cpu_seconds"]
            # SIGXCPU at the first limit; SIGKILL at the second for a program that ignores it.
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            report(result_write, word, *run_test(job, test))
        finally:
            # Without Python's clean-up, in which code of the program (atexit) would run after the verdict.
            os._exit(0)
    os.close(result_write)
    received = read_until(result_read, min(started + job["wall_seconds"], deadline))
    os.close(result_read)
    status, cpu_seconds = end_everything(child)
    seconds = round(time.monotonic() - started, 3)
    try:
        answer, verdict, error = json.loads(received or b"")
    except (ValueError, TypeError):  # the program may have written anything, such as a number
        answer, verdict, error = None, None, None
    if answer != word:
        out_of_time = received is None or status == -signal.SIGXCPU or cpu_seconds >= job["cpu_seconds"]
        verdict, error = verdict_without_word(status, out_of_time)
        # What a whole program has written decides, also where it ends itself.
        if stdio and verdict == "failed" and status == 0:
            verdict, error = "passed", None
    if stdio and verdict == "passed":
        written.seek(0)
        output = written.read().decode(errors="replace")
        if not same_output(output, stdio["stdout"]):
            verdict, error = "failed", f"expected output {stdio['stdout'].strip()!r:.80}, got {output.strip()!r:.80}"
    given.close()
    written.close()
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
    checked = run_apart(job | {"code": "", "setup": ""}, f"compile({job['code']!r}, '<response>', 'exec')", deadline)
    if checked["verdict"] != "passed":
        outcome["static"] = checked["error"]
    else:
        for test in job["tests"]:
            if time.monotonic() >= deadline:
                outcome["tests"].append({"verdict": "not_run", "error": "the total time was over", "seconds": 0.0})
            else:
                outcome["tests"].append(run_apart(job, test, deadline))
    print(json.dumps(outcome), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
