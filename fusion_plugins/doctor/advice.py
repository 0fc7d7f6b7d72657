"""The verdict about a source, and the settings that would improve it."""

from collections.abc import Sequence

from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.doctor.diagnosis import ClassCount, Diagnosis

#: a source that is better than the target on a smaller share of the texts is not worth its store
FEW_WINS = 0.05
#: share of the supervised positions with a distribution below which a source teaches little
LOW_COVERAGE = 0.5
#: shares of the probability mass above which its loss is reported
MUCH_OUTSIDE, MUCH_UNMAPPED = 0.2, 0.1
#: the target counts as better than the source when it gives the labels this much more probability
MARGIN = 1.01


def advice(diagnosis: Diagnosis, options: ProjectionOptions) -> list[str]:
    """Return the problems of a source, each with the setting that helps, worst first; empty where there is none.

    The target's own store has no problems; the one line about it says how to mark it.

    Args:
        diagnosis: the counts.
        options: the options of the projection that they were counted with.
    """
    if diagnosis.is_target:
        return [
            "this is the target's own store (same tokenizer, same probabilities), not another source: set is_target: "
            "true in its entry of fusion.sources. With fusion.rule: min_ce the target then keeps its own distributions "
            "on the texts where no source is better. Equal tokenizers need no vocabulary map in any case"
        ]
    found = _about_positions(diagnosis) + _about_mass(diagnosis)
    digits, total = diagnosis.classes.get("digits", ClassCount()), diagnosis.total
    if not options.chain and digits.label * MARGIN < digits.target_label:
        found.append(
            "on digits the projected distributions give the right token less probability than the target does: set "
            "fusion.projection.chain: true"
        )
    if diagnosis.compared and not _rarely_wins(diagnosis) and total.label * MARGIN < total.target_label:
        found.append(
            "on these texts the target itself gives the right token more probability than the source does: a larger "
            "fusion.lm_loss_weight, or fusion.rule: token_min_ce, limits the harm"
        )
    return found


def verdict(diagnosis: Diagnosis, found: Sequence[str]) -> str:
    """Return ``good``, ``fair``, ``poor`` or, for the target's own store, ``own``.

    A good source has no problems. A poor one has a distribution at less than half of the supervised positions, or is
    better than the target on less than one text in twenty.

    Args:
        diagnosis: the counts.
        found: what :func:`advice` returned for them.
    """
    if diagnosis.is_target:
        return "own"
    if not found:
        return "good"
    return "poor" if diagnosis.projection.coverage < LOW_COVERAGE or _rarely_wins(diagnosis) else "fair"


def _rarely_wins(diagnosis: Diagnosis) -> bool:
    return diagnosis.compared and diagnosis.wins < FEW_WINS * diagnosis.texts


def _about_positions(diagnosis: Diagnosis) -> list[str]:
    found = []
    if _rarely_wins(diagnosis):
        found.append(
            f"the source is better than the target on only {diagnosis.wins} of {diagnosis.texts} texts: min_ce will "
            "rarely choose it; leave it out, or capture texts from its own field"
        )
    if diagnosis.projection.coverage < LOW_COVERAGE:
        found.append(
            f"only {diagnosis.projection.coverage:.0%} of the supervised positions have a distribution, because the "
            "tokens of source and target end at different bytes: expect a weak signal"
        )
    return found


def _about_mass(diagnosis: Diagnosis) -> list[str]:
    found, used = [], max(diagnosis.projection.used, 1)
    outside, unmapped = diagnosis.projection.outside_mass / used, diagnosis.projection.unmapped_mass / used
    # A store of the whole vocabulary cannot hold more entries.
    larger = min(4 * diagnosis.top_k, diagnosis.vocab_size)
    if outside > MUCH_OUTSIDE and larger > diagnosis.top_k:
        found.append(
            f"{outside:.0%} of the probability lies outside the stored top {diagnosis.top_k}: capture with a larger "
            f"top_k ({larger})"
        )
    if unmapped > MUCH_UNMAPPED:
        best = diagnosis.vocabulary_map == "first_token"
        cure = "expect a weak signal" if best else "set fusion.projection.vocabulary_map: first_token"
        found.append(f"{unmapped:.0%} of the probability has no counterpart in the target's vocabulary: {cure}")
    return found
