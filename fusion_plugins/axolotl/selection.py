"""Scored responses as axolotl loads them -> the best answers or the pairs that one stage trains on, and a report.

The rules are those of the ``fusion:`` block; :mod:`~fusion_plugins.axolotl.scored_rows` reads the responses.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.table import Table

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.preference_rows import Row
from fusion_plugins.axolotl.response_args import PairArgs, SftArgs
from fusion_plugins.axolotl.scored_rows import Columns, Scored, read_scored
from fusion_plugins.core.preferences.best import BEST_RULES, BestRule, best_per_prompt, best_per_source
from fusion_plugins.core.preferences.candidates import Candidate, CandidateGroups, Pair
from fusion_plugins.core.preferences.choosing import SelectionReport, resolve_rule
from fusion_plugins.core.preferences.conclusions import warnings_of
from fusion_plugins.core.preferences.gaps import check_gap_window
from fusion_plugins.core.preferences.pairs import length_statistics, pairs_per_prompt
from fusion_plugins.core.preferences.split import Split, split_prompts
from fusion_plugins.core.preferences.weights import reward_weights, with_mean_one
from fusion_plugins.core.preferences.worth import examine_worth
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.plugins import lookup
from fusion_plugins.terminal import console, say

Report = dict[str, Any]

#: the pair rule of the target's own answers
OWN_RULE = "own_answers"
_NEED_REWARDS = {"reward", "same_source", "across_sources"}
_FOR_VERDICTS = (
    "For responses with verdicts and no rewards set `rule: verdict` under both fusion.sft and fusion.pairs, in the "
    "configurations of both stages; axolotl_configs/fusechat3_verdict.yml shows it."
)


def choose_pairs(columns: Columns, block: FusionBlock) -> tuple[list[Pair], Report]:
    """Return the preference pairs of a table of scored responses, and the report.

    Raises:
        DataError: a row is wrong, or not one pair is left; the message says why.
    """
    return _chosen_pairs(read_scored(columns, block), block)


def _chosen_pairs(scored: Scored, block: FusionBlock) -> tuple[list[Pair], Report]:
    """Return what :func:`choose_pairs` does."""
    _check_rules(scored, block, best=block.split is not None, pairs=True)
    _check_own(scored, block)
    pairs, found = _pairs(scored, block)
    split = None
    if block.split is not None:
        # The runs of both stages must divide alike, so each looks at the best answers and the pairs of all prompts.
        best = _best(scored, block)[0]
        split = split_prompts(best, _pairs_for_split(scored, block, best, pairs), block.split.rule())
        dpo = set(split.dpo)
        pairs = [pair for pair in pairs if pair.chosen.prompt_id in dpo]
    report = _report(found, scored.unusable, split) | {
        "pairs": len(pairs),
        "warnings": _warnings(scored, [pair.chosen for pair in pairs]),
        "lengths": {
            "/".join(key): {"count": lengths.count, "mean": round(lengths.mean, 1), "median": lengths.median}
            for key, lengths in length_statistics(pairs).items()
        },
    }
    if not pairs:
        raise DataError(
            f"expected preference pairs in the scored responses, got none: {json.dumps(report)}. The limits 0.01 and "
            "0.1 of the reward gap belong to ArmoRM; for another reward model set fusion.pairs.min_gap and max_gap, or "
            f"`gap_unit: quantile`. {_FOR_VERDICTS}"
        )
    return pairs, report


def choose_triples(columns: Columns, block: FusionBlock) -> tuple[list[tuple[Pair, Candidate]], Report]:
    """Return the target's own pairs, each with the best answer of the sources (WRPO), and the report.

    Raises:
        DataError: as :func:`choose_pairs`; or no source answers a prompt that has a pair.
    """
    scored = read_scored(columns, block)
    pairs, report = _chosen_pairs(scored, block)
    best, _ = _best(scored, block)
    triples = [(pair, answer) for pair in pairs if (answer := best.get(pair.chosen.prompt_id)) is not None]
    report |= {"triples": len(triples), "pairs_without_best_answer": len(pairs) - len(triples)}
    if not triples:
        raise DataError(
            f"expected a best answer of the sources to the prompts of the target's own pairs, got none: "
            f"{json.dumps(report)}. Give the responses of the sources and of the target together. {_FOR_VERDICTS}"
        )
    return triples, report


def choose_best(columns: Columns, block: FusionBlock) -> tuple[list[Candidate], Report]:
    """Return the responses of a table that SFT learns from, and the report.

    One per prompt, or one of each source (``fusion.sft.per_prompt: all``).

    Raises:
        DataError: a row is wrong, or not one response is left; the message says why.
    """
    scored = read_scored(columns, block)
    dividing = block
    if block.split is not None and block.split.pairs is not None:
        # This stage trains on no pairs: only those that divide the prompts count.
        alone = block.split.model_copy(update={"pairs": None})
        dividing = block.model_copy(update={"pairs": block.split.pairs, "split": alone})
    _check_rules(scored, dividing, best=True, pairs=block.split is not None)
    best, found = _best(scored, block)
    wanted = {prompt_id for prompt_id, candidate in best.items() if candidate is not None}
    split = None
    if block.split is not None:
        # Which prompts have a pair, and so which train this stage, the gap window decides.
        pairs, paired = _pairs(scored, dividing)
        found = replace(found, limits=paired.limits)
        split = split_prompts(best, _pairs_for_split(scored, dividing, best, pairs), block.split.rule())
        wanted &= set(split.sft)
    if (block.sft or SftArgs()).per_prompt == "all":
        answers = _each_best(scored, block)
        chosen = [candidate for prompt_id in best if prompt_id in wanted for candidate in answers[prompt_id]]
    else:
        chosen = [candidate for prompt_id, candidate in best.items() if candidate is not None and prompt_id in wanted]
    by_source = Counter(sorted(candidate.source for candidate in chosen))
    report = _report(found, scored.unusable, split) | {"answers": len(chosen), "by_source": dict(by_source)}
    report |= {"warnings": _warnings(scored, chosen)}
    if not chosen:
        raise DataError(
            f"expected best answers in the scored responses, got none: {json.dumps(report)}. The rule `reward` needs "
            f"rewards where a prompt has several responses. {_FOR_VERDICTS} With fusion.split, see sft_share and "
            "unpaired."
        )
    return chosen, report


def weigh(candidates: Sequence[Candidate], temperature: float, setting: str, report: Report) -> list[float]:
    """Return the weights of answers that are learnt, or of chosen ones, in the same order; their mean is 1.

    Where nothing is weighed, which a few responses or a narrow gap window can bring about, it says so, also in the
    report.

    Args:
        candidates: the answers.
        temperature: of the softmax, in units of the reward.
        setting: the key that asks for weights.
        report: of the selection; gets ``prompts_with_several`` and, if need be, one more of its ``warnings``.
    """
    counts = Counter(candidate.prompt_id for candidate in candidates)
    several = [candidate for candidate in candidates if counts[candidate.prompt_id] > 1]
    report["prompts_with_several"] = sum(count > 1 for count in counts.values())
    problem = None
    if not several:
        problem = (
            f"{setting}: not one of {len(counts)} prompts has two to weigh, so every weight is 1, as without it. Give "
            "the responses of further sources, or wider limits (fusion.pairs.min_gap and max_gap); or remove it."
        )
    elif all(candidate.reward is None for candidate in several):
        problem = (
            f"{setting}: not one answer has a reward, so those of a prompt count alike. Score the responses with a "
            "reward model or a judge as well (`fusion score`), or remove it."
        )
    if problem:
        say(f"warning: {problem}", stderr=True)
        report["warnings"] = [*report["warnings"], problem]
    return with_mean_one(reward_weights(candidates, temperature))


def show_report(report: Report, title: str) -> None:
    """Print a report as a table."""
    table = Table("", "", title=title, show_header=False)
    for name, value in report.items():
        # The file names the rows; there may be many.
        shown = len(value) if isinstance(value, list) else value
        table.add_row(name, shown if isinstance(shown, str) else json.dumps(shown))
    console().print(table)


def _pairs(scored: Scored, block: FusionBlock) -> tuple[list[Pair], SelectionReport]:
    settings = block.pairs or PairArgs()
    own = settings.rule == OWN_RULE
    options = {"own_source": settings.own_source, **settings.options} if own else settings.options
    groups = scored.own if own else scored.sources
    propose = partial(lookup("pair_rules", settings.rule), **options)
    pairs, found = pairs_per_prompt(groups, propose, settings.window(), settings.most, settings.min_accuracy)
    if found.limits is not None:  # the window has decided about pairs
        doubt = check_gap_window(settings.window(), [one for group in groups.by_prompt.values() for one in group])
        if doubt is not None:
            say(f"warning: {doubt}", stderr=True)
    return pairs, found


def _pairs_for_split(
    scored: Scored, block: FusionBlock, best: Mapping[str, Candidate | None], pairs: list[Pair]
) -> list[Pair]:
    """Return the pairs by which the prompts are divided.

    The target's own answers are sampled from the model of the first stage, so that stage cannot know which prompts will
    have a pair of them: there, each prompt with a best answer of the sources counts as one that has.
    """
    divided_by = block.split.pairs if block.split is not None else None
    if divided_by is not None:
        pairs = _pairs(scored, block.model_copy(update={"pairs": divided_by}))[0]
    if (divided_by or block.pairs or PairArgs()).rule != OWN_RULE:
        return pairs
    return [Pair(candidate, candidate, 0.0) for candidate in best.values() if candidate is not None]


def _best(scored: Scored, block: FusionBlock) -> tuple[dict[str, Candidate | None], SelectionReport]:
    best, found = best_per_prompt(_for_best(scored, block), _best_rule(block))
    if (block.sft or SftArgs()).only_verified:
        why = {"no_usable_response": "none_verified"}
        found = replace(found, dropped_prompts={why.get(key, key): n for key, n in found.dropped_prompts.items()})
    return best, found


def _each_best(scored: Scored, block: FusionBlock) -> dict[str, list[Candidate]]:
    """Return prompt id -> the best candidate of each source."""
    choose = _best_rule(block)
    return {
        prompt_id: best_per_source(group, choose) for prompt_id, group in _for_best(scored, block).by_prompt.items()
    }


def _best_rule(block: FusionBlock) -> BestRule:
    return resolve_rule((block.sft or SftArgs()).rule, BEST_RULES, "fusion.sft.rule")


def _for_best(scored: Scored, block: FusionBlock) -> CandidateGroups:
    """Return the candidates that can be a best answer."""
    if not (block.sft or SftArgs()).only_verified:
        return scored.sources
    kept = {
        prompt_id: [candidate for candidate in group if candidate.correct is True]
        for prompt_id, group in scored.sources.by_prompt.items()
    }
    return CandidateGroups(kept, scored.sources.dropped)


def _check_own(scored: Scored, block: FusionBlock) -> None:
    """Refuse the rule of own answers where there are none: every prompt would be left out as one without a pair."""
    settings = block.pairs or PairArgs()
    if settings.rule == OWN_RULE and not scored.own.by_prompt:
        sources = ", ".join(sorted({each.source for group in scored.sources.by_prompt.values() for each in group}))
        raise DataError(
            f"fusion.pairs.rule {OWN_RULE}: expected responses of the source {settings.own_source!r}, got those of "
            f"{sources or 'none'}. Sample the model of the first stage under that name (`fusion sample` with "
            "the same prompts and the same folder adds a source to it), and score the folder again."
        )


def _warnings(scored: Scored, chosen: Sequence[Candidate]) -> list[str]:
    """Say and return what speaks against the answers that are trained on."""
    worth = examine_worth(scored.responses)
    told = warnings_of(worth, Counter((candidate.domain, candidate.source) for candidate in chosen))
    for line in told:
        say(f"warning: {line}", stderr=True)
    if blind := [domain.domain for domain in worth if domain.target is None]:
        say(
            f"{', '.join(blind)}: there are no answers of the target itself, so it is not known whether these sources "
            "are better than it. Sample it too, name it in fusion.pairs.own_source, and see `fusion doctor`.",
            stderr=True,
        )
    return told


def _check_rules(scored: Scored, block: FusionBlock, *, best: bool, pairs: bool) -> None:
    """Refuse rules that need rewards where there are only verdicts.

    They would not fail: the best answer of a prompt with one right answer needs no reward, so a stage would train on
    those prompts alone, and the split would give all of them to one stage.
    """
    candidates = [candidate for group in scored.sources.by_prompt.values() for candidate in group]
    rewarded = any(candidate.reward is not None for candidate in candidates)
    if rewarded or all(candidate.correct is None for candidate in candidates):
        return
    used = {
        "fusion.sft": best and (block.sft or SftArgs()).rule,
        "fusion.pairs": pairs and (block.pairs or PairArgs()).rule,
    }
    wrong = [f"{key}.rule {rule}" for key, rule in used.items() if rule in _NEED_REWARDS]
    if wrong:
        raise ConfigError(
            f"expected rewards for {' and '.join(wrong)}, got responses with verdicts and not one reward. "
            f"{_FOR_VERDICTS}"
        )


def _report(found: SelectionReport, unusable: list[Row], split: Split | None) -> Report:
    report = asdict(found)
    if found.limits is None:
        del report["limits"]
    if split is not None:
        report["split"] = {"sft": len(split.sft), "dpo": len(split.dpo), "dropped": dict(split.dropped)}
    return report | {"unusable": unusable}
