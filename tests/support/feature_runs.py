"""Trains with every feature of axolotl, with and without the plugin, and prints what was logged.

    python tests/support/feature_runs.py FOLDER [NAME ...]

One JSON line for each run, with the logged figures or the error that ended it.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

# Triton's kernels (Liger) run in its interpreter, so that they can be compared without a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import axolotl_runs as runs
from axolotl_features import Feature, pairs

KINDS = ("plain", "fused")
FIGURES = ("loss", "grad_norm", "eval_loss", "fusion_loss")


def settings_of(feature: Feature, *, fused: bool) -> dict[str, Any]:
    """The settings of one of the two runs."""
    settings = {**feature.besides, **feature.keys}
    plugins = settings.pop("plugins", ["FUSION"])
    ours = [runs.PLUGIN] if fused else []
    return {
        **settings,
        "plugins": [name for given in plugins for name in (ours if given == "FUSION" else [given])] or None,
    }


def train_one(feature: Feature, kind: str, material: Any, tokens: Path, folder: Path) -> dict[str, Any] | str:
    """Train without or with the plugin; return the logged figures, or the error as text."""
    from transformers import set_seed

    out = folder / kind
    if kind == "plain":
        settings = runs.config(material, out, datasets=[{"path": str(tokens), "type": None, "ds_type": "json"}])
        settings.pop("fusion")
    else:
        settings = runs.config(material, out, fusion={"lm_loss_weight": 1.0})
    changed = {**settings, **settings_of(feature, fused=kind == "fused")}
    set_seed(7)  # axolotl draws the weights of an adapter before it sets its own
    try:
        trainer = runs.train({key: value for key, value in changed.items() if value is not None}, out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return {name: runs.logged(trainer, name) for name in FIGURES}


def tokens_of(material: Any, folder: Path) -> Path:
    """Write the rows of a fused run, without what is fused: the dataset of the plain runs."""
    _, rows = runs.prepare(runs.config(material, folder, shuffle_merged_datasets=False), folder)
    columns = ("input_ids", "attention_mask", "labels")
    return runs.write_rows(
        folder / "tokens.jsonl", [{name: [int(value) for value in row[name]] for name in columns} for row in rows]
    )


def run_all(folder: Path, names: Sequence[str], results: TextIO) -> None:
    """Train the pairs, each run in a process of its own: axolotl patches classes for good."""
    material = runs.make_material(folder)
    tokens = tokens_of(material, folder)

    def show(feature: Feature, kind: str) -> None:
        logged = train_one(feature, kind, material, tokens, folder)
        print(json.dumps({"name": feature.name, "kind": kind, "logged": logged}), file=results, flush=True)

    for kind in KINDS:
        show(Feature("nothing", {}), kind)  # in this process, so that the others find everything loaded
    for feature in pairs():
        if names and feature.name not in names:
            continue
        for kind in KINDS:
            process = os.fork()
            if process == 0:
                try:
                    show(feature, kind)
                finally:
                    os._exit(0)
            os.waitpid(process, 0)


if __name__ == "__main__":
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the hosts print is no result
    run_all(Path(sys.argv[1]), sys.argv[2:], results)
