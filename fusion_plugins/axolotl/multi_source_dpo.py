"""Dataset type ``fusion_plugins.multi_source_dpo``: preference pairs from the scored responses of many sources.

Second stage of FuseChat-3.0 (arXiv 2503.04222). The published loss of the Llama targets is
``dpo_loss_type: ["sigmoid_norm"]``: the length-normalised DPO loss.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Features, Value

from fusion_plugins.axolotl.guards import DPO, require_plugin
from fusion_plugins.axolotl.selection import choose_pairs, write_report
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer

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
    whole["features"] = Features({name: Value("string") for name in ("prompt", "chosen", "rejected")})

    def build(rows: Columns, tokenizer: Any) -> dict[str, list[str]]:
        cfg.dataset_num_proc = num_proc
        block = require_plugin(cfg, DPO)
        pairs, report = choose_pairs(dict(rows), block)
        write_report(report, Path(cfg.output_dir) / "fusion_pairs.json", "preference pairs")
        target = TargetTokenizer.of(tokenizer, cfg)
        columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
        for pair in pairs:
            prompt, chosen = target.prompt_and_completion(pair.chosen.prompt, pair.chosen.response)
            _, rejected = target.prompt_and_completion(pair.rejected.prompt, pair.rejected.response)
            for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
                columns[name].append(text)
        return columns

    return build, whole
