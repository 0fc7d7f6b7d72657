"""Are the answers of these sources worth training on? What scored responses say about it, before any training.

:func:`examine_worth` compares, per domain, the sources with the target's own answers to the same prompts. Fine-tuning
on the answers of a source that is worse than the target makes the target worse, also where only right answers are
chosen: of a weak source these are those with luck. So besides the accuracies there are two measures of luck. **Dealt**:
the same answers dealt to other prompts of the domain; who always says "2" is right as often there. **Repeats**:
how often a source that was right is right again when it is asked again.

Everything is a mean over prompts, each counting the same, and every interval takes the prompts as its sample: several
answers to one prompt are no independent evidence.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.preferences.candidates import Candidate, is_own
from fusion_plugins.core.preferences.numbers import deviation, difference, mean, quantiles
from fusion_plugins.core.preferences.verdict import verdict_details
from fusion_plugins.errors import DataError

#: prompts below which nothing is said about a source: an interval is then wider than most differences
FEWEST_PROMPTS = 30
#: a difference of accuracies, and one of rewards in standard deviations of the target's, that does not matter
SAME_ACCURACY, SAME_REWARD = 0.05, 0.1
#: two-sided 95 %
_Z = 1.959964

Verdict = Literal["better", "same", "worse", "luck", "unknown"]
"""What a source is to the target: see :func:`_verdict`."""
Conclusion = Literal["worth it", "not worth it", "not enough data"]
Interval = tuple[float, float]
_NOTHING = (math.nan, math.nan)


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
    interval: Interval = _NOTHING
    dealt: float = math.nan
    repeats: float = math.nan
    solved: float = math.nan
    characters: tuple[float, float] = _NOTHING
    reward: float = math.nan
    gap: float = math.nan
    difference: float = math.nan
    difference_interval: Interval = _NOTHING
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


def wilson(share: float, count: float) -> Interval:
    """Return the 95 % interval of a share (Wilson's), both ends in [0, 1].

    Args:
        share: in [0, 1].
        count: size of the sample, above 0.

    Example:
        >>> [round(end, 3) for end in wilson(0.8, 10)], [round(end, 3) for end in wilson(0, 4)]
        ([0.49, 0.943], [0.0, 0.49])
    """
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # At the ends the formula gives 0 and 1, but for rounding.
    return (middle - half if share > 0 else 0.0), (middle + half if share < 1 else 1.0)


def response_of(candidate: Candidate, own_source: str | None = None) -> Response:
    """Return what the comparison needs of a candidate.

    Args:
        candidate: with the column ``scores`` of `fusion score` in its ``extra``, if it has one, as a dict or as JSON.
        own_source: name of the source that is the target.
    """
    found = verdict_details(candidate.extra.get("scores"))
    gold = found.get("gold")
    gold = candidate.extra.get("reference") if gold is None else gold
    answer = found.get("answer")
    reward = candidate.reward
    return Response(
        prompt_id=candidate.prompt_id,
        source=candidate.source,
        domain=candidate.domain,
        own=is_own(candidate, own_source),
        correct=candidate.correct,
        reward=float(reward) if reward is not None and math.isfinite(reward) else None,
        characters=len(candidate.response),
        answer=candidate.response.strip() if answer is None else _text(answer),
        # A NUL stands in no answer: such a gold answer is like no other.
        gold=f"\0{candidate.prompt_id}" if gold is None else _text(gold),
    )


def examine_worth(responses: Iterable[Response]) -> list[DomainWorth]:
    """Compare the sources with the target, per domain.

    Args:
        responses: of the sources and, marked ``own``, of the target; in any order.

    Returns:
        One entry per domain, sorted by name.

    Raises:
        DataError: the own answers have more than one name.
    """
    domains: dict[str, list[Response]] = defaultdict(list)
    for response in responses:
        domains[response.domain].append(response)
    if len(names := {each.source for group in domains.values() for each in group if each.own}) > 1:
        raise DataError(
            f"expected the target's own answers of one source, got those of {', '.join(sorted(names))}. Mark one of "
            "them with is_target, or name one."
        )
    return [_conclude(_domain(name, group)) for name, group in sorted(domains.items())]


def _domain(name: str, group: Sequence[Response]) -> DomainWorth:
    measure = _measure(group)
    by_source: dict[str, list[Response]] = defaultdict(list)
    for each in group:
        by_source[each.source].append(each)
    right_for: dict[str, set[str]] = defaultdict(set)
    for each in group:
        right_for[each.gold].add(each.gold)
        if each.correct:
            right_for[each.answer].add(each.gold)
    values = {source: _values(answers, measure) for source, answers in by_source.items()}
    found = {source: _source(source, by_source[source], values[source], measure, right_for) for source in by_source}
    own = next((each.source for each in group if each.own), None)
    target = found.pop(own) if own is not None else None
    others = {source: values[source] for source in found}
    if own is None:
        compared = [replace(each, verdict="luck" if _is_luck(each) else "unknown") for each in found.values()]
    else:
        compared = [_against(each, values[each.name], values[own], measure) for each in found.values()]
        target = target and replace(target, verdict="luck" if _is_luck(target) else "unknown")
    sure = {each.name: others[each.name] for each in compared if each.verdict != "luck"}
    together = _together(sure, values[own] if own is not None else {}, measure)
    return DomainWorth(
        domain=name,
        measure=measure,
        prompts=len({each.prompt_id for each in group}),
        sources=sorted(compared, key=lambda each: (-_or(each.value, -math.inf), each.name)),
        target=target,
        solved=_solved(others) if measure == "verdict" else math.nan,
        only_sources=_only_sources(others, values[own]) if measure == "verdict" and own is not None else math.nan,
        together=together,
    )


def _measure(group: Sequence[Response]) -> Literal["verdict", "reward"]:
    """Return what decides: verdicts where at least half of the prompts have one, or where there are no rewards."""
    prompts = {each.prompt_id for each in group}
    judged = {each.prompt_id for each in group if each.correct is not None}
    rewarded = any(each.reward is not None for each in group)
    return "verdict" if judged and (2 * len(judged) >= len(prompts) or not rewarded) else "reward"


def _values(answers: Sequence[Response], measure: str) -> dict[str, list[float]]:
    """Return prompt id -> verdicts as 0 and 1, or rewards, of the answers that have one."""
    values: dict[str, list[float]] = defaultdict(list)
    for each in answers:
        value = each.correct if measure == "verdict" else each.reward
        if value is not None:
            values[each.prompt_id].append(float(value))
    return values


def _source(
    name: str,
    answers: Sequence[Response],
    values: Mapping[str, Sequence[float]],
    measure: str,
    right_for: Mapping[str, set[str]],
) -> SourceWorth:
    lengths = [each.characters for each in answers]
    rewards: dict[str, list[float]] = defaultdict(list)
    for each in answers:
        if each.reward is not None:
            rewards[each.prompt_id].append(each.reward)
    gaps = [difference(max(given), min(given)) for given in rewards.values() if len(given) > 1]
    means = [mean(given) for given in values.values()]
    worth = SourceWorth(
        name=name,
        responses=len(answers),
        prompts=len(values),
        characters=(float(np.mean(lengths)), float(np.median(lengths))),
        reward=mean([reward for given in rewards.values() for reward in given]),
        gap=quantiles(gaps, [0.5])[0] if gaps else math.nan,
    )
    if not means:
        return worth
    value = mean(means)
    if measure == "reward":
        return replace(worth, value=value, interval=_normal(means))
    return replace(
        worth,
        value=value,
        interval=wilson(value, len(means)),
        dealt=_dealt(answers, right_for),
        repeats=_repeats(values.values()),
        solved=mean([float(any(given)) for given in values.values()]),
    )


def _dealt(answers: Sequence[Response], right_for: Mapping[str, set[str]]) -> float:
    """Return the accuracy of a source's answers, each dealt to every other prompt that it has answered.

    An answer is right for a prompt if it is the gold answer, or if some response that said it was judged right for that
    gold answer. Where no scorer noted answers and gold answers, only what was judged right for the very prompt counts,
    and the figure is too low rather than too high.
    """
    judged = [each for each in answers if each.correct is not None]
    gold_of = {each.prompt_id: each.gold for each in judged}
    if len(gold_of) < 2:
        return math.nan
    prompts_with = Counter(gold_of.values())
    answered = Counter(each.prompt_id for each in judged)
    by_prompt: dict[str, float] = defaultdict(float)
    for each in judged:
        right = right_for.get(each.answer, set())
        elsewhere = sum(prompts_with[gold] for gold in right) - (each.gold in right)
        by_prompt[each.prompt_id] += elsewhere / (len(gold_of) - 1) / answered[each.prompt_id]
    return mean(list(by_prompt.values()))


def _repeats(values: Iterable[Sequence[float]]) -> float:
    again = others = 0.0
    for given in values:
        right = sum(given)
        again += right * (right - 1)
        others += right * (len(given) - 1)
    return again / others if others else math.nan


def _against(
    worth: SourceWorth, values: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]], measure: str
) -> SourceWorth:
    """Return the figures of a source with its difference from the target and the verdict."""
    common = values.keys() & own.keys()
    differences = [difference(mean(values[prompt]), mean(own[prompt])) for prompt in sorted(common)]
    if not differences:
        return worth
    margin = SAME_ACCURACY
    if measure == "reward":
        margin = SAME_REWARD * deviation([mean(own[prompt]) for prompt in common])
    found = replace(
        worth, difference=mean(differences), difference_interval=_normal(differences), compared=len(differences)
    )
    return replace(found, verdict=_verdict(found, margin))


def _verdict(found: SourceWorth, margin: float) -> Verdict:
    """Return what a source is to the target.

    ``worse`` and ``better``: the interval of the difference does not hold 0. ``luck``: it is not worse, but its
    accuracy cannot be told from that of its answers dealt to other prompts. ``same``: the whole interval lies within
    the margin. ``unknown``: none of these, or too few prompts.
    """
    low, high = found.difference_interval
    if found.compared < FEWEST_PROMPTS:
        return "unknown"
    if high < 0:
        return "worse"
    if found.value > 0 and found.interval[0] <= _or(found.dealt, -math.inf):
        return "luck" if _is_luck(found) else "unknown"
    if low > 0:
        return "better"
    return "same" if -margin <= low and high <= margin else "unknown"


def _is_luck(found: SourceWorth) -> bool:
    """Whether right answers are as frequent on other prompts; never where the source is hardly ever right."""
    dealt = _or(found.dealt, -math.inf)
    enough = found.prompts >= FEWEST_PROMPTS and found.value > 0
    return enough and found.interval[0] <= dealt and found.value - dealt < SAME_ACCURACY


def _together(
    sources: Mapping[str, Mapping[str, Sequence[float]]], own: Mapping[str, Sequence[float]], measure: str
) -> SourceWorth | None:
    """Return what the best source of each prompt is worth, chosen by half of the answers, measured by the others."""
    chosen: dict[str, list[float]] = {}
    for prompt in sorted({prompt for values in sources.values() for prompt in values}):
        halves = [(given[::2], given[1::2]) for values in sources.values() if len(given := values.get(prompt, ())) > 1]
        if len(halves) > 1:
            found = [_chosen(halves), _chosen([(second, first) for first, second in halves])]
            chosen[prompt] = [mean(found)]
    if not chosen:
        return None
    means = [value for [value] in chosen.values()]
    value = mean(means)
    worth = SourceWorth(
        name="best source per prompt",
        responses=0,
        prompts=len(means),
        value=value,
        interval=wilson(value, len(means)) if measure == "verdict" else _normal(means),
    )
    return _against(worth, chosen, own, measure)


def _chosen(halves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the mean of the second half of the source with the best first half; of all of them where several are."""
    means = [(mean(first), mean(second)) for first, second in halves]
    best = max(first for first, _ in means)
    return mean([second for first, second in means if first == best])


def _solved(sources: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    prompts = {prompt for values in sources.values() for prompt in values}
    right = {prompt for values in sources.values() for prompt, given in values.items() if any(given)}
    return len(right) / len(prompts) if prompts else math.nan


def _only_sources(sources: Mapping[str, Mapping[str, Sequence[float]]], own: Mapping[str, Sequence[float]]) -> float:
    prompts = {prompt for values in sources.values() for prompt in values if prompt in own}
    right = {prompt for values in sources.values() for prompt, given in values.items() if any(given)}
    return sum(prompt in right and not any(own[prompt]) for prompt in prompts) / len(prompts) if prompts else math.nan


def _conclude(found: DomainWorth) -> DomainWorth:
    """Return a domain with its conclusion and the reasons."""
    reasons = list(_reasons(found))
    every = [*found.sources, *([found.together] if found.together else [])]
    if any(each.verdict == "better" for each in every):
        return replace(found, conclusion="worth it", reasons=reasons)
    if found.target is not None and found.sources and all(each.verdict != "unknown" for each in found.sources):
        return replace(found, conclusion="not worth it", reasons=reasons)
    return replace(found, conclusion="not enough data", reasons=reasons)


def _reasons(found: DomainWorth) -> Iterator[str]:
    if not found.sources:
        yield f"there are no answers of a source in {found.domain}: sample one"
    if found.target is None:
        yield (
            f"there are no answers of the target in {found.domain}: sample it under a name of its own with the same "
            "prompts into the same folder, and score the folder again"
        )
    else:
        yield from _comparisons(found)
    for each in (*found.sources, *([found.target] if found.target else [])):
        if _is_luck(each):
            yield (
                f"{each.name} is right on {found.domain} in {each.value:.1%}, and so are its answers dealt to other "
                f"prompts in {each.dealt:.1%}: that is luck, and its right answers teach nothing"
            )
    if found.together is not None and found.together.verdict == "better":
        yield (
            f"the best source of each prompt is better than the target on {found.domain}: choose by the rule "
            f"{'verdict' if found.measure == 'verdict' else 'reward'}"
        )


def _comparisons(found: DomainWorth) -> Iterator[str]:
    by_verdict: dict[str, list[SourceWorth]] = defaultdict(list)
    for each in found.sources:
        few = each.verdict == "unknown" and each.compared < FEWEST_PROMPTS
        by_verdict["few" if few else each.verdict].append(each)
    for verdict, text in _SENTENCES.items():
        if group := by_verdict[verdict]:
            names = sorted(each.name for each in group)
            yield text.format(
                names=_joined(names),
                are="is" if len(names) == 1 else "are",
                listed=", ".join(names),
                domain=found.domain,
                scores="verdicts" if found.measure == "verdict" else "rewards",
            )


#: verdict -> what it means for the training
_SENTENCES: Mapping[str, str] = {
    "better": "{names} {are} better than the target on {domain}",
    "worse": "{names} {are} worse than the target on {domain}: training on these answers makes it worse. Set "
    "fusion.leave_out_sources: [{listed}]",
    "same": "{names} {are} no better than the target on {domain}",
    "few": f"{{names}} and the target have fewer than {FEWEST_PROMPTS} prompts of {{domain}} in common that have "
    "{scores}: sample and score more",
    "unknown": "the answers do not show whether {names} {are} better than the target on {domain}: sample more prompts",
}


def warnings_of(found: Iterable[DomainWorth], trained: Mapping[tuple[str, str], int]) -> list[str]:
    """Return what speaks against the answers that a run trains on, one sentence per source and domain.

    Args:
        found: what :func:`examine_worth` returned for all responses.
        trained: (domain, source) -> answers that the run learns from.
    """
    told = []
    for domain in found:
        own = domain.target
        for each in (*domain.sources, *([own] if own is not None else [])):
            count = trained.get((domain.domain, each.name), 0)
            if not count or each.verdict not in ("worse", "luck"):
                continue
            start = f"{domain.domain}: {count} of the answers that are trained on are those of {each.name}, which "
            if each.verdict == "worse" and own is not None:
                unit = "is right in {:.1%}" if domain.measure == "verdict" else "has a mean reward of {:.4g}"
                told.append(
                    f"{start}{unit.format(each.value)}, worse than the target ({unit.format(own.value)}): that makes "
                    f"the target worse. Set fusion.leave_out_sources: [{each.name}]"
                )
            elif each.verdict == "luck":
                told.append(
                    f"{start}is right in {each.value:.1%}, and in {each.dealt:.1%} where its answers are dealt to "
                    "other prompts: what is right is luck, and there is nothing to learn from it"
                )
    return told


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _normal(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of a mean; nan with one value."""
    if len(values) < 2:
        return _NOTHING
    middle, half = mean(values), _Z / math.sqrt(len(values)) * deviation(values, ddof=1)
    return difference(middle, half), difference(middle, -half)


def _or(value: float, other: float) -> float:
    return other if math.isnan(value) else value
