"""FuseChat: the target fused with one source at a time, and the results merged by mergekit.

The free settings of every method are tuned on the validation split, those of methods without any (linear, VaRM, SCE's
weights) are what they are. The held-out split is looked at once per method.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from fusion_lab import world
from fusion_lab.recipes import fusellm
from fusion_lab.runner import Cell, Work
from fusion_lab.world import Lab, Stage

__all__ = ["METHODS", "needs", "run"]

#: what the targets are fused with, in the order in which they are added; `none`: trained on the texts alone
PARENTS = ("numbers", "docs", "digits", "none")
SCALES, DENSITIES = (0.3, 0.5, 1.0), (0.2, 0.5, 0.8)
#: method -> the settings that are tried: parameters of every model, or of the merge
METHODS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": 1.0}],
    "task_arithmetic": [{"weight": scale} for scale in SCALES],
    **{
        method: [{"weight": scale, "density": density} for scale in SCALES[1:] for density in DENSITIES]
        for method in ("ties", "dare_linear")
    },
    **{f"varm:{unit}": [{"granularity": unit}] for unit in ("matrix", "row", "element", "module", "layer", "model")},
    "fusechat_sce": [{"select_topk": share} for share in (0.1, 0.5, 1.0)],
}
#: methods that have no base model, and those whose parameters are the merge's own
WITHOUT_BASE = ("linear",)
OF_MERGE = ("varm", "fusechat_sce")


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the parents of a merge, and the target that is fused with the same sources at once."""
    names = PARENTS[: cell["targets"]]
    sources = tuple(name for name in names if name != "none")
    stores = [world.store(lab, name) for name in sources]
    alone = [_fused(lab, cell, name, (name,)) for name in names]
    return [*stores, *alone, _fused(lab, cell, "+".join(sources), sources)]


def _folder(lab: Lab, name: str, seed: int) -> Path:
    return lab.folder / "merges" / f"{name}-{seed}"


def _fused(lab: Lab, cell: Cell, name: str, sources: tuple[str, ...]) -> Stage:
    facts = {key: value for key, value in cell.factors.items() if key != "targets"} | {"seed": cell.seed}
    stores = tuple(f"store:common:{source}" for source in sources if source != "none")
    run = partial(_train, lab, cell, name, sources)
    return Stage(f"fused:{name}:{cell.seed}", run, ("world", *stores), facts)


def _train(lab: Lab, cell: Cell, name: str, sources: tuple[str, ...], work: Work) -> None:
    """Train the target on the cell's texts; every target of a seed sees the same texts in the same order."""
    files = fusellm.write_corpus(lab, cell, work.folder)
    rows = sum(len(world.read_rows(path)) for path in files.values())
    steps = max(1, rows * cell["epochs"] // lab.settings["batch"])
    settings = fusellm.config(lab, cell, files, steps) | {"save_strategy": "no", "lr_scheduler": "cosine"}
    del settings["save_steps"], settings["save_total_limit"]
    if sources != ("none",):
        block = {
            "sources": [{"name": source, "store": str(lab.store(source))} for source in sources],
            "lm_loss_weight": cell["lm_loss_weight"],
        }
        settings = fusellm.with_plugin(settings, block)
    work.axolotl("train", settings)
    folder = _folder(lab, name, cell.seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work.folder / "model", folder)
    fusellm.tidy(work)


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Merge by every method with every setting, and measure what validation chose."""
    names = PARENTS[: cell["targets"]]
    base = lab.model("target")
    work.record("base", method="base", **work.call(_measured, lab, base, "heldout"))
    for name in names:
        work.record("parent", method=name, **work.call(_measured, lab, _folder(lab, name, cell.seed), "heldout"))
    together = "+".join(name for name in names if name != "none")
    work.record("together", method=together, **work.call(_measured, lab, _folder(lab, together, cell.seed), "heldout"))
    parents = [str(_folder(lab, name, cell.seed)) for name in names]
    for method, settings in METHODS.items():
        found = []
        for number, values in enumerate(settings):
            merged = work.folder / "merges" / f"{method.replace(':', '-')}-{number}"
            file = f"{merged.name}.yml"
            work.write(file, _config(method, values, str(base), parents))
            work.command("mergekit-yaml", file, f"merges/{merged.name}", "--random-seed", str(cell.seed))
            lowest = work.call(_measured, lab, merged, "validation")["bpb"] if len(settings) > 1 else 0.0
            found.append((lowest, number, merged))
        _, number, merged = min(found)
        tuned = {key: value for key, value in settings[number].items() if key != "granularity"}
        work.record("merge", method=method, **tuned, **work.call(_measured, lab, merged, "heldout"))
        shutil.rmtree(work.folder / "merges")
    fusellm.tidy(work)


def _config(method: str, values: dict[str, Any], base: str, parents: list[str]) -> dict[str, Any]:
    name = method.partition(":")[0]
    own = {} if name in OF_MERGE else {"parameters": values}
    config = {"merge_method": name, "models": [{"model": parent, **own} for parent in parents], "dtype": "float32"}
    config |= {} if name in WITHOUT_BASE else {"base_model": base}
    return config | ({"parameters": values} if name in OF_MERGE else {})


def _measured(lab: Lab, folder: Path, split: str) -> dict[str, float]:
    return world.measure_model(lab, folder, split, solved=False)
