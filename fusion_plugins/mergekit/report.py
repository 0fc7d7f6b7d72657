"""The report on a merge: how much each model contributed, and where.

It turns ``fusion_merge.json`` into one self-contained HTML page: merge weights per model, a heat map of layers by
modules for every model, the largest and smallest weights, and the distance from equal weights. This module needs
neither torch nor mergekit, so that a record can be drawn on any machine.
"""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from fusion_plugins.mergekit.record import read_record

#: Number of tensors in a list of extremes.
LISTED = 10


@dataclass(frozen=True)
class MergeSummary:
    """The numbers of the report.

    Attributes:
        models: tuned models, by their shortest distinct names.
        mean: mean merge weight per model, every parameter counting once.
        extremes: per model the (weight, tensor) of the smallest and of the largest weights, most extreme first.
        distance: from equal weights, half the sum of ``|weight - 1/J|`` over the J models (total variation), in
            [0, 1 - 1/J]; mean over parameters. 0 is a plain mean.
        farthest: (distance, tensor), the tensors farthest from equal weights.
        effective: exp of the entropy of the weights: how many models take part, mean over parameters.
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
    changed = [entry for entry in record["tensors"] if sum(entry["weights"].values()) > 0]
    names = [entry["name"] for entry in changed]
    sizes = [entry["elements"] for entry in changed]
    weights = [[entry["weights"].get(model, 0.0) for model in models] for entry in changed]
    uniform = 1 / max(len(models), 1)
    distances = [sum(abs(weight - uniform) for weight in tensor) / 2 for tensor in weights]
    entropies = [-sum(weight * math.log(weight) for weight in tensor if weight > 0) for tensor in weights]
    extremes = []
    for index in range(len(models)):
        ranked = sorted((tensor[index], name) for tensor, name in zip(weights, names, strict=True))
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
        DataError: there is no readable record, it has another format, or it belongs to other weights.
    """
    from jinja2 import Environment, PackageLoader

    record = read_record(folder)
    summary = summarize_merge(record)
    environment = Environment(loader=PackageLoader("fusion_plugins.mergekit"), autoescape=True)
    return environment.get_template("merge.html").render(
        name=folder.resolve().name,
        record=record,
        summary=summary,
        uniform=1 / len(summary.models),
        heat_map=_heat_map(record, summary.models),
        outside=[entry for entry in record["tensors"] if entry["layer"] is None],
        config=json.dumps(record["config"], indent=2),
    )


def _heat_map(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return one picture as a data URL (PNG): a panel per model, layers from top to bottom, their tensors across."""
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
    # White is an equal weight. The centre has to lie below vmax, also for one model, whose equal weight is 1.
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
    figure.colorbar(image, ax=list(panels), label="merge weight (white: equal weights)", shrink=0.8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def _within_layer(entry: Mapping[str, Any]) -> str:
    inside: str = entry["name"][len(entry["layer"]) + 1 :]
    return inside.removesuffix(".weight")


def _short_names(models: Sequence[str]) -> list[str]:
    """Return the last part of every path or name, or all of it where two models share the last part."""
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean over the parameters, for one value per tensor."""
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / max(sum(sizes), 1)
