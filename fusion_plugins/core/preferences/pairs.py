"""Scored candidates of many sources -> preference pairs and best answers (FuseChat-3.0, sections 5 and 6).

Place in the way of the data: after ``fusion score``, before axolotl's SFT and DPO data sets; which prompt goes to which
stage is decided in :mod:`fusion_plugins.core.preferences.split`.

Rules that hold everywhere in this module:

* A prompt is **verified** when its domain is ``math`` or ``code`` or when one of its candidates has a verdict. There
  the better answer must be correct and the worse one incorrect; a candidate without a verdict can be neither.
* Before any rule runs, empty responses, responses whose reward is not finite and repetitions of one response by one
  source are left out. All of it is counted.
* **Ties** (equal rewards, or no rewards at all) are broken by a hash of prompt, source, index and response: a fixed
  order that favours no source and does not depend on the order of the rows, the process or the machine.

The published limits 0.01 and 0.1 belong to the reward scale of ArmoRM-Llama3-8B-v0.1. For another reward model give
your own limits, or quantiles of the gaps that occur: ``GapWindow(0.2, 0.9, unit="quantile")``.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.preferences.candidates import (
    Candidate,
    Pair,
    best_first,
    clean,
    is_verified,
    reward_of,
    tie_order,
    worst_first,
)
from fusion_plugins.errors import ConfigError

__all__ = [
    "BEST_RULES",
    "PAIR_RULES",
    "GapWindow",
    "LengthStatistics",
    "SelectionReport",
    "across_sources",
    "best_of",
    "best_with_report",
    "build_pairs",
    "highest_reward",
    "length_statistics",
    "pairs_with_report",
    "same_source",
    "verdict",
]

#: A gap this close to a limit counts as inside it: rewards are float32 numbers.
GAP_TOLERANCE = 1e-6

PairRule = Callable[..., list[Pair]]
BestRule = Callable[[Sequence[Candidate]], Candidate | None]


@dataclass(frozen=True)
class GapWindow:
    """Which reward gaps (chosen minus rejected) a pair may have. Both limits are inclusive.

    A pair without a gap (rule ``verdict``) and a pair of an exempt domain always pass.

    Attributes:
        minimum: smallest gap; None for no limit.
        maximum: largest gap; None for no limit.
        unit: ``reward``: the limits are differences of rewards. ``quantile``: they are quantiles, in [0, 1], of the
            gaps of all pairs that the rule proposes, which makes them independent of the reward model's scale.
        exempt: domains in which the verdict alone decides; the published rule names no gap for code.
    """

    minimum: float | None = 0.01
    maximum: float | None = 0.1
    unit: Literal["reward", "quantile"] = "reward"
    exempt: frozenset[str] = frozenset({"code"})

    def __post_init__(self) -> None:
        if self.unit not in ("reward", "quantile"):
            raise ConfigError(f"unit of the gap window: expected 'reward' or 'quantile', got {self.unit!r}")
        limits = [limit for limit in (self.minimum, self.maximum) if limit is not None]
        if any(not math.isfinite(limit) for limit in limits) or limits != sorted(limits):
            raise ConfigError(
                f"gap window: expected finite minimum <= maximum, got minimum={self.minimum}, maximum={self.maximum}"
            )
        if self.unit == "quantile" and any(not 0 <= limit <= 1 for limit in limits):
            raise ConfigError(f"gap window in quantiles: expected limits in [0, 1], got {self.minimum}, {self.maximum}")


@dataclass(frozen=True)
class SelectionReport:
    """What became of the prompts and responses; nothing is left out without being counted here.

    Attributes:
        prompts: prompts seen.
        kept: prompts with at least one pair (or a best answer).
        dropped_prompts: reason -> prompts without one; sums to ``prompts - kept``.
        dropped_responses: reason -> responses left out before the rule ran.
        dropped_pairs: reason -> proposed pairs that were not taken.
        limits: the gap window in rewards, after quantiles were measured.
    """

    prompts: int
    kept: int
    dropped_prompts: Mapping[str, int]
    dropped_responses: Mapping[str, int]
    dropped_pairs: Mapping[str, int] = field(default_factory=dict)
    limits: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a group of responses, in characters."""

    count: int
    mean: float
    median: float


def build_pairs(
    candidates: Iterable[Candidate],
    rule: str | PairRule = "same_source",
    *,
    window: GapWindow | None = None,
    per_prompt: int = 1,
    options: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Return preference pairs, ordered by prompt id; see :func:`pairs_with_report`.

    Example:
        >>> from fusion_plugins.core.fusion.types import Candidate
        >>> rewards = [0.10, 0.15, 0.12]
        >>> answers = [Candidate("p", "a", i, "Hi?", f"answer {i}", reward=reward) for i, reward in enumerate(rewards)]
        >>> [(pair.chosen.index, pair.rejected.index, round(pair.gap, 2)) for pair in build_pairs(answers)]
        [(1, 0, 0.05)]
    """
    return pairs_with_report(candidates, rule, window=window, per_prompt=per_prompt, options=options)[0]


def pairs_with_report(
    candidates: Iterable[Candidate],
    rule: str | PairRule = "same_source",
    *,
    window: GapWindow | None = None,
    per_prompt: int = 1,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Pair], SelectionReport]:
    """Build preference pairs and say what was left out.

    The rule proposes pairs of one prompt, best first; those outside the gap window go; the first ``per_prompt`` stay.
    With ``same_source`` and one pair per prompt, the pair is that of the source whose chosen answer has the highest
    reward among the sources whose gap lies in the window.

    Args:
        candidates: scored responses, in any order, of any number of prompts and sources.
        rule: a name in :data:`PAIR_RULES`, or a function of the (cleaned) candidates of one prompt.
        window: limits of the reward gap; the published ones by default.
        per_prompt: most pairs per prompt, at least 1.
        options: keyword arguments for the rule.

    Raises:
        ConfigError: unknown rule, or ``per_prompt`` below 1.
        DataError: candidates of one prompt disagree about its text or its domain.
    """
    if per_prompt < 1:
        raise ConfigError(f"per_prompt: expected at least 1 pair per prompt, got {per_prompt}")
    propose = _resolve(rule, PAIR_RULES, "pair rule")
    window = window or GapWindow()
    groups, dropped_responses = clean(candidates)
    proposals = {prompt_id: propose(group, **(options or {})) for prompt_id, group in groups.items()}
    limits = _limits(window, proposals.values())
    pairs: list[Pair] = []
    why: Counter[str] = Counter()
    dropped_pairs: Counter[str] = Counter()
    for prompt_id, proposed in proposals.items():
        faults = [_fault(pair, limits, window.exempt) for pair in proposed]
        kept = [pair for pair, fault in zip(proposed, faults, strict=True) if fault is None]
        dropped_pairs.update(fault for fault in faults if fault is not None)
        dropped_pairs["beyond_per_prompt"] += len(kept[per_prompt:])
        pairs += kept[:per_prompt]
        if not kept:
            why[_common(faults) if proposed else _why_no_pair(groups[prompt_id])] += 1
    kept_prompts = len(groups) - why.total()
    return pairs, SelectionReport(len(groups), kept_prompts, dict(why), dropped_responses, dict(+dropped_pairs), limits)


def best_of(candidates: Iterable[Candidate], rule: str | BestRule = "reward") -> dict[str, Candidate | None]:
    """Return prompt id -> best candidate, None where nothing qualifies; see :func:`best_with_report`."""
    return best_with_report(candidates, rule)[0]


def best_with_report(
    candidates: Iterable[Candidate], rule: str | BestRule = "reward"
) -> tuple[dict[str, Candidate | None], SelectionReport]:
    """Choose the answer of each prompt that supervised fine-tuning learns from.

    Args:
        candidates: scored responses, in any order.
        rule: a name in :data:`BEST_RULES`, or a function of the (cleaned) candidates of one prompt.

    Returns:
        Prompt id -> candidate or None, ordered by prompt id, and the report.

    Raises:
        ConfigError: unknown rule.
        DataError: candidates of one prompt disagree about its text or its domain.
    """
    choose = _resolve(rule, BEST_RULES, "rule for the best answer")
    groups, dropped_responses = clean(candidates)
    best = {prompt_id: choose(group) for prompt_id, group in groups.items()}
    why = Counter(_why_no_best(groups[prompt_id]) for prompt_id, candidate in best.items() if candidate is None)
    return best, SelectionReport(len(groups), len(groups) - why.total(), dict(why), dropped_responses)


def same_source(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose, for each source, its highest against its lowest reward (verified: correct against incorrect).

    Pairs of one source keep the reward model's liking for a source's style out of the signal. The source whose chosen
    answer has the highest reward comes first.
    """
    verified = is_verified(candidates)
    proposed = [_extremes(group, verified) for group in _by_source(candidates).values()]
    return sorted((pair for pair in proposed if pair), key=lambda pair: best_first(pair.chosen))


def across_sources(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose the highest against the lowest reward over all sources (verified: correct against incorrect)."""
    pair = _extremes(candidates, is_verified(candidates))
    return [pair] if pair else []


def verdict(candidates: Sequence[Candidate]) -> list[Pair]:
    """Propose, for each source, one correct against one incorrect answer; rewards play no part.

    For data that only a verifier has scored. Which answers, and which source comes first, the tie rule decides.
    """
    proposed = []
    for group in _by_source(candidates).values():
        correct = [candidate for candidate in group if candidate.correct is True]
        incorrect = [candidate for candidate in group if candidate.correct is False]
        if correct and incorrect:
            proposed.append(Pair(min(correct, key=tie_order), min(incorrect, key=tie_order), None))
    return sorted(proposed, key=lambda pair: tie_order(pair.chosen))


def highest_reward(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate with the highest reward (verified: among the correct ones).

    Where only one candidate qualifies it needs no reward: that is the published treatment of Chinese prompts.
    """
    pool = _acceptable(candidates)
    if len(pool) == 1:
        return pool[0]
    rewarded = [candidate for candidate in pool if candidate.reward is not None]
    return min(rewarded, key=best_first) if rewarded else None


def _any_correct(candidates: Sequence[Candidate]) -> Candidate | None:
    pool = _acceptable(candidates)
    if not is_verified(candidates) and len(pool) > 1:
        return None
    return min(pool, key=tie_order) if pool else None


def length_statistics(pairs: Iterable[Pair]) -> dict[tuple[str, str, str], LengthStatistics]:
    """Return (domain, source, "chosen" | "rejected") -> lengths of the responses, in characters.

    Reward models like long answers; a wide difference between the two sides is what a preference loss will learn first.
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
    # Equal rewards throughout: there is no better answer.
    return None if chosen is rejected else Pair(chosen, rejected, reward_of(chosen) - reward_of(rejected))


def _acceptable(candidates: Sequence[Candidate]) -> list[Candidate]:
    verified = is_verified(candidates)
    return [candidate for candidate in candidates if candidate.correct is True or not verified]


def _by_source(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.source].append(candidate)
    return groups


def _limits(window: GapWindow, proposals: Iterable[list[Pair]]) -> tuple[float | None, float | None]:
    if window.unit == "reward":
        return window.minimum, window.maximum
    gaps = [p.gap for pairs in proposals for p in pairs if p.gap is not None and p.chosen.domain not in window.exempt]
    if not gaps:
        return None, None
    low, high = (None if q is None else float(np.quantile(gaps, q)) for q in (window.minimum, window.maximum))
    return low, high


def _fault(pair: Pair, limits: tuple[float | None, float | None], exempt: frozenset[str]) -> str | None:
    if pair.chosen.response.strip() == pair.rejected.response.strip():
        return "same_response"
    if pair.gap is None or pair.chosen.domain in exempt:
        return None
    low, high = limits
    if low is not None and pair.gap < low - GAP_TOLERANCE:
        return "gap_too_small"
    if high is not None and pair.gap > high + GAP_TOLERANCE:
        return "gap_too_large"
    return None


def _common(faults: Sequence[str | None]) -> str:
    return faults[0] if faults[0] is not None and len(set(faults)) == 1 else "no_gap_in_window"


def _why_no_pair(candidates: Sequence[Candidate]) -> str:
    if len(candidates) < 2:
        return "fewer_than_two_responses"
    if is_verified(candidates):
        if all(candidate.correct is None for candidate in candidates):
            return "no_verdict"
        if not any(candidate.correct is True for candidate in candidates):
            return "none_correct"
        if not any(candidate.correct is False for candidate in candidates):
            return "none_incorrect"
    return "no_reward" if all(candidate.reward is None for candidate in candidates) else "rule_found_none"


def _why_no_best(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return "no_usable_response"
    if is_verified(candidates) and not _acceptable(candidates):
        return "no_verdict" if all(candidate.correct is None for candidate in candidates) else "none_correct"
    return "no_reward" if all(candidate.reward is None for candidate in candidates) else "rule_found_none"


def _resolve(rule: Any, known: Mapping[str, Any], what: str) -> Any:
    if callable(rule):
        return rule
    if rule not in known:
        raise ConfigError(f"{what}: expected one of {', '.join(sorted(known))} or a function, got {rule!r}")
    return known[rule]


#: name -> rule; :mod:`fusion_plugins.plugins` hands these to the plugin manager.
PAIR_RULES: dict[str, PairRule] = {"same_source": same_source, "across_sources": across_sources, "verdict": verdict}
#: name -> rule for the best answer of a prompt.
BEST_RULES: dict[str, BestRule] = {"reward": highest_reward, "verdict": _any_correct}
