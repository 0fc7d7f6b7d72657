"""What a merge did: the weights and statistics of every tensor, written beside the merged model.

The methods report to a :class:`MergeRecord`. When the checkpoint is complete, it becomes ``fusion_merge.json``, which
``fusion report`` draws; :func:`append_card` adds a section to the model card.

A record describes the weights beside it and no others. So :func:`remove_record` removes it when a merge into its folder
starts, it is written when the weights are complete, and it holds their fingerprint, which :func:`read_record` compares.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from fusion_plugins.checkpoint_fingerprint import checkpoint_fingerprint
from fusion_plugins.errors import DataError, MergeError
from fusion_plugins.escape import for_markdown
from fusion_plugins.page import PAGE_NAME
from fusion_plugins.store.files import write_atomic

RECORD_NAME = "fusion_merge.json"
FORMAT = 2
#: What mergekit writes weights into.
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
#: Larger files of weights are hashed in part.
WHOLE_BYTES = 1 << 28
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
            "weights": weights_fingerprint(self.folder),
            "versions": {name: version(name) for name in ("fusion-plugins", "mergekit", "torch")},
            "mean_weights": mean_weights,
            "tensors": tensors,
        }
        write_atomic(self.folder / RECORD_NAME, f"{json.dumps(record, indent=1)}\n")


class _Tensor(BaseModel):
    name: str
    layer: str | None
    elements: int
    weights: dict[str, FiniteFloat]

    @model_validator(mode="after")
    def _layer_holds_tensor(self) -> "_Tensor":
        if self.layer is not None and not self.name.startswith(f"{self.layer}."):
            raise ValueError("the name of a tensor must begin with its layer")
        return self


class _Record(BaseModel):
    """What a page reads of a record, which may come from anywhere."""

    method: str
    base_model: str
    models: list[str] = Field(min_length=1)
    config: dict[str, Any]
    versions: dict[str, str]
    weights: str
    mean_weights: dict[str, FiniteFloat]
    tensors: list[_Tensor]

    @model_validator(mode="after")
    def _models_have_means(self) -> "_Record":
        if set(self.models) != set(self.mean_weights):
            raise ValueError("every model needs a mean weight")
        return self


def weights_fingerprint(folder: Path) -> str | None:
    """Return a sha256 (hex) of the merged weights in a folder; None if there are none."""
    return checkpoint_fingerprint(folder, whole_bytes=WHOLE_BYTES, weight_files=WEIGHT_FILES, with_config=False)


def require_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written, before hours of work.

    Raises:
        MergeError: a file or a permission is in the way.
    """
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    what = None if nearest.is_dir() else f"{nearest} is a file"
    if what is None:
        try:  # the bits of a permission do not tell about read-only disks, nor hold for root
            TemporaryFile(dir=nearest).close()
        except OSError as error:
            what = f"{nearest} cannot be written: {error.strerror}"
    if what is not None:
        raise MergeError(
            f"{folder}: expected a folder for the merged model, or a name for a new one, got neither ({what}). Name "
            "another folder, or repair the permission."
        )


def remove_record(folder: Path) -> None:
    """Remove what describes the weights in a folder, before a merge replaces them: record, page, section of the card.

    Raises:
        OSError: a permission is in the way.
    """
    for name in (RECORD_NAME, PAGE_NAME):
        (folder / name).unlink(missing_ok=True)
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        kept, heading, _ = text.partition(f"\n{CARD_HEADING}\n")
        if heading:
            card.write_text(f"{kept.rstrip()}\n", encoding="utf-8", errors="surrogateescape")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of the merge that made the weights in a folder.

    Raises:
        DataError: there is no readable record, it has another format, or it belongs to other weights.
    """
    path = folder / RECORD_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of a merged model, got no folder. Correct the path.")
    if not path.exists():
        raise DataError(
            f"{folder}: expected a merged model with {RECORD_NAME}, got no such file. Merge with varm or fusechat_sce "
            "to the end: other methods leave no record, nor does a merge that did not finish."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected the record of a merge, got {error}. Merge again.") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT or not content.get("tensors"):
        raise DataError(
            f"{path}: expected format {FORMAT} and at least one tensor, got format {found!r} or no tensors. Merge "
            "again with this version of fusion-plugins."
        )
    try:
        record = _Record.model_validate(content).model_dump()
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"{path}: expected the record of a merge, got a wrong {place}: {problem['msg']}. Merge again."
        ) from None
    weights = weights_fingerprint(folder)
    if weights is None or record["weights"] != weights:
        raise DataError(
            f"{path}: expected the record of the weights in {folder}, got that of others: the weights were merged, "
            "trained or copied there afterwards. Merge again, or report on the folder that the record is from."
        )
    return record


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
        if not weights:
            continue
        (low, low_name), (high, high_name) = min(weights), max(weights)
        rows.append(
            f"| {for_markdown(model)} | {record['mean_weights'][model]:.3f} | {low:.3f} ({for_markdown(low_name)})"
            f" | {high:.3f} ({for_markdown(high_name)}) |"
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
