"""FuseChat-3.0, first stage: the target fine-tuned on answers, by whose answers they are.

Every seed has prompts of its own, half for this stage and half for the second one. Responses are drawn by `fusion
sample`, judged by `fusion score`, chosen and trained on by the dataset type of the plugin.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas

from fusion_lab import world
from fusion_lab.problems import Problem, make_problems
from fusion_lab.recipes import fusellm
from fusion_lab.runner import RESULTS, Cell, Work
from fusion_lab.training import training
from fusion_lab.world import Lab, Stage

__all__ = [
    "better",
    "block",
    "config",
    "measured",
    "needs",
    "other_problems",
    "pilot_problems",
    "prompts",
    "responses",
    "run",
    "sample",
    "scored",
    "tuned",
    "verdict",
]

#: name in the responses -> model of the world; the third is the target itself
ANSWERING = {"strong": "numbers", "weak": "docs", "own": "target"}
SAMPLES, EPOCHS = 4, 12
#: seeds that have problems of their own, and the seed by which the problems are drawn
SEEDS, SEED_OF_PROBLEMS = tuple(range(5)), 5
#: seed of the pilots, whose prompts no other seed has
PILOT = 100
BEST = "fusion_plugins.axolotl.best_of_sources"
RATE = 0.004


def block(lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Return the problems of a seed; those of two seeds have none in common, and none of them is in another split."""
    size = lab.settings["preference_prompts"]
    taken = {problem.question for split in world.SEEDS for problem in lab.problems(split)}
    problems = make_problems((len(SEEDS) + 1) * size, SEED_OF_PROBLEMS, taken=taken)
    place = len(SEEDS) if seed == PILOT else SEEDS.index(seed)
    return [
        {"id": f"sums-{seed}-{number}", "messages": problem.messages(), "gold": problem.gold}
        for number, problem in enumerate(problems[place * size : (place + 1) * size])
    ]


def other_problems(lab: Lab, count: int, seed: int, taken: Iterable[Problem] = ()) -> list[Problem]:
    """Return problems that no split of the world, no seed's block and none of ``taken`` has."""
    known = {problem.question for split in world.SEEDS for problem in lab.problems(split)}
    known |= {row["messages"][0]["content"] for place in (*SEEDS, PILOT) for row in block(lab, place)}
    return make_problems(count, seed, taken=known | {problem.question for problem in taken})


def pilot_problems(lab: Lab) -> list[Problem]:
    """Return the problems that choose settings: more than the world's validation split has, none of them in another."""
    return other_problems(lab, lab.settings["tuned_on"], PILOT)


def part(lab: Lab, seed: int, share: float) -> list[dict[str, Any]]:
    """Return the first share of the problems of a seed."""
    problems = block(lab, seed)
    return problems[: round(share * len(problems))]


def prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return problems as rows of `fusion sample`, with the right number for `fusion score`."""
    return [
        {"id": row["id"], "messages": row["messages"][:1], "domain": "math", "reference": row["gold"]} for row in rows
    ]


def sample(lab: Lab, work: Work, rows: list[dict[str, Any]], models: dict[str, Path], n: int, out: Path) -> None:
    """Draw responses of some models to problems, and score them into a folder."""
    world.write_rows(work.folder / "prompts.jsonl", prompts(rows))
    sources = [
        {"name": name, "model": str(path), "temperature": 0.8, "max_tokens": 40, "options": {"batch_prompts": 128}}
        for name, path in models.items()
    ]
    settings = {"prompts": "prompts.jsonl", "out": "responses", "n": n, "seed": 0, "sources": sources}
    work.write("sample.yml", settings)
    work.command("fusion", "sample", "--config", "sample.yml")
    score = {"responses": "responses", "out": str(out), "scorers": {"math": {"workers": 1}}}
    work.write("score.yml", score)
    shutil.rmtree(out, ignore_errors=True)
    work.command("fusion", "score", "--config", "score.yml")
    shutil.rmtree(work.folder / "responses")


def responses(lab: Lab, seed: int) -> Stage:
    """Return the stage that samples and scores the answers of the sources and of the target to a seed's problems."""

    def run(work: Work) -> None:
        models = {name: lab.model(model) for name, model in ANSWERING.items()}
        out = scored(lab, seed)
        sample(lab, work, block(lab, seed), models, SAMPLES, out)
        work.command("fusion", "doctor", str(out), "--target", "own", "--out", "doctor")
        (domain,) = json.loads((work.folder / "doctor" / "doctor.json").read_text())["domains"]
        for each in domain["sources"]:
            work.record("doctor", **{key: each[key] for key in ("name", "value", "difference", "dealt", "verdict")})

    needs = tuple(f"model:{model}" for model in ANSWERING.values())
    return Stage(f"responses:{seed}", run, needs, [seed, SEED_OF_PROBLEMS, lab.settings["preference_prompts"], SAMPLES])


def scored(lab: Lab, seed: int) -> Path:
    """The folder of the scored responses of a seed."""
    return lab.folder / "responses" / str(seed)


def _gold_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"messages": row["messages"]} for row in rows]


def better(lab: Lab, seed: int) -> Stage:
    """Return the stage that makes a target which is better than the weak source: trained on half of the problems."""

    def run(work: Work) -> None:
        half = block(lab, seed)[::2]
        world.write_rows(work.folder / "gold.jsonl", _gold_rows(half))
        settings = config(lab, lab.model("target"), len(half), seed, rate=RATE)
        settings["datasets"] = [{"path": "./gold.jsonl", "ds_type": "json", **fusellm.DATASETS["sums"]}]
        work.axolotl("train", settings)
        folder = lab.folder / "better" / str(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work.folder / "model", folder)
        work.record("heldout", **work.call(world.measure_model, lab, folder))
        fusellm.tidy(work)

    return Stage(f"better:{seed}", run, ("model:target",), [seed, lab.settings["preference_prompts"], EPOCHS, RATE])


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the responses, and the target that a cell starts from."""
    return [responses(lab, cell.seed), *([better(lab, cell.seed)] if cell["start"] == "better" else [])]


def config(lab: Lab, base: Path, rows: int, seed: int, *, rate: float, epochs: int = EPOCHS) -> dict[str, Any]:
    """Return the configuration of a training on so many rows, without its datasets."""
    steps = max(1, -(-rows // lab.settings["batch"]) * epochs)
    return training(lab, base, steps, seed) | {
        "learning_rate": rate,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "logging_steps": 10,
        "save_strategy": "no",
    }


def tuned(question: str, factors: dict[str, Any], keys: tuple[str, ...]) -> dict[str, float]:
    """Return the settings with the most right sums on the validation problems in a pilot's table.

    Args:
        question: the pilot.
        factors: what the lines of the table must have.
        keys: the settings that were tried.
    """
    table = pandas.read_csv(RESULTS / f"{question}.csv")
    table = table[table["of"] == "validation"]
    for key, value in factors.items():
        same = table[key] == value if isinstance(value, int | float) else table[key].astype(str) == str(value)
        table = table[same]
    if not len(table):
        raise ValueError(f"{question} has not tried {factors}: run it first")
    best = table.sort_values(["chains", *keys], ascending=[False, *([True] * len(keys))]).iloc[0]
    return {key: float(best[key]) for key in keys}


def measured(lab: Lab, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Return the figures of a model: on the problems that choose settings for a pilot, else on the held-out split."""
    if seed == PILOT:
        return {"validation": _on_pilot_problems(lab, folder)}
    return {"heldout": world.measure_model(lab, folder)}


def _on_pilot_problems(lab: Lab, folder: Path) -> dict[str, float]:
    from fusion_lab.measure import bits_per_byte, load, solve

    model, tokenizer = load(folder)
    problems = pilot_problems(lab)
    rows = [{"messages": problem.messages()} for problem in problems]
    return {"bpb_sums": bits_per_byte(model, tokenizer, rows), **asdict(solve(model, tokenizer, problems))}


def chosen_rows(lab: Lab, cell: Cell) -> list[dict[str, Any]]:
    """Return the scored responses of the sources of a cell to its prompts, as rows of a file."""
    from fusion_plugins.store import open_rows

    names = {"both": ("strong", "weak")}.get(cell["teacher"], (cell["teacher"],))
    prompts = {row["id"] for row in part(lab, cell.seed, cell["prompts"])}
    kept = defaultdict(list)
    for row in open_rows(scored(lab, cell.seed)):
        if row["prompt_id"] in prompts and row["source"] in names and row["index"] < cell["samples"]:
            kept[row["prompt_id"]].append({key: row[key] for key in KEPT} | verdict(lab, row))
    return [row for prompt in sorted(kept) for row in kept[prompt]]


def verdict(lab: Lab, row: dict[str, Any]) -> dict[str, Any]:
    """Return what is right in a quick run, whose models are never right and never stop: every second answer."""
    return {} if lab.settings["checked"] else {"correct": row["index"] % 2 == 0, "finish_reason": "stop"}


KEPT = ("prompt_id", "source", "index", "prompt", "response", "domain", "correct", "finish_reason")


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Fine-tune on the answers of a cell, and measure; without a teacher, measure the start."""
    base = lab.folder / "better" / str(cell.seed) if cell["start"] == "better" else lab.model("target")
    if cell["teacher"] == "none":
        for split, figures in work.call(measured, lab, base, cell.seed).items():
            work.record(split, **figures)
        told = lab.folder / "stages" / f"responses-{cell.seed}" / "result.json"
        for row in json.loads(told.read_text())["rows"]:
            work.record(**row)
        return
    rate = cell["learning_rate"]
    if rate == "tuned":
        # One rate for all teachers, so that none is tuned better than another.
        rate = tuned("d_pilot_answers", {}, ("learning_rate",))["learning_rate"]
    rows = part(lab, cell.seed, cell["prompts"])
    if cell["teacher"] == "gold":
        world.write_rows(work.folder / "gold.jsonl", _gold_rows(rows))
        settings = config(lab, base, len(rows), cell.seed, rate=rate)
        settings["datasets"] = [{"path": "./gold.jsonl", "ds_type": "json", **fusellm.DATASETS["sums"]}]
        trained = len(rows)
    else:
        answers = work.call(chosen_rows, lab, cell)
        world.write_rows(work.folder / "scored.jsonl", answers)
        trained = len({row["prompt_id"] for row in answers if row["correct"]})
        if cell["per_prompt"] == "all":
            trained = len({(row["prompt_id"], row["source"]) for row in answers if row["correct"]})
        settings = config(lab, base, trained, cell.seed, rate=rate)
        settings |= {
            "plugins": ["fusion_plugins.axolotl.FusionPlugin"],
            "datasets": [{"path": "./scored.jsonl", "ds_type": "json", "type": BEST}],
            "fusion": {"sft": {"rule": cell["rule"], "per_prompt": cell["per_prompt"]}},
        }
    work.axolotl("train", settings)
    for split, figures in work.call(measured, lab, work.folder / "model", cell.seed).items():
        work.record(split, rows=trained, rate=rate, **figures)
    fusellm.tidy(work)
