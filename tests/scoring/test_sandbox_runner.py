"""Verdicts of the runner on real programs, inside the real sandbox."""

import pytest

from fusion_plugins.scoring.sandbox import Limits, Sandbox


def test_every_test_has_its_own_verdict(sandbox):
    code = "def f(x):\n    if x == 3:\n        while True:\n            pass\n    return x + 1\n"
    tests = [
        "assert f(1) == 2",
        "assert f(1) == 3",
        "f()",
        "f(3)",
        "import ctypes; ctypes.string_at(0)",
        "assert f(2) == 3",
    ]
    outcome = sandbox.run(code, tests)
    assert [test.verdict for test in outcome.tests] == ["passed", "failed", "failed", "timeout", "crashed", "passed"]
    assert outcome.tests[1].error.startswith("AssertionError")
    assert "missing 1 required positional argument" in outcome.tests[2].error


def test_tests_do_not_see_what_others_did(sandbox):
    write = "open('left', 'w').write('x'); STATE.append(1); assert len(STATE) == 1"
    outcome = sandbox.run("STATE = []", [write, write, "import os; assert os.listdir('.') == []"])
    assert [test.verdict for test in outcome.tests] == ["passed"] * 3


@pytest.mark.parametrize(
    "end",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        "import os, signal; os.kill(os.getpid(), 9)",
    ],
)
def test_a_program_that_ends_itself_does_not_pass(sandbox, end):
    (test,) = sandbox.run(end, ["assert False"]).tests
    assert test.verdict in ("failed", "crashed")


def test_a_program_that_writes_verdicts_does_not_pass(sandbox):
    forge = (
        "import os\n"
        "for fd in range(64):\n"
        '    for text in (b\'["word", "passed", null]\', b\'{"static": null, "tests": [{"verdict": "passed"}]}\'):\n'
        "        try:\n            os.write(fd, text)\n        except OSError:\n            pass\n"
        "os._exit(0)\n"
    )
    (test,) = sandbox.run(forge, ["assert False"]).tests
    assert test.verdict == "failed"


@pytest.mark.parametrize("text", [b"3", b"null", b"[1, 2]", b'{"a": 1, "b": 2, "c": 3}', b"\xff"])
def test_whatever_a_program_writes_for_a_verdict_is_a_verdict_of_false(sandbox, text):
    write = f"        os.write(fd, {text!r})\n"
    forge = "import os\nfor fd in range(64):\n    try:\n" + write + "    except OSError:\n        pass\nos._exit(0)\n"
    outcome = sandbox.run(forge, ["assert False", "pass"])
    assert outcome.failure is None
    assert [test.verdict for test in outcome.tests] == ["failed", "failed"]


def test_code_under_the_main_guard_does_not_run_and_dataclasses_work(sandbox):
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "if __name__ == '__main__':\n    raise RuntimeError\n"
    )
    (test,) = sandbox.run(code, ["assert Point(3).x == 3"]).tests
    assert test.verdict == "passed", test


def test_total_time_ends_the_tests_that_are_left():
    limited = Sandbox(Limits(cpu_seconds=1, wall_seconds=2, total_seconds=1))
    outcome = limited.run("import time", ["time.sleep(5)", "pass"])
    assert [test.verdict for test in outcome.tests] == ["timeout", "not_run"]
