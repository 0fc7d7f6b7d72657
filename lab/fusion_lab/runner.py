"""Questions, their cells, and the tasks that doit runs: one per stage of the world and one per cell.

A question is a YAML file of `questions/`. A cell is one choice of factors and one seed. What is finished has a file
``result.json`` that holds the key of what was asked; so a run that was killed goes on where it was.
"""

import hashlib
import importlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import yaml
from doit.cmd_base import TaskLoader2
from doit.doit_cmd import DoitMain
from doit.task import dict_to_task

from fusion_lab import ROOT, warm, world
from fusion_lab.world import Lab, Stage

__all__ = ["QUESTIONS", "RESULTS", "Cell", "Question", "Work", "read_question", "run_question"]

QUESTIONS = ROOT / "lab" / "questions"
RESULTS = ROOT / "lab" / "results"
Factors = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One YAML file.

    Attributes:
        name: of the file.
        title: the question.
        recipe: module of ``fusion_lab.recipes`` that runs a cell.
        hypotheses: written before any result was seen.
        seeds: each cell is run once per seed.
        base: the default of every factor.
        sweeps: factor -> levels, one factor at a time around the base.
        crosses: grids, each a mapping of factors to levels, around the base.
        cells: single cells, each a mapping of what differs from the base.
        quick: replaces seeds, sweeps, crosses and cells in a quick run.
        budget_minutes: CPU minutes that all cells are meant to take.
    """

    name: str
    title: str
    recipe: str
    hypotheses: list[str]
    seeds: list[int]
    base: Factors
    sweeps: dict[str, list[Any]] = field(default_factory=dict)
    crosses: list[dict[str, list[Any]]] = field(default_factory=list)
    cells: list[Factors] = field(default_factory=list)
    quick: dict[str, Any] = field(default_factory=dict)
    budget_minutes: float = 60

    def choices(self) -> Iterator[Factors]:
        """Yield the factors of every cell, each once: the base, sweeps, crosses, single cells."""
        changes = [
            {},
            *({factor: level} for factor, levels in self.sweeps.items() for level in levels),
            *(
                dict(zip(grid, levels, strict=True))
                for grid in self.crosses
                for levels in itertools.product(*grid.values())
            ),
            *self.cells,
        ]
        seen = []
        for change in changes:
            if unknown := set(change) - set(self.base):
                raise ValueError(f"{self.name}: {', '.join(sorted(unknown))}: no factor of the base")
            factors = self.base | change
            if factors not in seen:
                seen.append(factors)
                yield factors


@dataclass(frozen=True)
class Cell:
    """One choice of factors and one seed."""

    question: Question
    factors: Mapping[str, Any]
    seed: int

    @property
    def name(self) -> str:
        """What differs from the base, and the seed."""
        changed = [f"{key}-{value}" for key, value in self.factors.items() if value != self.question.base[key]]
        return "_".join([*changed, f"seed-{self.seed}"]).replace("/", "-").replace(" ", "")

    def __getitem__(self, factor: str) -> Any:
        return self.factors[factor]


class Work:
    """What a stage or a cell runs with: a folder, commands and calls that are timed, and figures that are kept.

    Attributes:
        folder: its own, empty at the start.
        rows: the recorded figures.
        spent: CPU seconds by command or function.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.spent: dict[str, float] = {}

    def command(self, *arguments: str) -> float:
        """Run a console script in the folder; return its CPU seconds. The line is kept in ``commands.sh``."""
        with (self.folder / "commands.sh").open("a") as script:
            script.write(" ".join(arguments) + "\n")
        spent = warm.command(*arguments, folder=self.folder, log=self.folder / "log.txt")
        return self._count(" ".join(arguments[:2]), spent.cpu)

    def axolotl(self, name: str, config: Mapping[str, Any]) -> float:
        """Write ``NAME.yml`` and run ``axolotl train`` on it; return its CPU seconds."""
        self.write(f"{name}.yml", config)
        return self.command("axolotl", "train", f"{name}.yml", "--launcher", "python")

    def write(self, name: str, values: Any) -> Path:
        """Write a YAML file into the folder."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a fork, and return what it returns."""
        value, spent = warm.call(function, *arguments, log=self.folder / "log.txt")
        self._count(function.__name__, spent.cpu)
        return value

    def record(self, of: str, **figures: Any) -> None:
        """Keep figures, as a row of the question's table; ``of`` says what of."""
        self.rows.append({"of": of, **figures})

    def _count(self, name: str, cpu: float) -> float:
        self.spent[name] = round(self.spent.get(name, 0) + cpu, 2)
        return cpu


def read_question(name: str, *, quick: bool = False) -> Question:
    """Read a question by the start of its file's name."""
    found = sorted(QUESTIONS.glob(f"{name}*.yml"))
    if len(found) != 1:
        known = ", ".join(path.stem for path in sorted(QUESTIONS.glob("*.yml")))
        raise SystemExit(f"expected the name of a question, got {name!r}; there are {known}")
    values = yaml.safe_load(found[0].read_text(encoding="utf-8"))
    question = Question(found[0].stem, **values)
    if not quick:
        return question
    return Question(
        found[0].stem, **(values | {"sweeps": {}, "crosses": [], "cells": [], "seeds": [0]} | question.quick)
    )


def _finished(folder: Path, key: str) -> bool:
    result = folder / "result.json"
    return result.exists() and json.loads(result.read_text())["key"] == key


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _do(folder: Path, key: str, what: dict[str, Any], run: Callable[[Work], None]) -> None:
    """Run something in a new folder and leave ``result.json`` there, whole or not at all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = Work(folder)
    run(work)
    result = {"key": key, **what, "cpu": work.spent, "rows": work.rows}
    partial_file = folder / "result.json.part"
    partial_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
    os.replace(partial_file, folder / "result.json")


def _stage_keys(stages: Mapping[str, Stage], size: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, stage in stages.items():  # each stands after those that it needs
        keys[name] = _key(size, name, stage.facts, [keys[need] for need in stage.needs])
    return keys


def _task(name: str, folder: Path, key: str, what: dict[str, Any], run: Any, needs: Sequence[str], after: Any) -> Any:
    def action() -> None:
        _do(folder, key, what, run)
        after()

    uptodate = [lambda task, values: _finished(folder, key)]
    return {
        "name": name,
        "actions": [action],
        "uptodate": uptodate,
        "task_dep": list(needs),
        "title": lambda task: name,
    }


def _tasks(lab: Lab, question: Question, folders: list[Path]) -> Iterator[Any]:
    """Yield the tasks; the folders of the cells are added to ``folders``."""
    recipe = importlib.import_module(f"fusion_lab.recipes.{question.recipe}")
    cells = [Cell(question, factors, seed) for factors in question.choices() for seed in question.seeds]
    stages = world.stages(lab)
    wanted = []
    for cell in cells:
        own: list[Stage] = recipe.needs(lab, cell)
        stages |= {stage.name: stage for stage in own}
        wanted.append(("world", *(stage.name for stage in own)))
    keys = _stage_keys(stages, lab.size)
    for stage in stages.values():
        folder = lab.folder / "stages" / stage.name.replace(":", "-")
        yield _task(stage.name, folder, keys[stage.name], {"stage": stage.name}, stage.run, stage.needs, lambda: None)
    # All seeds of a choice, then the next one: a run that ends early has whole comparisons.
    collect = partial(write_results, lab, question, folders)
    for cell, names in zip(cells, wanted, strict=True):
        key = _key(lab.size, dict(cell.factors), cell.seed, [keys[name] for name in names])
        # Questions of one recipe share the cells that are the same.
        folder = lab.folder / "cells" / question.recipe / f"{cell.name}-{key[:6]}"
        folders.append(folder)
        what = {"factors": dict(cell.factors), "seed": cell.seed}
        name = f"{question.name}:{cell.name}"
        yield _task(name, folder, key, what, partial(recipe.run, lab, cell), names, collect)


def write_results(lab: Lab, question: Question, folders: Sequence[Path]) -> None:
    """Write the rows of all finished cells to the question's CSV, and what they took to another one."""
    rows, times = [], []
    for folder in folders:
        path = folder / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        asked = {**result["factors"], "seed": result["seed"]}
        rows += [asked | row for row in result["rows"]]
        times += [asked | {"command": name, "cpu_seconds": cpu} for name, cpu in result["cpu"].items()]
    out, suffix = _results(lab)
    _write_csv(rows, out / f"{question.name}{suffix}.csv")
    _write_csv(times, out / f"{question.name}{suffix}.seconds.csv")


def _results(lab: Lab) -> tuple[Path, str]:
    """Return the folder of the CSV files, and what their names end with; a quick run leaves the repository alone."""
    return RESULTS if lab.size != "quick" else lab.folder / "results", f".{lab.size}" if lab.size == "gpu" else ""


def write_world(lab: Lab) -> None:
    """Write the figures of the world's models to ``world.csv``."""
    path = lab.folder / "stages" / "world" / "result.json"
    folder, suffix = _results(lab)
    _write_csv(json.loads(path.read_text())["rows"], folder / f"world{suffix}.csv")


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    pandas.DataFrame(rows).to_csv(part, index=False, float_format="%.6g", lineterminator="\n")
    os.replace(part, path)


class _Loader(TaskLoader2):
    def __init__(self, tasks: Sequence[Any], database: Path) -> None:
        super().__init__()
        self.tasks, self.database = tasks, database

    def setup(self, opt_values: Any) -> None:
        """Nothing to set up."""

    def load_doit_config(self) -> dict[str, Any]:
        """Go on after a cell that failed; what is finished is known by the files."""
        return {"dep_file": str(self.database), "backend": "json", "verbosity": 2, "continue": True}

    def load_tasks(self, cmd: Any, pos_args: Any) -> list[Any]:
        """Return the tasks."""
        return [dict_to_task(task) for task in self.tasks]


def run_question(name: str, lab: Lab, *, quick: bool, arguments: Sequence[str] = ()) -> int:
    """Run all cells of a question that are not finished; return doit's status.

    Args:
        name: start of the name of its file.
        lab: where, and how large.
        quick: run its quick form.
        arguments: more of doit's, for example ``-n 2``, or ``list``.
    """
    question = read_question(name, quick=quick)
    lab.folder.mkdir(parents=True, exist_ok=True)
    folders: list[Path] = []
    tasks = list(_tasks(lab, question, folders))
    loader = _Loader(tasks, lab.folder / "doit.json")
    status = DoitMain(loader).run(list(arguments) or ["run"])
    write_results(lab, question, folders)
    if _world_is_there(lab):
        write_world(lab)
    return int(status or 0)


def _world_is_there(lab: Lab) -> bool:
    return (lab.folder / "stages" / "world" / "result.json").exists()
