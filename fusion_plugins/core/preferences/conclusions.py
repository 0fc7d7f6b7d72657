"""What a comparison of the sources with the target means for a training: a conclusion, and sentences that say why."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fusion_plugins.core.preferences.worth_types import FEWEST_PROMPTS, DomainWorth, SourceWorth, is_luck


def conclude(found: DomainWorth) -> DomainWorth:
    """Return a domain with its conclusion and the reasons."""
    reasons = list(_reasons(found))
    every = [*found.sources, *([found.together] if found.together else [])]
    if any(each.verdict == "better" for each in every):
        return replace(found, conclusion="worth it", reasons=reasons)
    if found.target is not None and found.sources and all(each.verdict != "unknown" for each in found.sources):
        return replace(found, conclusion="not worth it", reasons=reasons)
    return replace(found, conclusion="not enough data", reasons=reasons)


def _reasons(found: DomainWorth) -> Iterator[str]:
    if not found.sources:
        yield f"there are no answers of a source in {found.domain}: sample one"
    if found.target is None:
        yield (
            f"there are no answers of the target in {found.domain}: sample it under a name of its own with the same "
            "prompts into the same folder, and score the folder again"
        )
    else:
        yield from _comparisons(found)
    for each in (*found.sources, *([found.target] if found.target else [])):
        if is_luck(each):
            yield (
                f"{each.name} is right on {found.domain} in {each.value:.1%}, and so are its answers dealt to other "
                f"prompts in {each.dealt:.1%}: that is luck, and its right answers teach nothing"
            )
    if found.together is not None and found.together.verdict == "better":
        yield (
            f"the best source of each prompt is better than the target on {found.domain}: choose by the rule "
            f"{'verdict' if found.measure == 'verdict' else 'reward'}"
        )


def _comparisons(found: DomainWorth) -> Iterator[str]:
    by_verdict: dict[str, list[SourceWorth]] = defaultdict(list)
    for each in found.sources:
        few = each.verdict == "unknown" and each.compared < FEWEST_PROMPTS
        by_verdict["few" if few else each.verdict].append(each)
    for verdict, text in _SENTENCES.items():
        if group := by_verdict[verdict]:
            names = sorted(each.name for each in group)
            yield text.format(
                names=_joined(names),
                are="is" if len(names) == 1 else "are",
                listed=", ".join(names),
                domain=found.domain,
                scores="verdicts" if found.measure == "verdict" else "rewards",
            )


#: verdict -> what it means for the training
_SENTENCES: Mapping[str, str] = {
    "better": "{names} {are} better than the target on {domain}",
    "worse": "{names} {are} worse than the target on {domain}: training on these answers makes it worse. Set "
    "fusion.leave_out_sources: [{listed}]",
    "same": "{names} {are} no better than the target on {domain}",
    "few": f"{{names}} and the target have fewer than {FEWEST_PROMPTS} prompts of {{domain}} in common that have "
    "{scores}: sample and score more",
    "unknown": "the answers do not show whether {names} {are} better than the target on {domain}: sample more prompts",
}


def warnings_of(found: Iterable[DomainWorth], trained: Mapping[tuple[str, str], int]) -> list[str]:
    """Return what speaks against the answers that a run trains on, one sentence per source and domain.

    Args:
        found: what :func:`~fusion_plugins.core.preferences.worth.examine_worth` returned for all responses.
        trained: (domain, source) -> answers that the run learns from.
    """
    told = []
    for domain in found:
        own = domain.target
        for each in (*domain.sources, *([own] if own is not None else [])):
            count = trained.get((domain.domain, each.name), 0)
            if not count or each.verdict not in ("worse", "luck"):
                continue
            start = f"{domain.domain}: {count} of the answers that are trained on are those of {each.name}, which "
            if each.verdict == "worse" and own is not None:
                unit = "is right in {:.1%}" if domain.measure == "verdict" else "has a mean reward of {:.4g}"
                told.append(
                    f"{start}{unit.format(each.value)}, worse than the target ({unit.format(own.value)}): that makes "
                    f"the target worse. Set fusion.leave_out_sources: [{each.name}]"
                )
            elif each.verdict == "luck":
                told.append(
                    f"{start}is right in {each.value:.1%}, and in {each.dealt:.1%} where its answers are dealt to "
                    "other prompts: what is right is luck, and there is nothing to learn from it"
                )
    return told


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
