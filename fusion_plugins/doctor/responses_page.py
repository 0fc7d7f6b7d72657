"""The output of ``fusion doctor`` for scored responses: a table in the terminal, and a self-contained HTML page."""

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fusion_plugins.core.preferences.intervals import Interval
from fusion_plugins.core.preferences.worth_types import DomainWorth, SourceWorth
from fusion_plugins.doctor.responses import ResponsesReport
from fusion_plugins.page import COLOURS, new_figure, plot_name, plot_unit, png, render_page, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "-"
#: conclusion -> class of the page's styles
STYLES = {"worth it": "good", "not worth it": "poor", "not enough data": "fair"}
#: heads of the table, in the order of :func:`line`
HEADS = (
    "source",
    "answers",
    "prompts",
    "value",
    "95 % interval",
    "minus the target",
    "95 % interval",
    "dealt",
    "repeats",
    "solved",
    "characters",
    "mean reward",
    "reward gap",
    "verdict",
)
#: what the heads mean, for the terminal and the page
NOTES = (
    "value: accuracy, or the mean reward where answers have no verdicts. Each prompt counts the same, and intervals "
    "take the prompts as the sample.",
    "dealt: accuracy of the same answers dealt to other prompts; a value that is not above it is luck. repeats: how "
    "often a source that solved a prompt is right in its other answers to it; near the value itself, right answers are "
    "luck or all prompts are equally hard.",
    "solved: prompts with at least one right answer. characters: mean (and median). reward gap: median of the best "
    "minus the worst reward of a prompt.",
)


def lines(domain: DomainWorth) -> list[list[str]]:
    """Return the table of a domain: the target first, then the sources, then the best source of each prompt."""
    found = [*([domain.target] if domain.target else []), *domain.sources]
    found += [domain.together] if domain.together else []
    return [_line(each, domain) for each in found]


def summary(domain: DomainWorth) -> str:
    """Return the sentence about a domain's prompts."""
    if math.isnan(domain.solved):
        return f"{domain.prompts:,} prompts, compared by {domain.measure}."
    only = "" if math.isnan(domain.only_sources) else f", {domain.only_sources:.1%} by a source and never by the target"
    return (
        f"{domain.prompts:,} prompts, compared by {domain.measure}; {domain.solved:.1%} are solved by a source{only}."
    )


def show(report: ResponsesReport, console: Console) -> None:
    """Print a table per domain, its conclusion and the reasons.

    Args:
        report: what was found.
        console: one of :func:`fusion_plugins.terminal.console`.
    """
    for domain in report.domains:
        table = Table(title=f"{domain.domain}: {summary(domain)}")
        for place, head in enumerate(HEADS):
            table.add_column(head, justify="left" if place in (0, len(HEADS) - 1) else "right")
        for line in lines(domain):
            table.add_row(*line)
        console.print(table)
    for note in NOTES:
        console.print(note)
    for domain in report.domains:
        console.print(f"{domain.domain}: {domain.conclusion}", style="bold")
        for reason in domain.reasons:
            console.print(f"  - {reason}")


def render_responses_page(report: ResponsesReport) -> str:
    """Return the HTML page, with its picture inside it.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    domains = [
        {
            "found": domain,
            "style": STYLES[domain.conclusion],
            "summary": summary(domain),
            "lines": lines(domain),
            "picture": svg(_draw(domain), f"{domain.domain}: what the answers are worth, by source"),
        }
        for domain in report.domains
    ]
    return render_page("doctor_responses.html", {"report": report, "domains": domains, "heads": HEADS, "notes": NOTES})


def responses_png(report: ResponsesReport) -> bytes:
    """Return a PNG of the first domain's picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return png(_draw(report.domains[0]))


def _draw(domain: DomainWorth) -> "Figure":
    found = [each for each in (domain.target, *domain.sources, domain.together) if each is not None]
    found = [each for each in found if not math.isnan(each.value)][::-1]
    figure = new_figure(5.2, 1.3 + 0.35 * len(found))
    panel = figure.subplots()
    unit, named = plot_unit(end for each in found for end in (each.value, *each.interval))
    for place, each in enumerate(found):
        colour = COLOURS[1] if each is domain.target else COLOURS[0]
        low, high = ((each.value if math.isnan(end) else end) / unit for end in each.interval)
        panel.plot([low, high], [place, place], color=colour, linewidth=2)
        panel.plot([each.value / unit], [place], "o", color=colour)
        if not math.isnan(each.dealt):
            panel.plot([each.dealt], [place], "|", color="black", markersize=12, markeredgewidth=2)
    panel.set_yticks(range(len(found)), [plot_name(each.name) for each in found])
    panel.set_ylim(-0.6, max(len(found), 1) - 0.4)
    verdicts = domain.measure == "verdict"
    panel.set_xlabel(
        "accuracy (bar: the same answers dealt to other prompts)" if verdicts else f"mean reward{named}", fontsize=9
    )
    if verdicts:
        panel.set_xlim(-0.02, 1.02)
    panel.tick_params(labelsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _line(found: SourceWorth, domain: DomainWorth) -> list[str]:
    share = domain.measure == "verdict"
    target = found is domain.target
    mean, median = found.characters
    return [
        f"{found.name} (target)" if target else found.name,
        f"{found.responses:,}" if found.responses else NOTHING,
        f"{found.prompts:,}",
        _number(found.value, share),
        _interval(found.interval, share),
        _number(found.difference, share, sign=True),
        _interval(found.difference_interval, share, sign=True),
        _number(found.dealt, True),
        _number(found.repeats, True),
        _number(found.solved, True),
        NOTHING if math.isnan(mean) else f"{mean:,.0f} ({median:,.0f})",
        _number(found.reward, False),
        _number(found.gap, False),
        ("luck" if found.verdict == "luck" else NOTHING) if target else found.verdict,
    ]


def _number(value: float, share: bool, *, sign: bool = False) -> str:
    if math.isnan(value):
        return NOTHING
    return format(value, f"{'+' if sign else ''}{'.1%' if share else '.4g'}")


def _interval(ends: Interval, share: bool, *, sign: bool = False) -> str:
    low, high = ends
    return NOTHING if math.isnan(low) else f"{_number(low, share, sign=sign)} to {_number(high, share, sign=sign)}"
