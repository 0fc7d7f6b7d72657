"""Prompts with a good and a bad answer that every working reward model orders alike.

A head with its sign turned round, the wrong output of a head with several, a chat template of another model or a
checkpoint that was damaged all give finite numbers that look like rewards. Here they show. The better answer is the
longer one in half of the prompts, so that a model that only measures length is right as often as wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: (prompt, good answer, bad answer)
KNOWN_ANSWERS: tuple[tuple[str, str, str], ...] = (
    ("What is 12 + 30?", "12 + 30 = 42.", "I refuse, and the sky is a fish fish fish."),
    ("What is the capital of France?", "The capital of France is Paris.", "Berlin."),
    (
        "Name the first three planets from the Sun.",
        "Mercury, Venus and Earth.",
        "The first three planets are Jupiter, Pluto and the Moon, in that order.",
    ),
    (
        "Write a Python function that returns the square of x.",
        "def square(x):\n    return x * x",
        "def square(x):\n    return x + 2  # this adds two, which is nearly the same for most values",
    ),
    (
        "Explain in one sentence why the sky is blue.",
        "Air scatters short, blue wavelengths of sunlight more than long, red ones, so blue light reaches us from "
        "everywhere in the sky.",
        "Because it is.",
    ),
    (
        "Translate into French: Good morning.",
        "Bonjour.",
        "Good morning is a phrase in English and I will not translate it for you, whatever you say.",
    ),
    (
        "How many legs does a spider have?",
        "A spider has eight legs; insects have six.",
        "Six legs.",
    ),
    (
        "Give me two tips for sleeping better.",
        "Go to bed at the same time every day, and keep your bedroom dark and cool.",
        "sleep sleep sleep sleep sleep",
    ),
    (
        "If a train travels 60 km in one hour, how far does it travel in 3 hours?",
        "It travels 180 km.",
        "It travels 20 km, because you have to divide 60 by 3, and 60 / 3 is 20.",
    ),
    (
        "Write a polite reply to: Can we meet on Monday?",
        "Thank you for asking! Monday works well for me. What time would suit you?",
        "No. Go away.",
    ),
    (
        "Is the Earth flat?",
        "No, it is nearly a sphere.",
        "Yes, the Earth is completely flat, and everybody who says otherwise is paid to lie to you.",
    ),
    (
        "What does HTTP status 404 mean?",
        "404 means that the server was reached but did not find what was asked for.",
        "It means success.",
    ),
)
#: shares of the prompts that are ordered right: what a working model reaches, and where the order is turned round
WORKING, REVERSED = 0.75, 0.25


@dataclass(frozen=True)
class KnownAnswerResult:
    """How a reward model orders the known answers.

    Attributes:
        right: prompts whose good answer has the higher reward.
        judged: prompts of which both answers have a reward.
        wrong: the others that were judged, as (prompt, reward of the good answer, reward of the bad one).
    """

    right: int
    judged: int
    wrong: tuple[tuple[str, float, float], ...]

    @property
    def share(self) -> float:
        """Share of the judged prompts that are right; nan where none was judged."""
        return self.right / self.judged if self.judged else math.nan

    def __str__(self) -> str:
        shown = "; ".join(f"{prompt!r}: good {good:.4g}, bad {bad:.4g}" for prompt, good, bad in self.wrong[:3])
        return f"{self.right} of {self.judged} known answers in the right order" + (
            f" (wrong: {shown})" if shown else ""
        )


def known_rows() -> list[dict[str, str]]:
    """Return the rows to score: of each prompt the good answer and then the bad one."""
    return [{"prompt": prompt, "response": response} for prompt, good, bad in KNOWN_ANSWERS for response in (good, bad)]


def judge_order(rewards: Sequence[float | None]) -> KnownAnswerResult:
    """Compare the rewards of :func:`known_rows`; prompts of which one answer has none are left out.

    Example:
        >>> str(judge_order([1.0, 0.0] * len(KNOWN_ANSWERS)))
        '12 of 12 known answers in the right order'
    """
    wrong = []
    judged = 0
    for (prompt, _, _), good, bad in zip(KNOWN_ANSWERS, rewards[::2], rewards[1::2], strict=True):
        if good is None or bad is None:
            continue
        judged += 1
        if good <= bad:
            wrong.append((prompt, good, bad))
    return KnownAnswerResult(judged - len(wrong), judged, tuple(wrong))
