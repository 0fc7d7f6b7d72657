"""Candidates of many sources -> preference pairs (FuseChat-3.0, sections 5 and 6).

Data flow: ``fusion score`` -> :func:`~fusion_plugins.core.preferences.candidates.clean` -> :func:`pairs_per_prompt` and
:func:`~fusion_plugins.core.preferences.best.best_per_prompt` ->
:func:`~fusion_plugins.core.preferences.split.split_prompts` -> axolotl's SFT and DPO datasets. For a single step,
:func:`build_pairs` cleans and chooses in one call. The rules that pairs and best answers have in common stand in
:mod:`~fusion_plugins.core.preferences.choosing`.

The published limits 0.01 and 0.1 belong to the reward scale of ArmoRM-Llama3-8B-v0.1. For another reward model give
your own limits, or quantiles of the gaps that occur: ``GapWindow(0.2, 0.9, unit="quantile")``.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusion_plugins.core.preferences.candidates import (
    Candidate,
    CandidateGroups,
    Pair,
    answer_of,
    best_first,
    clean,
    is_own,
    is_verified,
    reward_of,
    steadiest_first,
    tie_order,
    worst_first,
)
from fusion_plugins.core.preferences.choosing import SelectionReport, by_source, resolve_rule, why_no_best
from fusion_plugins.core.preferences.gaps import GapWindow
from fusion_plugins.core.preferences.numbers import difference, quantiles
from fusion_plugins.errors import ConfigError

#: A gap that misses a limit by no more than this passes. The limits are meant in decimals, and rewards are binary
#: (often float32) numbers: 0.4 - 0.3 is a little more than 0.1.
GAP_TOLERANCE = 1e-6

PairRule = Callable[..., list[Pair]]


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a group of responses, in characters."""

    count: int
    mean: float
    median: float


def build_pairs(
    candidates: Iterable[Candidate | Mapping[str, Any]],
    rule: str | PairRule = "same_source",
    *,
    window: GapWindow | None = None,
    per_prompt: int | None = 1,
    options: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Return preference pairs, ordered by prompt id; see :func:`pairs_with_report`.

    Example:
        >>> from fusion_plugins.core.preferences.candidates import Candidate
        >>> rewards = [0.10, 0.15, 0.12]
        >>> answers = [Candidate("p", "a", i, "Hi?", f"answer {i}", reward=reward) for i, reward in enumerate(rewards)]
        >>> [(pair.chosen.index, pair.rejected.index, round(pair.gap, 2)) for pair in build_pairs(answers)]
        [(1, 0, 0.05)]
    """
    return pairs_with_report(candidates, rule, window=window, per_prompt=per_prompt, options=options)[0]


def pairs_with_report(
    candidates: Iterable[Candidate | Mapping[str, Any]],
    rule: str | PairRule = "same_source",
    *,
    window: GapWindow | None = None,
    per_prompt: int | None = 1,
    options: Mapping[str, Any] | None = None,
    min_accuracy: float = 0.0,
) -> tuple[list[Pair], SelectionReport]:
    """Clean candidates, and return preference pairs with a report of what was left out; see :func:`pairs_per_prompt`.

    Args:
        candidates: scored responses, in any order, of any number of prompts and sources; or rows with the same keys.
        rule: a name in :data:`PAIR_RULES`, or a function of the (cleaned) candidates of one prompt.
        window: limits of the reward gap; the published ones by default.
        per_prompt: most pairs per prompt, at least 1; None for all that the rule proposes (one per source).
        options: keyword arguments for the rule.
        min_accuracy: smallest share of right responses, over all prompts, of a source whose verdicts make pairs.

    Raises:
        ConfigError: unknown rule, ``per_prompt`` below 1, or ``min_accuracy`` outside [0, 1].
        DataError: a row is wrong, or candidates of one prompt disagree about its text or its domain.
    """
    propose = partial(resolve_rule(rule, PAIR_RULES, "pair rule"), **(options or {}))
    return pairs_per_prompt(clean(candidates), propose, window or GapWindow(), per_prompt, min_accuracy)


def pairs_per_prompt(
    groups: CandidateGroups,
    propose: PairRule,
    window: GapWindow,
    per_prompt: int | None = 1,
    min_accuracy: float = 0.0,
) -> tuple[list[Pair], SelectionReport]:
    """Return the preference pairs of each prompt, ordered by prompt id, and a report of what was left out.

    The rule proposes pairs of one prompt, best first; those outside the gap window go; the first ``per_prompt`` stay.
    With ``same_source`` and one pair per prompt, the pair is that of the source whose chosen answer has the highest
    reward among the sources whose gap lies in the window.

    A pair whose chosen answer is right by a verdict goes, too, where its source is right less often than
    ``min_accuracy`` over all prompts: what such a source gets right may be luck. Other pairs are not concerned.

    Raises:
        ConfigError: ``per_prompt`` is below 1, or ``min_accuracy`` outside [0, 1].
    """
    if per_prompt is not None and per_prompt < 1:
        raise ConfigError(f"per_prompt: expected at least 1 pair per prompt, got {per_prompt}")
    if not 0 <= min_accuracy <= 1:
        raise ConfigError(f"min_accuracy: expected a share in [0, 1], got {min_accuracy}")
    proposals = {prompt_id: propose(group) for prompt_id, group in groups.by_prompt.items()}
    limits = _limits(window, proposals.values())
    pairs: list[Pair] = []
    no_pair: Counter[str] = Counter()
    dropped_pairs: Counter[str] = Counter()
    for prompt_id, proposed in proposals.items():
        judged = [(pair, _fault(pair, limits, window.exempt, min_accuracy)) for pair in proposed]
        kept = [pair for pair, fault in judged if fault is None]
        faults = Counter(fault for _, fault in judged if fault is not None)
        pairs += kept[:per_prompt]
        dropped_pairs += faults
        dropped_pairs += Counter(beyond_per_prompt=len(kept) - len(kept[:per_prompt]))
        if not proposed:
            no_pair[_why_no_pair(groups.by_prompt[prompt_id])] += 1
        elif not kept:
            no_pair[next(iter(faults)) if len(faults) == 1 else "no_gap_in_window"] += 1
    kept_prompts = len(proposals) - no_pair.total()
    decided = limits if limits != (None, None) and _gaps(window, proposals.values()) else None
    report = SelectionReport(len(proposals), kept_prompts, dict(no_pair), groups.dropped, dict(dropped_pairs), decided)
    return pairs, report


def same_source(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose, for each source, its highest against its lowest reward (verified: correct against incorrect).

    In pairs of one source, the reward model's preference for a source's style cannot decide. The source whose chosen
    answer has the highest reward comes first.
    """
    verified = is_verified(candidates)
    proposed = [_extremes(group, verified) for group in by_source(candidates).values()]
    return sorted((pair for pair in proposed if pair), key=lambda pair: best_first(pair.chosen))


def across_sources(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose the highest against the lowest reward over all sources (verified: correct against incorrect)."""
    pair = _extremes(candidates, is_verified(candidates))
    return [pair] if pair else []


def verdict(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose, for each source, one correct against one incorrect answer; rewards play no part.

    For data that only a verifier has scored. The source that is right most often comes first (see
    :mod:`~fusion_plugins.core.preferences.choosing`), with the right answer that it gave most often; which incorrect
    answer, the order of ties decides. A source that is always right has no pair;
    :func:`~fusion_plugins.core.preferences.split.split_prompts` sends its prompts to SFT.
    """
    proposed = []
    for group in by_source(candidates).values():
        correct = [candidate for candidate in group if candidate.correct is True]
        incorrect = [candidate for candidate in group if candidate.correct is False]
        if correct and incorrect:
            proposed.append(Pair(min(correct, key=steadiest_first), min(incorrect, key=tie_order), None))
    return sorted(proposed, key=lambda pair: steadiest_first(pair.chosen))


def own_answers(candidates: Sequence[Candidate], *, own_source: str | None = None) -> list[Pair]:
    """Propose the target's own best answer against its own worst one (verified: correct against incorrect).

    By rewards where there are any, as :func:`same_source`, else by verdicts, as :func:`verdict`. WRPO needs these
    pairs.

    Args:
        candidates: those of one prompt.
        own_source: name of the source that is the target itself; answers with ``is_target`` are own ones in any case.
    """
    own = [candidate for candidate in candidates if is_own(candidate, own_source)]
    verified = is_verified(candidates)
    # Where answers have verdicts alone, rewards of other prompts play no part.
    if verified and all(candidate.reward is None for candidate in own):
        return verdict(own)
    pair = _extremes(own, verified)
    return [pair] if pair else []


def length_statistics(pairs: Iterable[Pair]) -> dict[tuple[str, str, str], LengthStatistics]:
    """Return (domain, source, "chosen" | "rejected") -> lengths of the responses, in characters.

    Reward models favour long answers. A preference loss learns a wide difference between the two sides first.
    """
    lengths: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for pair in pairs:
        for side, candidate in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            lengths[candidate.domain, candidate.source, side].append(len(candidate.response))
    return {
        key: LengthStatistics(len(found), float(np.mean(found)), float(np.median(found)))
        for key, found in sorted(lengths.items())
    }


def _extremes(candidates: Sequence[Candidate], verified: bool) -> Pair | None:
    rewarded = [candidate for candidate in candidates if candidate.reward is not None]
    better = [candidate for candidate in rewarded if candidate.correct is True or not verified]
    worse = [candidate for candidate in rewarded if candidate.correct is False or not verified]
    if not better or not worse:
        return None
    chosen, rejected = min(better, key=best_first), min(worse, key=worst_first)
    # One candidate is both: it is the only one, or all rewards are equal, so that there is no better answer.
    return None if chosen is rejected else Pair(chosen, rejected, difference(reward_of(chosen), reward_of(rejected)))


def _limits(window: GapWindow, proposals: Iterable[list[Pair]]) -> tuple[float | None, float | None]:
    if window.unit == "reward":
        return window.minimum, window.maximum
    gaps = _gaps(window, proposals)
    if not gaps:
        return None, None
    low, high = (None if q is None else quantiles(gaps, [q])[0] for q in (window.minimum, window.maximum))
    return low, high


def _gaps(window: GapWindow, proposals: Iterable[list[Pair]]) -> list[float]:
    """Return the gaps that the window decides about."""
    return [p.gap for pairs in proposals for p in pairs if p.gap is not None and p.chosen.domain not in window.exempt]


def _fault(
    pair: Pair, limits: tuple[float | None, float | None], exempt: frozenset[str], min_accuracy: float
) -> str | None:
    if pair.chosen.correct is True and pair.chosen.evidence.accuracy < min_accuracy:
        return "source_accuracy_too_low"
    if answer_of(pair.chosen) == answer_of(pair.rejected):
        return "same_response"
    if pair.gap is None or pair.chosen.domain in exempt:
        return None
    low, high = limits
    if low is not None and pair.gap < low - GAP_TOLERANCE:
        return "gap_too_small"
    if high is not None and pair.gap > high + GAP_TOLERANCE:
        return "gap_too_large"
    return None


def _why_no_pair(candidates: Sequence[Candidate]) -> str:
    if len(candidates) < 2:
        return "fewer_than_two_responses"
    verdicts = [candidate.correct for candidate in candidates]
    if True in verdicts and False not in verdicts:
        return "none_incorrect"
    return why_no_best(candidates)


#: name -> rule; :mod:`fusion_plugins.plugins` hands these to the plugin manager.
PAIR_RULES: dict[str, PairRule] = {
    "same_source": same_source,
    "across_sources": across_sources,
    "verdict": verdict,
    "own_answers": own_answers,
}
