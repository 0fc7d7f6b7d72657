"""Read the number that a text begins with: digits with separators, exponents, fractions, English and Chinese words."""

import re
from fractions import Fraction

#: at most so many digits before and behind the point: "1e999999999" would be written out as a gigabyte of zeros
_MAX_EXPONENT = 400
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
_MULTIPLIERS = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12, "score": 20,
    "lakh": 10**5, "crore": 10**7, "lakhs": 10**5, "crores": 10**7,
    "dozens": 12, "hundreds": 100, "thousands": 1000, "millions": 10**6, "billions": 10**9, "trillions": 10**12,
}  # fmt: skip
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10
}  # fmt: skip
_PARTS |= {f"{name}s": value for name, value in _PARTS.items() if name not in ("half", "halves")}
_CHINESE = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_MYRIADS = {"万": 10**4, "亿": 10**8}

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_VALUE = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*(?P<inner>[-+]?)
    (?:10\s*\^\s*[{{(]?(?P<ten>[-+]?\d{{1,3}})[}})]?           # 10^5
      |(?P<whole>\d+)\s+(?P<top>\d+)/(?P<below>\d+)             # 1 1/2
      |(?P<above>{NUMBER})\s*/\s*(?P<under>{NUMBER})           # 1/2
      |(?P<plain>{NUMBER})
       (?:[eE](?P<e>[-+]?\d{{1,3}})|\s*(?:\*|x|×)\s*10\s*\^\s*[{{(]?(?P<power>[-+]?\d{{1,3}})[}})]?)?)
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_MULTIPLIER = re.compile(rf"\s*-?\s*({'|'.join(_MULTIPLIERS)}|bn|K(?![a-z]))(?![a-zA-Z])\s*(?:of\b)?\s*")


def leading_number(text: str) -> tuple[Fraction, str] | None:
    """Return the number that a text begins with, and the rest of the text; None where it begins with none.

    Example:
        >>> leading_number("3 dozen eggs"), leading_number("1.5e3 m"), leading_number("2x")
        ((Fraction(36, 1), 'eggs'), (Fraction(1500, 1), ' m'), (Fraction(2, 1), 'x'))
    """
    signed = re.match(r"(?:minus|negative)\s+(?=[\d.$€£¥])|负\s*(?=\d)", text, re.IGNORECASE)
    if signed and (behind := leading_number(text[signed.end() :])):
        return -behind[0], behind[1]
    found = _VALUE.match(text)
    if found is None:
        return _chinese_number(text) or _english_number(text)
    value, rest = _value(found), found["rest"]
    # Behind it goes a formula, not a unit.
    if value is None or re.match(r"\s*[+*/^×(=<>]|\s*-\s*\d|[eE]\d|[.,]\d", rest):
        return None
    chinese = re.match(r"\s*([十百千万亿零一二三四五六七八九两\d.]*[十百千万亿])(?![米克瓦])", rest)
    if chinese and found["plain"]:
        value, rest = _chinese(f"{found['plain'].replace(',', '')}{chinese[1]}"), rest[chinese.end() :]
    while multiplier := _MULTIPLIER.match(rest):
        value *= _MULTIPLIERS.get(multiplier[1], 10**9 if multiplier[1] == "bn" else 1000)
        rest = rest[multiplier.end() :]
    # "$5 m" are millions, "5 m" metres; "5M" and "5k" without a space are amounts, too.
    suffix = re.match(r"\s*([kKmMbB])(?:n)?(?![A-Za-z])" if found["currency"] else r"([kKMB])(?:n)?(?![A-Za-z])", rest)
    if suffix:
        value *= {"k": 10**3, "m": 10**6, "b": 10**9}[suffix[1].lower()]
        rest = rest[suffix.end() :]
    negative = [found["sign"], found["inner"]].count("-") == 1
    return -value if negative else value, rest


def decimal(text: str) -> Fraction:
    """Return the value of digits with thousands separators."""
    return Fraction(text.replace(",", ""))


def _value(found: re.Match[str]) -> Fraction | None:
    """Return the value of a match of :data:`_VALUE`, without sign and multipliers."""
    try:
        if found["whole"]:
            return int(found["whole"]) + Fraction(int(found["top"]), int(found["below"]))
        if found["above"]:
            return decimal(found["above"]) / decimal(found["under"])
        exponent = int(found["ten"] or found["e"] or found["power"] or 0)
        ten = Fraction(10) ** exponent if abs(exponent) <= _MAX_EXPONENT else None
        return ten if ten is None or found["ten"] else decimal(found["plain"]) * ten
    except (ValueError, ZeroDivisionError):  # 1/0, or more digits than Python reads
        return None


def _chinese_number(text: str) -> tuple[Fraction, str] | None:
    found = re.match(
        r"(负?)((?:百分之)?)(?:([零一二两三四五六七八九十百千万亿]+)又)?([零〇一二两三四五六七八九十百千万亿点]+)"
        r"(?:分之([零〇一二两三四五六七八九十百千万亿]+))?",
        text,
    )
    if not found:
        return None
    value = _chinese(found[4])
    if found[5]:
        value = _chinese(found[5]) / value if value else Fraction(0)
    if found[3]:  # 二又二分之一
        value += _chinese(found[3])
    return -value if found[1] else value, ("%" if found[2] else "") + text[found.end() :]


def _english_number(text: str) -> tuple[Fraction, str] | None:
    words = re.findall(r"[A-Za-z]+|[^A-Za-z]+", text)
    # `current` is below the next multiplier, `total` above: "two million" is in `total` when "five" follows.
    total = current = Fraction(0)
    used, end, negative = 0, 0, False
    for place, word in enumerate(map(str.lower, words)):
        behind = _next_word(words, place)
        if re.fullmatch(r"[\s-]+", word) or (word == "and" and used and behind in {*_WORDS, "a"}):
            continue
        if word in ("minus", "negative") and not used:
            negative = True
        elif word in _WORDS:
            current += _WORDS[word]
        elif word in ("a", "an") and behind in {*_MULTIPLIERS, *_PARTS}:
            current += 0 if current or total else 1
        elif word in _PARTS and (used or word == "half"):
            # "two thirds" is a fraction, "three and a half" a sum.
            is_sum = _next_word(words, place, -1) in ("a", "an") and current and used > 1
            current = current + Fraction(1, _PARTS[word]) if is_sum else (current or 1) * Fraction(1, _PARTS[word])
        elif word == "hundred" and used:
            current = (current or Fraction(1)) * 100
        elif word in _MULTIPLIERS and used:
            total, current = total + (current or 1) * _MULTIPLIERS[word], Fraction(0)
        else:
            break
        used, end = used + 1, place + 1
    if used == negative:
        return None
    value = total + current
    return -value if negative else value, "".join(words[end:])


def _next_word(words: list[str], place: int, step: int = 1) -> str:
    place += step
    while 0 <= place < len(words) and not words[place].isalpha():
        place += step
    return words[place].lower() if 0 <= place < len(words) else ""


def _chinese(text: str) -> Fraction:
    """Return the value of a Chinese numeral, with digits of either kind.

    Example:
        >>> [int(_chinese(text)) for text in ("三百二十一", "3万5千", "1.5亿", "十二", "一万零三")]
        [321, 35000, 150000000, 12, 10003]
    """
    total = section = Fraction(0)
    digits = ""
    for character in text + " ":
        if character in _CHINESE:
            digits += str(_CHINESE[character])
        elif character.isdigit() or character in ".点":
            digits += "." if character in ".点" else character
        else:
            value = Fraction(digits) if re.fullmatch(r"\d+(?:\.\d+)?", digits) else None
            digits = ""
            if character in _CHINESE_TENS:
                section += (Fraction(1) if value is None else value) * _CHINESE_TENS[character]
            elif character in _CHINESE_MYRIADS:
                total = (total + section + (value or 0) or Fraction(1)) * _CHINESE_MYRIADS[character]
                section = Fraction(0)
            else:
                section += value or 0
    return total + section
