"""FuseChat-3.0, second stage: preference losses after fine-tuning on best answers, by whose answers the pairs are.

The first half of a seed's problems trains the first stage, the second half this one. The log-probabilities of chosen
and rejected answers are measured before and after, because a margin can grow while both of them fall.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from fusion_lab import world
from fusion_lab.problems import answer_of, sums_of
from fusion_lab.recipes import answers, fusellm
from fusion_lab.recipes.answers import BEST, KEPT, block, config, measured, responses, sample, scored, tuned, verdict
from fusion_lab.runner import Cell, Work
from fusion_lab.world import Lab, Stage

__all__ = ["needs", "run"]

PAIRS = "fusion_plugins.multi_source_dpo"
_TRAINERS = "fusion_plugins.axolotl.preference_trainers"
#: share of a seed's problems that the first stage has; the others are those of the second one
FIRST = 0.5
#: own answers per problem, and epochs of this stage
OWN_SAMPLES, EPOCHS, SFT_EPOCHS = 8, 3, 12
#: loss -> what it needs in the configuration
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"dpo_loss_type": ["sigmoid"]},
    "dpo_nll": {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 1.0]},
    "ln_dpo": {"dpo_loss_type": ["sigmoid_norm"]},
    "wrpo": {"trainer_cls": f"{_TRAINERS}.WRPOTrainer"},
    "infifpo": {"dpo_loss_type": ["sigmoid_norm"], "trainer_cls": f"{_TRAINERS}.InfiFPOTrainer"},
}
#: pairs by a reward that the lab gives, of one source's answers
BY_REWARD = ("delta", "short")
NO_WINDOW = {"min_gap": "none", "max_gap": "none"}


def _start(lab: Lab, seed: int) -> Path:
    return lab.folder / "preferences" / f"sft-{seed}"


def _second(lab: Lab, seed: int) -> list[dict[str, Any]]:
    problems = block(lab, seed)
    return problems[round(FIRST * len(problems)) :]


def _more(lab: Lab, seed: int, times: int) -> list[dict[str, Any]]:
    """Return problems beyond those of the seed's block, so that the second stage has so many times as many."""
    count = (times - 1) * len(_second(lab, seed))
    problems = answers.other_problems(lab, count, 1000 + seed, answers.pilot_problems(lab))
    return [
        {"id": f"more-{seed}-{number}", "messages": problem.messages(), "gold": problem.gold}
        for number, problem in enumerate(problems)
    ]


def _own(lab: Lab, seed: int) -> Path:
    return lab.folder / "preferences" / f"own-{seed}"


def _many(lab: Lab, cell: Cell, whose: str) -> Path:
    return lab.folder / "preferences" / f"{whose}-{cell.seed}-times-{cell['problems']}"


def first_stage(lab: Lab, seed: int) -> Stage:
    """Return the stage that fine-tunes the target on the best answers to the first half of a seed's problems."""

    def run(work: Work) -> None:
        cell = Cell(None, {"teacher": "both", "samples": answers.SAMPLES, "prompts": FIRST}, seed)  # type: ignore[arg-type]
        rows = work.call(answers.chosen_rows, lab, cell)
        world.write_rows(work.folder / "scored.jsonl", rows)
        trained = len({row["prompt_id"] for row in rows if row["correct"]})
        settings = config(lab, lab.model("target"), trained, seed, rate=answers.RATE) | _best("scored.jsonl", "verdict")
        work.axolotl("train", settings)
        shutil.rmtree(_start(lab, seed), ignore_errors=True)
        shutil.copytree(work.folder / "model", _start(lab, seed))
        work.record("heldout", **work.call(world.measure_model, lab, _start(lab, seed)))
        fusellm.tidy(work)

    return Stage(f"sft:{seed}", run, (f"responses:{seed}",), [seed, FIRST, answers.RATE])


def own_answers(lab: Lab, seed: int) -> Stage:
    """Return the stage that samples the model of the first stage on the second half of the problems."""

    def run(work: Work) -> None:
        sample(lab, work, _second(lab, seed), {"own": _start(lab, seed)}, OWN_SAMPLES, _own(lab, seed))

    return Stage(f"own:{seed}", run, (f"sft:{seed}",), [seed, FIRST, OWN_SAMPLES])


def more_answers(lab: Lab, cell: Cell) -> Stage:
    """Return the stage that samples the sources and the first stage's model on problems beyond the seed's block."""

    def run(work: Work) -> None:
        rows = _more(lab, cell.seed, cell["problems"])
        sources = {name: lab.model(answers.ANSWERING[name]) for name in ("strong", "weak")}
        sample(lab, work, rows, sources, answers.SAMPLES, _many(lab, cell, "sources"))
        sample(lab, work, rows, {"own": _start(lab, cell.seed)}, OWN_SAMPLES, _many(lab, cell, "own"))

    facts = [cell.seed, cell["problems"], OWN_SAMPLES]
    return Stage(f"more:{cell.seed}-{cell['problems']}", run, (f"sft:{cell.seed}",), facts)


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the answers of the sources, the first stage and its own answers."""
    more = [more_answers(lab, cell)] if cell["problems"] > 1 else []
    return [responses(lab, cell.seed), first_stage(lab, cell.seed), own_answers(lab, cell.seed), *more]


def _best(path: str, rule: str) -> dict[str, Any]:
    return {
        "plugins": ["fusion_plugins.axolotl.FusionPlugin"],
        "datasets": [{"path": f"./{path}", "ds_type": "json", "type": BEST}],
        "fusion": {"sft": {"rule": rule}},
    }


def _rows(lab: Lab, cell: Cell) -> list[dict[str, Any]]:
    """Return the answers that a cell chooses among, to the problems of this stage."""
    from fusion_plugins.store import open_rows

    problems = {row["id"]: row for row in _second(lab, cell.seed)}
    folders = [scored(lab, cell.seed), _own(lab, cell.seed)]
    if cell["problems"] > 1:
        problems |= {row["id"]: row for row in _more(lab, cell.seed, cell["problems"])}
        folders += [_many(lab, cell, "sources"), _many(lab, cell, "own")]
    found = []
    for folder in folders:
        for row in open_rows(folder):
            # `own` in the responses of the first stage is the model before it.
            if row["prompt_id"] not in problems or (folder == scored(lab, cell.seed) and row["source"] == "own"):
                continue
            found.append({key: row[key] for key in KEPT} | verdict(lab, row))
    if cell["pairs"] == "delta":
        found = [_by_sums(row, problems[row["prompt_id"]]) for row in found if row["source"] == "own"]
        return [row for row in found if row is not None]
    if cell["pairs"] == "short":
        return [_by_length(row) for row in found if row["source"] == "own"]
    only_own = cell["method"] == "sft" and cell["pairs"] == "own"
    wanted = {"own"} if only_own else {"strong", "weak"} if cell["method"] == "sft" else {"strong", "weak", "own"}
    return [row | ({"source": "mine"} if only_own else {}) for row in found if row["source"] in wanted]


def _by_sums(row: dict[str, Any], problem: dict[str, Any]) -> dict[str, Any] | None:
    """Return a wrong answer with the number of its right sums as its reward; None for a right one."""
    if row["correct"] or answer_of(row["response"]) == problem["gold"]:
        return None
    right = set(sums_of(problem["messages"][-1]["content"]))
    reward = float(len(right & set(sums_of(row["response"]))))
    return row | {"source": "mine", "domain": "instruction", "correct": None, "reward": reward}


def _by_length(row: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with a reward that is higher the fewer sums it writes down, right or wrong."""
    written = float(len(sums_of(row["response"])))
    return row | {"source": "mine", "domain": "instruction", "correct": None, "reward": -written}


def _settings(lab: Lab, cell: Cell, rows: list[dict[str, Any]], rate: float, beta: float) -> dict[str, Any]:
    base = _start(lab, cell.seed)
    prompts = defaultdict(list)
    for row in rows:
        prompts[row["prompt_id"]].append(row)
    if cell["method"] == "sft":
        rule = "reward" if cell["pairs"] in BY_REWARD else "verdict"
        usable = [group for group in prompts.values() if rule == "reward" or any(row["correct"] for row in group)]
        return config(lab, base, len(usable), cell.seed, rate=rate, epochs=SFT_EPOCHS) | _best("scored.jsonl", rule)
    rules = {"own": "own_answers", "source": "verdict"} | dict.fromkeys(BY_REWARD, "same_source")
    pairs: dict[str, Any] = {"rule": rules[cell["pairs"]], "own_source": "own", "texts": "pairs.jsonl"}
    if cell["pairs"] in BY_REWARD:
        pairs |= NO_WINDOW
        del pairs["own_source"]
    training = config(lab, base, len(prompts), cell.seed, rate=rate)
    del training["max_steps"]  # how many pairs there are is known when they are chosen
    return training | {
        "num_epochs": EPOCHS,
        "rl": "dpo",
        "rl_beta": beta,
        "plugins": ["fusion_plugins.axolotl.FusionPlugin"],
        "datasets": [{"path": "./scored.jsonl", "ds_type": "json", "type": PAIRS}],
        "fusion": {"sft": {"rule": "verdict"}, "pairs": pairs} if cell["pairs"] not in BY_REWARD else {"pairs": pairs},
        **LOSSES[cell["method"]],
    }


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Train the second stage of a cell, and measure it and what became of the pairs."""
    method = cell["method"]
    if method == "none":
        written = work.call(_sums_written, lab, _start(lab, cell.seed), cell.seed)
        for split, figures in work.call(measured, lab, _start(lab, cell.seed), cell.seed).items():
            work.record(split, written=written, **figures)
        return
    rate, beta = cell["learning_rate"], cell["beta"]
    if rate == "tuned":
        if method == "sft":  # fine-tuning has one rate, whatever it is trained on
            rate = tuned("d_pilot_answers", {}, ("learning_rate",))["learning_rate"]
        else:
            tried = {"method": method, "pairs": cell["pairs"], "problems": cell["problems"]}
            found = tuned("d_pilot_preferences", tried, ("learning_rate", "beta"))
            rate, beta = found["learning_rate"], found["beta"]
    rows = work.call(_rows, lab, cell)
    world.write_rows(work.folder / "scored.jsonl", rows)
    settings = _settings(lab, cell, rows, rate, beta)
    if method == "infifpo":
        # Its reference is captured from the pairs, so they are chosen before, without the trainer that needs it.
        work.write("pairs.yml", {key: value for key, value in settings.items() if key != "trainer_cls"})
        work.command("axolotl", "preprocess", "pairs.yml")
        settings["fusion"]["reference"] = _reference(lab, cell, work)
    work.axolotl("train", settings)
    more: dict[str, Any] = {"rate": rate, "beta": beta}
    if method != "sft":
        before = work.call(_logprobs, _start(lab, cell.seed), work.folder / "pairs.jsonl")
        after = work.call(_logprobs, work.folder / "model", work.folder / "pairs.jsonl")
        pairs = len(world.read_rows(work.folder / "pairs.jsonl")) // 2
        more |= {"pairs_trained": pairs, **{f"{name}_before": value for name, value in before.items()}}
        more |= {f"{name}_after": value for name, value in after.items()}
    more["written"] = work.call(_sums_written, lab, work.folder / "model", cell.seed)
    for split, figures in work.call(measured, lab, work.folder / "model", cell.seed).items():
        work.record(split, **more, **figures)
    fusellm.tidy(work)


def _reference(lab: Lab, cell: Cell, work: Work) -> dict[str, Any]:
    """Capture the pairs from the model of the first stage and from the strong source."""
    sources = []
    for name, model in (("target", _start(lab, cell.seed)), ("strong", lab.model(answers.ANSWERING["strong"]))):
        store = f"./stores/{name}"
        work.command(
            *("fusion", "capture", "--texts", "pairs.jsonl", "--model", str(model), "--out", store, "--top-k", "1")
        )
        sources.append({"name": name, "store": store, "is_target": name == "target"})
    return {"rule": "max_margin", "clip": True, "sources": sources}


def _sums_written(lab: Lab, folder: Path, seed: int) -> float:
    """Return the mean number of sums in greedy answers to the problems that a seed is measured on."""
    from fusion_lab.measure import answers as greedy
    from fusion_lab.measure import load

    problems = answers.pilot_problems(lab) if seed == answers.PILOT else lab.problems("heldout")
    found = greedy(*load(folder), [problem.question for problem in problems])
    return sum(len(sums_of(text)) for text in found) / len(found)


def _logprobs(model: Path, texts: Path) -> dict[str, float]:
    """Return the mean log-probability (nats) of the chosen and of the rejected answers, which alternate in the file."""
    import torch

    from fusion_lab.measure import load
    from fusion_lab.pretrain import encode, pad

    loaded, tokenizer = load(model)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            inputs = pad([encode(tokenizer, row) for row in rows[start : start + 32]], tokenizer.pad_token_id)
            labels = inputs.pop("labels")[:, 1:]
            logprobs = loaded(**inputs).logits[:, :-1].log_softmax(-1)
            each = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            found += ((each * (labels >= 0)).sum(-1)).tolist()
    chosen, rejected = found[::2], found[1::2]
    return {"chosen": sum(chosen) / len(chosen), "rejected": sum(rejected) / len(rejected)}
