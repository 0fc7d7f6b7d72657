"""Units behind a number: which words and symbols are one, and what the known ones measure."""

import re
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
        "volume": {"ml milliliter millilitre 毫升": "1", "l liter litre 升": "1000"},
        "dollars": {"¢ cent": "1", "$ dollar usd": "100"},
        "yuan": {"分": "1", "角": "10", "¥ yuan rmb 元 块": "100"},
    }.items()
    for names, factor in units.items()
    for word in names.split()
    for name in (word, f"{word}s")
}  # fmt: skip

_SYMBOLS = frozenset("mph km/h m/s am pm".split()) | {
    f"{unit}{sign}{power}" for unit in ("mm", "cm", "m", "km", "ft") for sign in ("", "^") for power in "23"
}
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
