"""Code: does the program in the response compile and pass its tests? Runs in :mod:`~fusion_plugins.scoring.sandbox`.

A response is correct when its code compiles and every test passes (FuseChat-3.0, section 4), and incorrect when a test
fails, crashes or runs out of time. There is no verdict where the sandbox fails or a test is no program. A sandbox that
cannot isolate is an error.
"""

import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.scoring.base import Row, Score
from fusion_plugins.scoring.sandbox import Limits, Outcome, Sandbox

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "python3", "py"}


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
        self.facts = {"limits": asdict(chosen), "packages": list(packages), "python": platform.python_version()}
        self._sandbox = Sandbox(chosen, packages)
        # Threads are enough: each one only waits for the processes of its sandbox.
        self._threads = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="sandbox")

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one verdict per row; ``tests`` of a row are those of :func:`list_tests`."""
        return list(self._threads.map(self._score_one, rows))

    def close(self) -> None:
        """End the programs that still run."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()

    def _score_one(self, row: Row) -> Score:
        given = row.get("tests")
        tests = list_tests(given)
        if not tests:
            return Score(reason="no tests")
        code = extract_code(row["response"], given.get("entry_point") if isinstance(given, dict) else None)
        if not code.strip():
            return Score(correct=False, reason="the response has no code")
        return _as_score(self._sandbox.run(code, tests))


def extract_code(response: str, entry_point: str | None = None) -> str:
    r"""Return the program in a response: a fenced block, or all of a response without fences.

    Of several Python blocks the last one that defines ``entry_point`` counts, else the longest; an unclosed last block
    (a response that was cut off) counts as it is.

    Example:
        >>> extract_code("Sure:\n```python\ndef f(): return 1\n```\nUsage:\n```python\nprint(f())\n```", "f")
        'def f(): return 1\n'
    """
    blocks = [body for language, body in _FENCE.findall(response) if language.lower() in _PYTHON]
    if not blocks:
        return "" if _FENCE.search(response) else response
    if entry_point is not None:
        defining = [block for block in blocks if re.search(rf"^(def|class)\s+{re.escape(entry_point)}\b", block, re.M)]
        if defining:
            return defining[-1]
    return max(blocks, key=len)


def list_tests(tests: Any) -> list[str]:
    r"""Return tests as programs, each to be run after the response's code.

    Args:
        tests: a program, a list of programs (for example single ``assert`` lines), None, or a mapping with ``test`` or
            ``tests`` (either of those), ``setup`` (code before each of them) and ``entry_point``. A single test that
            defines ``check(candidate)`` is called with the entry point, as in HumanEval.

    Raises:
        DataError: anything else.

    Example:
        >>> list_tests({"setup": "import math", "tests": ["assert f(0) == math.pi"]})
        ['import math\nassert f(0) == math.pi']
    """
    if tests is None:
        return []
    if isinstance(tests, str):
        return [tests] if tests.strip() else []
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return tests
    if isinstance(tests, dict) and ("test" in tests or "tests" in tests):
        setup = f"{tests['setup']}\n" if tests.get("setup") else ""
        programs = list_tests(tests.get("tests", tests.get("test")))
        name = tests.get("entry_point")
        call = f"\ncheck({name})\n" if name and len(programs) == 1 and "def check(" in programs[0] else ""
        return [setup + program + call for program in programs]
    raise DataError(
        "tests: expected a program, a list of programs, or a mapping with 'test' or 'tests' and perhaps 'setup' and "
        f"'entry_point', got {tests!r:.80}. Correct `tests` of the prompt."
    )


def _as_score(outcome: Outcome) -> Score:
    if outcome.failure is not None:
        return Score(reason=outcome.failure)
    if outcome.static is not None:
        return Score(correct=False, reason="does not compile", details={"error": outcome.static, "tests": []})
    verdicts = [test.verdict for test in outcome.tests]
    # A test that does not compile is a defect of the data, no verdict on the response.
    if "unreadable" in verdicts:
        return Score(reason="a test does not compile", details={"tests": verdicts})
    failed = [test for test in outcome.tests if test.verdict != "passed"]
    details = {"tests": verdicts, "error": failed[0].error if failed else None}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in sorted(Counter(verdicts).items()))
    return Score(correct=not failed, reason=f"tests: {counted}" if failed else None, details=details)
