"""Rounds on own answers against as many steps on the source's answers, after a first stage on the source's answers.

The first half of a seed's problems trains the first stage, the second half is what all second stages have: SFT on the
best right answers of the source, fusion on its right answers (off-policy), or rounds of `fusion rounds`, in which the
target answers and the source says how probable it finds that. All of them take the same number of steps.
"""

import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusion_lab import world
from fusion_lab.problems import Problem, answer_of
from fusion_lab.recipes import answers, fusellm
from fusion_lab.runner import Cell, Work
from fusion_lab.world import Lab, Stage

__all__ = ["needs", "run"]

FUSED = "fusion_plugins.axolotl.fused"
PILOT_QUESTION, LONGER_PILOT = "g_pilot_rounds", "g_pilot_longer"
#: the one source of all stages, by its name in the responses
SOURCE = "strong"
#: seed of the problems that choose settings
SEED_OF_VALIDATION = 6
TOP_K, MAX_TOKENS = 32, 40
#: of the first stage
RATE = 0.002
#: losses of the trainings that share the answers of one round
SHARING = ("jsd", "reverse_kl", "advantage", "ce")


def _halves(lab: Lab, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    problems = answers.block(lab, seed)
    return problems[: len(problems) // 2], problems[len(problems) // 2 :]


def _start(lab: Lab, cell: Cell) -> Path:
    return lab.model("target") if cell["start"] == "target" else _tuned(lab, cell.seed)


def _tuned(lab: Lab, seed: int) -> Path:
    return lab.folder / "rounds" / f"sft-{seed}"


def first_stage(lab: Lab, seed: int) -> Stage:
    """Return the stage that fine-tunes the target on the source's best answers to the first half of the problems."""

    def run(work: Work) -> None:
        rows = work.call(_of_source, lab, seed, _halves(lab, seed)[0])
        trained = _write(work, rows)
        work.axolotl("train", _sft(answers.config(lab, lab.model("target"), trained, seed, rate=RATE)))
        shutil.rmtree(_tuned(lab, seed), ignore_errors=True)
        shutil.copytree(work.folder / "model", _tuned(lab, seed))
        fusellm.tidy(work)

    return Stage(f"rounds-sft:{seed}", run, (f"responses:{seed}",), [seed, SOURCE, RATE])


def needs(lab: Lab, cell: Cell) -> list[Stage]:
    """Return the answers of the source, and the first stage."""
    return [answers.responses(lab, cell.seed), first_stage(lab, cell.seed)]


def _of_source(lab: Lab, seed: int, problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scored answers of the source to problems."""
    from fusion_plugins.store import open_rows

    wanted = {problem["id"] for problem in problems}
    return [
        {key: row[key] for key in answers.KEPT} | answers.verdict(lab, row)
        for row in open_rows(answers.scored(lab, seed))
        if row["source"] == SOURCE and row["prompt_id"] in wanted
    ]


def _write(work: Work, rows: list[dict[str, Any]]) -> int:
    """Write scored answers; return to how many problems one is right."""
    world.write_rows(work.folder / "scored.jsonl", rows)
    return len({row["prompt_id"] for row in rows if row["correct"]})


def _sft(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {
        "plugins": ["fusion_plugins.axolotl.FusionPlugin"],
        "datasets": [{"path": "./scored.jsonl", "ds_type": "json", "type": answers.BEST}],
        "fusion": {"sft": {"rule": "verdict"}},
    }


def _fusion(cell: Cell, loss: str, stores: str) -> dict[str, Any]:
    """Return the block of a training on texts that the sources have read."""
    sources = [{"name": name, "store": f"{stores}/{name}"} for name in _sources(cell)]
    block: dict[str, Any] = {"sources": sources, "loss": loss, "lm_loss_weight": 0.0, "rule": "fixed_weights"}
    return block | {"loss_options": {"clip": cell["clip"]}} if loss == "advantage" else block


def _sources(cell: Cell) -> dict[str, str]:
    """Return name and model of the sources that read the texts of a cell."""
    both = {"digits": "digits"} if cell["method"] in ("rounds_both", "off_policy_both") else {}
    return {SOURCE: answers.ANSWERING[SOURCE], **both}


def _steps(lab: Lab, cell: Cell) -> int:
    """Steps of every second stage: those of SFT, or a multiple of them."""
    once = -(-len(_halves(lab, cell.seed)[1]) // lab.settings["batch"]) * answers.EPOCHS
    return once * int(cell.factors.get("times", 1))


def _training(lab: Lab, base: Path, steps: int, seed: int, rate: float) -> dict[str, Any]:
    return answers.config(lab, base, lab.settings["batch"], seed, rate=rate, epochs=steps)


def validation(lab: Lab) -> list[Problem]:
    """Return as many problems as are held out, which choose the settings; no other split or seed has any of them."""
    return answers.other_problems(lab, lab.settings["heldout_problems"], SEED_OF_VALIDATION)


def _measured(lab: Lab, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    from fusion_lab.measure import load, solve

    if seed != answers.PILOT:
        return {"heldout": world.measure_model(lab, folder)}
    figures = world.measure_model(lab, folder, "validation", solved=False)
    return {"validation": figures | asdict(solve(*load(folder), validation(lab)))}


def run(lab: Lab, cell: Cell, work: Work) -> None:
    """Train the second stage of a cell, and measure."""
    if cell["method"] == "seconds":
        _seconds(lab, cell, work)
        return
    rate = cell["learning_rate"]
    if rate == "tuned":
        keys = [key for key in cell.factors if key != "learning_rate"]
        rate = 0.0
        if cell["method"] != "none":
            pilot = LONGER_PILOT if "times" in cell.factors else PILOT_QUESTION
            like = {key: "tuned" if key == "start" else cell[key] for key in keys}
            rate = answers.tuned(pilot, like, ("learning_rate",))["learning_rate"]
    method = cell["method"].removesuffix("_both")
    made, more = {"none": _none, "sft": _run_sft, "off_policy": _run_off_policy, "rounds": _run_rounds}[method](
        lab, cell, work, rate
    )
    for split, figures in work.call(_measured, lab, made, cell.seed).items():
        work.record(split, rate=rate, steps=_steps(lab, cell), **more, **figures)
    fusellm.tidy(work)
    shutil.rmtree(work.folder / "rounds", ignore_errors=True)


def _none(lab: Lab, cell: Cell, work: Work, rate: float) -> tuple[Path, dict[str, Any]]:
    return _start(lab, cell), {}


def _run_sft(lab: Lab, cell: Cell, work: Work, rate: float) -> tuple[Path, dict[str, Any]]:
    _write(work, work.call(_of_source, lab, cell.seed, _halves(lab, cell.seed)[1]))
    work.axolotl("train", _sft(_training(lab, _start(lab, cell), _steps(lab, cell), cell.seed, rate)))
    return work.folder / "model", {}


def _run_off_policy(lab: Lab, cell: Cell, work: Work, rate: float) -> tuple[Path, dict[str, Any]]:
    rows = work.call(_of_source, lab, cell.seed, _halves(lab, cell.seed)[1])
    _write(work, [row for row in rows if row["correct"]])
    for name, model in _sources(cell).items():
        _capture(work, "scored.jsonl", lab.model(model), f"stores/{name}")
    settings = _training(lab, _start(lab, cell), _steps(lab, cell), cell.seed, rate)
    datasets = [{"path": "./scored.jsonl", "ds_type": "json", "type": FUSED}]
    work.axolotl("train", _fused(settings, datasets, _fusion(cell, cell["loss"], "./stores")))
    return work.folder / "model", {}


def _fused(settings: dict[str, Any], datasets: list[dict[str, Any]], block: dict[str, Any]) -> dict[str, Any]:
    return settings | {"plugins": ["fusion_plugins.axolotl.FusionPlugin"], "datasets": datasets, "fusion": block}


def _capture(work: Work, texts: str, model: Path, out: str) -> float:
    return work.command(
        *("fusion", "capture", "--texts", texts, "--model", str(model), "--out", out, "--top-k", str(TOP_K))
    )


def _run_rounds(lab: Lab, cell: Cell, work: Work, rate: float) -> tuple[Path, dict[str, Any]]:
    """Run the steps of `fusion rounds`, each in a fork; `fusion rounds --config rounds.yml` runs them by hand."""
    settings = _training(lab, _start(lab, cell), _steps(lab, cell) // cell["rounds"], cell.seed, rate)
    block = _fusion(cell, cell["loss"], "stores")
    work.write("train.yml", _fused(settings, [{"path": "answers", "type": FUSED}], block))
    _write_prompts(lab, cell, work)
    sample = _sampling(cell) | {"prompts": "prompts.jsonl", "n": cell["samples"], "seed": 1000 * cell.seed}
    settings = {
        "target": str(_start(lab, cell)),
        "rounds": cell["rounds"],
        "sample": sample,
        "capture": {"top_k": TOP_K},
        "sources": [{"name": name, "model": str(lab.model(model))} for name, model in _sources(cell).items()],
        "train": {"config": "train.yml", "command": "axolotl train --launcher python"},
    }
    work.write("rounds.yml", settings)
    for words in work.call(_chain, work.folder / "rounds.yml"):
        work.command(*words)
    for number, figures in enumerate(work.call(_rounds_figures, lab, cell, work.folder / "rounds"), 1):
        work.record("round", number=number, **figures)
    last = work.folder / "rounds" / f"{cell['rounds']:02d}"
    return last / "model", {}


def _sampling(cell: Cell) -> dict[str, Any]:
    return {"temperature": cell["temperature"], "max_tokens": MAX_TOKENS, "options": {"batch_prompts": 128}}


def _write_prompts(lab: Lab, cell: Cell, work: Work) -> None:
    world.write_rows(work.folder / "prompts.jsonl", answers.prompts(_halves(lab, cell.seed)[1]))


def _chain(path: Path) -> list[list[str]]:
    """Write the configurations of the rounds; return the commands in their order."""
    from fusion_plugins.chain.round_configs import load_rounds
    from fusion_plugins.chain.rounds import write_rounds

    chain = write_rounds(load_rounds(path, {}))
    return [list(chain.steps[name].words) for name in chain.sorter().static_order()]


def _rounds_figures(lab: Lab, cell: Cell, out: Path) -> list[dict[str, float]]:
    """Return what the target had said in every round, and what the source has read of it."""
    from fusion_plugins.store import open_rows, open_store

    golds, found = {row["id"]: row["gold"] for row in _halves(lab, cell.seed)[1]}, []
    for number in range(1, cell["rounds"] + 1):
        folder = out / f"{number:02d}"
        rows = list(open_rows(folder / "responses"))
        store = open_store(folder / "stores" / SOURCE)
        found.append(
            {
                "own_answers": len(rows),
                "own_right": sum(answer_of(row["response"]) == golds[row["prompt_id"]] for row in rows) / len(rows),
                "own_finished": sum(row["finish_reason"] == "stop" for row in rows) / len(rows),
                "texts": len(store),
                "tokens": sum(len(record.text.input_ids) for record in store),
            }
        )
    return found


def _seconds(lab: Lab, cell: Cell, work: Work) -> None:
    """Train with several losses on the answers of one round, and count what the source is asked for.

    The source is a copy that is removed before the first training.
    """
    _write_prompts(lab, cell, work)
    source = {"name": "own", "model": str(_start(lab, cell))} | _sampling(cell)
    work.write(
        "sample.yml",
        {"prompts": "prompts.jsonl", "out": "responses", "n": cell["samples"], "seed": 1000 * cell.seed}
        | {"sources": [source]},
    )
    work.command("fusion", "sample", "--config", "sample.yml")
    copy = work.folder / "source"
    shutil.copytree(lab.model(answers.ANSWERING[SOURCE]), copy)
    captured = _capture(work, "responses", copy, "stores/strong")
    rows, tokens = work.call(_asked, work.folder)
    steps = _steps(lab, cell) // cell["rounds"]
    batches = _order(rows, lab.settings["batch"], steps, cell.seed)
    once = work.call(_forward, copy, _order(rows, lab.settings["batch"], 0, cell.seed))
    online = work.call(_forward, copy, batches)
    shutil.rmtree(copy)
    work.record("stored", runs=1, tokens=tokens, seconds=once[1], command_seconds=captured)
    for number, loss in enumerate(SHARING, 1):
        settings = _training(lab, _start(lab, cell), steps, cell.seed, 0.001)
        settings |= {"output_dir": f"./model-{loss}", "dataset_prepared_path": f"./prepared-{loss}"}
        datasets = [{"path": "responses", "type": FUSED}]
        work.axolotl(f"train-{loss}", _fused(settings, datasets, _fusion(cell, loss, "stores")))
        work.record("online", runs=number, tokens=number * online[0], seconds=number * online[1])
    for folder in (*work.folder.glob("model-*"), *work.folder.glob("prepared-*"), work.folder / "responses"):
        shutil.rmtree(folder)
    fusellm.tidy(work)


def _asked(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the answers of a round as chats, one per sample, and how many tokens the source has read for its store."""
    from fusion_plugins.response_texts import answer_text
    from fusion_plugins.store import open_rows, open_store

    texts = [answer_text(row, number) for number, row in enumerate(open_rows(folder / "responses"))]
    rows = [{"id": text.id, "messages": text.messages} for text in texts if not text.empty]
    return rows, sum(len(record.text.input_ids) for record in open_store(folder / "stores" / "strong"))


def _order(rows: list[dict[str, Any]], batch: int, steps: int, seed: int) -> list[list[dict[str, Any]]]:
    """Return the batches of a training of so many steps, epochs shuffled; of 0 steps, every text once."""
    if not steps:
        rows = list({row["id"]: row for row in rows}.values())
        return [rows[start : start + batch] for start in range(0, len(rows), batch)]
    rng, found = random.Random(seed), []
    while len(found) < steps:
        rng.shuffle(rows)
        found += [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return found[:steps]


def _forward(model: Path, batches: list[list[dict[str, Any]]]) -> tuple[int, float]:
    """Run a model on batches as a living teacher would be; return its tokens, padding left out, and CPU seconds."""
    import torch

    from fusion_lab.measure import load
    from fusion_lab.pretrain import encode, pad

    loaded, tokenizer = load(model)
    encoded = [[encode(tokenizer, row) for row in batch] for batch in batches]
    inputs = [pad(batch, tokenizer.pad_token_id) for batch in encoded]
    tokens = sum(int(each["attention_mask"].sum()) for each in inputs)
    with torch.inference_mode():
        since = time.process_time()
        for each in inputs:
            each.pop("labels")
            loaded(**each).logits.log_softmax(-1)
        return tokens, time.process_time() - since
