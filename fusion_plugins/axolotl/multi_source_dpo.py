"""Dataset type ``fusion_plugins.multi_source_dpo``: preference pairs from the scored responses of many sources.

Second stage of FuseChat-3.0 (arXiv 2503.04222). The published loss of the Llama targets is
``dpo_loss_type: ["sigmoid_norm"]``: the length-normalised DPO loss.

The rows hold token ids besides the texts, and :mod:`~fusion_plugins.axolotl.preference_trainers` trains on those. The
texts are for axolotl's filter of long rows and for people. Some losses need more columns: the best answer of a source
(WRPO), what the sources say about both answers (InfiFPO), a weight (FusePO).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from axolotl.utils.distributed import is_main_process
from datasets import Dataset, Features, Value

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.fingerprint import store_content
from fusion_plugins.axolotl.guards import DPO, require_plugin
from fusion_plugins.axolotl.losses import WRPO
from fusion_plugins.axolotl.preference_rows import (
    ANSWERS,
    PREFERENCE,
    REFERENCE,
    SOURCE_ANSWER,
    WEIGHT,
    Row,
    conversation,
    leave_out,
    make_rows,
    pair_name,
    preference_row,
)
from fusion_plugins.axolotl.prepared import keep_report
from fusion_plugins.axolotl.reference import make_reference
from fusion_plugins.axolotl.selection import choose_pairs, choose_triples, show_report, weigh
from fusion_plugins.axolotl.source_args import SourceArgs
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.preferences.candidates import Candidate, Pair, chat_of
from fusion_plugins.errors import DataError
from fusion_plugins.store.files import write_atomic

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
    # Without it, the column `prompt` would keep the type of the table's own, which may be one of chats. What is wrong
    # with the block is said below.
    columns = PREFERENCE | _further_columns(cfg)
    whole["features"] = Features(columns)

    def build(rows: Columns, tokenizer: Any) -> dict[str, list[Any]]:
        cfg.dataset_num_proc = num_proc
        block = require_plugin(cfg, DPO)
        strategy = str(cfg.excess_length_strategy or "drop").lower()
        target = TargetTokenizer.of(tokenizer, cfg)
        items, report = _items(dict(rows), block, target, cfg)
        made, unusable = make_rows(
            items,
            partial(_row, target, cfg.sequence_len if strategy == "truncate" else None),
            columns | {"length": Value("int32")},
            num_proc=num_proc or None,
            desc="Tokenizing pairs",
        )
        report["unusable"] += leave_out(unusable, len(items), block.on_unusable)
        kept, report["longer_than_sequence_len"] = _fitting(made, cfg.sequence_len, strategy)
        show_report(report, "preference pairs")
        stores = {source.store: store_content(cfg, source.store) for source in _reference_sources(block)}
        keep_report(cfg, _entry(cfg, dataset_idx), "fusion_pairs.json", report, stores)
        return {name: kept[name][:] for name in columns}

    return build, whole


def _further_columns(cfg: Any) -> dict[str, Any]:
    """Return the columns that the loss of a run needs besides those of a pair."""
    block = cfg.fusion or {}
    columns: dict[str, Any] = SOURCE_ANSWER if cfg.trainer_cls == WRPO else {}
    columns = columns | (REFERENCE if block.get("reference") else {})
    return columns | (WEIGHT if (block.get("pairs") or {}).get("weighted") else {})


def _items(
    rows: Columns, block: FusionBlock, target: TargetTokenizer, cfg: Any
) -> tuple[list[tuple[str, Row]], dict[str, Any]]:
    """Return what identifies each row and what it is made of, and the report."""
    third: list[Candidate] = []
    if cfg.trainer_cls == WRPO:
        triples, report = choose_triples(rows, block)
        pairs, third = [pair for pair, _ in triples], [answer for _, answer in triples]
    else:
        pairs, report = choose_pairs(rows, block)
    if block.pairs is not None and block.pairs.texts is not None and is_main_process():
        write_texts(Path(block.pairs.texts), pairs)
    further: list[Row] = [{"source": conversation(answer)} for answer in third] or [{} for _ in pairs]
    if block.reference is not None:
        found = make_reference(pairs, block.reference, target, str(cfg.base_model), block.on_missing_text)
        pairs = found.pairs
        report["missing_from_stores"] = [asdict(each) for each in found.missing]
        further = [{"reference": list(means)} for means in found.values.tolist()]
    elif block.pairs is not None and block.pairs.weighted:
        chosen = [pair.chosen for pair in pairs]
        weights = weigh(chosen, block.pairs.weight_temperature, "fusion.pairs.weighted", report)
        further = [{"weight": weight} for weight in weights]
    items = [
        (pair_name(pair), {"chosen": conversation(pair.chosen), "rejected": conversation(pair.rejected), **more})
        for pair, more in zip(pairs, further, strict=True)
    ]
    return items, report


def write_texts(path: Path, pairs: Sequence[Pair]) -> None:
    """Write both answers of every pair as chats, each once, one JSON object per line."""
    lines: dict[str, None] = {}
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            messages, tools = chat_of(answer)
            lines[json.dumps({"messages": messages, "tools": tools})] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def _reference_sources(block: FusionBlock) -> list[SourceArgs]:
    return block.reference.sources if block.reference is not None else []


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
    given = [item[name] for name in ("chosen", "rejected", "source") if name in item]
    row = preference_row(*(target.answer(each["prompt"], each["reply"], tools=each["tools"]) for each in given))
    prompt = len(row["prompt_ids"])
    if cut is None:
        length = max(prompt + _longest(row), _length_apart(target, row))
    else:
        row |= {name: row[name][: max(0, cut - prompt)] for name in _answers(row)}
        # A prompt that leaves no room for an answer is too long.
        length = prompt + max(1, _longest(row))
    if "reference" in item:
        # TRL's columns are sums over the target's tokens.
        row |= {
            name: mean * len(row[ids]) for name, mean, ids in zip(REFERENCE, item["reference"], ANSWERS, strict=True)
        }
    return row | {name: item[name] for name in WEIGHT if name in item} | {"length": length}


def _answers(row: Row) -> list[str]:
    return [name for name in (*ANSWERS, *SOURCE_ANSWER) if name in row]


def _longest(row: Row) -> int:
    return max(len(row[name]) for name in _answers(row))


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
