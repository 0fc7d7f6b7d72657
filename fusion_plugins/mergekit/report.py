"""The report on a merge: how much each model contributed, and where.

It turns ``fusion_merge.json`` into one self-contained HTML page: merge weights per model, a heat map of layers by
modules for every model, the largest and smallest weights, and the distance from equal weights. This module needs
neither torch nor mergekit, so that a record can be drawn on any machine.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_plugins.mergekit.record import read_record
from fusion_plugins.page import new_figure, plot_name, render_page, svg

#: Number of tensors in a list of extremes.
LISTED = 10
#: Cells of a heat map that are drawn one by one.
MOST_CELLS = 5000
PIXELS_PER_INCH = 96
#: How far a picture may shrink.
READABLE = 0.8


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
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    return render_page("merge.html", merge_values(folder))


def merge_values(folder: Path, level: int = 2) -> dict[str, Any]:
    """Return what the template ``parts/merge.html`` names; see :func:`render_merge_report`.

    Args:
        folder: of the merged model.
        level: of the headings.
    """
    record = read_record(folder)
    summary = summarize_merge(record)
    return {
        "level": level,
        "name": folder.resolve().name,
        "record": record,
        "summary": summary,
        "uniform": 1 / len(summary.models),
        "heat_maps": _heat_maps(record, summary.models),
        "outside": [entry for entry in record["tensors"] if entry["layer"] is None],
        "config": json.dumps(record["config"], indent=2, ensure_ascii=False),
    }


def _heat_maps(record: Mapping[str, Any], names: Sequence[str]) -> list[tuple[Any, int]]:
    """Return (picture, least width in pixels) per model: layers from top to bottom, their tensors across."""
    from matplotlib.colors import TwoSlopeNorm

    inside = [entry for entry in record["tensors"] if entry["layer"] is not None]
    if not inside:
        return []
    layers = list(dict.fromkeys(entry["layer"] for entry in inside))
    columns = list(dict.fromkeys(_within_layer(entry) for entry in inside))
    uniform = 1 / len(names)
    # White is an equal weight. The centre has to lie below vmax, also for one model, whose equal weight is 1.
    norm = TwoSlopeNorm(vcenter=min(uniform, 0.999), vmin=0, vmax=1)
    pictures = []
    for model, name in zip(record["models"], names, strict=True):
        grid = [[math.nan] * len(columns) for _ in layers]
        for entry in inside:
            grid[layers.index(entry["layer"])][columns.index(_within_layer(entry))] = entry["weights"].get(model, 0.0)
        figure = new_figure(max(3.6, 1.2 + 0.32 * len(columns)), 3.2 + 0.2 * len(layers))
        panel = figure.subplots()
        # As many cells as a mixture of experts can have would make the page large: then the cells are one picture.
        cells = panel.pcolormesh(grid, cmap="RdBu_r", norm=norm, rasterized=len(layers) * len(columns) > MOST_CELLS)
        panel.invert_yaxis()
        panel.set_title(plot_name(name), fontsize=10)
        places = [index + 0.5 for index in range(max(len(columns), len(layers)))]
        panel.set_xticks(places[: len(columns)], [plot_name(column) for column in columns], rotation=90, fontsize=9)
        numbers = [plot_name(layer.rpartition(".")[2]) for layer in layers]
        panel.set_yticks(places[: len(layers)], numbers, fontsize=9)
        panel.set_ylabel("layer", fontsize=9)
        bar = figure.colorbar(cells, ax=panel, orientation="horizontal", aspect=30)
        bar.set_ticks(sorted({0.0, uniform, 1.0}), labels=[f"{tick:.2g}" for tick in sorted({0.0, uniform, 1.0})])
        bar.ax.tick_params(labelsize=9)
        bar.set_label("merge weight; white: equal", fontsize=9)
        # On a narrower screen the picture scrolls, so that its letters stay readable.
        least = round(READABLE * PIXELS_PER_INCH * figure.get_figwidth())
        pictures.append((svg(figure, f"Merge weights of {name} by layer and module"), least))
    return pictures


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
