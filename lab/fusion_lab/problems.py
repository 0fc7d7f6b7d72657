"""Short word problems with worked sums: the generator, and what checks an answer to one of them.

A problem tells one or two changes of a number of things; every number is between 1 and 20. The solution is one line per
sum and a last line with the answer, so that a lucky answer can be told from a right chain.
"""

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Problem", "Score", "answer_of", "make_problems", "score", "sums_of"]

NAMES = "Ada Ben Cleo Dan Ella Finn Gita Hugo".split()
ITEMS = "apples beads books cards coins eggs nuts toys".split()
GAIN = ("{name} buys {n} more.", "{friend} gives {name} {n}.", "{name} finds {n}.")
LOSE = ("{name} gives {n} to {friend}.", "{name} loses {n}.", "{name} sells {n}.")
#: largest number of a problem, and largest change
TOP, CHANGE = 20, 9
_SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
_ANSWER = re.compile(r"^####[ \t]*(-?\d+)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        question: its text.
        solution: one line per sum, then ``#### <gold>``.
        gold: the answer as a decimal number.
    """

    question: str
    solution: str
    gold: str

    def messages(self) -> list[dict[str, str]]:
        """Return the problem and its solution as a chat."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.solution}]


def _change(rng: random.Random, value: int) -> int:
    """Draw a change that leaves between 1 and TOP things."""
    gains = value < TOP and (value <= 1 or rng.random() < 0.5)
    return rng.randint(1, min(CHANGE, TOP - value)) if gains else -rng.randint(1, min(CHANGE, value - 1))


def make_problem(rng: random.Random) -> Problem:
    """Make one problem; the same state of ``rng`` gives the same problem."""
    name, friend = rng.sample(NAMES, 2)
    items = rng.choice(ITEMS)
    value = rng.randint(2, TOP - 2)
    told, sums = [f"{name} has {value} {items}."], []
    for _ in range(rng.choice((1, 2))):
        change = _change(rng, value)
        sentence = rng.choice(GAIN if change > 0 else LOSE)
        told.append(sentence.format(name=name, friend=friend, n=abs(change)))
        sums.append(f"{value} {'+' if change > 0 else '-'} {abs(change)} = {value + change}")
        value += change
    question = " ".join([*told, f"How many {items} does {name} have?"])
    return Problem(question, "\n".join([*sums, f"#### {value}"]), str(value))


def make_problems(count: int, seed: int, *, taken: Collection[str] = ()) -> list[Problem]:
    """Make problems with distinct questions, none of them in ``taken`` (those of another split)."""
    rng, seen, problems = random.Random(seed), set(taken), []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def answer_of(text: str) -> str | None:
    """Return the number on the last ``####`` line of a response, None without one."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None


def sums_of(text: str) -> list[tuple[str, ...]]:
    """Return the sums that a text writes down, in order."""
    return _SUM.findall(text)


@dataclass(frozen=True)
class Score:
    """How a model answered N problems; all are shares of the N.

    Attributes:
        answers: with the right number.
        chains: with the right number and exactly the sums of the problem.
        luck: expected share of right numbers if the same answers were dealt to other problems.
        constant: share that the best constant answer solves; the chance level.
    """

    answers: float
    chains: float
    luck: float
    constant: float


def score(problems: Sequence[Problem], responses: Sequence[str]) -> Score:
    """Score one response per problem.

    Luck is exact, not drawn: each answer meets each other problem's gold equally often.
    """
    n = len(problems)
    answers = [answer_of(text) for text in responses]
    right = [answer == problem.gold for answer, problem in zip(answers, problems, strict=True)]
    chains = [
        ok and sums_of(text) == sums_of(problem.solution)
        for ok, text, problem in zip(right, responses, problems, strict=True)
    ]
    golds, given = Counter(problem.gold for problem in problems), Counter(answers)
    pairs = sum(count * golds[answer] for answer, count in given.items() if answer is not None)
    luck = (pairs - sum(right)) / (n * (n - 1)) if n > 1 else 0.0
    return Score(sum(right) / n, sum(chains) / n, luck, max(golds.values()) / n)
