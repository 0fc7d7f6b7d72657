"""Verdicts on programs per second, on tests like those of HumanEval: right solutions and wrong ones.

    python benchmarks/bench_verdicts.py [--repeats 5]

Ours is the whole scorer, from response to verdict, with a program and its checks in two isolated processes. Beside it
a plain subprocess of Python per program, without any isolation, and the lower bound: `exec` of the same programs in
this process. All see the same work, in turns. Times are processor time of all processes; on two cores, 40 ms are 50
verdicts per second. Exits 1 when a verdict is wrong or the figure is missed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion_plugins.scoring.code_scorer import CodeScorer
from fusion_plugins.scoring.sandbox_limits import cpu_seconds

PROBLEMS = Path(__file__).parent.parent / "tests" / "data" / "humaneval.jsonl"
REACH = 50  # verdicts per second on two cores
CORES = 2


def tasks() -> list[tuple[str, str, dict[str, Any], bool]]:
    """Return program, program with its tests, tests, and whether it is right."""
    found = []
    for problem in map(json.loads, PROBLEMS.read_text().splitlines()):
        tests = {"test": problem["test"], "entry_point": problem["entry_point"], "prompt": problem["prompt"]}
        for body, right in ((problem["canonical_solution"], True), ("    return None\n", False)):
            code = problem["prompt"] + body
            found.append((code, f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\n", tests, right))
    return found


def bare(work: list[tuple[str, str, dict[str, Any], bool]]) -> list[bool]:
    """Return verdicts by running the programs in this process."""
    verdicts = []
    for _, whole, _, _ in work:
        try:
            exec(compile(whole, "<test>", "exec"), {"__name__": "test"})
        except Exception:
            verdicts.append(False)
        else:
            verdicts.append(True)
    return verdicts


def plain(work: list[tuple[str, str, dict[str, Any], bool]]) -> list[bool]:
    """Return verdicts by one plain process of Python for each program."""
    return [
        subprocess.run([sys.executable, "-I", "-S", "-c", whole], capture_output=True, check=False).returncode == 0
        for _, whole, _, _ in work
    ]


def used(scorer: CodeScorer) -> float:
    """Return the processor time of this process, of the children that it has waited for, and of the sandboxes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + children.ru_utime + children.ru_stime
    return own + sum(map(cpu_seconds, scorer.processes()))


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--repeats", type=int, default=5)
    repeats = options.parse_args().repeats
    work = tasks()
    scorer = CodeScorer(workers=CORES)
    rows = [{"response": f"```python\n{code}\n```", "tests": tests} for code, _, tests, _ in work]

    def ours(work: Any) -> list[bool]:
        return [score.correct is True for score in scorer.score(rows)]

    ways: dict[str, Callable[[Any], list[bool]]] = {"ours": ours, "plain subprocess": plain, "bare exec": bare}
    best = dict.fromkeys(ways, (float("inf"), float("inf")))
    wrong = False
    ours(work)
    for _ in range(repeats):
        for name, way in ways.items():
            before, started = used(scorer), time.perf_counter()
            wrong |= way(work) != [right for *_, right in work]
            times = used(scorer) - before, time.perf_counter() - started
            best[name] = min(best[name][0], times[0]), min(best[name][1], times[1])
    trusts = {score.details["trust"] for score in scorer.score(rows)}
    scorer.close()
    print(f"{len(work)} programs, checks {', '.join(trusts)}; best of {repeats}\n")
    print("| | ms of a core per verdict | verdicts/s on two cores | wall, verdicts/s |\n|---|---|---|---|")
    for name, (cpu, wall) in best.items():
        print(f"| {name} | {1000 * cpu / len(work):.2f} | {CORES * len(work) / cpu:.0f} | {len(work) / wall:.0f} |")
    missed = CORES * len(work) / best["ours"][0] < REACH
    return int(wrong or missed or trusts != {"outside"})


if __name__ == "__main__":
    sys.exit(main())
