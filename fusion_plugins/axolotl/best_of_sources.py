"""Dataset type ``fusion_plugins.axolotl.best_of_sources``: fine-tuning on the best response of any source.

First stage of FuseChat-3.0 (arXiv 2503.04222). The dataset is the output of `fusion score`; ``fusion.sft`` and
``fusion.split`` set the rules.
"""

import json
from pathlib import Path
from typing import Any

from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from datasets import Dataset

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.guards import BEST, require_plugin
from fusion_plugins.axolotl.selection import choose_best, write_report
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> "BestOfSources":
    """Return the strategy; axolotl calls this for the dataset type.

    Raises:
        PluginError: the plugin is not configured or not loaded.
        ConfigError: the ``fusion:`` block is missing or wrong.
    """
    block = require_plugin(cfg, BEST)
    return BestOfSources(TargetTokenizer.of(tokenizer, cfg), block, Path(cfg.output_dir) / "fusion_sft.json")


class BestOfSources(DatasetWrappingStrategy):
    """Scored responses -> one supervised conversation per prompt."""

    def __init__(self, target: TargetTokenizer, block: FusionBlock, report: Path) -> None:
        self._target, self._block, self._report = target, block, report

    def wrap_dataset(
        self, dataset: Any, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Dataset:
        """Choose the responses and tokenize them; see :meth:`TargetTokenizer.answer`."""
        # Not `to_dict`, which leaves messages as JSON text where not all of them have the same keys.
        chosen, report = choose_best(dataset[:], self._block)
        write_report(report, self._report, "best responses")
        # As JSON, because an Arrow column holds either texts or chats, and gives all messages the same keys.
        rows = Dataset.from_list([{"prompt": json.dumps(best.prompt), "response": best.response} for best in chosen])
        return rows.map(
            self._tokenize,
            num_proc=process_count,
            remove_columns=rows.column_names,
            keep_in_memory=bool(keep_in_memory),
            load_from_cache_file=False,
            desc="Tokenizing best responses",
        )

    def _tokenize(self, row: dict[str, Any]) -> dict[str, Any]:
        text = self._target.answer(json.loads(row["prompt"]), row["response"])
        return {"input_ids": text.tokens.input_ids, "attention_mask": [1] * len(text.labels), "labels": text.labels}
