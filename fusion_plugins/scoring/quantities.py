r"""Read answers that are no formula: numbers in words and with units, letters, ranges, times, dates, weekdays, months.

One reader for gold and response alike; what it cannot read is left to math-verify.

>>> same(read("5 million dollars"), read(r"\$5,000,000")), same(read("5 million"), read("5"))
(True, False)
>>> same(read("2 hours"), read("120 min")), same(read("3万"), read("30000")), same(read("3-5"), read("3 to 5 days"))
(True, True, True)
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from fusion_plugins.scoring.dates import read_clock, read_date, read_month, read_weekday
from fusion_plugins.scoring.intervals import says_interval
from fusion_plugins.scoring.numerals import NUMBER, decimal, leading_number
from fusion_plugins.scoring.signs import plain_signs
from fusion_plugins.scoring.units import UNITS, in_common, is_unit, measure, power_of

#: a longer text is no quantity
_MAX_CHARACTERS = 200
_TOLERANCE = Fraction(1, 10**6)

_LATEX = (
    (re.compile(r"(?<=\d)(,?)\\[,!;: ](?=\d{3}(?!\d))"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr?|[,!;: ]|quad|qquad)(?![a-zA-Z])|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm)\s*\{([^{}]*)\}"), r" \1 "),
    (
        re.compile(r"\\[dt]?frac\s*\{\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|\\[dt]?frac\s*(\d)\s*(\d)(?!\d)"),
        r" \1\3/\2\4 ",
    ),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°"), " degrees "),
    (re.compile(r"\\times|\\cdot|·|×"), "×"),
    (re.compile(r"\\div|÷"), "/"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\*\*|__"), ""),
)
_FORMULA = re.compile(r"\$\$?((?:\\\$|[^$])+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_APPROXIMATELY = re.compile(
    r"^(?:about|approximately|approx\.?|roughly|around|exactly|only|just|a total of|\\approx|\\sim|[≈~=:]"
    r"|约|大约|共|一共|是|为)\s*",
    re.IGNORECASE,
)
_ARITHMETIC = re.compile(rf"[-+]?\s*\(*(?:{NUMBER})\)*(?:\s*[-+*/×]\s*\(*-?(?:{NUMBER})\)*)+")
_CHOICE = re.compile(
    r"[(\[]?\s*(?:option\s+|choice\s+|选项?)?[(\[]?([A-J])(?:[)\]]+[.:、]?|[.:、])?(?:\s+(.+))?", re.DOTALL
)
_CHOICES = re.compile(r"[(\[]?[A-J][)\]]?(?:\s*(?:[,、&]|and|和)?\s*[(\[]?[A-J][)\]]?)+")
_RANGE = re.compile(
    r"(?:(?:between|from)\s+)?(.+?)\s*(?:(?<=[\d%])\s*-\s*(?=[$\d])|–|\bto\b|\band\b|~|至|到)\s*(.+)",
    re.DOTALL | re.IGNORECASE,
)
#: arithmetic and its result
_STEP = re.compile(r"\d\s*[-+*/×÷x]\s*\$?\d[^=]*=")
#: what parts the members of a list
LIST = re.compile(r"\s*(?:,|、|，|;|\band\b|\bor\b|和|或)\s*(?:and\b|or\b)?\s*")


@dataclass(frozen=True)
class Quantity:
    """An answer that is no formula; the fields that do not apply are None or empty.

    Attributes:
        number: its value; that of "50%" is 50.
        percent: whether a percent sign or word follows.
        unit: lower-case unit; "" without.
        choice: letters of a multiple choice.
        content: the text behind a letter.
        bounds: the two ends of a range.
        clock: minutes after midnight, and whether a.m. or p.m. is given.
        date: year (or None), month, day.
        weekday: 1 for Monday to 7 for Sunday.
        month: 1 to 12, of a month that is named.
        worked_out: False for arithmetic that nobody has carried out, such as 290/2.
        ratio: the terms of a ratio such as 3 : 4.
        interval: whether it is an inequality, or an interval with an infinite end.
    """

    number: Fraction | None = None
    percent: bool = False
    unit: str = ""
    choice: frozenset[str] = frozenset()
    content: str = ""
    bounds: "tuple[Quantity, Quantity] | None" = None
    clock: tuple[int, bool] | None = None
    date: tuple[int | None, int, int] | None = None
    weekday: int | None = None
    month: int | None = None
    worked_out: bool = True
    ratio: "tuple[Fraction, ...]" = ()
    interval: bool = False

    @property
    def kind(self) -> str:
        """Return number, choice, range, time, date, weekday, month, ratio, interval, or "" for what cannot be read."""
        kinds = {
            "number": self.number,
            "choice": self.choice or None,
            "range": self.bounds,
            "time": self.clock,
            "date": self.date,
            "weekday": self.weekday,
            "month": self.month,
            "ratio": self.ratio or None,
            "interval": self.interval or None,
        }
        return next((name for name, value in kinds.items() if value is not None), "" if self.worked_out else "number")


def is_list(text: str) -> bool:
    """Return whether a text is a list of numbers, such as "3 and -1", and not of steps: "3*4=12 and 12+5=17"."""
    parts = LIST.split(text)
    return 1 < len(parts) <= 12 and all(read(part).kind == "number" and not _STEP.search(part) for part in parts)


def as_formula(text: str) -> str:
    r"""Return an answer as math-verify reads it: numbers and lists of them without words, a formula without marks.

    Example:
        >>> as_formula("3 million and −1"), as_formula(r"$\sqrt{2}$"), as_formula("50 percent")
        ('3000000, -1', '\\sqrt{2}', '50\\%')
    """
    if is_list(text):
        return ", ".join(map(as_formula, LIST.split(text)))
    found = read(text)
    # "2k" may be a product, too.
    if found.number is None or re.fullmatch(r"\$?\d+(?:\.\d+)?k\$?", text.strip()):
        formula = _FORMULA.fullmatch(text.strip())
        return (next(filter(None, formula.groups())) if formula else text).strip()
    number = found.number
    return (str(number) if number.denominator == 1 else f"{number.numerator}/{number.denominator}") + (
        r"\%" if found.percent else ""
    )


@lru_cache(4096)
def read(text: str) -> Quantity:
    """Return what an answer says; a quantity without kind where it is a formula or words."""
    if len(text) > _MAX_CHARACTERS:
        return Quantity()
    if says_interval(text):
        return Quantity(interval=True)
    text = _bare(text)
    for reader in (_read_choice, _read_calendar, _read_number, _read_range, _read_ratio):
        found = reader(text)
        if found is not None:
            return found
    return Quantity()


def same(gold: Quantity, answer: Quantity) -> bool:
    """Return whether two quantities are the same; those of different kinds are not.

    Numbers may differ by rounding: by 1e-6, and small ones by 1e-6 of their size. Where only one has a percent sign,
    50% is 50 and also 0.5. Units count where both answers have one that is known. A date without a year is that date of
    any year, a time without a.m. or p.m. is both.
    """
    if gold.bounds and answer.bounds:
        return all(map(same, gold.bounds, answer.bounds))
    if gold.clock and answer.clock:
        (minutes, certain), (others, also) = gold.clock, answer.clock
        return minutes == others or (not (certain and also) and (minutes - others) % 720 == 0)
    if gold.date and answer.date:
        return gold.date[1:] == answer.date[1:] and len({gold.date[0], answer.date[0]} - {None}) <= 1
    if gold.weekday or gold.month:
        return (gold.weekday, gold.month) == (answer.weekday, answer.month)
    if gold.choice or answer.choice:
        return gold.choice == answer.choice
    if gold.ratio or answer.ratio:
        return _same_ratio(gold, answer)
    return gold.number is not None and answer.number is not None and _same_number(gold, answer)


def _same_ratio(gold: Quantity, answer: Quantity) -> bool:
    """Return whether two ratios are proportional; 3/4 and "3 to 4" are the ratio 3 : 4."""
    one, other = gold.ratio or _terms(gold), answer.ratio or _terms(answer)
    return (
        bool(one and other)
        and len(one) == len(other)
        and all(a * other[0] == b * one[0] for a, b in zip(one, other, strict=True))
    )


def _terms(quantity: Quantity) -> tuple[Fraction, ...]:
    if quantity.bounds:
        return tuple(end.number or Fraction(0) for end in quantity.bounds)
    return (quantity.number, Fraction(1)) if quantity.number is not None and not quantity.percent else ()


def _same_number(gold: Quantity, answer: Quantity) -> bool:
    one, other = gold.number or Fraction(0), answer.number or Fraction(0)
    units = gold.unit, answer.unit
    if all(unit.startswith("_") for unit in units) and units[0] != units[1]:
        return False
    # Square inches are no cubic inches.
    if len({power_of(unit) for unit in units} - {0}) > 1:
        return False
    first, second = map(measure, units)
    if first and second:
        factors = in_common(first, second)
        return factors is not None and close(one * factors[0], other * factors[1])
    if gold.percent != answer.percent:
        percent, plain = (one, other) if gold.percent else (other, one)
        return close(percent, plain) or close(percent / 100, plain)
    return close(one, other)


def close(one: Fraction, other: Fraction) -> bool:
    """Return whether two numbers differ by no more than rounding.

    Example:
        >>> close(Fraction(1, 3), Fraction("0.333333")), close(Fraction("1e-7"), Fraction("2e-7"))
        (True, False)
    """
    return abs(one - other) <= _TOLERANCE * min(Fraction(1), max(abs(one), abs(other)))


def _bare(text: str) -> str:
    """Return a text without the marks of LaTeX and Markdown, words such as "about", and what only closes a sentence."""
    text = plain_signs(text).strip(" *_").rstrip(".。*_ ")
    formula = _FORMULA.fullmatch(text)
    if formula:
        text = next(filter(None, formula.groups()))
    text = re.sub(rf"^\$\s*({NUMBER})\s*\$(?=\s+[A-Za-z])", r"\1", text)  # "$3$ dozen"
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    text = re.sub(r"(?<=[a-z])\s*\^\s*\{?([23])\}?", r"^\1", text)
    # "8!" is a factorial.
    text = (
        re.sub(r"(?<![\d)}])[!！]+$", "", " ".join(text.split()).rstrip(" .。,，;")).rstrip(" .。,，;").lstrip(" ,，;")
    )
    while (shorter := _APPROXIMATELY.sub("", text)) != text:
        text = shorter
    text = re.sub(r"^-\s*\(([\d.,/ ]+)\)$", r"-\1", text)
    if re.fullmatch(r"\d{1,3}(?: \d{3})+|\d{1,3}(?:\.\d{3}){2,}", text):
        text = re.sub(r"[ .]", "", text)
    # The name of what is given: "x = 5", "f(2) = 5", "90/3 = 30"; "3x + 2 = 5" is an equation.
    named = re.fullmatch(r"(?:[^=<>,;]*\d\s*|\\?[A-Za-z_ ]+(?:_?\{?\w\}?|\(\w+\))?\s*)[=≈]\s*([^=<>,;]+|[\d,.]+)", text)
    if named and (
        _ARITHMETIC.fullmatch(text.rpartition("=")[0].rpartition("=")[2].strip()) or not re.match(r"[\d(]", text)
    ):
        text = named[1].strip()
    return text


def _read_choice(text: str) -> Quantity | None:
    if _CHOICES.fullmatch(text):
        letters = re.sub(r"\band\b|[^A-J]", "", text)
        return Quantity(choice=frozenset(letters)) if len(set(letters)) == len(letters) else None
    found = _CHOICE.fullmatch(text)
    if not found or (found[2] and not re.match(r".*[)\].:、]", text[: found.start(2)])):
        return None
    return Quantity(choice=frozenset(found[1]), content=found[2] or "")


def _read_calendar(text: str) -> Quantity | None:
    if (clock := read_clock(text)) is not None:
        return Quantity(clock=clock)
    if (date := read_date(text)) is not None:
        return Quantity(date=date)
    if (weekday := read_weekday(text)) is not None:
        return Quantity(weekday=weekday)
    month = read_month(text)
    return None if month is None else Quantity(month=month)


def _read_range(text: str) -> Quantity | None:
    found = _RANGE.fullmatch(text)
    if not found or (re.search(r"\band\b", text) and not re.match(r"between|from", text, re.IGNORECASE)):
        return None
    low, high = _read_number(found[1].strip()), _read_number(found[2].strip())
    if low is None or high is None or low.number is None or high.number is None:
        return None
    if not low.unit and not low.percent:
        low = Quantity(number=low.number, percent=high.percent, unit=high.unit)
    return Quantity(bounds=(low, high))


def _read_ratio(text: str) -> Quantity | None:
    terms = [leading_number(term) for term in re.split(r"\s*(?::|∶|\\colon\b)\s*", text)]
    if len(terms) < 2 or any(term is None or term[1].strip() for term in terms):
        return None
    ratio = tuple(term[0] for term in terms if term)
    return Quantity(ratio=ratio) if all(ratio) else None


def _read_number(text: str) -> Quantity | None:
    """Return a number with its unit; "2 hours 30 minutes" is 2.5 hours."""
    worked_out = True
    if _ARITHMETIC.fullmatch(text):
        between = re.fullmatch(rf"({NUMBER})\s*-\s*({NUMBER})", text)
        if between and decimal(between[1]) < decimal(between[2]):
            return None
        worked_out = re.fullmatch(r"[^/]+/[^/]+", text) is not None and _is_worked_out(text)
        if not worked_out:
            return Quantity(worked_out=False)
    found = leading_number(text)
    if found is None:
        return None
    number, rest = found
    digits = text[: len(text) - len(rest)]
    if re.fullmatch(rf"[^\s\d]*(?:{NUMBER})\s*/\s*(?:{NUMBER})\s*", digits):
        worked_out = _is_worked_out(digits)
    if base := re.fullmatch(r"\s*_\s*(?:\{\s*(\w+)\s*\}|(\d))", rest):
        return Quantity(number=number, unit=f"_{base[1] or base[2]}")
    percent = re.match(r"\s*(?:%|percent\b|per cent\b|percentage points\b|pct\b)", rest, re.IGNORECASE)
    if percent:
        return Quantity(number=number, percent=True, worked_out=worked_out) if is_unit(rest[percent.end() :]) else None
    currency = re.match(r"[-+]?\s*([$€£¥])", text)
    unit = currency[1] if currency else rest.strip().lower().rstrip(".")
    more = re.match(r"\s*([a-z]+|[\u4e00-\u9fff]+?)\s*(?:,|and)?\s*(?=\d)", rest)
    if more and not currency and not is_unit(rest):
        behind = _read_number(rest[more.end() :])
        first, second = UNITS.get(more[1]), UNITS.get(behind.unit) if behind else None
        if not (behind and behind.number is not None and first and second and first[0] == second[0]):
            return None
        return Quantity(number=number + behind.number * second[1] / first[1], unit=more[1])
    return Quantity(number=number, unit=unit, worked_out=worked_out) if is_unit(rest) else None


def _is_worked_out(text: str) -> bool:
    """Return whether a fraction is an answer and not a division that is still to be done."""
    top, _, bottom = re.sub(r"[^\d./]", "", text).partition("/")
    try:
        return (Fraction(top) / Fraction(bottom)).denominator != 1
    except (ValueError, ZeroDivisionError):
        return False
