"""What a page is made of: sections of texts, tables, pictures and coloured tokens, all of them plain data.

Whatever stands in them is data for the template, which escapes it; only pictures and parts that were rendered before
are markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fusion_plugins.page import render_page


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: its content.
        tone: good, fair or poor for a colour.
    """

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table that scrolls in a box of its own.

    Attributes:
        label: what it holds, for people who do not see it.
        heads: of the columns.
        rows: cells as texts; the first one names the row.
        words: how many of the first columns hold words; the others hold numbers.
        folded: title behind which it is folded away; empty for a table that is shown.
    """

    kind: ClassVar[str] = "table"
    label: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    folded: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures beside each other as far as there is room, each with the table of what it shows.

    Attributes:
        items: picture as an SVG element, and its table.
    """

    kind: ClassVar[str] = "pictures"
    items: Sequence[tuple[Any, Table]]


@dataclass(frozen=True)
class Tokens:
    """A text with coloured tokens.

    Attributes:
        label: what the colours say.
        tokens: text, class of its colour, and what it says of itself.
        legend: class and meaning.
    """

    kind: ClassVar[str] = "tokens"
    label: str
    tokens: Sequence[tuple[str, str, str]]
    legend: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    """The text of a file, folded away."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str


@dataclass(frozen=True)
class Part:
    """Markup that :func:`fusion_plugins.page.render_part` made."""

    kind: ClassVar[str] = "part"
    markup: Any


Block = Text | Table | Pictures | Tokens | Listing | Part


@dataclass(frozen=True)
class Section:
    """A heading and what belongs to it.

    Attributes:
        title: the heading.
        blocks: under it.
        parts: sections one level deeper.
    """

    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence["Section"] = field(default=())


def render(title: str, lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: of the page.
        lead: before the first section.
        sections: the rest.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    return render_page("report.html", {"title": title, "lead": lead, "sections": sections})


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for a table; a dash for none.

    Example:
        >>> number(1234567), number(0.123456), number(None), number(float("nan"))
        ('1,234,567', '0.1235', '–', '–')
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and 10**digits <= abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def share(part: float, whole: float) -> str:
    """Return a share for a table; a dash where there is nothing to share.

    Example:
        >>> share(1, 3), share(0, 0)
        ('33.3%', '–')
    """
    return f"{part / whole:.1%}" if whole else "–"


def cut(text: str, limit: int) -> str:
    """Return a text that is at most so long; its middle goes.

    Example:
        >>> cut("abcdefgh", 5)
        'ab…gh'
    """
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[: limit - 1 - half]}…{text[len(text) - half :]}"
