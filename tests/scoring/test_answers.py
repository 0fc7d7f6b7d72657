"""Answers in responses and references, found by text alone."""

import doctest

import pytest

from fusion_plugins.scoring import answers
from fusion_plugins.scoring.answers import final_part, find_answer, gold_answer


@pytest.mark.parametrize(
    ("response", "text", "how"),
    [
        (r"\boxed{a{b}c} \boxed{unclosed", "a{b}c", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"\boxed{5}, put it into \boxed{}. \boxed{7", "5", "boxed"),
        (r"\fbox{2} and \boxed 3", "2, 3", "boxed"),
        (r"So \boxed{6}. I used \boxed as asked.", "6", "boxed"),
        (r"First \boxed{3}, but then \boxed{4}.", "4", "boxed"),
        (r"$x=\boxed{3}$ or $x=\boxed{-1}$", "3, -1", "boxed"),
        (r"\boxed{3} 和 \boxed{-1}", "3, -1", "boxed"),
        (r"\boxed{5}, that is \boxed{5}", "5", "boxed"),
        ("#### $1,200 per day", "$1,200 per day", "hashes"),
        ("#### 3. Add the numbers\n3 + 4\n#### 7 apples", "7 apples", "hashes"),
        ("The answer is 7.\n\n#### 3 key points", "7", "phrase"),
        ("The answer is 5.\n#### 7", "7", "hashes"),
        ("The answer is 90/3=30", "90/3=30", "phrase"),
        ("**Answer:** 12 apples", "12 apples", "phrase"),
        ("The answer is **12**.", "12", "phrase"),
        ("The final answer to the question is: $\\frac12$.", "\\frac12", "phrase"),
        ("The answer is $x = 3$ or $x = -1$.", "x = 3, x = -1", "phrase"),
        ("The answer is 7 because 3 + 4 = 7.", "7", "phrase"),
        ("The answer is that she has 7 apples.", "7", "phrase"),
        ("答案是２３８０元", "2380元", "phrase"),
        ("所以最终答案为：三百二十一。", "三百二十一", "phrase"),
        ("答：一共要付2380元。", "2380元", "phrase"),
        ("答：小明有7个苹果。", "7个苹果", "phrase"),
        ("答：还剩3/4米。", "3/4", "phrase"),
        ("She has **12** apples.\n\n**15**", "15", "bold"),
        ("He had **12** apples. Now 45.", "45", "number"),
        ("一共要付2380元。", "2380", "number"),
        ("So $2^{10}$, that is $1024$.", "1024", "formula"),
        ("We get\n\\begin{align*}\nx &= 2 + 3 \\\\\n&= 5.\n\\end{align*}", "5", "formula"),
        ("It takes 3 to 5 days.", "3 to 5", "number"),
        ("It takes 2 hours and 30 minutes.", "2 hours and 30 minutes", "number"),
        ("She has twenty-one apples.", "twenty-one", "number"),
    ],
)
def test_the_last_group_of_the_strongest_mark_is_the_answer(response, text, how):
    found = find_answer(response)
    assert (any(text in way for way in found.texts), found.how) == (True, how), found


@pytest.mark.parametrize(
    "response", ["I do not know.", "", "<think>\\boxed{5}", "<think>It is 5", "<thinking>\n#### 5\n"]
)
def test_no_answer_is_none_and_thinking_has_none(response):
    assert find_answer(response) is None


def test_only_boxes_and_hashes_count_when_asked_for():
    assert find_answer("The answer is 5. **5**", marked_only=True) is None
    assert find_answer("#### 5", marked_only=True).how == "hashes"


def test_a_response_that_broke_off_has_only_a_marked_answer():
    for text in ("She has 5 + 3 = 8", "It is **8**", "8"):
        assert find_answer(text).texts
        assert find_answer(text, broken_off=True) is None
    assert find_answer(r"\boxed{8} To check, add", broken_off=True).texts == ("8",)


def test_the_final_part_is_behind_the_last_thinking():
    assert final_part("hm</think>5") == "5"
    assert final_part("<think>a</think>b<think>c</think>d") == "d"
    assert final_part("<think>a</think>b\n<think>c") == ""
    assert final_part("split at '</think>' or \"<think>\"") == "split at '</think>' or \"<think>\""


def test_gold_answers_are_taken_out_of_their_solutions():
    assert gold_answer("9 * 2 = 18\n#### 18 dollars.") == "18 dollars."
    assert gold_answer(r"so \boxed{2 \pi}") == r"2 \pi"


def test_examples_in_docstrings_run():
    result = doctest.testmod(answers)
    assert result.attempted > 0
    assert result.failed == 0
