"""Arithmetic word problems with worked solutions and gold answers.

A problem tells how a number of things changes in one to three steps. Numbers stay at or below 20, so that a model of a
few million parameters can learn the sums in minutes, and one that has seen little of them fails.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["Problem", "make_problem", "make_problems"]

NAMES = "Ada Ben Cleo Dan Ella Finn Gita Hugo Iris Jack Kira Liam Mia Noah Olga Paul".split()
ITEMS = "apples beads books cards coins eggs keys nuts pears plums rocks seeds shells spoons stamps toys".split()
BOXES = "bags boxes jars packs rows".split()

HAVE = ("{name} has {n} {items}.", "{name} starts with {n} {items}.")
PACKED = ("{name} has {k} {boxes} with {n} {items} each.", "{name} fills {k} {boxes} with {n} {items} each.")
GAIN = (
    "{name} buys {n} more {items}.",
    "{friend} gives {name} {n} {items}.",
    "Then {name} finds {n} {items}.",
)
LOSE = (
    "{name} gives {n} {items} to {friend}.",
    "{name} loses {n} {items}.",
    "Then {name} sells {n} {items}.",
)
TIMES = ("Then {name} gets {k} times as many {items}.",)
SHARE = ("{name} shares the {items} among {k} friends.", "{name} packs the {items} into {k} {boxes}.")
ASK_TOTAL = ("How many {items} does {name} have now?", "How many {items} are there now?")
ASK_SHARE = ("How many {items} are in each part?",)
RESULT = ("{work} {items}.", "That is {work} {items}.", "{name} has {work} {items}.")


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: the text of the problem.
        solution: the worked solution; its last line is ``#### <gold>``.
        gold: the answer as a decimal number.
        steps: how many sums the solution has, 1 to 3.
    """

    question: str
    solution: str
    gold: str
    steps: int


def _start(rng: random.Random, steps: int) -> tuple[str, int, str, dict[str, int]]:
    if steps == 1 or rng.random() < 0.5:
        n = rng.randint(3, 12)
        return rng.choice(HAVE), n, "", {"n": n}
    k, n = rng.randint(2, 4), rng.randint(2, 5)
    return rng.choice(PACKED), k * n, f"{k} * {n} = {k * n}", {"k": k, "n": n}


def _step(rng: random.Random, value: int, last: bool) -> tuple[str, int, str, dict[str, int]]:
    """One change of ``value``: its sentence, the new value, the sum, and the numbers of the sentence."""
    divisors = [k for k in range(2, 7) if value % k == 0 and value > k] if last else []
    weights = {"gain": 3 * (value <= 14), "lose": 3 * (value > 3), "times": int(value <= 6), "share": len(divisors)}
    kind = rng.choices(list(weights), weights=list(weights.values()))[0]
    if kind == "gain":
        n = rng.randint(2, 6)
        return rng.choice(GAIN), value + n, f"{value} + {n} = {value + n}", {"n": n}
    if kind == "lose":
        n = rng.randint(2, min(6, value - 1))
        return rng.choice(LOSE), value - n, f"{value} - {n} = {value - n}", {"n": n}
    k = rng.choice(divisors) if kind == "share" else rng.randint(2, 3)
    if kind == "share":
        return rng.choice(SHARE), value // k, f"{value} / {k} = {value // k}", {"k": k}
    return rng.choice(TIMES), value * k, f"{value} * {k} = {value * k}", {"k": k}


def make_problem(rng: random.Random) -> Problem:
    """Make one problem; the same state of ``rng`` gives the same problem."""
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "items": rng.choice(ITEMS), "boxes": rng.choice(BOXES)}
    steps = rng.choices((1, 2, 3), weights=(3, 2, 1))[0]
    sentence, value, work, numbers = _start(rng, steps)
    told = [sentence.format(**words, **numbers)]
    works = [work] if work else []
    shared = False
    while len(works) < steps:
        sentence, value, work, numbers = _step(rng, value, last=len(works) == steps - 1)
        told.append(sentence.format(**words, **numbers))
        works.append(work)
        shared = " / " in work
    told.append(rng.choice(ASK_SHARE if shared else ASK_TOTAL).format(**words))
    style = rng.choice(RESULT)
    lines = [style.format(work=work, **words) for work in works]
    return Problem(" ".join(told), " ".join(lines) + f"\n#### {value}", str(value), steps)


def make_problems(count: int, seed: int, *, taken: Collection[str] = ()) -> list[Problem]:
    """Make ``count`` different problems.

    Args:
        count: how many.
        seed: of the random numbers.
        taken: questions that must not come again, for example those of another split.

    Returns:
        ``count`` problems with distinct questions, none of them in ``taken``.
    """
    rng = random.Random(seed)
    seen, problems = set(taken), []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems
