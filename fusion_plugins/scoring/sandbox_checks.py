"""Run one test: the program's names, then the checks on them; standard library only, inside the sandbox.

A test is a mapping with ``kind``: a program whose checks are counted (asserts, check, unittest, pytest), a call of a
function (calls), what a whole program reads and writes (stdio), or a program that passes when it ends (program).
"""

import ast
import builtins
import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

ERROR_CHARACTERS = 200
#: kinds of tests that pass without a check that is counted
_COUNT_NOTHING = ("program", "calls", "stdio")


def run_test(
    test: Mapping[str, Any], setup: str, counter: str, define: Callable[[types.ModuleType], None]
) -> tuple[str, str | None]:
    """Return verdict and error of a test.

    Args:
        test: what to run, with ``kind``.
        setup: a program that runs before the names are there, as far as it can, and as a whole behind them.
        counter: name of the function that the checks call.
        define: puts the names of the response into a module.
    """
    kind = test["kind"]
    # A registered module, because dataclasses and pickle look up the module of a class, and test files import it. Not
    # "__main__" but for a whole program, because responses put their demonstrations under that guard.
    name = "__main__" if kind == "stdio" else "solution"
    module = sys.modules[name] = types.ModuleType(name)
    # Both are compiled before anything runs: a test that is no program is "unreadable", whatever the response does.
    try:
        check, prepared = (
            compile(text, f"<{part}>", "exec", dont_inherit=True)
            for part, text in (("test", test.get("source", "")), ("setup", setup))
        )
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return "unreadable", describe(error)
    reached = [0]

    def count() -> None:
        reached[0] += 1

    setattr(builtins, counter, count)
    # Python's module "site" gives programs these two; it is not loaded here.
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)
    try:
        prepare(setup, module)
        define(module)
        exec(prepared, module.__dict__)
        failure = _run_kind(kind, test, check, module)
    except BaseException as error:
        # A whole program may end itself.
        if kind != "stdio" or not isinstance(error, SystemExit) or error.code not in (None, 0):
            return "failed", describe(error)
        failure = None
    if kind == "stdio":
        _end_of_program()
    if failure is not None:
        return "failed", failure[:ERROR_CHARACTERS]
    return ("passed" if reached[0] or kind in _COUNT_NOTHING else "unchecked"), None


def _run_kind(kind: str, test: Mapping[str, Any], check: types.CodeType, module: types.ModuleType) -> str | None:
    """Run a test behind the response; return why it fails, or raise what it raises."""
    if kind == "unittest":
        return _run_test_cases(check, test["classes"], module)
    if kind == "pytest":
        return _run_test_functions(test["source"], module)
    if kind == "calls":
        return _run_call(test, module)
    exec(check, module.__dict__)
    return None


def prepare(setup: str, module: types.ModuleType) -> None:
    """Run those statements of the setup that need nothing of the response: its annotations may need theirs."""
    for statement in ast.parse(setup).body:
        try:
            exec(compile(ast.Module([statement], []), "<setup>", "exec"), module.__dict__)
        except Exception:
            continue  # the whole setup runs again after the response, and then every error counts


def _run_test_cases(check: types.CodeType, classes: list[str], module: types.ModuleType) -> str | None:
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


def _run_test_functions(source: str, module: types.ModuleType) -> str | None:
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


def _run_call(test: Mapping[str, Any], module: types.ModuleType) -> str | None:
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
        both_nan = math.isnan(found) and math.isnan(expected)
        return both_nan or math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)
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


def _end_of_program() -> None:
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
