"""Answers in responses and references, found by text alone."""

import doctest

from fusion_plugins.scoring import answers
from fusion_plugins.scoring.answers import gold_answer, last_number, marked_answer, write_out_exponents


def test_marks_and_numbers_in_text():
    assert marked_answer("#### 3. Add the numbers") is None
    assert marked_answer("#### $1,200 per day") == ("$1,200", "hashes")
    assert marked_answer("\\boxed{a{b}c} \\boxed{unclosed") == ("a{b}c", "boxed")
    assert marked_answer("\\boxed{\\{1, 2\\}}") == ("\\{1, 2\\}", "boxed")
    assert last_number("10-5, x2 and 3/4") == "3/4"
    assert last_number("about 12.") == "12"


def test_the_last_box_that_is_closed_and_not_empty_counts():
    assert marked_answer(r"\boxed{5}, put it into \boxed{}. \boxed{7") == ("5", "boxed")
    assert marked_answer(r"\fbox{2} and \boxed 3") == ("3", "boxed")


def test_a_number_in_chinese_text_is_found():
    assert last_number("共有２３８０元") == "2380"
    assert marked_answer("#### 2380元") == ("2380", "hashes")


def test_units_are_dropped_and_mathematics_is_kept():
    assert gold_answer("#### 18 dollars.") == "18"
    assert gold_answer(r"\boxed{2 pi}") == "2 pi"
    assert gold_answer(r"\boxed{2 sqrt 3}") == "2 sqrt 3"


def test_exponents_of_three_digits_stay_as_they_are():
    assert write_out_exponents("1e99") == "1" + "0" * 99
    assert write_out_exponents("1e999999999") == "1e999999999"


def test_examples_in_docstrings_run():
    result = doctest.testmod(answers)
    assert result.attempted > 0
    assert result.failed == 0
