"""Every format of tests: a right program passes, a wrong one fails, and nothing passes unchecked."""

import base64
import json
import pickle
import zlib

import pytest

from fusion_plugins.scoring.code_scorer import CodeScorer

RIGHT = "```python\ndef f(x):\n    return x + 1\n```"
WRONG = "```python\ndef f(x):\n    return x + 2\n```"
METHOD = "```python\nclass Solution:\n    def f(self, x: int) -> int:\n        return x + 1\n```"
WRONG_METHOD = METHOD.replace("+ 1", "+ 2")
TYPED = (
    "```python\nfrom __future__ import generator_stop\nclass Solution:\n"
    "    def f(self, nums: List[int], k: Optional[int] = None) -> DefaultDict[int, int]:\n"
    "        return [nums[0] + k] if math.inf > gcd(1, 2) == Counter('a')['a'] == len(collections.deque('a')) "
    "else nums\n```"
)
SUM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
DIFFERENCE = SUM.replace("a + b", "a - b")
TEST_CASES = """
import unittest
class TestCases(unittest.TestCase):
    def setUp(self):
        self.start = 1
    def test_next(self):
        self.assertEqual(f(self.start), 2)
    def test_other(self):
        with self.assertRaises(TypeError):
            f("a")
if __name__ == "__main__":
    unittest.main()
"""
EVALPLUS = """
def is_close(a, b):
    return abs(a - b) < 1e-6
def assertion(out, exp, atol):
    exact_match = out == exp
    if not exact_match and isinstance(exp, float):
        exact_match = is_close(out, exp)
    assert exact_match
def check(candidate):
    inputs = [[1], [2]]
    results = [2, 3]
    for i, (inp, exp) in enumerate(zip(inputs, results)):
        assertion(candidate(*inp), exp, 0)
"""
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
KODCODE = (
    "from solution import f\nimport pytest\n\n@pytest.mark.parametrize('x, y', [(1, 2), (-1, 0)])\n"
    "def test_values(x, y):\n    assert f(x) == y\n\n"
    "def test_error():\n    with pytest.raises(TypeError):\n        f('a')\n"
)


def packed(text, protocol=4):
    return base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


MERGE = "```python\nfrom heapq import *\nclass Solution:\n    def merge(self, x):\n        return sorted(x)\n```"
WRONG_MERGE = MERGE.replace("sorted(x)", "x")
WITH_HELPER = 'import math\n\ndef g(x):\n    return x\n\ndef f(x: "int") -> "int":\n    """Add one."""\n'
MULTIPLE = "def check(candidate):\n    assert candidate(1) == 2\n\ndef test_check():\n    check(f)\n\ntest_check()\n"
SELF_RUNNING = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 2)\n"
    "unittest.main()"
)
NO_ERROR = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        try:\n            f('a')\n"
    "        except TypeError:\n            pass\n        else:\n            self.fail('no error')"
)
EXITS = "```python\na, b = map(int, input().split())\nif a == 1:\n    print(3)\n    exit()\nprint(a + b)\nquit(0)\n```"
REVERSED = "```python\ndef f(x):\n    return x[::-1]\n```"

FORMATS = {
    # plain asserts
    "one assert": ("assert f(1) == 2", RIGHT, WRONG),
    "a list of asserts": (["assert f(1) == 2", "assert f(0) == 1"], RIGHT, WRONG),
    "JSON text of a list": ('["assert f(1) == 2"]', RIGHT, WRONG),
    "JSON text of a program": (json.dumps("assert f(1) == 2"), RIGHT, WRONG),
    "a program in pieces": (["x = 1", "assert f(x) == x + 1"], RIGHT, WRONG),
    "a loop": ("for x in range(3):\n    assert f(x) == x + 1", RIGHT, WRONG),
    "a test that raises by itself": ("if f(1) != 2:\n    raise ValueError", RIGHT, WRONG),
    "a test that wants an error": (
        "try:\n    f('a')\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError",
        RIGHT,
        "```python\ndef f(x):\n    return x\n```",
    ),
    "a helper in the setup": (
        {"setup": "def same(a, b):\n    assert a == b", "tests": ["same(f(1), 2)"]},
        RIGHT,
        WRONG,
    ),
    "test functions that the program calls": ("def test_f():\n    assert f(1) == 2\ntest_f()", RIGHT, WRONG),
    # MBPP
    "MBPP": ({"test_list": ["assert f(1) == 2"], "test_setup_code": "", "test_imports": ["import math"]}, RIGHT, WRONG),
    "MBPP, setup that needs the response": (
        {"test_setup_code": "one = f(0)", "test_list": ["assert f(one) == 2"]},
        RIGHT,
        WRONG,
    ),
    "MBPP, imports of the tests": (
        {"test_imports": ["import math"], "test_list": ["assert math.isclose(f(1), 2.0)"]},
        RIGHT,
        WRONG,
    ),
    # HumanEval
    "HumanEval": ({"test": CHECK, "entry_point": "f"}, RIGHT, WRONG),
    "HumanEval that calls check": ({"test": CHECK + "check(f)\n", "entry_point": "f"}, RIGHT, WRONG),
    "HumanEval+": ({"test": EVALPLUS, "entry_point": "f"}, RIGHT, WRONG),
    "two check programs": (
        {"tests": [CHECK, "def check(c):\n    assert c(7) == 8"], "entry_point": "f"},
        RIGHT,
        "```python\ndef f(x):\n    return 9 if x == 7 else x + 1\n```",
    ),
    "HumanEval as JSON text": (json.dumps({"test": CHECK, "entry_point": "f"}), RIGHT, WRONG),
    "HumanEval with a helper in the prompt": (
        {"prompt": WITH_HELPER, "test": "def check(c):\n    assert g(c(1)) == 2", "entry_point": "f"},
        RIGHT,
        WRONG,
    ),
    "HumanEval as JSON text, continued": (
        json.dumps({"prompt": WITH_HELPER, "test": CHECK, "entry_point": "f"}),
        "    return x + 1\n",
        "    return x + 2\n",
    ),
    "MultiPL-E": (MULTIPLE, RIGHT, WRONG),
    "MultiPL-E with an entry point": ({"test": MULTIPLE, "entry_point": "f"}, RIGHT, WRONG),
    # LeetCode
    "LeetCode, a method that is named as another function": (
        {
            "test": "def check(c):\n    assert c([2, 1]) == [1, 2]",
            "entry_point": "merge",
            "setup": "from heapq import *",
        },
        MERGE,
        WRONG_MERGE,
    ),
    "LeetCode": ({"test": CHECK, "entry_point": "Solution().f", "setup": "from typing import *"}, METHOD, WRONG_METHOD),
    "LeetCode, which imports what its answers use": (
        {"inputs": ["[1, 2]\n3"], "outputs": ["[4]"], "fn_name": "f"},
        TYPED,
        TYPED.replace("[nums[0] + k]", "nums"),
    ),
    "LeetCode by the method's name": ({"test": CHECK, "entry_point": "f"}, METHOD, WRONG_METHOD),
    "asserts on a class": ("s = Solution()\nassert s.f(1) == 2", METHOD, WRONG_METHOD),
    # BigCodeBench
    "BigCodeBench": ({"test": TEST_CASES, "entry_point": "f"}, RIGHT, WRONG),
    "test cases alone": (TEST_CASES, RIGHT, WRONG),
    "test cases by another name": (
        "from unittest import TestCase\nclass Checks(TestCase):\n"
        "    def test(self):\n        self.assertEqual(f(1), 2)",
        RIGHT,
        WRONG,
    ),
    "test cases that run by themselves": (SELF_RUNNING, RIGHT, WRONG),
    "test cases that want an error": (NO_ERROR, RIGHT, "```python\ndef f(x):\n    return x\n```"),
    # KodCode
    "a helper that is named check": (
        {"test": "def check(x, y):\n    assert f(x) == y\n\ndef test_a():\n    check(1, 2)", "entry_point": "f"},
        RIGHT,
        WRONG,
    ),
    "the module of the solution": (
        "import solution as s\ndef test_a():\n    assert s.f(1) == 2",
        f"{WRONG}\nCorrected:\n{RIGHT}\nUsage:\n```python\nprint('a longer block than the others', 1)\n```",
        WRONG,
    ),
    "test functions": ("def test_a():\n    assert f(1) == 2", RIGHT, WRONG),
    "KodCode": (KODCODE, RIGHT, WRONG),
    "a class of tests": ("class TestF:\n    def test_a(self):\n        assert f(1) == 2", RIGHT, WRONG),
    # APPS, TACO, LiveCodeBench: whole programs
    "stdin and stdout": ({"inputs": ["1 2\n", "5 5"], "outputs": ["3\n", "10"]}, SUM, DIFFERENCE),
    "JSON text of stdin and stdout": ('{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}', SUM, DIFFERENCE),
    "input_output": ({"input_output": '{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}'}, SUM, DIFFERENCE),
    "lists of lines": ({"inputs": [["1 2"]], "outputs": [["3"]]}, SUM, DIFFERENCE),
    "LiveCodeBench": (
        '[{"input": "1 2\\n", "output": "3\\n", "testtype": "stdin"}, {"input": "4 4", "output": "8"}]',
        SUM,
        DIFFERENCE,
    ),
    "a solution under the main guard": (
        {"inputs": ["1 2"], "outputs": ["3"]},
        "```python\nimport sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n"
        "if __name__ == '__main__':\n    main()\n    sys.exit(0)\n```",
        "```python\nimport sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n```",
    ),
    "output at exit and from a thread": (
        {"inputs": ["1 2"], "outputs": ["3\n4"]},
        "```python\nimport atexit, threading, time\na, b = map(int, input().split())\natexit.register(print, 4)\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print(a + b))).start()\n```",
        "```python\nimport sys, os\nprint(3, flush=True)\nos._exit(0)\n```",
    ),
    "numbers with a point": ({"inputs": ["1 3"], "outputs": ["0.33333333"]}, SUM.replace("+", "/"), SUM),
    "programs that exit": ({"inputs": ["1 2", "3 3"], "outputs": ["3", "6"]}, EXITS, EXITS.replace("+", "-")),
    "lists of inputs as CodeContests names them": ({"input": ["1 2"], "output": ["3"]}, SUM, DIFFERENCE),
    "one case": ({"input": "1 2", "output": "3"}, SUM, DIFFERENCE),
    # APPS, TACO, LiveCodeBench: functions
    "a text of digits": (
        {"fn_name": "f", "inputs": [["12"]], "outputs": ["21"]},
        REVERSED,
        REVERSED.replace("-1", "1"),
    ),
    "DeepCoder": (
        [{"input": "1", "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}],
        METHOD,
        WRONG_METHOD,
    ),
    "SYNTHETIC-1": ([{"type": "function_call", "fn_name": "f", "input": [1], "output": [2]}], RIGHT, WRONG),
    "SYNTHETIC-1, standard input": (
        [{"type": "stdin_stdout", "fn_name": None, "input": "1 2\n", "output": "3\n"}],
        SUM,
        DIFFERENCE,
    ),
    "results in mappings with text as keys": (
        {"fn_name": "f", "inputs": [["a"]], "outputs": [{"a": {"b": 1}}]},
        "```python\ndef f(x):\n    return {x: {'b': 1}}\n```",
        "```python\ndef f(x):\n    return {x: {'b': 2}}\n```",
    ),
    "a result that calls itself equal": (
        {"fn_name": "f", "inputs": [[1]], "outputs": [2]},
        RIGHT,
        "```python\nclass A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()\n```",
    ),
    "APPS function": ({"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], [3]]}, RIGHT, WRONG),
    "APPS method": ({"fn_name": "f", "inputs": [[1]], "outputs": [2]}, METHOD, WRONG_METHOD),
    "APPS as JSON text": ('{"fn_name": "f", "inputs": [[1]], "outputs": [2]}', METHOD, WRONG_METHOD),
    "LiveCodeBench function": (
        {"fn_name": "f", "tests": '[{"input": "[1, 2]\\n3", "output": "[1, 2, 3]", "testtype": "functional"}]'},
        "```python\nclass Solution:\n    def f(self, a, b):\n        return (*a, b)\n```",
        "```python\nclass Solution:\n    def f(self, a, b):\n        return [3, 2, 1]\n```",
    ),
    "LiveCodeBench function with metadata": (
        {
            "tests": [{"input": "1", "output": "2", "testtype": "functional"}],
            "metadata": '{"func_name": "f"}',
        },
        METHOD,
        WRONG_METHOD,
    ),
    "LiveCodeBench, public and private": (
        {
            "public_test_cases": '[{"input": "1 1", "output": "2", "testtype": "stdin"}]',
            "private_test_cases": packed('[{"input": "5 3", "output": "8", "testtype": "stdin"}]'),
            "metadata": "{}",
        },
        SUM,
        SUM.replace("a + b", "2"),
    ),
    "LiveCodeBench, functions, packed": (
        {
            "public_test_cases": "[]",
            "private_test_cases": packed('[{"input": "1", "output": "2", "testtype": "functional"}]'),
            "metadata": '{"func_name": "f"}',
        },
        METHOD,
        WRONG_METHOD,
    ),
    "packed tests alone": (packed('{"inputs": ["1 2"], "outputs": ["3"]}', 2), SUM, DIFFERENCE),
    "CodeContests": (
        {
            "public_tests": {"input": ["1 1\n"], "output": ["2\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["5 3\n"], "output": ["8\n"]},
        },
        SUM,
        SUM.replace("a + b", "2"),
    ),
    "LeetCodeDataset": (
        {
            "test": CHECK.replace("candidate(1)", "candidate(x = 1)"),
            "entry_point": "Solution().f",
            "input_output": [{"input": "x = 1", "output": "2"}],
        },
        METHOD,
        WRONG_METHOD,
    ),
    "arguments by name": ({"fn_name": "f", "inputs": ["x = 1"], "outputs": ["2"]}, METHOD, WRONG_METHOD),
    "results in mappings": (
        {"fn_name": "f", "inputs": [[2]], "outputs": [{"2": 0.5}]},
        "```python\ndef f(x):\n    return {x: 1 / x}\n```",
        "```python\ndef f(x):\n    return {x: x}\n```",
    ),
}


@pytest.fixture(scope="module")
def scorer(short_limits):
    made = CodeScorer(workers=2, **short_limits | {"cpu_seconds": 4, "wall_seconds": 20})
    yield made
    made.close()


def test_a_right_program_passes_and_a_wrong_one_fails_in_every_format(scorer):
    right = scorer.score([{"response": right, "tests": tests} for tests, right, _ in FORMATS.values()])
    wrong = scorer.score([{"response": wrong, "tests": tests} for tests, _, wrong in FORMATS.values()])
    found = {name: (a, b) for name, a, b in zip(FORMATS, right, wrong, strict=True)}
    assert {name: both for name, both in found.items() if (both[0].correct, both[1].correct) != (True, False)} == {}
    formats = {score.details["format"] for score in right}
    assert formats == {"asserts", "check", "unittest", "pytest", "stdio", "calls"}


UNCHECKED = {
    "check without an entry point": {"test": CHECK},
    "check that is empty": {"test": "def check(candidate):\n    pass", "entry_point": "f"},
    "check that checks nothing here": {
        "test": "def check(candidate):\n    for x in []:\n        assert candidate(x)",
        "entry_point": "f",
    },
    "test cases without a test": (
        "import unittest\nclass TestCases(unittest.TestCase):\n    def helper(self):\n        assert f(1)"
    ),
    "test cases that are skipped": (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    @unittest.skip('no')\n    def test(self):\n        assert f(1)"
    ),
    "a test file without a test": "class TestF:\n    def helper(self):\n        assert f(1) == 2",
    "asserts about nothing": "assert True",
    "asserts about numbers": "f(1)\nassert 1 == 1",
    "an assert of two values": "assert (f(1) == 2, 'why')",
    "test cases about nothing": (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_a(self):\n        f(1)\n        self.assertTrue(True)"
    ),
    "asserts whose failure is printed": "try:\n    assert f(1) == 2\nexcept AssertionError:\n    print('failed')",
    "a coroutine for pytest": "async def test_a():\n    assert await f(1) == 2",
    "asserts that are not reached": "if f(1) == 7:\n    assert f(2) == 3",
    "a call": ["f(1)"],
    "a print": "print(f(1) == 2)",
    "a bare comparison": "f(1) == 2",
    "imports": "import math",
    "a comment": "# assert f(1) == 2",
    "empty": "",
    "an empty list": [],
    "empty texts": ["", " "],
    "no cases": {"inputs": [], "outputs": []},
    "more inputs than outputs": {"inputs": ["1", "2"], "outputs": ["1"]},
    "a case without output": [{"input": "1"}],
    "functional cases without a name": [{"input": "1", "output": "2", "testtype": "functional"}],
    "a number": 3,
    "numbers": [1, 2],
    "another mapping": {"cases": 3},
    "an entry point that is none": {"test": CHECK, "entry_point": "a b"},
    "a test that does not compile": ["assert f(1) =="],
    "a pickle that is more than a text": {"private_test_cases": packed(["assert f(1) == 2"])},
    "a pickle that runs code": {"private_test_cases": packed(Harmful())},
    "a pickle that is cut off": {"private_test_cases": packed("[]")[:-8]},
    "cases that are none": {"public_test_cases": "three"},
    "a package that is not there": "import surely_not_installed\nassert f(1) == 2",
    "the metadata of LiveCodeBench without a name": {
        "tests": '[{"input": "1", "output": "2", "testtype": "functional"}]',
        "metadata": "{}",
    },
    "a package that the file needs": "import surely_not_installed\ndef test_a():\n    assert f(1) == 2",
    "a fixture that is not there": "def test_a(candidate):\n    assert candidate(1) == 2",
}


def test_tests_that_check_nothing_are_no_verdict_with_a_reason(scorer):
    rows = [{"response": response, "tests": tests} for tests in UNCHECKED.values() for response in (RIGHT, WRONG)]
    keys = [(name, right) for name in UNCHECKED for right in (True, False)]
    found = dict(zip(keys, scorer.score(rows), strict=True))
    assert {key: score for key, score in found.items() if score.correct is not None or not score.reason} == {}
    assert "expected a pickle of one text" in found["a pickle that runs code", True].reason
    assert found["check without an entry point", True].reason.endswith("add it to the tests")
    assert "surely_not_installed" in found["a package that is not there", True].reason


PRINTED = {
    "a number": "print(1)",
    "a verdict": "print('passed')\nprint('[\"word\", \"passed\", null]')",
    "an exit": "import sys\nsys.exit(0)",
    "an exit from a thread of the kernel": "import os\nos._exit(0)",
    "an exit when it is called": "import os\ndef f(x):\n    os._exit(0)",
    "a polite exit when it is called": "def f(x):\n    raise SystemExit(0)",
    "test cases of its own": (
        "import unittest\nclass TestCases(unittest.TestCase):\n    def test_a(self):\n        pass"
    ),
    "test functions of its own": "def test_a():\n    pass",
    "a check of its own": "def check(candidate):\n    pass\ncheck(1)",
}


@pytest.mark.parametrize(
    "name", ["one assert", "HumanEval", "BigCodeBench", "test functions", "stdin and stdout", "APPS function"]
)
def test_what_a_program_prints_or_how_it_ends_is_no_verdict(scorer, name):
    tests = FORMATS[name][0]
    scores = scorer.score([{"response": f"```python\n{code}\n```", "tests": tests} for code in PRINTED.values()])
    assert {way: score for way, score in zip(PRINTED, scores, strict=True) if score.correct is not False} == {}


def test_the_output_of_a_program_is_read_to_its_end(scorer):
    tests = {"inputs": [""], "outputs": ["1\n2"]}
    more = ["print(1)\nprint(2)", "print(1)", "print(1)\nprint(2)\nprint(3)", "print('1 2')", "print(1)\nprint(2)\n1/0"]
    scores = scorer.score([{"response": f"```python\n{code}\n```", "tests": tests} for code in more])
    assert [score.correct for score in scores] == [True, False, False, False, False]
    assert scores[1].details["error"] == "expected output '1\\n2', got '1'"


def test_a_program_whose_package_is_not_in_the_sandbox_is_not_incorrect(scorer):
    response = "```python\nimport surely_not_installed.part as s\ndef f(x):\n    return s.next(x)\n```"
    (score,) = scorer.score([{"response": response, "tests": "assert f(1) == 2"}])
    assert score.correct is None
    assert score.reason == "the package 'surely_not_installed' is not in the sandbox; see the option packages"


def test_setup_gives_what_annotations_of_the_response_need(scorer):
    tests = {"setup": "from typing import List\nclass Node:\n    pass", "tests": ["assert f([1]) == 1"]}
    response = "```python\ndef f(x: List[int], node: Node = None) -> int:\n    return x[0]\n```"
    (score,) = scorer.score([{"response": response, "tests": tests}])
    assert score.correct is True, score
