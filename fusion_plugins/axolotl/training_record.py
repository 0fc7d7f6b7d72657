"""What a training leaves for `fusion report`: ``fusion_training.json`` in its output folder.

It holds the configuration that was used (secrets removed), the versions of the packages, a few rows with the source
that teaches each token, and, once the training has ended, its figures. Times are left out, so that the same training
leaves the same file. Nothing that goes wrong here ends a training.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
from axolotl.utils.distributed import is_main_process
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

import fusion_plugins
from fusion_plugins.axolotl.args import fusion_block
from fusion_plugins.axolotl.collator import Fused, FusionCollator, TokenChunks
from fusion_plugins.axolotl.target_tokenizer import IGNORED
from fusion_plugins.core.fusion.teachers import NOTHING, teacher_names, teacher_numbers
from fusion_plugins.core.fusion.types import has_entries
from fusion_plugins.core.text.token_bytes import readable_tokens
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.redaction import without_secrets
from fusion_plugins.store.files import write_atomic
from fusion_plugins.training_files import EXAMPLE_TOKENS, EXAMPLES, MOST_ENTRIES, TRAINING_RECORD, TRAINING_VERSION

LOG = get_logger(__name__)
_PACKAGES = ("axolotl", "transformers", "torch", "trl", "peft", "accelerate", "datasets")
#: parts of names of figures that are times, speeds or memory
_OF_THE_MACHINE = ("runtime", "per_sec", "memory")


def keep_record(cfg: Any, trainer: Any) -> None:
    """Write what is known before the first step, and let the trainer add its figures after the last one."""
    if is_main_process():
        _tried(lambda: _begin(cfg, trainer))


def _begin(cfg: Any, trainer: Any) -> None:
    base = str(cfg.base_model)
    record = {
        "version": TRAINING_VERSION,
        # Relative to a folder that nobody knows later.
        "base_model": os.path.abspath(base) if os.path.isdir(base) else base,
        "adapter": cfg.adapter or None,
        "versions": _versions(),
        "config": without_secrets(_as_json(cfg.to_dict())),
        "examples": _examples(cfg, trainer),
        "log_history": [],
    }
    path = Path(cfg.output_dir, TRAINING_RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, record)
    trainer.add_callback(_KeepFigures(path, record))


class _KeepFigures(TrainerCallback):
    """Adds the figures of a training that has ended."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self._path, self._record = path, record

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record again, with the figures."""
        # The trainer saves the model after this.
        _tried(lambda: _write(self._path, {**self._record, "log_history": kept_entries(state.log_history)}))


def _tried(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:  # a page is not worth a training
        LOG.warning(f"fusion: {TRAINING_RECORD} is missing or not whole: {type(error).__name__}: {error}")


def kept_entries(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of a log without figures of the machine.

    Of the steps, and of everything else (evaluations, the end), at most :data:`MOST_ENTRIES` are kept, the last one
    among them: evaluations are few, and would be lost among the steps.
    """
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, entry in enumerate(history):
        places["loss" in entry].append(place)
    chosen = sorted(place for each in places.values() for place in each[::-1][:: -(-len(each) // MOST_ENTRIES) or 1])
    return [
        {name: value for name, value in history[place].items() if not any(part in name for part in _OF_THE_MACHINE)}
        for place in chosen
    ]


def _examples(cfg: Any, trainer: Any) -> list[dict[str, Any]]:
    """Return rows of a training on fused distributions, spread evenly; none of another one."""
    collator, rows = trainer.data_collator, trainer.train_dataset
    if not isinstance(collator, FusionCollator) or not hasattr(rows, "__len__"):
        return []
    # Only the bytes of the tokens are asked for, and the tokenizer was checked when the rows were prepared.
    table = TokenTable.from_tokenizer(collator.tokenizer, check=False)
    names = [source.name for source in fusion_block(cfg).sources]
    places = np.unique(np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows)), dtype=int)).tolist()
    return [_example(place, rows[place], collator, table, names) for place in places]


def _example(place: int, row: Any, collator: FusionCollator, table: TokenTable, names: Sequence[str]) -> dict[str, Any]:
    (fused,) = collator.fused([row])
    ids = list(row["input_ids"])[:EXAMPLE_TOKENS]
    return {
        "row": place,
        "of_tokens": len(row["input_ids"]),
        "ids": [int(token) for token in ids],
        "tokens": readable_tokens([table.bytes_of(int(token)) for token in ids]),
        "supervised": [int(label) != IGNORED for label in list(row["labels"])[: len(ids)]],
        "sources": teachers(fused, names)[: len(ids)],
    }


def teachers(fused: Fused | TokenChunks, names: Sequence[str]) -> list[str | None]:
    """Return who teaches each token of a row; None where nobody does.

    Args:
        fused: distributions or chunks of the T positions of a row.
        names: of the sources, by their numbers.

    Returns:
        T names, of :func:`~fusion_plugins.core.fusion.teachers.teacher_names`. The distribution at a position is over
        the token after it, so that the first token has none.
    """
    present: np.ndarray = fused.place > 0 if isinstance(fused, TokenChunks) else has_entries(fused.ids)
    kept = present if isinstance(fused, TokenChunks) else fused.kept  # no fallback makes a chunk
    every = teacher_names(names)
    found = [every[number] for number in teacher_numbers(present, fused.source, kept, len(names)).tolist()]
    return [None, *(None if name == NOTHING else name for name in found[:-1])]


def _versions() -> dict[str, str]:
    found = {"fusion-plugins": fusion_plugins.__version__, "python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _as_json(value: Any) -> Any:
    """Return settings as JSON would have them, without those that nobody set."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(record, indent=1) + "\n")
