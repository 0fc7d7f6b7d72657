"""Dataset type ``fusion_plugins.axolotl.best_of_sources``: fine-tuning on the best response of any source.

First stage of FuseChat-3.0 (arXiv 2503.04222). The dataset is the output of `fusion score`; ``fusion.sft`` and
``fusion.split`` set the rules. With ``per_prompt: all`` the best response of each source is learnt, and the column
``weight`` says how much it counts (FuseSFT; :mod:`~fusion_plugins.axolotl.weighted_sft` trains on those).
"""

from functools import partial
from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from datasets import Dataset

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.guards import BEST, require_plugin
from fusion_plugins.axolotl.preference_rows import (
    SUPERVISED,
    WEIGHT,
    Row,
    candidate_name,
    conversation,
    leave_out,
    make_rows,
    supervised_row,
)
from fusion_plugins.axolotl.prepared import keep_report
from fusion_plugins.axolotl.selection import choose_best, show_report, weigh
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> "BestOfSources":
    """Return the strategy; axolotl calls this for the dataset type.

    Raises:
        PluginError: the plugin is not configured or not loaded.
        ConfigError: the ``fusion:`` block is missing or wrong.
    """
    block = require_plugin(cfg, BEST)
    return BestOfSources(TargetTokenizer.of(tokenizer, cfg), block, cfg, ds_cfg or {})


class BestOfSources(DatasetWrappingStrategy):
    """Scored responses -> one supervised conversation per prompt."""

    def __init__(self, target: TargetTokenizer, block: FusionBlock, cfg: Any, entry: Any) -> None:
        self._target, self._block, self._cfg, self._entry = target, block, cfg, entry

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Choose the responses and tokenize them; see :meth:`TargetTokenizer.answer`."""
        # Not `to_dict`, which leaves messages as JSON text where not all of them have the same keys.
        chosen, report = choose_best(dataset[:], self._block)
        items = [(candidate_name(best), conversation(best)) for best in chosen]
        columns = SUPERVISED
        settings = self._block.sft
        if settings is not None and settings.per_prompt == "all":
            weights = weigh(chosen, settings.weight_temperature, "fusion.sft.per_prompt: all", report)
            items = [(name, item | {"weight": weight}) for (name, item), weight in zip(items, weights, strict=True)]
            columns = SUPERVISED | WEIGHT
        rows, unusable = make_rows(
            items,
            partial(_row, self._target),
            columns,
            num_proc=process_count,
            keep_in_memory=bool(keep_in_memory),
            desc="Tokenizing best responses",
        )
        report["unusable"] += leave_out(unusable, len(chosen), self._block.on_unusable)
        # axolotl drops or truncates these, or stops: excess_length_strategy.
        report["longer_than_sequence_len"] = [
            name for name, ids in zip(rows["name"], rows["input_ids"], strict=True) if len(ids) > self._cfg.sequence_len
        ]
        show_report(report, "best responses")
        keep_report(self._cfg, self._entry, "fusion_sft.json", report)
        return rows.remove_columns("name")


def _row(target: TargetTokenizer, item: Row) -> Row:
    row = supervised_row(target.answer(item["prompt"], item["reply"], tools=item["tools"]))
    return row | ({"weight": item["weight"]} if "weight" in item else {})
