r"""Read intervals: as brackets, or as inequalities of one variable.

>>> as_interval("x < 3"), as_interval(r"$(-\infty, 3)$"), as_interval(r"1 \le x < 3 \text{ or } x > 5")
(('(-\\infty,3)', 'x'), ('(-\\infty,3)', ''), ('[1,3) \\cup (5,\\infty)', 'x'))
"""

import re

_PLAIN = (
    (re.compile(r"\\(?:left|right|displaystyle|[,!;: ])(?![a-zA-Z])|[$~]|\\[()\[\]]"), " "),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:leq?|leqslant)(?![a-zA-Z])|≤|=<"), "<="),
    (re.compile(r"\\(?:geq?|geqslant)(?![a-zA-Z])|≥"), ">="),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"^\s*[a-zA-Z]\s*(?:\\in\b|∈|\bin\b)"), " "),
)
_UNION = re.compile(r"\s*(?:\\cup|∪|\bor\b|\bU\b)\s*")
_BRACKETS = re.compile(r"([(\[])([^,()\[\]]+),([^,()\[\]]+)([)\]])")
_SIGN = re.compile(r"(<=|>=|<|>)")
_VARIABLE = re.compile(r"[a-zA-Z]")
_INFINITY = r"\infty"


def as_interval(text: str) -> tuple[str, str] | None:
    """Return intervals in one form, and the variable of an inequality ("" without); None where there are none.

    A pair such as (1,3) is one, too, although it may be a point.
    """
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    parts = [_one(part.strip()) for part in _UNION.split(" ".join(text.split()).rstrip(" ."))]
    variables = {variable for part in parts if part for _, variable in [part] if variable}
    if None in parts or len(variables) > 1:
        return None
    return r" \cup ".join(part[0] for part in parts if part), "".join(variables)


def says_interval(text: str) -> bool:
    """Return whether a text can only be an interval: an inequality, or brackets with an infinite end."""
    found = as_interval(text) if re.search(r"[<>≤≥]|\\[lg](?:eq?|t)|infty", text) else None
    return found is not None and bool(found[1] or _INFINITY in found[0])


def _one(part: str) -> tuple[str, str] | None:
    brackets = _BRACKETS.fullmatch(part)
    if brackets:
        left, low, high, right = (piece.strip() for piece in brackets.groups())
        return _written(left, low, high, right, "")
    pieces = [piece.strip() for piece in _SIGN.split(part)]
    signs = pieces[1::2]
    if len(pieces) not in (3, 5) or len({sign[0] for sign in signs}) != 1:
        return None
    if signs[0][0] == ">":
        pieces = pieces[::-1]
        signs = pieces[1::2]
    sides = pieces[::2]
    # Now everything rises from left to right.
    places = [place for place, side in enumerate(sides) if _VARIABLE.fullmatch(side)]
    if len(places) != 1 or (len(sides) == 3 and places != [1]):
        return None
    place = places[0]
    low = sides[place - 1] if place else f"-{_INFINITY}"
    high = sides[place + 1] if place + 1 < len(sides) else _INFINITY
    left = "[" if place and "=" in signs[place - 1] else "("
    right = "]" if place < len(signs) and "=" in signs[place] else ")"
    return _written(left, low, high, right, sides[place])


def _written(left: str, low: str, high: str, right: str, variable: str) -> tuple[str, str] | None:
    ends = [re.sub(r"^\+\s*(?=\\infty)", "", end.replace(" ", "") if "infty" in end else end) for end in (low, high)]
    # Another letter makes it something else than an interval of numbers.
    if any(not end or re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+|\bpi\b|\bsqrt\b", "", end)) for end in ends):
        return None
    return f"{left}{ends[0]},{ends[1]}{right}", variable
