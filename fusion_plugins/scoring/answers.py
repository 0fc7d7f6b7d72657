"""Find the answer in a model's response and in a gold reference; text only, nothing is evaluated."""

import re
from decimal import Decimal

# The minus of "10-5" is no sign and "x2" is no number, hence the look-behind. ASCII, because a Chinese character would
# count as a letter and "付2380元" would hold no number.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%)?", re.ASCII)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
# In a response "#### 3. Add the numbers" is a Markdown heading; an answer is a number with at most a short unit.
_HASHED_NUMBER = re.compile(
    r"####[ \t]*(\\?\$?[ \t]*[-+]?[\d,]*\.?\d[\d,./]*(?<![.,/])[ \t]*%?)[^\d\n.:)]{0,16}\.?[ \t]*$", re.M
)
# "18 dollars" and "$18 per day" have a unit, "2 pi" and "2 sqrt 3" have none: a unit is a word of three letters or more
# that names no function.
_WITH_UNIT = re.compile(
    r"(\\?\$?\s*[-+]?[\d,]*\.?\d+(?:\s*/\s*\d+)?)\s+(?!(?:sqrt|sin|cos|tan|log|exp|mod|and)\b)[a-zA-Z]{3}[a-zA-Z ]*"
)
# "\boxed 3" is TeX for "\boxed{3}".
_BOXED = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?<=\s)([^\s{}$.]+))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# At most two digits of exponent: "1e999999999" would be written out as a gigabyte of zeros.
_EXPONENT = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][-+]?\d{1,2}(?![\w.]*\w)")
#: full-width digits, letters and signs in Chinese text -> ASCII
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_CHINESE = re.compile(r"[\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff]+")


#: the end of a model's thinking; in a program it is inside quotes
_THOUGHT = re.compile(r"""(?<!["'`])</(?:think|thinking|thought|reasoning|seed:think)>(?!["']|`(?!``))""", re.I)
_THINKING = re.compile(r"^[ \t]*<(?:think|thinking|thought|reasoning|seed:think)>", re.I | re.M)


def final_part(response: str) -> str:
    """Return what a response says after its thinking; nothing where the thinking has no end.

    Example:
        >>> final_part("<think>5? </think>It is 6."), final_part("<think>5?")
        ('It is 6.', '')
    """
    behind = _THOUGHT.split(response)[-1]
    return "" if _THINKING.search(behind) else behind


def gold_answer(reference: str) -> str:
    r"""Return the answer inside a reference: after ``####``, inside the last ``\boxed{}``, or all of it.

    Example:
        >>> gold_answer("9 * 2 = 18\n#### 18"), gold_answer(r"so \boxed{\frac{1}{2}}"), gold_answer("2380元")
        ('18', '\\frac{1}{2}', '2380')
    """
    hashed = _HASHES.findall(reference)
    return _strip_units(hashed[-1] if hashed else _last_boxed(reference) or reference)


def marked_answer(response: str) -> tuple[str, str] | None:
    r"""Return the answer that a response marks as such, and how: the last ``\boxed{}``, else the last ``#### number``.

    Example:
        >>> marked_answer(r"\boxed{3}, no, \boxed{4}"), marked_answer("#### 2. Add\n3 + 4\n#### 7 apples")
        (('4', 'boxed'), ('7', 'hashes'))
        >>> marked_answer("It is 7.")
    """
    boxed = _last_boxed(response)
    if boxed is not None:
        return _strip_units(boxed), "boxed"
    hashed = _HASHED_NUMBER.findall(response)
    return (_strip_units(hashed[-1]), "hashes") if hashed else None


def last_number(text: str) -> str | None:
    """Return the last number of a text, with its sign, decimals, denominator or percent sign.

    Example:
        >>> last_number("一共要付2380元。"), last_number("from 10-5 to 1,234.50"), last_number("none")
        ('2380', '1,234.50', None)
    """
    found = _NUMBER.findall(text.translate(_FULL_WIDTH))
    return found[-1].strip() if found else None


def write_out_exponents(text: str) -> str:
    """Return a text with numbers such as 1.5e6 written in full; math-verify reads the "e" as a symbol.

    Example:
        >>> write_out_exponents("It is 1.5e6, or 2E-3. (3e, x2e5)")
        'It is 1500000, or 0.002. (3e, x2e5)'
    """
    return _EXPONENT.sub(lambda match: f"{Decimal(match[0]):f}", text)


def _strip_units(answer: str) -> str:
    """Return an answer in ASCII forms, without outer space and final period; a number also without its unit.

    Example:
        >>> _strip_units("约２３８０元。"), _strip_units(" 18 dollars. "), _strip_units("甲")
        ('2380', '18', '甲')
    """
    text = answer.translate(_FULL_WIDTH).strip().rstrip(".。").strip()
    bare = _CHINESE.sub(" ", text).strip()
    if not any(character.isdigit() for character in bare):
        return text
    with_unit = _WITH_UNIT.fullmatch(bare)
    return with_unit[1] if with_unit else bare


def _last_boxed(text: str) -> str | None:
    # The last one that is closed and not empty: responses are cut off, and some mention a bare "\boxed{}".
    for match in reversed(list(_BOXED.finditer(text))):
        inside = match[1] or _balanced(text, match.end())
        if inside is not None and inside.strip():
            return inside
    return None


def _balanced(text: str, start: int) -> str | None:
    """Return ``text[start:]`` up to the brace that closes the one before ``start``; None where none does."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None
