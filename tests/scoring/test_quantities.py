"""Answers that are no formula: what they say, and which of them are the same."""

import doctest
from fractions import Fraction

import pytest

from fusion_plugins.scoring import quantities
from fusion_plugins.scoring.quantities import read, same

SAME = [
    # numbers in words, with multipliers
    ("5 million", "5,000,000"),
    ("5M", "5 million"),
    ("2.5B", "2,500,000,000"),
    ("3 dozen", "36"),
    ("a dozen", "12"),
    ("twenty-one", "21"),
    ("2.5 billion", "2500000000"),
    ("three hundred and five", "305"),
    ("one million two hundred thousand", "1200000"),
    ("half", "0.5"),
    ("$5M", "5 million"),
    ("two thirds", "2/3"),
    ("three and a half", "3.5"),
    ("half a million", "500000"),
    ("minus five", "-5"),
    # Chinese
    ("3万", "30000"),
    ("1.5亿", "150000000"),
    ("三百二十一", "321"),
    ("3万5千", "35000"),
    ("二分之一", "1/2"),
    ("负三", "-3"),
    ("百分之五十", "50%"),
    ("２３８０元", "2380"),
    ("三点五", "3.5"),
    ("十二个", "12"),
    ("5千米", "5公里"),
    ("3万元", "30000元"),
    # signs, separators, exponents
    ("−5", "-5"),
    ("1,234.50", "1234.5"),
    ("1{,}234", "1234"),
    (r"1\,234", "1,234"),
    ("1.5e6", "1500000"),
    ("10^{-7}", "1e-7"),
    (r"1.2 \times 10^{3}", "1200"),
    ("2 x 10^5", "200000"),
    ("3½", "3.5"),
    (".5", "0.5"),
    ("+7", "7"),
    # fractions, percent
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"1\frac{1}{2}", "1 1/2"),
    (r"-\frac{3}{4}", "-0.75"),
    ("1/3", "0.333333"),
    ("50%", "50 percent"),
    (r"50\%", "0.5"),
    ("50%", "50"),
    # units and what stands around a number
    ("18 dollars per day", "$18"),
    (r"18\text{ dollars}", "18"),
    ("2 hours", "120 minutes"),
    ("2 hours 30 minutes", "2.5 hours"),
    ("5 km", "5000 m"),
    ("50 cents", "$0.50"),
    ("about 12", "12"),
    (r"\approx 3.14", "3.14"),
    (r"90^\circ", "90"),
    ("x = 5", "5"),
    ("90/3=30", "30"),
    ("f(2) = 7", "7"),
    ("**12**", "12"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    ("72 km/h", "72"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"12\text{ cm}^{2}", "12 cm^2"),
    ("60 km/h", "60 kilometers per hour"),
    ("60 mph", "60 miles an hour"),
    ("36 km/h", "10 m/s"),
    ("60 km per hour", "60 km"),
    ("18 dollars an hour", "$18 per hour"),
    ("1 m^2", "10000 cm^2"),
    ("5 m^2", "5 m"),
    ("1000 mL", "1000 cm^3"),
    ("2 cubic meters", "2000 liters"),
    ("1 m", "10000 cm^2"),
    ("20 °F", "20 Fahrenheit"),
    ("20 °C", r"20^\circ C"),
    ("20 degrees Fahrenheit", "20 degrees"),
    ("2 years", "24 months"),
    ("10 years old", "10 years"),
    ("12 apples per day", "12 apples"),
    # letters
    ("B", "(B)"),
    ("B", "B) 12"),
    (r"\text{(C)}", "C."),
    ("A, C", "AC"),
    ("选项B", "B"),
    ("option D", "D"),
    # ranges, times, dates
    ("3-5", "3 to 5"),
    ("3–5", "between 3 and 5"),
    ("$3-$5", "$3 to $5"),
    ("10%-20%", "10% to 20%"),
    ("3 - 5 days", "3至5"),
    ("3:30 PM", "15:30"),
    ("3:30 p.m.", "3:30"),
    ("9 AM", "9:00 a.m."),
    ("March 5, 2020", "2020-03-05"),
    ("5th of March", "Mar 5"),
    ("2020年3月5日", "March 5th, 2020"),
]
OTHER = [
    ("5 million", "5"),
    ("5M", "5"),
    ("3B", "3"),
    ("3 dozen", "3"),
    ("3万", "3"),
    ("1e-7", "2e-7"),
    ("0.0000001", "0.0000002"),
    ("5", "-5"),
    ("1234567.8", "1234567.9"),
    ("5 km", "5 m"),
    ("50 cents", "$50"),
    ("1/3", "0.333"),
    ("B", "C"),
    ("A, C", "A"),
    ("3-5", "3-6"),
    ("3:30 PM", "3:30 AM"),
    ("March 5", "March 6"),
    ("2020-03-05", "2021-03-05"),
    ("50%", "5"),
    ("1000000", "1000001"),
    ("三百二十一", "320"),
    ("52_8", "52_9"),
    (r"864 \mbox{ inches}^2", r"864 \mbox{ inches}^3"),
    ("60 km/h", "60 miles per hour"),
    ("60 km/h", "60 mph"),
    ("60 km/h", "60 m/s"),
    ("18 dollars per hour", "18 dollars per day"),
    ("60千米每小时", "60米每秒"),
    ("5 cm^2", "5 m^2"),
    ("1 m", "100 cm^2"),
    ("1 m^3", "100 cm"),
    ("2 liters", "2 cubic meters"),
    ("5 liters", "5 m"),
    ("20 °F", "20 Celsius"),
    ("5 square feet", "5 square inches"),
    ("5平方米", "5平方厘米"),
    ("5 years", "5 months"),
    ("20 °C", "20 °F"),
    ("$5", "€5"),
    ("5 dollars", "5 euros"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_ways_to_write_the_same_are_the_same_in_both_directions(one, other):
    assert read(one).kind == read(other).kind != ""
    assert same(read(one), read(other))
    assert same(read(other), read(one))


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_answers_are_others(one, other):
    assert read(one).kind
    assert not same(read(one), read(other))
    assert not same(read(other), read(one))


@pytest.mark.parametrize(
    "text",
    ["x^2", "2 pi", "2 sqrt 3", "5x", "3x+2=5", "(1,2)", r"11\sqrt{2}", "yes", "", "3, -1", "y=2x+3", "I think"],
)
def test_formulas_and_words_are_left_to_math_verify(text):
    assert read(text).kind == ""
    assert read(text).worked_out


@pytest.mark.parametrize(
    "text", ["290/2", r"\frac{290}{2}", "2 + 2", "100 - 1", r"2 \times 3", "3*4", "1 + 2 + 3", "6 ÷ 2"]
)
def test_arithmetic_that_nobody_has_carried_out_is_not_worked_out(text):
    assert not read(text).worked_out


@pytest.mark.parametrize(
    "text", ["1e999999999", "10^{999}", "9" * 5000, "1/0", "0/0", "25:99", "13/13/2020", "万", "-", "$"]
)
def test_what_looks_like_a_quantity_and_is_none_ends_no_run(text):
    assert read(text).kind in ("", "number", "ratio")


def test_values_are_exact():
    assert read("0.1").number == Fraction(1, 10)
    assert read("1e-7").number == Fraction(1, 10**7)


def test_examples_in_docstrings_run():
    result = doctest.testmod(quantities)
    assert result.attempted > 0
    assert result.failed == 0
