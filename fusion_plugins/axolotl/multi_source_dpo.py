"""Dataset type ``fusion_plugins.multi_source_dpo``: preference pairs from the scored responses of many sources.

Second stage of FuseChat-3.0 (arXiv 2503.04222). The published loss of the Llama targets is
``dpo_loss_type: ["sigmoid_norm"]``: the length-normalised DPO loss.

The rows hold token ids besides the texts, and :mod:`~fusion_plugins.axolotl.preference_trainers` trains on those. The
texts are for axolotl's filter of long rows and for people.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value

from fusion_plugins.axolotl.guards import DPO, require_plugin
from fusion_plugins.axolotl.preference_rows import (
    ANSWERS,
    PREFERENCE,
    Row,
    conversation,
    leave_out,
    make_rows,
    pair_name,
    preference_row,
)
from fusion_plugins.axolotl.prepared import keep_report
from fusion_plugins.axolotl.selection import choose_pairs, show_report
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.errors import DataError

Columns = Mapping[str, Sequence[Any]]


def multi_source_dpo(cfg: Any, dataset_idx: int = 0, **kwargs: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that turns a table of scored responses into prompts, chosen and rejected completions.

    axolotl calls this for the dataset type. It turns errors of this call into a warning, so the returned function is
    the one that checks the configuration.

    Raises:
        PluginError: (by the returned function) the plugin is not configured or not loaded.
        ConfigError: (by the returned function) the ``fusion:`` block is missing or wrong.
        DataError: (by the returned function) a row is wrong, or no pair is left.
    """
    # A pair needs all responses to its prompt, so axolotl must pass the whole table at once, not a part per process.
    num_proc, cfg.dataset_num_proc = cfg.dataset_num_proc, None
    whole: dict[str, Any] = {"batched": True, "batch_size": None, "remove_columns": "__all__"}
    # Without it, the column `prompt` would keep the type of the table's own, which may be one of chats.
    whole["features"] = Features(PREFERENCE)

    def build(rows: Columns, tokenizer: Any) -> dict[str, list[Any]]:
        cfg.dataset_num_proc = num_proc
        block = require_plugin(cfg, DPO)
        strategy = str(cfg.excess_length_strategy or "drop").lower()
        pairs, report = choose_pairs(dict(rows), block)
        made, unusable = make_rows(
            [
                (pair_name(pair), {"chosen": conversation(pair.chosen), "rejected": conversation(pair.rejected)})
                for pair in pairs
            ],
            partial(_row, TargetTokenizer.of(tokenizer, cfg), cfg.sequence_len if strategy == "truncate" else None),
            PREFERENCE | {"length": Value("int32")},
            num_proc=num_proc or None,
            desc="Tokenizing pairs",
        )
        report["unusable"] += leave_out(unusable, len(pairs), block.on_unusable)
        kept, report["longer_than_sequence_len"] = _fitting(made, cfg.sequence_len, strategy)
        show_report(report, "preference pairs")
        keep_report(cfg, _entry(cfg, dataset_idx), "fusion_pairs.json", report)
        return {name: kept[name][:] for name in PREFERENCE}

    return build, whole


#: entries of the training datasets whose pairs this process made
_made: set[str] = set()


def _entry(cfg: Any, index: int) -> Any:
    """Return the entry of the dataset whose pairs were just made; axolotl gives only its number.

    It prepares the training datasets before the test datasets, and counts both from 0.
    """
    from axolotl.utils.data.shared import datasets_with_name_generator

    for key in ("datasets", "test_datasets"):
        entries = list(datasets_with_name_generator(cfg.get(key) or []))
        if index < len(entries) and entries[index]["type"] == DPO:
            name = f"{key} {index} {entries[index].get('field_rejected')} {cfg.output_dir}"
            if name not in _made or not cfg.test_datasets:
                _made.add(name)
                return entries[index]
    return cfg.datasets[index]


def _row(target: TargetTokenizer, cut: int | None, item: Row) -> Row:
    chosen, rejected = (
        target.answer(each["prompt"], each["reply"], tools=each["tools"]) for each in (item["chosen"], item["rejected"])
    )
    row = preference_row(chosen, rejected)
    prompt = len(row["prompt_ids"])
    if cut is None:
        return row | {"length": max(prompt + _longest(row), _length_apart(target, row))}
    row |= {name: row[name][: max(0, cut - prompt)] for name in ANSWERS}
    # A prompt that leaves no room for an answer is too long.
    return row | {"length": prompt + max(1, _longest(row))}


def _longest(row: Row) -> int:
    return max(len(row[name]) for name in ANSWERS)


def _length_apart(target: TargetTokenizer, row: Row) -> int:
    """Return the length that axolotl's own filter measures; it tokenizes the three texts apart."""
    texts = [row[name] for name in ("prompt", "chosen", "rejected")]
    prompt, *answers = map(len, target.tokenizer(texts, add_special_tokens=False)["input_ids"])
    return prompt + max(answers)


def _fitting(rows: Dataset, limit: int, strategy: str) -> tuple[Dataset, list[str]]:
    """Return the rows that fit into the model's sequence, and what identifies the others."""
    fits = [length <= limit for length in rows["length"]]
    long = [name for name, fit in zip(rows["name"], fits, strict=True) if not fit]
    if long and (strategy == "raise" or len(long) == len(rows)):
        raise DataError(
            f"{len(long)} of {len(rows)} pairs are longer than sequence_len ({limit} tokens), the first for {long[0]}. "
            "Raise sequence_len, or set excess_length_strategy to drop or truncate."
        )
    return rows.select([place for place, fit in enumerate(fits) if fit]), long
