"""Which reward gaps pairs may have, and which window of them suits a reward model.

The published window is for ArmoRM; for any other reward model it has to be measured. ArmoRM's rewards lie between about
0 and 0.3, those of most other reward models between -30 and 30, those of a judge are ratings or shares. In the
published window, 0.01 to 0.1, hardly a pair of theirs is left, and the few that are have answers that are all but
equal.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.core.preferences.numbers import quantiles as shares_of
from fusion_plugins.errors import ConfigError

#: the reward model whose scale the published window has; a part of its name, in lower case
PUBLISHED_SCALE = "armorm"
#: rewards of an unknown model that are larger than this are not ArmoRM's
LARGEST_PUBLISHED = 1.5
#: quantiles of the gaps that are proposed: without the fifth that is the most doubtful and the tenth that is clearest
PROPOSED_QUANTILES = (0.2, 0.9)


@dataclass(frozen=True)
class GapWindow:
    """Which reward gaps (chosen minus rejected) a pair may have. Both limits are inclusive.

    A pair without a gap (rule ``verdict``) and a pair of an exempt domain always pass.

    Attributes:
        minimum: smallest gap; None for no limit.
        maximum: largest gap; None for no limit.
        unit: ``reward``: the limits are differences of rewards. ``quantile``: they are quantiles, in [0, 1], of the
            gaps of all pairs that the rule proposes, which makes them independent of the reward model's scale.
        exempt: domains in which the verdict alone decides. The published rule names no gap for code: the tests decide.
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
class Proposal:
    """A window that was measured.

    Attributes:
        window: in quantiles; it suits any scale.
        limits: the same in rewards, for these gaps.
        kept: gaps within it.
        published: gaps within the published window.
        gaps: gaps that were measured.
    """

    window: GapWindow
    limits: tuple[float, float]
    kept: int
    published: int
    gaps: int


def propose_window(gaps: Sequence[float], quantiles: tuple[float, float] = PROPOSED_QUANTILES) -> Proposal | None:
    """Return a window for gaps that occur; None where there are none.

    Args:
        gaps: rewards of chosen minus rejected answers, of all pairs that a rule proposes.
        quantiles: lowest and highest share of the gaps to keep.

    Example:
        >>> propose_window([0.5, 1.0, 2.0, 4.0, 8.0]).limits
        (0.9, 6.4)
    """
    if not len(gaps):
        return None
    values = np.asarray(gaps, np.float64)
    low, high = shares_of(gaps, quantiles)
    published = GapWindow()
    return Proposal(
        window=GapWindow(*quantiles, unit="quantile"),
        limits=(round(low, 12), round(high, 12)),
        kept=int(((values >= low) & (values <= high)).sum()),
        published=int(((values >= (published.minimum or 0)) & (values <= (published.maximum or np.inf))).sum()),
        gaps=len(values),
    )


def reward_scales(candidates: Iterable[Candidate]) -> set[str]:
    """Return the models that gave the rewards, as `fusion score` notes them in ``scores``; empty where nobody did."""
    return {scale for candidate in candidates if candidate.reward is not None for scale in _scales(candidate.extra)}


def check_gap_window(window: GapWindow, candidates: Sequence[Candidate]) -> str | None:
    """Refuse the published window for rewards of another model than ArmoRM.

    Which model gave the rewards is read from ``scores``. Where nobody says it, large rewards are a reason to doubt.

    Returns:
        What to tell the user where rewards of unknown origin are too large to be ArmoRM's; None otherwise.

    Raises:
        ConfigError: the window is the published one, and the rewards are of another model.
    """
    published = GapWindow()
    if (window.unit, window.minimum, window.maximum) != ("reward", published.minimum, published.maximum):
        return None
    scales = reward_scales(candidates)
    others = sorted(scale for scale in scales if PUBLISHED_SCALE not in scale.lower())
    rewards = [float(candidate.reward) for candidate in candidates if candidate.reward is not None]
    low, high = PROPOSED_QUANTILES
    why = (
        f"fusion.pairs: the limits {published.minimum} and {published.maximum} of the reward gap belong to the scale "
        "of ArmoRM; expected its rewards, got {got}. Set min_gap and max_gap for this reward model: `fusion report` "
        "of the scored folder shows the gaps that occur and proposes limits. Limits that suit any scale are "
        f"`min_gap: {low}`, `max_gap: {high}`, `gap_unit: quantile`."
    )
    if others:
        raise ConfigError(why.replace("{got}", f"those of {', '.join(others)}"))
    if scales or max(map(abs, rewards), default=0.0) <= LARGEST_PUBLISHED:
        return None
    return why.replace("{got}", f"rewards from {min(rewards):.4g} to {max(rewards):.4g}")


def _scales(extra: Mapping[str, Any]) -> Iterable[str]:
    scores = extra.get("scores")
    if isinstance(scores, str):
        try:
            scores = json.loads(scores)
        except ValueError:
            return
    for result in scores.values() if isinstance(scores, Mapping) else ():
        if isinstance(result, Mapping) and result.get("reward") is not None and isinstance(result.get("model"), str):
            yield result["model"]
