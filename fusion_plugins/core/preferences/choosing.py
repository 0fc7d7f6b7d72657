"""What the choice of pairs and that of best answers have in common.

Rules that hold for both:

* A prompt is **verified** when its domain is ``math`` or ``code`` or when one of its candidates has a verdict. There
  the better answer must be correct and the worse one incorrect; a candidate without a verdict can be neither.
* Before any rule runs, empty responses, responses whose reward is not finite and repetitions of one response by one
  source are left out. All of it is counted.
* Where **verdicts alone** decide (the rules ``verdict``), repeated right answers are evidence. The source comes first
  that is right most often on this prompt: by ``(right + 1) / (judged + 2)`` of its judged responses (4 of 4 before 8 of
  10 before 1 of 1), then by the number of right ones, then by its accuracy over all prompts. All responses count, also
  those that are left out. Of that source's right answers the one that it gave most often is taken.
* **Own answers** are those of the source that is the target itself (``own_source``, or rows with ``is_target``). They
  are no source's: only the rule ``own_answers`` makes pairs of them, and no best answer is one of them.
* **Ties** (equal rewards, equal evidence) are broken by a hash of prompt, source, index and response: a fixed
  order that favours no source and does not depend on the input order, the process or the machine.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fusion_plugins.core.preferences.candidates import Candidate, is_verified
from fusion_plugins.errors import ConfigError

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


@dataclass(frozen=True)
class SelectionReport:
    """What became of the prompts and responses; nothing is left out without being counted here.

    Attributes:
        prompts: prompts seen.
        kept: prompts with at least one pair (or a best answer).
        dropped_prompts: reason -> prompts without one; sums to ``prompts - kept``.
        dropped_responses: reason -> responses left out before the rule ran.
        dropped_pairs: reason -> proposed pairs that were not taken.
        limits: the gap window in rewards, after quantiles were measured; None where no pair was held against it: the
            rule gives no gaps, all domains are exempt, or the window has no limits.
    """

    prompts: int
    kept: int
    dropped_prompts: Mapping[str, int]
    dropped_responses: Mapping[str, int]
    dropped_pairs: Mapping[str, int] = field(default_factory=dict)
    limits: tuple[float | None, float | None] | None = None


def resolve_rule(rule: str | _Rule, known: Mapping[str, _Rule], kind: str) -> _Rule:
    """Return the rule of that name, or the rule itself if it is a function.

    Raises:
        ConfigError: unknown name; the message begins with ``kind``.
    """
    if callable(rule):
        return rule
    if rule not in known:
        raise ConfigError(f"{kind}: expected one of {', '.join(sorted(known))} or a function, got {rule!r}")
    return known[rule]


def acceptable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that may be the better answer to their prompt: the correct ones, where it is verified."""
    verified = is_verified(candidates)
    return [candidate for candidate in candidates if candidate.correct is True or not verified]


def by_source(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Return source -> its candidates, in the order of the candidates."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.source].append(candidate)
    return groups


def why_no_best(candidates: Sequence[Candidate]) -> str:
    """Return the reason, a key of the report, why no candidate of a prompt is its best answer."""
    if not candidates:
        return "no_usable_response"
    if not acceptable(candidates):
        return "no_verdict" if all(candidate.correct is None for candidate in candidates) else "none_correct"
    return "no_reward" if all(candidate.reward is None for candidate in candidates) else "rule_found_none"
