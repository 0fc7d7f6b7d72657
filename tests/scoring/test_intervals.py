"""Intervals, ratios and abbreviated thousands: the verdicts on them."""

import doctest

import pytest

from fusion_plugins.scoring import intervals
from fusion_plugins.scoring.intervals import as_interval, says_interval
from fusion_plugins.scoring.math_worker import judge


@pytest.mark.parametrize(
    ("gold", "response", "correct"),
    [
        ("2000", "The answer is 2k.", True),
        ("2000", "\\boxed{2k}", True),
        ("2k", "\\boxed{2000}", True),
        ("2000", "It costs 2k dollars.", True),
        ("2k", "\\boxed{2k}", True),
        ("2", "\\boxed{2k}", False),
        ("2000", "\\boxed{2.5k}", False),
        ("2500", "**2.5k**", True),
        ("2k+1", "\\boxed{2k+1}", True),
        ("k", "\\boxed{2k}", False),
        ("2000000", "The answer is 2M", True),
        ("2000", "about 2K people", True),
        ("3k", "The answer is $3k$", True),
        ("3:4", "The ratio is 3 : 4.", True),
        ("3:4", "The answer is 3 : 4.", True),
        ("3:4", "\\boxed{3:4}", True),
        ("3/4", "The ratio of boys to girls is 3 : 4.", True),
        ("3:4", "So the ratio is 3 to 4.", True),
        ("3:4", "So the ratio is 4 : 3.", False),
        ("3:4", "The ratio of boys to girls is 3:4, as shown.", True),
        ("3 : 4 : 5", "The sides are 3 : 4 : 5.", True),
        ("3:4:5", "The sides are 3:4:6.", False),
        ("3:4", "**3 : 4**", True),
        ("3：4", "答案是3：4。", True),
        ("4", "The ratio is 3 : 4.", False),
        ("3:4", "The ratio is $3 : 4$.", True),
        ("x<3", "\\boxed{(-\\infty,3)}", True),
        ("x<3", "The answer is (-oo, 3).", True),
        ("x < 3", "The solution is (-inf, 3)", True),
        ("(-\\infty,3)", "\\boxed{x<3}", True),
        ("x<=3", "\\boxed{(-\\infty,3]}", True),
        ("x<3", "\\boxed{(-\\infty,3]}", False),
        ("x>3", "\\boxed{(3,\\infty)}", True),
        ("x>3", "\\boxed{(3,oo)}", True),
        ("1<x<3", "\\boxed{(1,3)}", True),
        ("(1,3)", "\\boxed{1<x<3}", True),
        ("1 \\le x < 3", "\\boxed{[1,3)}", True),
        ("x<3", "\\boxed{(-\\infty,4)}", False),
        ("x<3", "so $x \\in (-\\infty, 3)$", True),
        ("x<1 or x>3", "\\boxed{(-\\infty,1)\\cup(3,\\infty)}", True),
        ("(-\\infty,1)\\cup(3,\\infty)", "\\boxed{x<1 \\text{ or } x>3}", True),
        ("x \\ge 2", "The answer is $[2, \\infty)$.", True),
        ("3>x", "\\boxed{(-\\infty,3)}", True),
        ("x \\geq \\frac12", "\\boxed{[\\frac{1}{2},\\infty)}", True),
        ("(3,4)", "\\boxed{(3,4)}", True),
        ("(-\\infty, 3)", "(-∞, 3)", True),
        ("x<3", "The answer is x<3.", True),
        ("x\\leq 3", "x≤3", True),
        ("x<3", "\\boxed{x>3}", False),
        ("2k", "\\boxed{k \\cdot 2}", True),
        ("2k", "\\boxed{3k}", False),
        (r"\$32,\!348", r"**$\$32,\!348$**", True),
        ("18", r"**$\$18$**", True),
        ("18", r"The answer is $\$19$.", False),
        ("12", "There are 4k apples", False),
        ("3:30 PM", "It is 15:30.", True),
        ("2:3:5", "The ratio is 4:6:10", True),
        ("5", "At 3:30 he had 5.", True),
        ("2", "The odds are 3 : 4, so 2.", True),
        ("7", "In the ratio 3 : 4 there are 7 parts.", True),
        ("x<3", "Since x<3, the answer is 2.", False),
        ("2", "Since x<3, the answer is 2.", True),
        ("2", "We need x < 3, hence x = 2.", True),
        ("5", "1 < 5 is true, so 5", True),
        ("18", "so 2:1 means 18", True),
        ("(3,\\infty)", "x>3 is the solution", True),
    ],
)
def test_intervals_ratios_and_thousands_are_compared_as_such(gold, response, correct):
    found = judge(gold, response)
    assert found["correct"] is correct, found


@pytest.mark.parametrize(
    "text", ["x^2 < 4", "x < y", "x + y < 3", "1 < x > 2", "(1,2,3)", "a < b < c", "", "<", "x", "<<", "(,)"]
)
def test_what_is_no_interval_of_numbers_is_none(text):
    assert as_interval(text) is None
    assert not says_interval(text)


def test_a_pair_is_an_interval_only_beside_one():
    assert as_interval("(1,3)") == ("(1,3)", "")
    assert not says_interval("(1,3)")


def test_examples_in_docstrings_run():
    result = doctest.testmod(intervals)
    assert result.attempted > 0
    assert result.failed == 0
