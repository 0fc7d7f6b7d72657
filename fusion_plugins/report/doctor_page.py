"""What ``fusion doctor`` shows: a table in the terminal, and a self-contained HTML page with a picture."""

import math
from base64 import b64encode
from io import BytesIO

from rich.console import Console
from rich.table import Table

from fusion_plugins.report.diagnosis import CLASSES, ClassCount, Diagnosis
from fusion_plugins.report.doctor import DoctorReport

__all__ = ["figures", "render_doctor_page", "show"]

KINDS = ("one_to_one", "one_to_many", "many_to_one", "crossing", "special")


def figures(diagnosis: Diagnosis) -> dict[str, float]:
    """Return the figures that stand in the table, name -> value; shares in [0, 1], cross-entropies in nats/byte.

    ``fallback`` is the share of supervised rows without a distribution: masked, or taught the label alone.
    """
    report, total = diagnosis.projection, diagnosis.total
    used = max(report.used, 1)
    return {
        "coverage": report.coverage,
        **{f"rows {kind.replace('_', '-')}": getattr(report, kind) / max(report.rows, 1) for kind in KINDS},
        "fallback": 1.0 - report.coverage,
        "mass kept": report.mass_kept,
        "mass outside top k": report.outside_mass / used,
        "mass unmapped": report.unmapped_mass / used,
        "label is top 1": total.top1 / max(total.used, 1),
        "label probability": total.gold / max(total.used, 1),
        "label probability, target": total.own / max(total.used, 1),
        "vocabulary exact": diagnosis.mapped["exact"],
        "vocabulary edited": diagnosis.mapped["edited"],
        "vocabulary unmapped": diagnosis.mapped["unmapped"],
        "vocabulary overlap": diagnosis.overlap,
        "CE per byte": diagnosis.ce_per_byte,
        "CE per byte, target": diagnosis.target_ce_per_byte,
        "texts won": diagnosis.wins / max(diagnosis.texts, 1),
    }


#: figures that need distributions on both sides
SCORED = ("CE per byte", "CE per byte, target", "texts won", "label probability, target", "mass outside top k")


def rows(report: DoctorReport) -> list[tuple[str, list[str]]]:
    """Return (figure, one text per source) in the order of the table."""
    columns = [figures(source.diagnosis) for source in report.sources]
    names = [name for name in columns[0] if report.scored or name not in SCORED]
    table = [(name, [_text(name, column[name]) for column in columns]) for name in names]
    per_class = [
        (f"{name}: coverage", [_class_text(s.diagnosis.classes[name]) for s in report.sources]) for name in CLASSES
    ]
    sizes = [("bytes per stored token", [_number(source.bytes_per_token, ".1f") for source in report.sources])]
    return table + per_class + (sizes if report.scored else [])


def show(report: DoctorReport, console: Console) -> None:
    """Print the table, the memory of a training step, and a verdict with its advice per source."""
    table = Table("", *(source.diagnosis.name for source in report.sources), title=f"fusion into {report.target}")
    for name, values in rows(report):
        table.add_row(name, *values)
    console.print(table)
    console.print(memory_line(report))
    for source in report.sources:
        console.print(f"{source.diagnosis.name}: [bold]{source.verdict}[/]")
        for line in source.advice:
            console.print(f"  - {line}")


def memory_line(report: DoctorReport) -> str:
    """Return one sentence on the memory of the fused targets."""
    return (
        f"{report.texts} texts examined. Fused targets of one step of 1 x 2048 tokens: "
        f"{report.sparse_bytes / 1e6:.2f} MB (as a dense tensor {report.dense_bytes / 1e6:,.0f} MB)."
    )


def render_doctor_page(report: DoctorReport) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("fusion_plugins.report"), autoescape=True)
    return environment.get_template("doctor.html").render(
        report=report, rows=rows(report), memory=memory_line(report), picture=_picture(report)
    )


def picture_png(report: DoctorReport) -> bytes:
    """Return a PNG: per label class the share of rows that each source teaches, and what the rows give the label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    coverage, gold = figure.subplots(1, 2)
    seen = [name for name in CLASSES if any(s.diagnosis.classes[name].rows for s in report.sources)]
    width = 0.8 / (len(report.sources) + 1)
    for index, source in enumerate(report.sources):
        classes = [source.diagnosis.classes[name] for name in seen]
        places = [place + index * width for place in range(len(seen))]
        coverage.bar(places, [_share(c.used, c.rows) for c in classes], width, label=source.diagnosis.name)
        gold.bar(places, [_share(c.gold, c.used) for c in classes], width, label=source.diagnosis.name)
        if report.scored:
            gold.scatter(places, [_share(c.own, c.used) for c in classes], color="black", marker="_", s=120, zorder=3)
    for panel, title in (
        (coverage, "rows with a distribution"),
        (gold, "probability of the label (bar: target's own)"),
    ):
        panel.set_title(title, fontsize=10)
        panel.set_xticks([place + width * (len(report.sources) - 1) / 2 for place in range(len(seen))], seen)
        panel.set_ylim(0, 1.05)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*coverage.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _picture(report: DoctorReport) -> str:
    return "data:image/png;base64," + b64encode(picture_png(report)).decode()


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _class_text(count: ClassCount) -> str:
    return f"{count.used / count.rows:.1%} of {count.rows:,}" if count.rows else "-"


def _text(name: str, value: float) -> str:
    return _number(value, ".3f" if name.startswith("CE") or "probability" in name else ".1%")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
