"""The output of ``fusion doctor``: a table in the terminal, and a self-contained HTML page with a picture."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_plugins.doctor.diagnosis import ClassCount, figures
from fusion_plugins.doctor.examine import DoctorReport, SourceVerdict
from fusion_plugins.doctor.label_classes import CLASSES
from fusion_plugins.page import COLOURS, new_figure, plot_name, png, render_page, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: part of the table -> how the names of its figures begin
PARTS = {
    "positions of the target": ("coverage", "without a distribution", "positions"),
    "probability mass": ("mass",),
    "label (the next token)": ("label",),
    "chunks that both tokenize": ("chunks",),
    "vocabularies": ("vocabulary",),
    "whole texts": ("CE", "texts", "bytes"),
}
NOTHING = "-"

#: (figure, one value per source, as text)
Line = tuple[str, list[str]]


def sections(report: DoctorReport) -> list[tuple[str, list[Line]]]:
    """Return the parts of the table, title and lines, without the figures that no source has."""
    columns = [figures(source.diagnosis) for source in report.sources]
    texts = [(name, [_text(name, column[name]) for column in columns]) for name in columns[0]]
    parts = [(title, [line for line in texts if line[0].startswith(names)]) for title, names in PARTS.items()]
    store = [
        ("map", [_map_text(source) for source in report.sources]),
        ("store, bytes per token", [_size(source, source.bytes_per_token) for source in report.sources]),
        ("store, bytes per byte of text", [_size(source, source.store_per_text) for source in report.sources]),
    ]
    parts += [
        ("coverage by kind of label", _by_class(report, _class_coverage)),
        ("label probability by kind", _by_class(report, _class_probability)),
        ("vocabulary map and store", store),
    ]
    return [(title, [line for line in lines if set(line[1]) != {NOTHING}]) for title, lines in parts]


def show(report: DoctorReport, console: Console) -> None:
    """Print the table, the memory of a training step, the notes, and a verdict with its advice per source.

    Args:
        report: what was found.
        console: one of :func:`fusion_plugins.terminal.console`.
    """
    table = Table(title=f"fusion into {report.target}")
    table.add_column(no_wrap=True)
    for source in report.sources:
        table.add_column(source.diagnosis.name, justify="right")
    for title, lines in sections(report):
        table.add_row(Text(title, style="bold"))
        for name, values in lines:
            table.add_row(f"  {name}", *values)
        table.add_section()
    console.print(table)
    for line in (_memory_line(report), *taught_lines(report), *report.notes):
        console.print(line)
    for source in report.sources:
        verdict = f"{source.diagnosis.name}: {source.verdict}" + ("" if source.advice else ", no problems found")
        console.print(verdict, style="bold")
        for line in source.advice:
            console.print(f"  - {line}")


def taught_lines(report: DoctorReport) -> Iterator[str]:
    """Yield, per domain, which source would teach how many positions of the sample."""
    for domain, counts in report.taught.items():
        total = max(1, sum(counts.values()))
        parts = ", ".join(f"{name} {count} ({count / total:.1%})" for name, count in counts.items())
        yield f"{domain or 'all texts'}: of {total} positions, min_ce would let teach {parts}"


def render_doctor_page(report: DoctorReport) -> str:
    """Return the HTML page, with its pictures inside it.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    pictures = []
    for title, draw in PANELS.items():
        # As wide as a phone, so that its letters need not shrink there.
        figure = new_figure(5.2, 3.6)
        draw(figure.subplots(), report)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        pictures.append(svg(figure, title))
    values = {"report": report, "sections": sections(report), "memory": _memory_line(report), "pictures": pictures}
    return render_page("doctor.html", values)


def picture_png(report: DoctorReport) -> bytes:
    """Return a PNG with the page's bar charts side by side.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 4.1)
    panels = figure.subplots(1, len(PANELS))
    for panel, draw in zip(panels, PANELS.values(), strict=True):
        draw(panel, report)
    names = panels[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return png(figure)


def _draw_coverage(panel: "Axes", report: DoctorReport) -> None:
    _bars(panel, report, lambda count: _share(count.used, count.positions))
    panel.set_ylim(0, 1.05)
    panel.set_title("share of positions with a distribution", fontsize=10)


def _draw_probability(panel: "Axes", report: DoctorReport) -> None:
    _bars(panel, report, lambda count: _share(count.label, count.used))
    for places, counts in _places(report):
        own = [_share(count.target_label, count.used) for count in counts]
        panel.scatter(places, own, color="black", marker="_", s=120, zorder=3)
    # Probabilities of labels can be small everywhere: the axis fits them.
    panel.set_ylim(bottom=0)
    panel.margins(y=0.1)
    panel.set_title("probability of the label (line: the target's own)", fontsize=10)


#: what a picture shows -> function that draws it
PANELS: dict[str, Any] = {
    "Share of the positions that have a distribution, by kind of label and source": _draw_coverage,
    "Probability of the label, by kind of label and source": _draw_probability,
}


def _bars(panel: "Axes", report: DoctorReport, height: Callable[[ClassCount], float]) -> None:
    width = 0.8 / (len(report.sources) + 1)
    for index, (source, (places, counts)) in enumerate(zip(report.sources, _places(report), strict=True)):
        heights = [height(count) for count in counts]
        name = plot_name(source.diagnosis.name)
        panel.bar(places, heights, width, label=name, color=COLOURS[index % len(COLOURS)])
    names = _seen_classes(report)
    middle = width * (len(report.sources) - 1) / 2
    panel.set_xticks([place + middle for place in range(len(names))], names)
    panel.spines[["top", "right"]].set_visible(False)


def _places(report: DoctorReport) -> list[tuple[list[float], list[ClassCount]]]:
    """Return per source where its bars stand and what they count."""
    width = 0.8 / (len(report.sources) + 1)
    names = _seen_classes(report)
    return [
        ([place + index * width for place in range(len(names))], [source.diagnosis.classes[name] for name in names])
        for index, source in enumerate(report.sources)
    ]


def _seen_classes(report: DoctorReport) -> list[str]:
    return [name for name in CLASSES if any(source.diagnosis.classes[name].positions for source in report.sources)]


def _memory_line(report: DoctorReport) -> str:
    return (
        f"{report.texts} texts examined. The fused distributions of a training step of 1 x 2048 tokens with 64 entries "
        f"per position take {report.sparse_bytes / 1e6:.2f} MB (as a dense tensor {report.dense_bytes / 1e6:,.0f} MB)."
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _by_class(report: DoctorReport, text: Callable[[ClassCount], str]) -> list[Line]:
    return [(name, [text(source.diagnosis.classes[name]) for source in report.sources]) for name in CLASSES]


def _class_coverage(count: ClassCount) -> str:
    return f"{count.used / count.positions:.1%} of {count.positions:,}" if count.positions else NOTHING


def _class_probability(count: ClassCount) -> str:
    if not count.used:
        return NOTHING
    target = "" if math.isnan(count.target_label) else f" (target {count.target_label / count.used:.3f})"
    return f"{count.label / count.used:.3f}{target}"


def _map_text(source: SourceVerdict) -> str:
    method = source.diagnosis.vocabulary_map
    return "none needed: the same tokenizer" if method == "identity" else method


def _size(source: SourceVerdict, value: float) -> str:
    return f"{'' if source.captured else 'about '}{value:.1f}"


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return NOTHING
    numbers = ("CE", "bytes", "chunks, tokens in each")
    return f"{value:.3f}" if name.startswith(numbers) or "probability" in name else f"{value:.1%}"
