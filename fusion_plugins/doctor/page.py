"""The output of ``fusion doctor``: a table in the terminal, and a self-contained HTML page with a picture."""

import math
from base64 import b64encode
from collections.abc import Callable
from io import BytesIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusion_plugins.doctor.diagnosis import ClassCount, figures
from fusion_plugins.doctor.examine import DoctorReport, SourceVerdict
from fusion_plugins.doctor.label_classes import CLASSES

#: part of the table -> how the names of its figures begin
PARTS = {
    "positions of the target": ("coverage", "without a distribution", "positions"),
    "probability mass": ("mass",),
    "label (the next token)": ("label",),
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
    """Print the table, the memory of a training step, the notes, and a verdict with its advice per source."""
    names = [escape(source.diagnosis.name) for source in report.sources]
    table = Table(title=f"fusion into {escape(report.target)}")
    table.add_column(no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for title, lines in sections(report):
        table.add_row(f"[bold]{title}[/]")
        for name, values in lines:
            table.add_row(f"  {name}", *values)
        table.add_section()
    console.print(table)
    for line in (_memory_line(report), *report.notes):
        console.print(escape(line))
    for name, source in zip(names, report.sources, strict=True):
        console.print(f"{name}: [bold]{source.verdict}[/]" + ("" if source.advice else ", no problems found"))
        for line in source.advice:
            console.print(f"  - {escape(line)}")


def render_doctor_page(report: DoctorReport, picture: bytes) -> str:
    """Return the HTML page, with the picture (a PNG) inside it."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("fusion_plugins.doctor"), autoescape=True)
    return environment.get_template("doctor.html").render(
        report=report,
        sections=sections(report),
        memory=_memory_line(report),
        picture="data:image/png;base64," + b64encode(picture).decode(),
    )


def picture_png(report: DoctorReport) -> bytes:
    """Return a PNG with two bar charts by kind of label: coverage, and the label's probability under each source."""
    # Figure and canvas are made directly: pyplot would choose a backend and keep every figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    coverage, probability = figure.subplots(1, 2)
    seen = [name for name in CLASSES if any(s.diagnosis.classes[name].positions for s in report.sources)]
    width = 0.8 / (len(report.sources) + 1)
    for index, source in enumerate(report.sources):
        classes = [source.diagnosis.classes[name] for name in seen]
        places = [place + index * width for place in range(len(seen))]
        coverage.bar(places, [_share(c.used, c.positions) for c in classes], width, label=source.diagnosis.name)
        probability.bar(places, [_share(c.label, c.used) for c in classes], width, label=source.diagnosis.name)
        own = [_share(c.target_label, c.used) for c in classes]
        probability.scatter(places, own, color="black", marker="_", s=120, zorder=3)
    for panel, title in (
        (coverage, "share of positions with a distribution"),
        (probability, "probability of the label (black line: the target's own)"),
    ):
        panel.set_title(title, fontsize=10)
        panel.set_xticks([place + width * (len(report.sources) - 1) / 2 for place in range(len(seen))], seen)
        panel.set_ylim(0, 1.05)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*coverage.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


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
    return f"{value:.3f}" if name.startswith(("CE", "bytes")) or "probability" in name else f"{value:.1%}"
