"""FuseLLM against training without it: a target continued on a corpus, measured along the way.

A run saves checkpoints. Validation chooses one (early stopping); the held-out split is looked at only there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from fusion_lab import world
from fusion_lab.runner import Cell, Work
from fusion_lab.training import training
from fusion_lab.world import DOMAINS, SOURCES, Lab, Stage

__all__ = ["config", "needs", "run", "tidy", "with_plugin", "write_corpus"]

#: checkpoints per run
POINTS = 4
#: entries of the stores that all runs share
TOP_K = 64
#: factors that are keys of the `fusion:` block, and those of its groups
BLOCK = ("lm_loss_weight", "rule", "metric", "loss")
PROJECTION = ("vocabulary_map", "chain", "tail", "min_mass", "fallback")

#: domain -> how axolotl reads its rows without the plugin
DATASETS: dict[str, dict[str, Any]] = {
    "docs": {"type": "completion", "field": "text"},
    "sums": {
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    },
}


def teachers(cell: Cell) -> tuple[str, ...]:
    """Return the models whose distributions a cell fuses; the target's own are among the paper's."""
    if cell["method"] == "clm":
        return ()
    return {"all": (*SOURCES, "target"), "others": SOURCES, "own": ("target",)}.get(cell["sources"], (cell["sources"],))


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the shared stores; a cell of another top_k captures its own."""
    return [world.store(lab, name, _texts(cell)) for name in teachers(cell)] if cell["top_k"] == TOP_K else []


def _domains(cell: Cell) -> tuple[str, ...]:
    domain = cell.factors.get("domains", "both")
    return DOMAINS if domain == "both" else (domain,)


def _texts(cell: Cell) -> str:
    return "common" if _domains(cell) == DOMAINS else f"common-{cell['domains']}"


def write_corpus(lab: Lab, cell: Cell, folder: Path) -> dict[str, Path]:
    """Write the cell's sample of the common rows, one file per domain; the seed decides which rows."""
    return world.write_corpus(lab, folder / "corpus", cell["amount"], cell.seed, _domains(cell))


def config(lab: Lab, cell: Cell, files: dict[str, Path], steps: int) -> dict[str, Any]:
    """Return the axolotl configuration of a run that saves :data:`POINTS` checkpoints."""
    return training(lab, lab.model("target"), steps, cell.seed) | {
        "datasets": [
            {"path": f"./{path.parent.name}/{path.name}", "ds_type": "json", **DATASETS[domain]}
            for domain, path in files.items()
        ],
        "learning_rate": cell["learning_rate"],
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": max(1, steps // 50),
        "weight_decay": 0.1,
        "logging_steps": 50,
        "save_steps": max(1, steps // POINTS),
        "save_only_model": True,
        "save_total_limit": POINTS,
    }


def with_plugin(plain: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with fusion: the same rows in the same order, and the block."""
    datasets = [
        {"path": dataset["path"], "ds_type": "json", "type": "fusion_plugins.axolotl.fused"}
        for dataset in plain["datasets"]
    ]
    return plain | {"plugins": ["fusion_plugins.axolotl.FusionPlugin"], "datasets": datasets, "fusion": block}


def tidy(work: Work) -> None:
    """Remove what is large; what was asked and what came out stay."""
    for name in ("model", "prepared", "stores", "published"):
        shutil.rmtree(work.folder / name, ignore_errors=True)


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Train, measure every checkpoint on the validation split, and the best one on the held-out split."""
    files = write_corpus(lab, cell, work.folder)
    rows = sum(len(world.read_rows(path)) for path in files.values())
    per_epoch = -(-rows // lab.settings["batch"])
    steps = max(POINTS, round(per_epoch * lab.settings["epochs"][cell["amount"]]))
    steps -= steps % POINTS
    settings = config(lab, cell, files, steps)
    captured = 0.0
    if names := teachers(cell):
        stores, captured = _stores(lab, cell, work, files, names, rows)
        block = {
            "sources": [{"name": name, "store": path, "is_target": name == "target"} for name, path in stores.items()],
            "projection": {key: cell[key] for key in PROJECTION},
            **{key: cell[key] for key in BLOCK},
        }
        settings = with_plugin(settings, block)
    trained = work.axolotl("train", settings)
    checkpoints = sorted((work.folder / "model").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    best, lowest = None, float("inf")
    for checkpoint, figures in zip(checkpoints, work.call(_validate, lab, checkpoints, _domains(cell)), strict=True):
        step = int(checkpoint.name.split("-")[1])
        work.record("validation", epoch=step / per_epoch, seconds=trained * step / steps, captured=captured, **figures)
        if figures["bpb"] < lowest:
            best, lowest = checkpoint, figures["bpb"]
    assert best is not None  # a run saves at least one
    step = int(best.name.split("-")[1])
    figures = work.call(_measure, lab, best, _domains(cell))
    work.record("heldout", epoch=step / per_epoch, seconds=trained * step / steps, captured=captured, **figures)
    tidy(work)


def _validate(lab: Lab, checkpoints: list[Path], domains: tuple[str, ...]) -> list[dict[str, float]]:
    return [world.measure_model(lab, path, "validation", domains=domains, solved=False) for path in checkpoints]


def _measure(lab: Lab, folder: Path, domains: tuple[str, ...]) -> dict[str, float]:
    return world.measure_model(lab, folder, domains=domains, solved="sums" in domains)


def _stores(
    lab: Lab, cell: Cell, work: Work, files: dict[str, Path], names: tuple[str, ...], rows: int
) -> tuple[dict[str, str], float]:
    """Return the stores of a run and the CPU seconds of capture that its rows took, the models' start left out."""
    if cell["top_k"] == TOP_K:
        texts = _texts(cell)
        share = rows / len(world.read_rows(lab.data(texts)))
        seconds = sum(capture_seconds(lab, name, texts) for name in names)
        return {name: str(lab.store(name, texts)) for name in names}, share * seconds
    seconds = 0.0
    for name in names:
        seconds += work.command(
            *("fusion", "capture", "--texts", "./corpus", "--model", str(lab.model(name))),
            *("--out", f"./stores/{name}", "--top-k", str(cell["top_k"])),
        )
    return {name: f"./stores/{name}" for name in names}, seconds


def capture_seconds(lab: Lab, name: str, texts: str) -> float:
    """Return the CPU seconds that capturing all rows of a file from a model took."""
    path = lab.folder / "stages" / f"store-{texts}-{name}" / "result.json"
    return float(sum(json.loads(path.read_text())["cpu"].values()))
