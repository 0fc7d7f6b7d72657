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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.preferences.candidates import Candidate, is_own
from fusion_plugins.core.preferences.conclusions import conclude
from fusion_plugins.core.preferences.intervals import interval_of_mean, wilson
from fusion_plugins.core.preferences.numbers import deviation, difference, mean, quantiles
from fusion_plugins.core.preferences.verdict import verdict_details
from fusion_plugins.core.preferences.worth_types import (
    FEWEST_PROMPTS,
    SAME_ACCURACY,
    SAME_REWARD,
    DomainWorth,
    Response,
    SourceWorth,
    Verdict,
    is_luck,
)
from fusion_plugins.errors import DataError


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
    return [conclude(_domain(name, group)) for name, group in sorted(domains.items())]


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
        compared = [replace(each, verdict="luck" if is_luck(each) else "unknown") for each in found.values()]
    else:
        compared = [_against(each, values[each.name], values[own], measure) for each in found.values()]
        target = target and replace(target, verdict="luck" if is_luck(target) else "unknown")
    sure = {each.name: others[each.name] for each in compared if each.verdict != "luck"}
    together = _together(sure, values[own] if own is not None else {}, measure)
    return DomainWorth(
        domain=name,
        measure=measure,
        prompts=len({each.prompt_id for each in group}),
        sources=sorted(compared, key=_best_first),
        target=target,
        solved=_solved(others) if measure == "verdict" else math.nan,
        only_sources=_only_sources(others, values[own]) if measure == "verdict" and own is not None else math.nan,
        together=together,
    )


def _best_first(worth: SourceWorth) -> tuple[float, str]:
    """Return a key to sort by; sources without a value come last."""
    return (math.inf if math.isnan(worth.value) else -worth.value), worth.name


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
        return replace(worth, value=value, interval=interval_of_mean(means))
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
        worth,
        difference=mean(differences),
        difference_interval=interval_of_mean(differences),
        compared=len(differences),
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
    if found.value > 0 and found.interval[0] <= found.dealt:
        return "luck" if is_luck(found) else "unknown"
    if low > 0:
        return "better"
    return "same" if -margin <= low and high <= margin else "unknown"


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
        interval=wilson(value, len(means)) if measure == "verdict" else interval_of_mean(means),
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


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
