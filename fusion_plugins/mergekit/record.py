"""What a merge did: the weights and statistics of every tensor, written beside the merged model.

The methods report to a :class:`MergeRecord`. When the checkpoint is complete, it becomes ``fusion_merge.json``, which
``fusion report`` draws; :func:`append_card` adds a section to the model card.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

RECORD_NAME = "fusion_merge.json"
FORMAT = 1
CARD_HEADING = "### How the models were weighted"


@dataclass(eq=False)
class MergeRecord:
    """Collects the weights of one merge; safe to call from several threads, as a multi-GPU merge does.

    Attributes:
        folder: where the merged model is written.
        method: name of the merge method.
        base_model: the base.
        models: the tuned models, in the order of the configuration.
        config: the whole configuration, as plain data.
        tensors: name of an output tensor -> what was recorded of it.
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
            weights: tuned model -> its weight.
            values: tuned model -> the measure that the weight was computed from.
            **details: layer and module of the tensor, number of elements, name of the unit, and what else the method
                knows.
        """
        with self.lock:
            self.tensors[name] = {"name": name, **details, "weights": dict(weights), "values": dict(values)}

    def write(self) -> None:
        """Write the record into the folder of the model, tensors in natural order (layer 2 before layer 10)."""
        tensors = sorted(self.tensors.values(), key=lambda entry: _natural(entry["name"]))
        total = sum(entry["elements"] for entry in tensors)
        mean_weights = {  # every parameter counts once
            model: sum(entry["elements"] * entry["weights"].get(model, 0.0) for entry in tensors) / max(total, 1)
            for model in self.models
        }
        record = {
            "format": FORMAT,
            "method": self.method,
            "base_model": self.base_model,
            "models": self.models,
            "config": dict(self.config),
            "versions": {name: version(name) for name in ("fusion-plugins", "mergekit", "torch")},
            "mean_weights": mean_weights,
            "tensors": tensors,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (self.folder / RECORD_NAME).write_text(f"{text}\n", encoding="utf-8")


def append_card(folder: Path) -> None:
    """Add the weights to the model card in ``folder``, if there is a card and a record with tensors."""
    card, source = folder / "README.md", folder / RECORD_NAME
    if not card.exists() or not source.exists():
        return
    record, text = json.loads(source.read_text(encoding="utf-8")), card.read_text(encoding="utf-8")
    if record["tensors"] and CARD_HEADING not in text:
        card.write_text(f"{text.rstrip()}\n\n{_card_section(record)}", encoding="utf-8")


def _card_section(record: Mapping[str, Any]) -> str:
    """Return a section in Markdown: mean, smallest and largest merge weight of every model."""
    rows = []
    for model in record["models"]:
        weights = [(entry["weights"][model], entry["name"]) for entry in record["tensors"] if model in entry["weights"]]
        (low, low_name), (high, high_name) = min(weights), max(weights)
        rows.append(
            f"| {model} | {record['mean_weights'][model]:.3f} | {low:.3f} (`{low_name}`) | {high:.3f} (`{high_name}`) |"
        )
    return "\n".join(
        [
            CARD_HEADING,
            "",
            f"`{record['method']}` gave every model a merge weight in each tensor. Mean over all parameters, smallest"
            f" and largest weight of a tensor (equal weights would be {1 / max(len(record['models']), 1):.3f}):",
            "",
            "| model | mean | smallest | largest |",
            "|---|---|---|---|",
            *rows,
            "",
            f"All weights are in `{RECORD_NAME}`; `fusion report` draws them.",
            "",
        ]
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers within names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
