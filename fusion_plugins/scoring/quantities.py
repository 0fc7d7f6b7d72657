r"""Read answers that are no formula: numbers in words and with units, letters, ranges, times, dates.

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

from fusion_plugins.scoring.intervals import says_interval
from fusion_plugins.scoring.numerals import NUMBER, decimal, leading_number

#: a longer text is no quantity
_MAX_CHARACTERS = 200
_TOLERANCE = Fraction(1, 10**6)

#: unit -> (what it measures, how many of the smallest)
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(factor))
    for dimension, units in {
        "length": {
            "mm millimeter millimetre 毫米": "1", "cm centimeter centimetre 厘米": "10", "m meter metre 米": "1000",
            "km kilometer kilometre 千米 公里": "1000000", "inch inches": "25.4", "ft foot feet": "304.8",
            "yd yard": "914.4", "mi mile": "1609344",
        },
        "mass": {
            "mg milligram 毫克": "1", "g gram 克": "1000", "kg kilogram 千克 公斤": "1000000",
            "t ton tonne 吨": "1000000000", "oz ounce": "28349.523125", "lb lbs pound": "453592.37",
        },
        "time": {
            "s sec second 秒": "1", "min minute 分钟": "60", "h hr hrs hour 小时": "3600", "day 天": "86400",
            "week 周 星期": "604800",
        },
        "volume": {"ml milliliter millilitre 毫升": "1", "l liter litre 升": "1000"},
        "dollars": {"¢ cent": "1", "$ dollar usd": "100"},
        "yuan": {"分": "1", "角": "10", "¥ yuan rmb 元 块": "100"},
    }.items()
    for names, factor in units.items()
    for word in names.split()
    for name in (word, f"{word}s")
}  # fmt: skip

_SYMBOLS = frozenset("mph km/h m/s am pm".split()) | {
    f"{unit}{power}" for unit in ("mm", "cm", "m", "km", "ft") for power in "²³"
}
_SYMBOLS |= {
    f"{symbol[:-1]}{sign}{'²³'.index(symbol[-1]) + 2}"
    for symbol in _SYMBOLS
    if symbol[-1] in "²³"
    for sign in ("", "^")
}
#: words behind a number that are no unit: functions, and what begins the rest of a sentence
_NO_UNITS = frozenset(
    "sqrt sin cos tan log ln exp mod and or to pi times plus minus over squared cubed is are because since so".split()
)
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
#: signs as typesetting and Chinese text have them -> ASCII
_SIGNS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    ord(sign): plain
    for signs, plain in {
        "−﹣‐‑‒": "-",
        "–—": "–",
        "\u00a0\u2009\u202f\u3000": " ",
        "﹪": "%",
        "\u200b\ufeff": "",
    }.items()
    for sign in signs
}
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
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
_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?:[:：](?P<minute>\d{2}))?(?::\d{2})?\s*(?P<half>[ap])\.?\s*m\.?"
    r"|(?P<hour2>\d{1,2}):(?P<minute2>\d{2})(?::\d{2})?(?:\s*o'?clock)?|(?P<hour3>\d{1,2})\s*o'?clock"
    r"|(?P<half4>上午|早上|下午|晚上)?(?P<hour4>\d{1,2})[点时](?:(?P<minute4>\d{1,2})分?|(?P<thirty>半))?",
    re.IGNORECASE,
)
_HALVES = {"a": 0, "p": 12, "上午": 0, "早上": 0, "下午": 12, "晚上": 12}
#: what parts the members of a list
LIST = re.compile(r"\s*(?:,|、|，|;|\band\b|\bor\b|和|或)\s*(?:and\b|or\b)?\s*")
_MONTHS = "january february march april may june july august september october november december".split()
_DATE = re.compile(
    r"(?P<year>\d{4})[-/.年]\s*(?P<month>\d{1,2})[-/.月]\s*(?P<day>\d{1,2})日?"
    r"|(?P<name>[A-Za-z]{3,9})\.?\s+(?P<nth>\d{1,2})(?:st|nd|rd|th)?(?:,?\s+(?P<of>\d{4}))?"
    r"|(?:the\s+)?(?P<nth2>\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<name2>[A-Za-z]{3,9})\.?(?:,?\s+(?P<of2>\d{4}))?"
    r"|(?P<month3>\d{1,2})月(?P<day3>\d{1,2})日"
    r"|(?P<one>\d{1,2})/(?P<two>\d{1,2})/(?P<of3>\d{4})"
)


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
    worked_out: bool = True
    ratio: "tuple[Fraction, ...]" = ()
    interval: bool = False

    @property
    def kind(self) -> str:
        """Return number, choice, range, time, date, ratio, interval, or "" for what cannot be read."""
        kinds = {
            "number": self.number,
            "choice": self.choice or None,
            "range": self.bounds,
            "time": self.clock,
            "date": self.date,
            "ratio": self.ratio or None,
            "interval": self.interval or None,
        }
        return next((name for name, value in kinds.items() if value is not None), "" if self.worked_out else "number")


def plain_signs(text: str) -> str:
    """Return a text with ASCII digits, letters and minus signs; formulas stay as they are.

    Example:
        >>> plain_signs("２３８０元, −5, 3½")
        '2380元, -5, 3 1/2'
    """
    text = text.translate(_SIGNS)
    for sign, fraction in _FRACTIONS.items():
        text = re.sub(rf"(?<=\d)\s*{sign}", f" {fraction}", text).replace(sign, fraction)
    text = re.sub(r"√\s*(\d+|\([^()]*\)|\w)", r"\\sqrt{\1}", text).replace("π", r"\pi ")
    text = re.sub(r"(?<=[(\[,\s+-])(?:oo|inf(?:inity)?|∞)(?=\s*[,)\]])", r"\\infty", text)
    # A dash is a minus where nothing is before it that it could part from what follows.
    text = re.sub(r"(^|[=({,:$]\s?|[^\W\d]\s)–(?=\d)", r"\1-", text)
    return text


def is_list(text: str) -> bool:
    """Return whether a text is a list of numbers, such as "3 and -1"."""
    parts = LIST.split(text)
    return 1 < len(parts) <= 12 and all(read(part).kind == "number" for part in parts)


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
    for reader in (_read_choice, _read_clock, _read_date, _read_number, _read_range, _read_ratio):
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
    powers = {unit[-2:] for unit in units if unit[-2:] in ("^2", "^3")}
    if len(powers) > 1:
        return False
    first, second = (_UNITS.get(unit) for unit in units)
    if first and second:
        return first[0] == second[0] and close(one * first[1], other * second[1])
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


def _read_clock(text: str) -> Quantity | None:
    found = _CLOCK.fullmatch(text)
    if not found:
        return None
    hour, minute = (
        next((int(found[name]) for name in names if found[name]), 0)
        for names in (("hour", "hour2", "hour3", "hour4"), ("minute", "minute2", "minute4"))
    )
    minute = 30 if found["thirty"] else minute
    if hour > 24 or minute > 59:
        return None
    half = _HALVES.get((found["half"] or found["half4"] or "").lower())
    return Quantity(clock=(60 * (hour if half is None else hour % 12 + half) + minute, half is not None))


def _read_date(text: str) -> Quantity | None:
    found = _DATE.fullmatch(text)
    if not found:
        return None
    name = found["name"] or found["name2"]
    # "3/5/2020" is the American order; "25/12/2020" can only be the other one.
    first, second = int(found["one"] or 0), int(found["two"] or 0)
    month, numbered_day = (second, first) if first > 12 else (first, second)
    month = int(found["month"] or found["month3"] or month)
    if name:
        month = next((place for place, full in enumerate(_MONTHS, 1) if full.startswith(name.lower())), 0)
    if not 1 <= month <= 12:
        return None
    year = found["year"] or found["of"] or found["of2"] or found["of3"]
    day = found["day"] or found["nth"] or found["nth2"] or found["day3"] or numbered_day
    return Quantity(date=(int(year) if year else None, month, int(day)))


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
        return Quantity(number=number, percent=True, worked_out=worked_out) if _is_unit(rest[percent.end() :]) else None
    currency = re.match(r"[-+]?\s*([$€£¥])", text)
    unit = currency[1] if currency else rest.strip().lower().rstrip(".")
    more = re.match(r"\s*([a-z]+|[\u4e00-\u9fff]+?)\s*(?:,|and)?\s*(?=\d)", rest)
    if more and not currency:
        behind = _read_number(rest[more.end() :])
        first, second = _UNITS.get(more[1]), _UNITS.get(behind.unit) if behind else None
        if not (behind and behind.number is not None and first and second and first[0] == second[0]):
            return None
        return Quantity(number=number + behind.number * second[1] / first[1], unit=more[1])
    return Quantity(number=number, unit=unit, worked_out=worked_out) if _is_unit(rest) else None


def _is_unit(text: str) -> bool:
    """Return whether a text behind a number is a unit: words, and no symbols that the number may multiply."""
    text = text.strip().strip(".").strip()
    if not text or text.lower() in _UNITS or text.lower() in _SYMBOLS or re.fullmatch(r"[\u3400-\u9fff]+", text):
        return True
    words = re.split(r"[\s-]+|(?<=\w)/(?=\w)", text)
    return len(text) >= 3 and len(words) <= 5 and all(map(_is_unit_word, words))


def _is_unit_word(word: str) -> bool:
    return word == "a" or (re.fullmatch(r"[A-Za-z][a-z]+(?:\^?[23²³])?", word) is not None and word not in _NO_UNITS)


def _is_worked_out(text: str) -> bool:
    """Return whether a fraction is an answer and not a division that is still to be done."""
    top, _, bottom = re.sub(r"[^\d./]", "", text).partition("/")
    try:
        return (Fraction(top) / Fraction(bottom)).denominator != 1
    except (ValueError, ZeroDivisionError):
        return False
