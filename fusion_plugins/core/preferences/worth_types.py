"""What :mod:`~fusion_plugins.core.preferences.worth` compares, responses, and what it finds of sources and domains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fusion_plugins.core.preferences.intervals import NO_INTERVAL, Interval

#: prompts below which nothing is said about a source: an interval is then wider than most differences
FEWEST_PROMPTS = 30
#: a difference of accuracies, and one of rewards in standard deviations of the target's, that does not matter
SAME_ACCURACY, SAME_REWARD = 0.05, 0.1
#: what a source is to the target; `_verdict` in `worth` says when
Verdict = Literal["better", "same", "worse", "luck", "unknown"]
#: whether to train on the answers of a domain
Conclusion = Literal["worth it", "not worth it", "not enough data"]


@dataclass(frozen=True, slots=True)
class Response:
    """What is needed of one scored response.

    Attributes:
        prompt_id: the prompt.
        source: who answered.
        domain: of the prompt.
        own: it is the target's own answer.
        correct: the verdict, if there is one.
        reward: the reward, if there is one that is finite.
        characters: length of the answer.
        answer: what was compared with the gold answer; where no scorer noted it, the whole text.
        gold: the gold answer; where none is known, something that no other prompt has.
    """

    prompt_id: str
    source: str
    domain: str
    own: bool
    correct: bool | None
    reward: float | None
    characters: int
    answer: str
    gold: str


@dataclass(frozen=True)
class SourceWorth:
    """The answers of one source, or of the target, in one domain.

    Attributes:
        name: the source.
        responses: its answers.
        prompts: prompts of which an answer has a verdict (or a reward, where the domain has no verdicts).
        value: accuracy in [0, 1], or the mean reward; nan without any.
        interval: 95 % interval of it.
        dealt: accuracy of the same answers dealt to other prompts; nan without verdicts or with one prompt.
        repeats: share of right answers among the other answers to prompts that it has solved; nan where it never
            answered such a prompt again.
        solved: share of the prompts with at least one right answer; nan without verdicts.
        characters: mean and median length.
        reward: mean reward; nan without.
        gap: median over prompts of its best minus its worst reward; nan where no prompt has two.
        difference: ``value`` minus the target's, over the prompts that both have answered; nan without a target.
        difference_interval: 95 % interval of it.
        compared: prompts that both have answered.
        verdict: what the source is to the target. For the target itself, and without one: ``luck`` or ``unknown``.
    """

    name: str
    responses: int
    prompts: int
    value: float = math.nan
    interval: Interval = NO_INTERVAL
    dealt: float = math.nan
    repeats: float = math.nan
    solved: float = math.nan
    characters: tuple[float, float] = NO_INTERVAL
    reward: float = math.nan
    gap: float = math.nan
    difference: float = math.nan
    difference_interval: Interval = NO_INTERVAL
    compared: int = 0
    verdict: Verdict = "unknown"


@dataclass(frozen=True)
class DomainWorth:
    """All answers of one domain.

    Attributes:
        domain: its name.
        measure: what answers are compared by: verdicts where half of the prompts have one, else rewards.
        prompts: prompts of the domain.
        sources: one entry per source, best first.
        target: the target's own answers; None where there are none.
        solved: share of the prompts that any source has solved, of those with a verdict; nan without verdicts.
        only_sources: share of the prompts with verdicts of both that a source has solved and the target has not.
        together: the source that does best on a prompt by one half of its answers, measured by the other half; the
            sources whose answers are luck are left out. None where fewer than two sources answered a prompt twice.
        conclusion: whether to train on these answers.
        reasons: sentences that say why, and what to do.
    """

    domain: str
    measure: Literal["verdict", "reward"]
    prompts: int
    sources: Sequence[SourceWorth]
    target: SourceWorth | None
    solved: float
    only_sources: float
    together: SourceWorth | None
    conclusion: Conclusion = "not enough data"
    reasons: Sequence[str] = field(default=())


def is_luck(found: SourceWorth) -> bool:
    """Whether right answers are as frequent on other prompts; never where the source is hardly ever right."""
    enough = found.prompts >= FEWEST_PROMPTS and found.value > 0
    # Where `dealt` is nan, both comparisons are false.
    return enough and found.interval[0] <= found.dealt and found.value - found.dealt < SAME_ACCURACY
