"""Which prompt trains which stage: best answers to SFT, pairs to DPO; no prompt to both (FuseChat-3.0, section 5).

The published counts are exact floors of 0.4 of each instruction dataset for SFT. No rule is published for mathematics
and code; there, prompts with a valid pair go to DPO and the other solvable ones to SFT, in a share that can be set.

Where verdicts alone decide, a prompt that some source always solves goes to SFT: a sound answer to learn is worth more
than another source's one lucky answer as a pair.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import Literal

from fusion_plugins.core.preferences.candidates import Candidate, Pair, is_verified
from fusion_plugins.errors import ConfigError


@dataclass(frozen=True)
class SplitRule:
    """How prompts are divided.

    Attributes:
        sft_share: share of the prompts with a pair that SFT gets, per dataset, rounded down; not for verified prompts.
        verified_dpo_share: share of the verified prompts with a pair that DPO gets, per dataset, rounded down.
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
                raise ConfigError(f"{name} of the split: expected a share in [0, 1], got {getattr(self, name)}")
        if self.unpaired not in ("drop", "sft"):
            raise ConfigError(f"unpaired of the split: expected 'drop' or 'sft', got {self.unpaired!r}")


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

    A prompt belongs to the dataset that ``extra["dataset"]`` of its candidates names, or else to its domain. Which
    prompts of a dataset go where is decided by a hash of seed and prompt id, so it does not depend on the input order.

    A pair without a reward gap (rule ``verdict``) does not count where some source always solves its prompt (has
    verdicts, all of them right) and there is a best answer: SFT gets such a prompt.

    Args:
        best: what :func:`fusion_plugins.core.preferences.best.best_of` returned.
        pairs: what :func:`fusion_plugins.core.preferences.pairs.build_pairs` returned for the same candidates.
        rule: shares and exceptions; the published ones by default.

    Returns:
        Prompt ids per stage. A prompt with neither a best answer nor a pair is counted in ``dropped``.
    """
    rule = rule or SplitRule()
    paired = {pair.chosen.prompt_id: pair.chosen for pair in pairs if not _better_learnt(pair, best)}
    sft: list[str] = []
    dpo: list[str] = []
    dropped: Counter[str] = Counter()
    divided: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for prompt_id in sorted(best.keys() | paired.keys()):
        candidate = best.get(prompt_id) or paired.get(prompt_id)
        if candidate is not None and prompt_id in paired and candidate.domain not in rule.sft_only:
            dataset = str(candidate.extra.get("dataset", candidate.domain))
            divided[is_verified([candidate]), dataset].append(prompt_id)
        elif candidate is None or best.get(prompt_id) is None:
            dropped["no_best_answer"] += 1
        elif candidate.domain in rule.sft_only or is_verified([candidate]) or rule.unpaired == "sft":
            sft.append(prompt_id)
        else:
            dropped["no_pair"] += 1
    for (verified, _), prompt_ids in divided.items():
        to_sft, to_dpo = _divide(prompt_ids, verified, rule)
        dpo += to_dpo
        for prompt_id in to_sft:
            # Without a best answer there is nothing to fine-tune on: the prompt's only use is its pair.
            (sft if best.get(prompt_id) else dpo).append(prompt_id)
    return Split(tuple(sorted(sft)), tuple(sorted(dpo)), dict(dropped))


def _better_learnt(pair: Pair, best: Mapping[str, Candidate | None]) -> bool:
    """Whether the prompt has a sound answer, and its pair only verdicts that may be luck."""
    return pair.gap is None and pair.chosen.evidence.always_solved and best.get(pair.chosen.prompt_id) is not None


def _divide(prompt_ids: list[str], verified: bool, rule: SplitRule) -> tuple[list[str], list[str]]:
    """Return the prompts for SFT and those for DPO."""

    # A hash, so that the runs of both stages divide alike on any machine and in any input order.
    def rank(prompt_id: str) -> bytes:
        return blake2b(f"{rule.seed}\0{prompt_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    ranked = sorted(prompt_ids, key=rank)
    share = rule.verified_dpo_share if verified else rule.sft_share
    # The share as it is written, not as it is stored: as a float, 0.29 of 100 prompts is a little less than 29. The
    # published counts (20 439 of 51 098 prompts for SFT, ...) are exact floors.
    first = math.floor(Fraction(str(share)) * len(ranked))
    return (ranked[first:], ranked[:first]) if verified else (ranked[:first], ranked[first:])
