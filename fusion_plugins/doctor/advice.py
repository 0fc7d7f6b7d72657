"""What stands in the way of a source, in words, and the setting that would improve it."""

from collections.abc import Sequence

from fusion_plugins.core.fusion.project import ProjectionOptions
from fusion_plugins.doctor.diagnosis import ClassCount, Diagnosis

__all__ = ["advice", "verdict"]

#: a source that is better than the target on a smaller share of the texts is not worth its store
FEW_WINS = 0.05
#: share of the rows below which a source teaches little
LOW_COVERAGE = 0.5
#: the target counts as better than the source when it gives the labels this much more probability
MARGIN = 1.01


def advice(diagnosis: Diagnosis, options: ProjectionOptions) -> list[str]:
    """Return what stands in the way of this source and the setting that would improve it, worst first.

    About the target's own store there is nothing to judge; it is only said to be that.
    """
    if diagnosis.is_target:
        return [
            "this is the target's own store (same tokenizer, same probabilities), not a source: mark it with "
            "is_target: true, and min_ce keeps the target's own rows where no source is better"
        ]
    found = _about_rows(diagnosis) + _about_mass(diagnosis)
    digits, total = diagnosis.classes.get("digits", ClassCount()), diagnosis.total
    if not options.chain and digits.gold * MARGIN < digits.own:
        found.append("on digits the projected rows are worse than the target: set alignment.chain: true")
    if diagnosis.compared and not _rarely_wins(diagnosis) and total.gold * MARGIN < total.own:
        found.append(
            "on these texts the target itself gives the right token more probability than the source does: a larger "
            "lm_loss_weight, or token_min_ce as the rule, limits the harm"
        )
    return found


def verdict(diagnosis: Diagnosis, found: Sequence[str]) -> str:
    """Return ``good``, ``fair``, ``poor`` or, for the target's own store, ``own``.

    Good is a source without complaints. Poor is one with less than half of the rows usable, or one that is better than
    the target on less than one text in twenty.
    """
    if diagnosis.is_target:
        return "own"
    if not found:
        return "good"
    return "poor" if diagnosis.projection.coverage < LOW_COVERAGE or _rarely_wins(diagnosis) else "fair"


def _rarely_wins(diagnosis: Diagnosis) -> bool:
    return diagnosis.compared and diagnosis.wins < FEW_WINS * diagnosis.texts


def _about_rows(diagnosis: Diagnosis) -> list[str]:
    found = []
    if _rarely_wins(diagnosis):
        found.append(
            f"the source is better than the target on only {diagnosis.wins} of {diagnosis.texts} texts: min_ce will "
            "hardly choose it; leave it out, or capture texts of its own field"
        )
    if diagnosis.projection.coverage < LOW_COVERAGE:
        found.append(
            f"only {diagnosis.projection.coverage:.0%} of the rows can be taught, because the tokenizers end at "
            "different bytes: expect a weak signal"
        )
    return found


def _about_mass(diagnosis: Diagnosis) -> list[str]:
    found, report, used = [], diagnosis.projection, max(diagnosis.projection.used, 1)
    larger = min(4 * diagnosis.top_k, diagnosis.vocab_size)
    if report.outside_mass / used > 0.2 and larger > diagnosis.top_k:
        found.append(
            f"{report.outside_mass / used:.0%} of the mass lies outside the stored top {diagnosis.top_k}: capture with "
            f"a larger top_k ({larger})"
        )
    if report.unmapped_mass / used > 0.1:
        cure = (
            "expect a weak signal" if diagnosis.vocabulary == "first_token" else "use alignment.vocabulary: first_token"
        )
        found.append(
            f"{report.unmapped_mass / used:.0%} of the mass has no counterpart in the target's vocabulary: {cure}"
        )
    return found
