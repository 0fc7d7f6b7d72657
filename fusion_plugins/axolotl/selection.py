"""Scored responses as axolotl loads them -> the best answers or the pairs that one stage trains on, and a report.

The rules are those of the ``fusion:`` block. Columns: ``prompt_id``, ``source``, ``index``, ``prompt``, ``response``,
and where there are any ``reward``, ``correct``, ``domain``, ``dataset``, ``finish_reason``; from the folder of `fusion
score`, or JSONL or Parquet files.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from rich.table import Table

from fusion_plugins.axolotl.args import FusionBlock, PairArgs, SftArgs
from fusion_plugins.axolotl.preference_rows import Row, Unusable, leave_out
from fusion_plugins.core.preferences.candidates import Candidate, CandidateGroups, Pair, as_candidate, clean, is_prompt
from fusion_plugins.core.preferences.gaps import check_gap_window
from fusion_plugins.core.preferences.pairs import (
    BEST_RULES,
    SelectionReport,
    best_per_prompt,
    length_statistics,
    pairs_per_prompt,
    resolve_rule,
)
from fusion_plugins.core.preferences.split import Split, split_prompts
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.plugins import lookup
from fusion_plugins.terminal import console

Columns = Mapping[str, Sequence[Any]]
Report = dict[str, Any]

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
    groups, unusable = _groups(columns, block)
    _check_rules(groups, block, best=block.split is not None, pairs=True)
    pairs, found = _pairs(groups, block)
    split = None
    if block.split is not None:
        # The runs of both stages must divide alike, so each looks at the best answers and the pairs of all prompts.
        split = split_prompts(_best(groups, block)[0], pairs, block.split.rule())
        dpo = set(split.dpo)
        pairs = [pair for pair in pairs if pair.chosen.prompt_id in dpo]
    report = _report(found, unusable, split) | {
        "pairs": len(pairs),
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


def choose_best(columns: Columns, block: FusionBlock) -> tuple[list[Candidate], Report]:
    """Return the best response to each prompt of a table of scored responses, and the report.

    Raises:
        DataError: a row is wrong, or not one response is left; the message says why.
    """
    groups, unusable = _groups(columns, block)
    _check_rules(groups, block, best=True, pairs=block.split is not None)
    best, found = _best(groups, block)
    chosen = [candidate for candidate in best.values() if candidate is not None]
    split = None
    if block.split is not None:
        pairs, paired = _pairs(groups, block)
        # Which prompts have a pair, and so which train this stage, the gap window decides.
        found = replace(found, limits=paired.limits)
        split = split_prompts(best, pairs, block.split.rule())
        sft = set(split.sft)
        chosen = [candidate for candidate in chosen if candidate.prompt_id in sft]
    by_source = Counter(sorted(candidate.source for candidate in chosen))
    report = _report(found, unusable, split) | {"answers": len(chosen), "by_source": dict(by_source)}
    if not chosen:
        raise DataError(
            f"expected best answers in the scored responses, got none: {json.dumps(report)}. The rule `reward` needs "
            f"rewards where a prompt has several responses. {_FOR_VERDICTS} With fusion.split, see sft_share and "
            "unpaired."
        )
    return chosen, report


def candidates_of(columns: Columns) -> tuple[list[Candidate], list[Unusable]]:
    """Turn a table into candidates.

    Args:
        columns: name -> values of all rows.

    Returns:
        The candidates, and the rows that lack a value or have one of the wrong type.
    """
    columns = {name: _prompts(values) if name == "prompt" else values for name, values in columns.items()}
    candidates, unusable = [], []
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        row = dict(zip(columns, values, strict=True))
        if row.get("finish_reason") == "length" and row.get("response") is None:
            row["response"] = ""  # the length limit came before the first word
        try:
            candidates.append(as_candidate(row, number))
        except DataError as error:
            unusable.append(Unusable(f"row {number}", str(error)))
    return candidates, unusable


def show_report(report: Report, title: str) -> None:
    """Print a report as a table."""
    table = Table("", "", title=title, show_header=False)
    for name, value in report.items():
        # The file names the rows; there may be many.
        shown = len(value) if isinstance(value, list) else value
        table.add_row(name, shown if isinstance(shown, str) else json.dumps(shown))
    console().print(table)


def _pairs(groups: CandidateGroups, block: FusionBlock) -> tuple[list[Pair], SelectionReport]:
    settings = block.pairs or PairArgs()
    propose = partial(lookup("pair_rules", settings.rule), **settings.options)
    pairs, found = pairs_per_prompt(groups, propose, settings.window(), settings.per_prompt)
    if found.limits is not None:  # the window has decided about pairs
        check_gap_window(settings.window(), [one for group in groups.by_prompt.values() for one in group])
    return pairs, found


def _best(groups: CandidateGroups, block: FusionBlock) -> tuple[dict[str, Candidate | None], SelectionReport]:
    return best_per_prompt(groups, resolve_rule((block.sft or SftArgs()).rule, BEST_RULES, "fusion.sft.rule"))


def _groups(columns: Columns, block: FusionBlock) -> tuple[CandidateGroups, list[Row]]:
    """Return the candidates, and what the report says about rows that are none."""
    candidates, unusable = candidates_of(columns)
    left_out = leave_out(unusable, len(candidates) + len(unusable), block.on_unusable)
    return clean(candidates, keep_truncated=block.keep_truncated), left_out


def _check_rules(groups: CandidateGroups, block: FusionBlock, *, best: bool, pairs: bool) -> None:
    """Refuse rules that need rewards where there are only verdicts.

    They would not fail: the best answer of a prompt with one right answer needs no reward, so a stage would train on
    those prompts alone, and the split would give all of them to one stage.
    """
    candidates = [candidate for group in groups.by_prompt.values() for candidate in group]
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


def _prompts(values: Sequence[Any]) -> Sequence[Any]:
    """Return prompts as texts or messages. A row folder stores them as JSON text, which all values then are."""
    try:
        parsed = [json.loads(value) for value in values]
    except (TypeError, ValueError, RecursionError):
        # One value that is not JSON shows that the others, too, are texts that only look like JSON.
        return values
    return parsed if all(is_prompt(prompt) for prompt in parsed) else values
