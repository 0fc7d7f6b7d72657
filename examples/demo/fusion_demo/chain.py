"""The files of one run: ``fusion.yml`` and a configuration per training, merge and sampling, from their templates."""

import os
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

__all__ = ["MODELS", "SIZES", "Size", "write_chain"]

DEMO = Path(__file__).resolve().parents[1]
ROOT = DEMO.parents[1]
CONFIGS = DEMO / "configs"
RECIPE = ROOT / "mergekit_configs" / "varm.yml"

#: model of each seed -> files that are laid over axolotl.yml, in order
TRAININGS = {
    "clm": ("clm",),
    "fusellm": ("fusellm",),
    "pair_numbers": ("fusellm", "pair"),
    "pair_docs": ("fusellm", "pair"),
    "sft": ("sft",),
    "dpo": ("dpo",),
    "sft_all": ("sft", "sft_all"),
}
#: every model of a seed, in the order of the table
MODELS = ("clm", "fusellm", "pair_numbers", "pair_docs", "merged", "sft", "dpo", "sft_all")
SEED = "$SEED"


class Size(NamedTuple):
    """One form of the demonstration.

    Attributes:
        world: size of the world, a name of ``lab/sizes.yml``; also the name of the folder.
        seeds: how often everything after the world is done.
        max_steps: limit of every training; None for its epochs.
    """

    world: str
    seeds: int
    max_steps: int | None


SIZES = {"full": Size("cpu", 5, None), "quick": Size("small", 1, 2)}


def write_chain(folder: Path, size: Size) -> Path:
    """Write ``fusion.yml`` and ``configs/`` into a folder; return the path of the former."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for seed in range(size.seeds):
        for name, config in _configs(size, seed).items():
            _write(folder / "configs" / f"{name}-{seed}.yml", config)
    _write(folder / "fusion.yml", _chain(folder, size))
    return folder / "fusion.yml"


def _write(path: Path, values: Any) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")


def _read(path: Path, **values: Any) -> Any:
    return yaml.safe_load(Template(path.read_text(encoding="utf-8")).safe_substitute(values))


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``above`` over ``below``; mappings are joined key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged


def _configs(size: Size, seed: int) -> dict[str, dict[str, Any]]:
    """Return what each tool is given for a seed, by the name of the step."""
    found: dict[str, dict[str, Any]] = {}
    for run, files in TRAININGS.items():
        values = {"RUN": run, "SEED": seed, "SOURCE": run.removeprefix("pair_")}
        config: dict[str, Any] = {}
        for name in ("axolotl", *files):
            config = _laid_over(config, _read(CONFIGS / f"{name}.yml", **values))
        found[run] = config if size.max_steps is None else config | {"max_steps": size.max_steps}
    found["merged"] = _laid_over(_read(RECIPE), _read(CONFIGS / "merged.yml", SEED=seed))
    found["sample"] = _read(CONFIGS / "sample.yml", SEED=seed)
    return found


def _chain(folder: Path, size: Size) -> dict[str, Any]:
    # Relative, so that the folder of a finished run can be moved with the checkout.
    demo, lab = (os.path.relpath(path, folder) for path in (DEMO, ROOT / "lab"))
    chain: dict[str, Any] = _read(DEMO / "fusion.yml", DEMO=demo, LAB=lab, SEEDS=size.seeds)
    once = [_of_seed(step, None, size.seeds) for step in chain["steps"] if SEED not in step["name"]]
    of_seeds = [
        _of_seed(step, seed, size.seeds)
        for seed in range(size.seeds)
        for step in chain["steps"]
        if SEED in step["name"]
    ]
    return chain | {"steps": [*once[:-1], *of_seeds, once[-1]]}


def _of_seed(step: dict[str, Any], seed: int | None, seeds: int) -> dict[str, Any]:
    """Return a step of one seed; one of no seed (None) reads and needs what it names of all of them."""

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(SEED, str(seed))
        numbers = range(seeds) if seed is None else (seed,)
        return list(dict.fromkeys(item.replace(SEED, str(number)) for item in value for number in numbers))

    return {key: filled(value) for key, value in step.items()} | {"env": "warm"}
