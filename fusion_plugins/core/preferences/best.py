"""Candidates of many sources -> the best answer to each prompt, or the best of each source, for SFT.

The rules that best answers and pairs have in common stand in :mod:`~fusion_plugins.core.preferences.choosing`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fusion_plugins.core.preferences.candidates import (
    Candidate,
    CandidateGroups,
    best_first,
    clean,
    is_verified,
    steadiest_first,
)
from fusion_plugins.core.preferences.choosing import SelectionReport, acceptable, by_source, resolve_rule, why_no_best

BestRule = Callable[[Sequence[Candidate]], Candidate | None]


def best_of(
    candidates: Iterable[Candidate | Mapping[str, Any]], rule: str | BestRule = "reward"
) -> dict[str, Candidate | None]:
    """Return prompt id -> best candidate, None where nothing qualifies; see :func:`best_with_report`."""
    return best_with_report(candidates, rule)[0]


def best_with_report(
    candidates: Iterable[Candidate | Mapping[str, Any]], rule: str | BestRule = "reward"
) -> tuple[dict[str, Candidate | None], SelectionReport]:
    """Clean candidates, and return the best answer to each prompt with a report; see :func:`best_per_prompt`.

    Args:
        candidates: as for :func:`~fusion_plugins.core.preferences.pairs.pairs_with_report`.
        rule: a name in :data:`BEST_RULES`, or a function of the (cleaned) candidates of one prompt.

    Raises:
        ConfigError: unknown rule.
        DataError: as for :func:`~fusion_plugins.core.preferences.pairs.pairs_with_report`.
    """
    choose = resolve_rule(rule, BEST_RULES, "rule for the best answer")
    return best_per_prompt(clean(candidates), choose)


def best_per_prompt(groups: CandidateGroups, choose: BestRule) -> tuple[dict[str, Candidate | None], SelectionReport]:
    """Return prompt id -> the candidate that SFT learns from, or None; ordered by prompt id; and a report."""
    best = {prompt_id: choose(group) for prompt_id, group in groups.by_prompt.items()}
    no_best = Counter(why_no_best(groups.by_prompt[prompt_id]) for prompt_id, found in best.items() if found is None)
    return best, SelectionReport(len(best), len(best) - no_best.total(), dict(no_best), groups.dropped)


def highest_reward(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate with the highest reward (verified: among the correct ones).

    Where only one candidate qualifies it needs no reward: that is the published treatment of Chinese prompts.
    """
    pool = acceptable(candidates)
    if len(pool) == 1:
        return pool[0]
    rewarded = [candidate for candidate in pool if candidate.reward is not None]
    return min(rewarded, key=best_first, default=None)


def any_correct(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return a correct candidate of the source that is right most often; of an unverified prompt its only candidate.

    See :mod:`~fusion_plugins.core.preferences.choosing` for "most often". Rewards play no part.
    """
    pool = acceptable(candidates)
    if len(pool) > 1 and not is_verified(candidates):
        return None
    return min(pool, key=steadiest_first, default=None)


def best_per_source(candidates: Sequence[Candidate], choose: BestRule = highest_reward) -> list[Candidate]:
    """Return the best candidate of each source to one prompt, ordered by source (FuseSFT); none where none qualifies.

    Where a rule of rewards chooses, sources without a reward are left out beside sources that have one.
    """
    if choose(candidates) is None:
        return []
    groups = sorted(by_source(acceptable(candidates)).items())
    found = [best for best in (choose(group) for _, group in groups) if best is not None]
    rewarded = [candidate for candidate in found if candidate.reward is not None]
    return rewarded if choose is highest_reward and rewarded else found


#: name -> rule for the best answer of a prompt.
BEST_RULES: dict[str, BestRule] = {"reward": highest_reward, "verdict": any_correct}
