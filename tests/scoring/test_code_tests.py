"""Tests as programs, and the checks in them."""

import doctest

import pytest

from fusion_plugins.scoring import check_counts, code_tests
from fusion_plugins.scoring.check_counts import COUNTER, count_checks
from fusion_plugins.scoring.code_tests import read_tests


@pytest.mark.parametrize(
    ("source", "checks"),
    [
        ("assert f(1)", 1),
        ("assert True", 0),
        ("assert f(1), 'no'\nassert f(2)", 2),
        ("numpy.testing.assert_allclose(f(1), 2)", 1),
        ("class T(TestCase):\n    def test(self):\n        self.assertTrue(f(1))\n        self.fail()", 2),
        ("with pytest.raises(ValueError):\n    f(1)", 1),
        ("with open('x') as file:\n    f(file)", 0),
        ("if f(1) != 2:\n    raise ValueError", 1),
        ("try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass", 1),
        ("for x in f(3):\n    print(x)", 0),
        ("def helper():\n    raise ValueError\nhelper", 0),
        ("match f(1):\n    case 2:\n        pass\n    case _:\n        raise ValueError", 1),
    ],
)
def test_checks_are_counted_where_they_can_fail(source, checks):
    counted, found = count_checks(source)
    assert found == checks
    assert counted.count(COUNTER) == checks


def test_a_check_is_reached_before_it_fails():
    reached = []
    with pytest.raises(AssertionError):
        exec(count_checks("for x in (1, 0):\n    assert x")[0], {COUNTER: lambda: reached.append(1)})
    assert reached == [1, 1]


def test_the_names_that_the_response_must_define_are_those_that_the_tests_read():
    assert read_tests("import math\nx = g(2)\nassert math.isclose(f(x), 1)").needed == {"f", "g"}
    assert read_tests({"test": "def check(c):\n    assert c(1)", "entry_point": "Solution().f"}).needed == {"Solution"}
    assert read_tests({"setup": "class Node: pass", "tests": ["assert f(Node())"]}).needed == {"f"}
    assert read_tests("from solution import f\ndef test():\n    assert f(1)").needed == {"f"}
    assert read_tests({"inputs": ["1"], "outputs": ["2"]}).needed == set()


def test_every_part_of_a_list_is_a_test_unless_it_checks_nothing_by_itself():
    assert len(read_tests(["assert f(1)", "assert f(2)"]).tests) == 2
    assert len(read_tests(["import math", "assert f(math.pi)", "assert f(2)"]).tests) == 1


def test_examples_in_docstrings_run():
    for module in (code_tests, check_counts):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
