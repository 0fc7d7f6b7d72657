"""Which prompt trains which stage: best answers to SFT, pairs to DPO; no prompt to both (FuseChat-3.0, section 5).

The published counts are exact floors of 0.4 of each instruction set for SFT, and no rule is published for mathematics
and code; there, prompts with a valid pair go to DPO and the other solvable ones to SFT, in a share that can be set.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import Literal

from fusion_plugins.core.preferences.candidates import VERIFIED_DOMAINS, Candidate, Pair
from fusion_plugins.errors import ConfigError

__all__ = ["Split", "SplitRule", "split_prompts"]


@dataclass(frozen=True)
class SplitRule:
    """How prompts are divided.

    Attributes:
        sft_share: share of the prompts with a pair that SFT gets, per data set, rounded down; not for verified prompts.
        verified_dpo_share: share of the verified prompts with a pair that DPO gets, per data set, rounded down.
        unpaired: what becomes of an unverified prompt without a pair: ``drop`` (the published counts) or ``sft``.
        sft_only: domains that never go to DPO.
        seed: other seeds give other, equally fixed, divisions.
    """

    sft_share: float = 0.4
    verified_dpo_share: float = 1.0
    unpaired: Literal["drop", "sft"] = "drop"
    sft_only: frozenset[str] = frozenset({"chinese"})
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sft_share", "verified_dpo_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.unpaired not in ("drop", "sft"):
            raise ConfigError(f"unpaired: expected 'drop' or 'sft', got {self.unpaired!r}")


@dataclass(frozen=True)
class Split:
    """The prompts of each stage.

    Attributes:
        sft: prompt ids, sorted.
        dpo: prompt ids, sorted; disjoint from ``sft``.
        dropped: reason -> prompts in neither.
    """

    sft: tuple[str, ...]
    dpo: tuple[str, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)


def split_prompts(best: Mapping[str, Candidate | None], pairs: Iterable[Pair], rule: SplitRule | None = None) -> Split:
    """Divide prompts between supervised fine-tuning and preference optimisation.

    A data set is what ``extra["dataset"]`` of the candidates names, the domain where it names none. Which prompts of a
    data set go where is decided by a hash of seed and prompt id, so that neither row order nor the presence of
    other prompts' text matters.

    Args:
        best: what :func:`fusion_plugins.core.preferences.pairs.best_of` returned.
        pairs: what :func:`fusion_plugins.core.preferences.pairs.build_pairs` returned for the same candidates.
        rule: shares and exceptions; the published ones by default.

    Returns:
        Prompt ids per stage. A prompt with neither a best answer nor a pair is counted in ``dropped``.
    """
    rule = rule or SplitRule()
    paired = {pair.chosen.prompt_id: pair.chosen for pair in pairs}
    sft: list[str] = []
    dropped: Counter[str] = Counter()
    groups: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for prompt_id in sorted(best.keys() | paired.keys()):
        candidate = best.get(prompt_id)
        known = candidate or paired.get(prompt_id)
        if known is None:
            dropped["no_best_answer"] += 1
        elif prompt_id in paired and known.domain not in rule.sft_only:
            groups[_verified(known), str(known.extra.get("dataset", known.domain))].append(prompt_id)
        elif candidate is None:
            dropped["no_best_answer"] += 1
        elif known.domain in rule.sft_only or _verified(known) or rule.unpaired == "sft":
            sft.append(prompt_id)
        else:
            dropped["no_pair"] += 1
    dpo: list[str] = []
    for (verified, _), members in groups.items():
        to_sft, to_dpo = _divide(members, verified, rule)
        # A prompt whose only use is its pair cannot move to SFT.
        sft += [prompt_id for prompt_id in to_sft if best.get(prompt_id)]
        dpo += to_dpo + [prompt_id for prompt_id in to_sft if not best.get(prompt_id)]
    return Split(tuple(sorted(sft)), tuple(sorted(dpo)), dict(dropped))


def _verified(candidate: Candidate) -> bool:
    return candidate.domain in VERIFIED_DOMAINS or candidate.correct is not None


def _divide(members: list[str], verified: bool, rule: SplitRule) -> tuple[list[str], list[str]]:
    ranked = sorted(members, key=lambda prompt_id: _rank(prompt_id, rule.seed))
    if verified:
        to_dpo = _floor(rule.verified_dpo_share, len(ranked))
        return ranked[to_dpo:], ranked[:to_dpo]
    to_sft = _floor(rule.sft_share, len(ranked))
    return ranked[:to_sft], ranked[to_sft:]


def _floor(share: float, count: int) -> int:
    # As written, not as stored in binary: 0.7 of 10 is 7.
    return math.floor(Fraction(str(share)) * count)


def _rank(prompt_id: str, seed: int) -> bytes:
    return blake2b(f"{seed}\0{prompt_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
