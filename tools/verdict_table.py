"""Measure how many verdicts on answers are right: datasets x ways to write the answer, math-verify alone beside it.

    python tools/verdict_table.py --data FOLDER [--rows 100] [--examples 3]

FOLDER holds gsm8k*.jsonl (question, answer), svamp*.jsonl (Body, Answer), math*.jsonl (problem, solution, answer) and
cmath*.jsonl (question, answer); those that are missing are left out. Prints the table of docs/responses.md.

A cell is the share of right verdicts in percent, over right answers and as many of each of three kinds of wrong ones:
the answer of another problem, a near miss, and the tenfold or the negative (for formulas, that of a third problem). No
verdict counts as a wrong one.
"""

import argparse
import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fusion_plugins.scoring.answers import gold_answer
from fusion_plugins.scoring.math_worker import judge

#: where a solution says its answer without marking it
PLACE = "\0"
#: style -> text of a response from the answer, a wrong answer and a solution that ends without marking its answer
STYLES: dict[str, Callable[[str, str, str], str]] = {
    "boxed": lambda answer, other, work: f"{work}\n\nSo we get $\\boxed{{{answer}}}$.",
    "hashes": lambda answer, other, work: f"{work}\n#### {answer}",
    "bold": lambda answer, other, work: f"{work}\n\n**{_formula(answer)}**",
    "sentence": lambda answer, other, work: f"{work}\n\nSo the answer is {_formula(answer)}.",
    "LaTeX": lambda answer, other, work: f"{work}\n\nTherefore\n\\[ {answer} \\]",
    "with units": lambda answer, other, work: f"{work}\n\nThe answer is {_with_unit(answer)} in total.",
    "after thinking": lambda answer, other, work: (
        f"<think>\nIt may be \\boxed{{{other}}}.\n</think>\n\nThe answer is {_formula(answer)}."
    ),
    "two candidates": lambda answer, other, work: (
        f"First I got $\\boxed{{{other}}}$, but that is wrong. It is $\\boxed{{{answer}}}$."
    ),
    "Chinese": lambda answer, other, work: f"解：{work}\n所以答案是{_formula(answer)}。",
    "unmarked": lambda answer, other, work: f"{work}\n\nThus we get {_formula(answer)}.",
    "solution": lambda answer, other, work: work,
}


def _formula(answer: str) -> str:
    """Return an answer as it stands in a sentence: LaTeX between dollar signs, a number as it is."""
    return f"${answer}$" if re.search(r"[\\^_{}]|[a-z]", answer) else answer


def _with_unit(answer: str) -> str:
    return f"{answer} apples" if re.fullmatch(r"-?[\d.,]+", answer) else _formula(answer)


def _near_miss(answer: str, other: str) -> str:
    """Return an answer with its last digit or its letter changed; another one where it has neither."""
    found = list(re.finditer(r"\d", answer)) or list(re.finditer(r"[A-D](?=\W*$)", answer))
    if not found:
        return other
    place = found[-1].start()
    character = answer[place]
    changed = str((int(character) + 1) % 10) if character.isdigit() else chr(ord(character) + 1)
    return f"{answer[:place]}{changed}{answer[place + 1 :]}"


def _tenfold(answer: str, other: str) -> str:
    """Return ten times a whole number, the negative of a decimal one, and another answer for a formula."""
    number = answer.replace(",", "")
    if re.fullmatch(r"-?\d*[1-9]\d*", number):
        return f"{number}0"
    return f"-{number}" if re.fullmatch(r"\d+\.\d+", number) else other


def problems(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (dataset, gold answer, solution without a mark)."""
    for path in sorted(folder.glob("*.jsonl")):
        name = next((name for name in ("gsm8k", "svamp", "math", "cmath") if path.name.startswith(name)), None)
        for row in map(json.loads, path.read_text().splitlines()) if name else ():
            if name == "gsm8k":
                work = re.sub(r"<<.*?>>", "", row["answer"].rpartition("####")[0]).strip()
                gold = gold_answer(row["answer"])
                last = re.search(rf"{r',?'.join(gold.replace(',', ''))}(?![\d.]\d)(?!.*\d)", work, re.DOTALL)
                if last:
                    yield name, gold, work[: last.start()] + PLACE + work[last.end() :]
            elif name == "math":
                box = re.search(
                    r"\\boxed\s*(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\w)(?!.*\\boxed)", row["solution"], re.DOTALL
                )
                if box and row["solution"].count(r"\boxed") == 1:
                    yield name, row["answer"], row["solution"][: box.start()] + PLACE + row["solution"][box.end() :]
            elif name == "svamp":
                yield name, f"{row['Answer']:.10g}", f"{row['Body']} We compute {row['Equation']}. That makes {PLACE}."
            else:
                yield name, str(row["answer"]), f"{row['question']}\n一共是{PLACE}。"


def alone(gold: str, response: str) -> bool:
    """Return the verdict of math-verify by itself, as its documentation calls it."""
    from math_verify import parse, verify

    gold_text = gold if re.search(r"\\boxed|\$", gold) else f"${gold}$"
    return verify(parse(gold_text, parsing_timeout=None), parse(response, parsing_timeout=None), timeout_seconds=None)


def cell(work: tuple[str, str, str, str, list[str]]) -> tuple[str, str, bool, bool, str]:
    """Judge one response; return dataset, style, whether ours and math-verify alone are right, and what happened."""
    logging.disable(logging.CRITICAL)
    dataset, style, gold, response, (expected,) = work
    right = expected == "right"
    ours = judge(gold, response)
    return (
        dataset,
        style,
        ours["correct"] is right,
        alone(gold, response) is right,
        f"{expected}: {gold!r} / {response[-160:]!r} -> {ours}",
    )


def tasks(folder: Path, rows: int) -> Iterator[tuple[str, str, str, str, list[str]]]:
    """Yield what to judge: each problem in each style, right and wrong in three ways."""
    found: dict[str, list[tuple[str, str]]] = {}
    for dataset, gold, solution in problems(folder):
        found.setdefault(dataset, []).append((gold, solution))
    for dataset, all_of_it in found.items():
        chosen = random.Random(7).sample(all_of_it, min(rows, len(all_of_it)))
        for place, (gold, solution) in enumerate(chosen):
            others = [
                other
                for other, _ in chosen[place + 1 :] + chosen[:place]
                if other.replace(" ", "") != gold.replace(" ", "")
            ]
            answers = {
                "right": gold,
                "another": others[0],
                "near": _near_miss(gold, others[1]),
                "tenfold": _tenfold(gold, others[2]),
            }
            for style, write in STYLES.items():
                for kind, answer in answers.items():
                    # Where the answer is wrong, the right one stands in the thinking or was given up.
                    wrong = answers["near"] if kind == "right" else gold
                    # The other styles mark the answer behind the part of the solution that leads to it.
                    head = solution.partition(PLACE)[0].rpartition("\n")[0]
                    if head.count(r"\[") != head.count(r"\]") or head.count("$") % 2 or "begin{" in head:
                        head = "Step by step, with $a = 3$ and $b = 17$, this is found."
                    work = solution.replace(PLACE, answer) if style == "solution" else head
                    yield dataset, style, gold, write(answer, wrong, work), [kind]


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--data", type=Path, required=True, help="folder of the datasets")
    options.add_argument("--rows", type=int, default=100, help="problems per dataset")
    options.add_argument("--examples", type=int, default=0, help="wrong verdicts to print per cell")
    chosen = options.parse_args()
    counts: dict[tuple[str, str], list[int]] = {}
    examples: dict[tuple[str, str], list[str]] = {}
    with ProcessPoolExecutor(2) as pool:
        for dataset, style, ours, others, what in pool.map(cell, tasks(chosen.data, chosen.rows), chunksize=50):
            count = counts.setdefault((dataset, style), [0, 0, 0])
            for place, value in enumerate((1, ours, others)):
                count[place] += value
            if not ours:
                examples.setdefault((dataset, style), []).append(what)
    datasets = list(dict.fromkeys(dataset for dataset, _ in counts))
    print("| answer | " + " | ".join(datasets) + " |\n|---|" + "---|" * len(datasets))
    for style in STYLES:
        cells = [counts[dataset, style] for dataset in datasets]
        print(
            f"| {style} | "
            + " | ".join(f"{100 * ours / all_:.1f} ({100 * others / all_:.1f})" for all_, ours, others in cells)
            + " |"
        )
    for key, found in examples.items():
        print(*[f"{key}: {what}" for what in found[: chosen.examples]], sep="\n", end="\n" if chosen.examples else "")


if __name__ == "__main__":
    main()
