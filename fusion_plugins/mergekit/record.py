"""What a merge did: the weights and statistics of every tensor, written beside the merged model.

While mergekit runs one of our methods, :func:`current_merge` gives the method a place to report to. When the checkpoint
is complete the record becomes ``fusion_merge.json``; ``fusion report`` draws it, and :func:`append_card` adds a section
to the model card.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from fusion_plugins.core.merging.varm import layer_of, unit_of

__all__ = ["RECORD_NAME", "CurrentMerge", "MergeRecord", "append_card", "card_section", "current_merge", "merging"]

RECORD_NAME = "fusion_merge.json"
FORMAT = 1
CARD_HEADING = "### How the models were weighted"


@dataclass(eq=False)
class MergeRecord:
    """Collects the weights of one merge; safe to call from several threads.

    Attributes:
        folder: where the merged model is written.
        method: name of the merge method.
        base_model: the base.
        models: the tuned models, in the order of the configuration.
        config: the whole configuration, as plain data.
    """

    folder: Path
    method: str
    base_model: str
    models: list[str]
    config: Mapping[str, Any]
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def add(self, name: str, weights: Mapping[str, float], values: Mapping[str, float], **details: Any) -> None:
        """Record one tensor.

        Args:
            name: of the output tensor.
            weights: tuned model -> its share.
            values: tuned model -> the measure that the share came from.
            **details: number of elements, name of the unit, and what else the method knows.
        """
        entry = {"name": name, "layer": layer_of(name), "module": unit_of(name, "module")}
        with self.lock:
            self.tensors[name] = entry | details | {"weights": dict(weights), "values": dict(values)}

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, tensors in natural order (layer 2 before layer 10)."""
        tensors = sorted(self.tensors.values(), key=lambda entry: _natural(entry["name"]))
        return {
            "format": FORMAT,
            "method": self.method,
            "base_model": self.base_model,
            "models": self.models,
            "config": dict(self.config),
            "versions": {name: version(name) for name in ("fusion-plugins", "mergekit", "torch")},
            "mean_weights": _mean_weights(tensors, self.models),
            "tensors": tensors,
        }

    def write(self) -> Path:
        """Write the record into the folder of the model and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECORD_NAME
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


@dataclass(frozen=True)
class CurrentMerge:
    """What a method learns from the plan that it runs in.

    Attributes:
        record: where to report weights.
        sums: (J,) float64 per tensor of the unit, where the unit is larger than a tensor.
        sizes: their numbers of elements.
        unit: name of that unit.
        dtype: of the result, where it is not that of the inputs.
    """

    record: MergeRecord
    sums: Sequence[torch.Tensor] | None = None
    sizes: Sequence[int] | None = None
    unit: str | None = None
    dtype: torch.dtype | None = None


_current: ContextVar[CurrentMerge | None] = ContextVar("fusion_plugins_current_merge", default=None)


def current_merge() -> CurrentMerge | None:
    """Return the merge that this thread works on, or None when a method is called outside a planned merge."""
    return _current.get()


@contextmanager
def merging(merge: CurrentMerge) -> Iterator[None]:
    """Make ``merge`` the current one in this thread."""
    token = _current.set(merge)
    try:
        yield
    finally:
        _current.reset(token)


def card_section(record: Mapping[str, Any]) -> str:
    """Return a section for the model card: shares per model, and where they are largest."""
    rows = []
    for model in record["models"]:
        shares = [(entry["weights"][model], entry["name"]) for entry in record["tensors"] if model in entry["weights"]]
        (low, low_name), (high, high_name) = min(shares), max(shares)
        rows.append(
            f"| {model} | {record['mean_weights'][model]:.3f} | {low:.3f} (`{low_name}`) | {high:.3f} (`{high_name}`) |"
        )
    return "\n".join(
        [
            CARD_HEADING,
            "",
            f"`{record['method']}` gave every model a share of each tensor's change. Mean over all parameters, smallest"
            f" and largest share of a tensor (equal shares would be {1 / max(len(record['models']), 1):.3f}):",
            "",
            "| model | mean | smallest | largest |",
            "|---|---|---|---|",
            *rows,
            "",
            f"All shares are in `{RECORD_NAME}`; `fusion report` draws them.",
            "",
        ]
    )


def append_card(folder: Path) -> None:
    """Add :func:`card_section` to the model card in ``folder``, if there is a card and a record with tensors."""
    card, source = folder / "README.md", folder / RECORD_NAME
    if not card.exists() or not source.exists():
        return
    record, text = json.loads(source.read_text(encoding="utf-8")), card.read_text(encoding="utf-8")
    if record["tensors"] and CARD_HEADING not in text:
        card.write_text(f"{text.rstrip()}\n\n{card_section(record)}", encoding="utf-8")


def _mean_weights(tensors: Sequence[Mapping[str, Any]], models: Sequence[str]) -> dict[str, float]:
    """Mean share of each model, every parameter counting once."""
    total = sum(entry["elements"] for entry in tensors)
    return {
        model: sum(entry["elements"] * entry["weights"].get(model, 0.0) for entry in tensors) / max(total, 1)
        for model in models
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
