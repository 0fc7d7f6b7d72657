"""Units behind a number: which words and symbols are one, and what the known ones measure."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

#: unit -> (what it measures, how many of the smallest)
UNITS: dict[str, tuple[str, Fraction]] = {
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
        "months": {"month 个月": "1", "year 年": "12"},
        "volume": {"ml milliliter millilitre 毫升": "1", "l liter litre 升": "1000"},
        "dollars": {"¢ cent": "1", "$ dollar usd": "100"},
        "yuan": {"分": "1", "角": "10", "¥ yuan rmb 元 块": "100"},
        "euros": {"€ euro eur": "1"},
    }.items()
    for names, factor in units.items()
    for word in names.split()
    for name in (word, f"{word}s")
}  # fmt: skip

#: what °C and °F become
_TEMPERATURES = {
    name: scale
    for scale in ("celsius", "fahrenheit")
    for name in (scale, *(f"degree{plural} {word}" for plural in ("", "s") for word in (scale[0], scale)))
}
_SYMBOLS = (
    frozenset("mph kph km/h km/hr km/s m/s cm/s ft/s am pm".split())
    | _TEMPERATURES.keys()
    | {f"{unit}{sign}{power}" for unit in ("mm", "cm", "m", "km", "ft") for sign in ("", "^") for power in "23"}
)
#: words behind a number that are no unit: functions, and what begins the rest of a sentence
_NO_UNITS = frozenset(
    "sqrt sin cos tan log ln exp mod and or to pi times plus minus over squared cubed is are because since so".split()
)


def is_unit(text: str) -> bool:
    """Return whether a text behind a number is a unit: words, and no symbols that the number may multiply."""
    text = text.strip().strip(".").strip()
    if not text or text.lower() in UNITS or text.lower() in _SYMBOLS or re.fullmatch(r"[\u3400-\u9fff]+", text):
        return True
    words = re.split(r"[\s-]+|(?<=\w)/(?=\w)", text)
    return len(text) >= 3 and len(words) <= 5 and all(map(_is_unit_word, words))


def _is_unit_word(word: str) -> bool:
    return word == "a" or (re.fullmatch(r"[A-Za-z][a-z]+(?:\^?[23])?", word) is not None and word not in _NO_UNITS)


@dataclass(frozen=True)
class Measure:
    """What a known unit measures: ``dimension`` to the ``power``, ``factor`` of its smallest unit, ``per`` another."""

    dimension: str
    power: int
    factor: Fraction
    per: "Measure | None" = None


def measure(unit: str) -> Measure | None:
    """Return what a unit in lower case measures, powers and rates included; None for one that is not known.

    Example:
        >>> measure("square feet").power, measure("mph") == measure("miles per hour"), measure("apples")
        (2, True, None)
    """
    unit = {"mph": "mi/h", "kph": "km/h"}.get(unit, unit)
    if scale := _TEMPERATURES.get(unit):
        return Measure(scale, 0, Fraction(1))
    if rate := re.fullmatch(r"(.+?)\s*(?:/|\bper\b|\ban?\b|每)\s*(.+)", unit):
        top, bottom = measure(rate[1]), measure(rate[2])
        return replace(top, per=bottom) if top and bottom and not (top.per or bottom.per) else None
    power = power_of(unit)
    plain = re.sub(r"^(?:square |sq\.? ?|cubic |cu\.? |平方|立方)|\^?[23]$", "", unit) if power else unit
    found = UNITS.get(plain)
    return Measure(found[0], power, found[1]) if found else None


def in_common(first: Measure, second: Measure) -> tuple[Fraction, Fraction] | None:
    """Return what to multiply two numbers by to compare them; None where their units measure different things.

    What one of them leaves out is not compared: "18 dollars per day" is "$18", and "5 m" an area of "5 m^2".

    Example:
        >>> in_common(measure("km/h"), measure("m/s")) == (Fraction(1000000, 3600), 1000)
        True
        >>> in_common(measure("km/h"), measure("kg")), in_common(measure("$"), measure("cents per day"))
        (None, (Fraction(100, 1), Fraction(1, 1)))
    """
    if {first.dimension, second.dimension} == {"length", "volume"}:
        # A millilitre is a cubic centimetre.
        if 3 not in (first.power, second.power):
            return None
        factors = _cubic(first), _cubic(second)
    elif first.dimension != second.dimension or (first.power and second.power and first.power != second.power):
        return None
    else:
        power = first.power or second.power or 1
        factors = first.factor**power, second.factor**power
    if not (first.per and second.per):
        return factors
    below = in_common(first.per, second.per)
    return below and (factors[0] / below[0], factors[1] / below[1])


def _cubic(one: Measure) -> Fraction:
    """Return the cubic millimetres of a unit of volume or of a cubic length."""
    return one.factor * 1000 if one.dimension == "volume" else one.factor**3


def power_of(unit: str) -> int:
    """Return 2 for the unit of an area and 3 for that of a volume, as far as its name says so; else 0.

    Example:
        >>> [power_of(unit) for unit in ("cm^2", "square feet", "立方米", "m3", "apples")]
        [2, 2, 3, 3, 0]
    """
    if found := re.fullmatch(r"(?:mm|cm|m|km|ft|in|yd|mi|[a-z]{3,})\^?([23])", unit):
        return int(found[1])
    names = {"square ": 2, "sq": 2, "平方": 2, "cubic ": 3, "cu ": 3, "立方": 3}
    return next((power for name, power in names.items() if unit.startswith(name)), 0)
