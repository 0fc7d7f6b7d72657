"""The report on a merge: who contributed how much, where.

``fusion_merge.json`` in, one self-contained HTML page out: shares per model, a heat map of layers by modules for every
model, the largest and smallest shares, and how far the merge is from a plain mean.
"""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from fusion_plugins.errors import DataError

__all__ = ["RECORD_NAME", "MergeSummary", "render_merge_report", "summarize_merge"]

RECORD_NAME = "fusion_merge.json"
LISTED = 10


@dataclass(frozen=True)
class MergeSummary:
    """What the report says in numbers.

    Attributes:
        models: tuned models, by their shortest distinct names.
        mean: mean share per model, every parameter counting once.
        extremes: per model the (share, tensor) of the smallest and of the largest shares, most extreme first.
        distance: share of the weight, from 0 to 1, that a plain mean would give to other models; mean over parameters.
        farthest: (distance, tensor), the tensors farthest from a plain mean.
        effective: exp of the entropy of the shares: how many models take part, mean over parameters.
        unchanged: tensors that no model changed.
    """

    models: list[str]
    mean: list[float]
    extremes: list[tuple[list[tuple[float, str]], list[tuple[float, str]]]]
    distance: float
    farthest: list[tuple[float, str]]
    effective: float
    unchanged: list[str]


def summarize_merge(record: Mapping[str, Any]) -> MergeSummary:
    """Compute the numbers of the report.

    Args:
        record: the content of ``fusion_merge.json``.
    """
    models = record["models"]
    moved = [entry for entry in record["tensors"] if sum(entry["weights"].values()) > 0]
    shares = [[entry["weights"].get(model, 0.0) for model in models] for entry in moved]
    sizes = [entry["elements"] for entry in moved]
    uniform = 1 / max(len(models), 1)
    distances = [sum(abs(share - uniform) for share in row) / 2 for row in shares]
    entropies = [-sum(share * math.log(share) for share in row if share > 0) for row in shares]
    names = [entry["name"] for entry in moved]
    extremes = []
    for index in range(len(models)):
        ranked = sorted((row[index], name) for row, name in zip(shares, names, strict=True))
        extremes.append((ranked[:LISTED], ranked[::-1][:LISTED]))
    return MergeSummary(
        models=_short_names(models),
        mean=[record["mean_weights"][model] for model in models],
        extremes=extremes,
        distance=_mean(distances, sizes),
        farthest=sorted(zip(distances, names, strict=True), reverse=True)[:LISTED],
        effective=_mean([math.exp(entropy) for entropy in entropies], sizes),
        unchanged=[entry["name"] for entry in record["tensors"] if sum(entry["weights"].values()) == 0],
    )


def render_merge_report(folder: Path) -> str:
    """Return the page for a merged model.

    Args:
        folder: of the merged model.

    Raises:
        DataError: there is no readable record, or it is of another format.
    """
    from jinja2 import Environment, PackageLoader

    record = _read(folder / RECORD_NAME)
    summary = summarize_merge(record)
    environment = Environment(loader=PackageLoader("fusion_plugins.doctor"), autoescape=True)
    return environment.get_template("merge.html").render(
        name=folder.resolve().name,
        record=record,
        summary=summary,
        uniform=1 / len(summary.models),
        heat_map=_heat_map(record, summary.models),
        outside=[entry for entry in record["tensors"] if entry["layer"] is None],
        config=json.dumps(record["config"], indent=2),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected the record of a merge; {escape(str(error))}") from error
    if record.get("format") != 1 or not record.get("tensors"):
        raise DataError(
            f"{path}: expected format 1 and at least one tensor; came format {record.get('format')!r} and "
            f"{len(record.get('tensors') or [])} tensors. Merge again with this version."
        )
    return record  # type: ignore[no-any-return]


def _heat_map(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """One picture, a panel per model, rows are layers, columns what a layer holds: a PNG as a data URL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    inside = [entry for entry in record["tensors"] if entry["layer"] is not None]
    if not inside:
        return ""
    layers = list(dict.fromkeys(entry["layer"] for entry in inside))
    columns = list(dict.fromkeys(_within_layer(entry) for entry in inside))
    width, height = 1.2 + 0.32 * len(columns), 1.8 + 0.17 * len(layers)
    figure = Figure(figsize=(len(names) * width + 1, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    norm = TwoSlopeNorm(vcenter=min(1 / len(names), 0.999), vmin=0, vmax=1)
    for panel, model, name in zip(panels, record["models"], names, strict=True):
        grid = [[math.nan] * len(columns) for _ in layers]
        for entry in inside:
            grid[layers.index(entry["layer"])][columns.index(_within_layer(entry))] = entry["weights"].get(model, 0.0)
        image = panel.imshow(grid, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        panel.set_title(name, fontsize=9)
        panel.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        panel.set_yticks(range(len(layers)), [layer.rpartition(".")[2] for layer in layers], fontsize=6)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="share (white: equal shares)", shrink=0.8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def _within_layer(entry: Mapping[str, Any]) -> str:
    inside: str = entry["name"][len(entry["layer"]) + 1 :]
    return inside.removesuffix(".weight")


def _short_names(models: Sequence[str]) -> list[str]:
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / max(sum(sizes), 1)
