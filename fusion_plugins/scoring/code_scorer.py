"""Code: does the program in the response compile and pass its tests? Runs in :mod:`~fusion_plugins.scoring.sandbox`.

A response is correct when its code compiles, every test passes (FuseChat-3.0, section 4) and at least one check was
reached, and incorrect when a test fails, crashes or runs out of time. There is no verdict where the sandbox fails, the
format of the tests is not recognised, or a test is no program, reaches no check or needs a package that is not there. A
sandbox that cannot isolate is an error.
"""

import importlib.util
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.install import install_command
from fusion_plugins.scoring.base import Row, Score
from fusion_plugins.scoring.code_tests import Suite, read_tests
from fusion_plugins.scoring.programs import extract_code
from fusion_plugins.scoring.sandbox import Outcome, Sandbox, TestVerdict
from fusion_plugins.scoring.sandbox_limits import Limits
from fusion_plugins.scoring.trust import apart

#: what pytest consists of
_PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")


class CodeScorer:
    """Runs the program of a response against the tests of its prompt.

    Args:
        workers: programs that run at one time; one per CPU core by default.
        packages: folders that programs may import from; without any, only the standard library.
        limits: fields of :class:`~fusion_plugins.scoring.sandbox.Limits`, for example ``cpu_seconds`` or ``memory``.

    Raises:
        ConfigError: a limit that does not exist.
        ScoringError: the sandbox cannot isolate here; nothing is run then.
    """

    domains: frozenset[str] | None = frozenset({"code"})

    def __init__(self, *, workers: int | None = None, packages: Sequence[str] = (), **limits: Any) -> None:
        known = asdict(Limits())
        wrong = [key for key, value in limits.items() if key not in known or not isinstance(value, int | float)]
        if wrong:
            raise ConfigError(
                f"scorers.code: expected packages, workers and numbers for the limits {', '.join(known)}, got "
                f"{', '.join(f'{key}: {limits[key]!r}' for key in wrong)}. Correct or remove it."
            )
        chosen = Limits(**limits)
        missing = [path for path in packages if not os.path.isdir(path)]
        if missing:
            raise ConfigError(
                f"scorers.code.packages: expected folders, got {', '.join(missing)}, where there is none. Install the "
                "packages with `pip install --target FOLDER`, or leave the folder out."
            )
        self.facts = {
            "limits": asdict(chosen),
            "packages": list(packages),
            "python": platform.python_version(),
            # Changes where the same response and tests may get another verdict than before.
            "rules": 5,
        }
        self._pytest = _pytest_folders()
        self._sandbox = Sandbox(chosen, packages, modules=self._pytest)
        # Threads are enough: each one only waits for the processes of its sandbox.
        self._threads = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="sandbox")

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one verdict per row; ``tests`` of a row are those of :func:`~.code_tests.read_tests`."""
        return list(self._threads.map(self._score_one, rows))

    def processes(self) -> list[int]:
        """Return the warm processes of the sandbox, for those who measure it."""
        return self._sandbox.processes()

    def close(self) -> None:
        """End the programs that still run."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

    def _score_one(self, row: Row) -> Score:
        try:
            suite = _suite(json.dumps(row.get("tests")))
        except (DataError, TypeError, ValueError) as error:
            return Score(reason=f"the tests cannot be read: {error}")
        if suite is None:
            return Score(reason="no tests")
        if suite.format == "pytest" and not self._pytest:
            return Score(reason=f"the tests are test functions, which need pytest: {install_command('score')}")
        code = extract_code(row["response"], suite.needed, suite.prompt)
        if not code.strip():
            return Score(correct=False, reason="the response has no code", details={"format": suite.format})
        return _as_score(suite, self._sandbox.run(code, suite.tests, suite.setup))


@lru_cache(256)
def _suite(tests: str) -> Suite | None:
    """Return the tests of a prompt, which all its responses share."""
    suite = read_tests(json.loads(tests))
    return suite and replace(suite, tests=apart(suite))


def _as_score(suite: Suite, outcome: Outcome) -> Score:
    if outcome.failure is not None:
        return Score(reason=outcome.failure, details={"format": suite.format})
    details: dict[str, Any] = {"format": suite.format, "tests": [test.verdict for test in outcome.tests]}
    # A program can deceive checks that run beside it; it cannot reach those that run outside.
    details["trust"] = "inside" if any(test.trust == "inside" for test in outcome.tests) else "outside"
    if outcome.static is not None:
        return Score(correct=False, reason="does not compile", details={**details, "error": outcome.static})
    failed = [test for test in outcome.tests if test.verdict != "passed"]
    if not failed:
        return Score(correct=True, details={**details, "error": None})
    details["error"] = failed[0].error
    defect = next(filter(None, (_defect(suite, test) for test in failed)), None)
    if defect is not None:
        return Score(reason=defect, details=details)
    counted = ", ".join(f"{count} {verdict}" for verdict, count in sorted(Counter(details["tests"]).items()))
    return Score(correct=False, reason=f"tests: {counted}", details=details)


def _defect(suite: Suite, test: TestVerdict) -> str | None:
    """Return why a test that has not passed says nothing about the response; None where it does."""
    if test.verdict == "unreadable":
        return "a test does not compile"
    if test.verdict == "unchecked":
        return "the tests reached no check"
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", test.error or "")
    if missing:
        return f"the package {missing[1]!r} is not in the sandbox; see the option packages"
    if re.search(r"fixture '|async def functions are not natively", test.error or "") and suite.format == "pytest":
        return f"the tests need what pytest does not have: {test.error}"
    return None


def _pytest_folders() -> list[str]:
    """Return the folders and files of pytest and what it imports; empty where pytest is not installed."""
    specs = [importlib.util.find_spec(name) for name in _PYTEST]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or [spec.origin or ""]]
    return places if specs[0] else []
