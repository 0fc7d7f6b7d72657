"""First step: write the texts, the dialogues and the problems of all splits as JSON lines.

Code and prose are plain texts; word problems are dialogues of one question and one answer. The files:

- ``pretrain.jsonl``: what the four models are trained from.
- ``texts.jsonl``, ``chats.jsonl``, ``common.jsonl`` (both): what is captured, and what the target is trained on.
- ``heldout.jsonl``, ``heldout_problems.jsonl``: only ever measured on.
- ``prompts.jsonl``: problems that the sources answer.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusion_demo.problems import Problem, make_problems
from fusion_demo.settings import Settings
from fusion_demo.texts import harvest

__all__ = ["as_messages", "read_rows", "write_data"]

Row = dict[str, Any]
#: Problems are made until their bytes are enough; this is the shortest that one can be.
LEAST_PROBLEM_BYTES = 80


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_messages(problem: Problem) -> list[dict[str, str]]:
    """One problem as a dialogue."""
    return [
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": problem.solution},
    ]


def _within(problems: Sequence[Problem], budget: int) -> list[Problem]:
    """The first problems that together have ``budget`` bytes."""
    kept, used = [], 0
    for problem in problems:
        if used >= budget:
            break
        kept.append(problem)
        used += len(problem.question) + len(problem.solution)
    return kept


def _rows(split: str, texts: dict[tuple[str, str], list[str]], problems: Sequence[Problem], seed: int) -> list[Row]:
    rows: list[Row] = [
        {"id": f"{split}-{domain}-{i}", "domain": domain, "text": text}
        for domain in ("code", "prose")
        for i, text in enumerate(texts[split, domain])
    ]
    rows += [
        {"id": f"{split}-maths-{i}", "domain": "maths", "messages": as_messages(problem)}
        for i, problem in enumerate(problems)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _prompt(i: int, name: str, problem: Problem) -> Row:
    question = as_messages(problem)[:1]
    return {"id": f"{name}-{i}", "domain": "math", "messages": question, "reference": problem.gold}


def write_data(folder: Path, settings: Settings) -> dict[str, int]:
    """Write all files of this module into ``folder``; returns file name -> number of rows."""
    budgets = {
        "heldout": settings.heldout_bytes,
        "common": settings.common_bytes,
        "pretrain": settings.pretrain_bytes,
    }
    texts = harvest(budgets)
    taken: set[str] = set()
    problems: dict[str, list[Problem]] = {}
    wanted = {name: amount // LEAST_PROBLEM_BYTES for name, amount in budgets.items()}
    wanted |= {"heldout_problems": settings.heldout_problems, "prompts": settings.prompts}
    for offset, (name, count) in enumerate(wanted.items()):
        made = make_problems(count, settings.seed + offset, taken=taken)
        problems[name] = _within(made, budgets[name]) if name in budgets else made
        taken.update(problem.question for problem in problems[name])
    files = {split: _rows(split, texts, problems[split], settings.seed) for split in budgets}
    files["texts"] = [row for row in files["common"] if "text" in row]
    files["chats"] = [row for row in files["common"] if "messages" in row]
    for name in ("heldout_problems", "prompts"):
        files[name] = [_prompt(i, name, problem) for i, problem in enumerate(problems[name])]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _write_rows(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in files.items()}
