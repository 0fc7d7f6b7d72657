"""A plugin: one fusion rule, one pair rule and one scorer, with names for YAML files.

After ``pip install`` of this folder, ``fusion plugins`` lists them. They are used by

* ``fusion: {rule: most_confident}`` in an axolotl YAML,
* ``fusion: {pairs: {rule: equal_length}}`` in an axolotl YAML,
* ``scorers: {contains_reference: {ignore_case: true}}`` in the YAML of ``fusion score``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion_plugins import hookimpl
from fusion_plugins.core.fusion.types import SparseDistributions
from fusion_plugins.core.preferences.candidates import Candidate, Pair
from fusion_plugins.scoring import Score, Scorer

__all__ = ["ContainsReference", "equal_length", "most_confident"]


def most_confident(
    distributions: Sequence[SparseDistributions], cross_entropies: Any, *, floor: float = 0.0
) -> SparseDistributions:
    """Take each position from the source whose most probable token is most probable; the first of equals.

    Args:
        distributions: S sources, ids and logprobs (..., T, K), leftover (..., T). `fuse` pads all of them to one K, so
            they can be stacked.
        cross_entropies: not used. A rule that wants those of each token, and not of the text, is marked with
            `fusion_plugins.core.fusion.fuse.per_token`.
        floor: a position whose best probability is below this gets no fused distribution.
    """
    ids = np.stack([d.ids for d in distributions])  # (S, ..., T, K)
    logprobs = np.stack([d.logprobs for d in distributions])
    leftover = np.stack([d.leftover for d in distributions])  # (S, ..., T)
    # A source without a distribution at a position has only empty entries there, -inf: it is never the best.
    best = logprobs.max(axis=-1)
    source = best.argmax(axis=0)[None]  # (1, ..., T)
    weak = np.exp(np.take_along_axis(best, source, 0)[0]) < floor
    fused_ids = np.take_along_axis(ids, source[..., None], 0)[0]
    fused_logprobs = np.take_along_axis(logprobs, source[..., None], 0)[0]
    return SparseDistributions(
        np.where(weak[..., None], -1, fused_ids),
        np.where(weak[..., None], -np.inf, fused_logprobs),
        np.where(weak, 1.0, np.take_along_axis(leftover, source, 0)[0]).astype(leftover.dtype),
    )


def equal_length(candidates: Sequence[Candidate], *, tolerance: float = 0.2) -> list[Pair]:
    """Propose, for each source, the pair with the widest reward gap among responses of nearly equal length.

    Args:
        candidates: the responses to one prompt, without empty and repeated ones.
        tolerance: largest difference of the lengths, as a share of the longer one.

    Returns:
        At most one pair per source, widest gap first. The gap window of the settings is applied afterwards.
    """
    found: dict[str, Pair] = {}
    for better in candidates:
        for worse in candidates:
            if better.source != worse.source or better.reward is None or worse.reward is None:
                continue
            lengths = sorted((len(better.response), len(worse.response)))
            gap = better.reward - worse.reward
            widest = found[better.source].gap if better.source in found else 0.0
            if lengths[1] - lengths[0] <= tolerance * lengths[1] and gap > (widest or 0.0):
                found[better.source] = Pair(better, worse, gap)
    return sorted(found.values(), key=lambda pair: -(pair.gap or 0.0))


class ContainsReference:
    """Judges a response correct if it contains the reference; for questions with one short answer."""

    domains: frozenset[str] | None = frozenset({"trivia"})

    def __init__(self, *, ignore_case: bool = True) -> None:
        self.facts: dict[str, Any] = {"ignore_case": ignore_case}

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Return one score per response; without a reference it has no verdict."""
        return [self._score(row) for row in rows]

    def close(self) -> None:
        """Nothing to free."""

    def _score(self, row: Mapping[str, Any]) -> Score:
        if not row.get("reference"):
            return Score(reason="no reference")
        response, reference = row["response"], row["reference"]
        if self.facts["ignore_case"]:
            response, reference = response.casefold(), reference.casefold()
        return Score(correct=reference in response)


@hookimpl
def register_fusion_rules(register: Any) -> None:
    """Register the fusion rule."""
    register("most_confident", most_confident)


@hookimpl
def register_pair_rules(register: Any) -> None:
    """Register the pair rule."""
    register("equal_length", equal_length)


@hookimpl
def register_scorers(register: Any) -> None:
    """Register what makes a scorer from its options: here, the class."""
    scorer: type[Scorer] = ContainsReference
    register("contains_reference", scorer)
