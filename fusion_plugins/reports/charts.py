"""Charts of a page.

Each is as wide as a phone, so that its letters need not shrink there; a wide page has them side by side.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from fusion_plugins.page import COLOURS, new_figure, plot_name, plot_unit, svg
from fusion_plugins.reports.blocks import Table, number, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: inches; a page of 390 pixels has room for 358
WIDTH, HEIGHT = 3.6, 2.9
#: points of a line, and rows of the table of a picture
MOST_POINTS, MOST_ROWS = 200, 40
#: characters of a name, beside which a second one fits
SHORT_NAME = 16
#: lines are told apart without their colours too
_STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
#: bars of a chart
MOST_BARS = 12

#: (x, y) in the order of x
Points = Sequence[tuple[float, float]]


def lines(title: str, lines_of: Mapping[str, Points], across: str, *, shares: bool = False) -> tuple[object, Table]:
    """Return a line chart as an SVG element, and the table of its numbers.

    Args:
        title: what it shows.
        lines_of: name -> points; of more lines than there are colours, the first ones are drawn, and all are listed.
        across: name of x.
        shares: y is in [0, 1].
    """
    figure = new_figure(WIDTH, HEIGHT)
    panel = figure.subplots()
    shown = dict(list(lines_of.items())[: len(COLOURS)])
    unit, named = plot_unit(y for points in shown.values() for _, y in points if isfinite(y))
    for place, (name, points) in enumerate(shown.items()):
        finite = [(x, y / unit) for x, y in spread(points, MOST_POINTS) if isfinite(y)]
        if finite:
            panel.plot(
                *zip(*finite, strict=True),
                color=COLOURS[place],
                linestyle=_STYLES[place],
                linewidth=1.8,
                marker="o" if len(finite) < 15 else "",
                markersize=4,
                label=plot_name(name, 30),
            )
    if shares:
        panel.set_ylim(-0.03, 1.03)
    figure.suptitle(plot_name(title + named, 60), fontsize=10)
    panel.set_xlabel(plot_name(across), fontsize=9)
    panel.tick_params(labelsize=9)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.lines:
        _legend(figure, list(shown))
    return svg(figure, f"{title}. The numbers are in the table below."), _table(title, lines_of, across)


def _legend(figure: "Figure", names: Sequence[str]) -> None:
    """Put the legend below: in two columns, where the names are short enough for that."""
    columns = 2 if len(names) > 2 and max(map(len, names)) <= SHORT_NAME else 1
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def spread(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most ``most`` points, spread evenly, the last one among them."""
    every = -(-len(points) // most) or 1
    return list(points[::-1][::every])[::-1]


def _table(title: str, lines_of: Mapping[str, Points], across: str) -> Table:
    values = {name: dict(points) for name, points in lines_of.items()}
    places = sorted({x for points in lines_of.values() for x, _ in points})
    shown = [x for x, _ in spread([(x, 0.0) for x in places], MOST_ROWS)]
    rows = [[number(x), *(number(values[name].get(x)) for name in values)] for x in shown]
    some = "" if len(shown) == len(places) else f", {len(shown)} of {len(places)} points"
    return Table(title, [across, *values], rows, words=0, folded=f"Numbers: {title}{some}")


def stacked(title: str, bars: Mapping[str, Mapping[str, float]], first: str) -> tuple[object, Table]:
    """Return a chart with one bar per name, divided into shares, and the table of its numbers.

    Args:
        title: what it shows.
        bars: name -> part -> count; of more bars or parts than there is room for, the largest are drawn, and all are
            listed.
        first: head of the column of the bars.
    """
    parts = list(dict.fromkeys(part for counts in bars.values() for part in counts))
    parts.sort(key=lambda part: -sum(counts.get(part, 0) for counts in bars.values()))
    shown = sorted(bars, key=lambda name: -sum(bars[name].values()))[:MOST_BARS]
    figure = new_figure(WIDTH, 1.5 + 0.34 * len(shown))
    panel = figure.subplots()
    starts = [0.0] * len(shown)
    for place, part in enumerate(parts[: len(COLOURS)]):
        widths = [bars[name].get(part, 0) / (sum(bars[name].values()) or 1) for name in shown]
        panel.barh(
            range(len(shown)),
            widths,
            height=0.7,
            left=starts,
            color=COLOURS[place],
            hatch=_HATCHES[place],
            edgecolor="white",
            label=plot_name(part, 30),
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    panel.set_yticks(range(len(shown)), [plot_name(name or "none", 14) for name in shown])
    panel.invert_yaxis()
    panel.set_xlim(0, 1)
    figure.suptitle(plot_name(title, 60), fontsize=10)
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    if shown:
        _legend(figure, parts)
    rows = [
        [name or "none", *(f"{counts.get(part, 0):,} ({share_of(counts, part)})" for part in parts)]
        for name, counts in bars.items()
    ]
    return svg(figure, f"{title}. The numbers are in the table below."), Table(title, [first, *parts], rows)


def share_of(counts: Mapping[str, float], part: str) -> str:
    """Return the share of one part for a table."""
    return share(counts.get(part, 0), sum(counts.values()))
