"""What `fusion keys` and the reference pages take from docstrings: marks as Markdown, and the entries of a section."""

import inspect
import re
from typing import Any

_ROLE = re.compile(r":\w+:`(~?)([^`<]+?)(?: <[^>`]*>)?`")
_SECTION = re.compile(r"^(?P<name>Args|Attributes):\n(?P<body>(?:[ ]{4}.*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^    (?P<names>\w+(?:, \w+)*)(?: \([^)]*\))?: (?P<text>.*(?:\n     .*)*)", re.MULTILINE)


def _code(match: re.Match[str]) -> str:
    short, target = match.groups()
    return f"`{target.rpartition('.')[2] if short else target}`"


def as_markdown(text: str) -> str:
    """Return a docstring with Sphinx roles, double backticks and ``::`` blocks written as Markdown."""
    text = _ROLE.sub(_code, text).replace("``", "`")
    # The section that is rendered as code has the plural as its name.
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return re.sub(r"::\n\n(?=    )", ":\n\n", text)


def entries(obj: Any) -> dict[str, str]:
    """Return name -> meaning of the ``Args:`` and ``Attributes:`` of an object's docstring."""
    found: dict[str, str] = {}
    for section in _SECTION.finditer(f"{inspect.getdoc(obj) or ''}\n"):
        for entry in _ENTRY.finditer(section["body"]):
            meaning = as_markdown(" ".join(entry["text"].split()))
            found |= dict.fromkeys(entry["names"].split(", "), meaning)
    return found


def first_sentence(obj: Any) -> str:
    """Return the first paragraph of an object's docstring on one line."""
    return as_markdown(" ".join((inspect.getdoc(obj) or "").partition("\n\n")[0].split()))
