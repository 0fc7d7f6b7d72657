"""Refuses configurations that would silently train without fusion or misalign the fused distributions.

Runs before anything is loaded. All problems of one configuration are reported together.
"""

from collections.abc import Iterator
from typing import Any

from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.errors import ConfigError, FusionError, PluginError
from fusion_plugins.plugins import get_registry
from fusion_plugins.store import open_store

PLUGIN = "fusion_plugins.axolotl.FusionPlugin"
FUSED = "fusion_plugins.axolotl.fused"
BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"

_TRAINERS = "fusion_plugins.axolotl.preference_trainers"
#: `rl` of axolotl -> the trainer, as `trainer_cls`, that takes the pairs of :data:`DPO` as they are tokenized
PAIR_TRAINERS = {
    "dpo": f"{_TRAINERS}.TokenizedDPOTrainer",
    "ipo": f"{_TRAINERS}.TokenizedDPOTrainer",
    "simpo": f"{_TRAINERS}.TokenizedCPOTrainer",
    "orpo": f"{_TRAINERS}.TokenizedORPOTrainer",
}

#: axolotl settings that cannot be combined with fusion.sources: key -> why not and what to do
_REFUSED = {
    "streaming": "distributions are fused when the dataset is prepared; remove it",
    "pretraining_dataset": "distributions are fused when the dataset is prepared; use `datasets:`",
    "skip_prepare_dataset": "distributions are fused when the dataset is prepared; remove it",
    "reward_model": "it has another loss; train the reward model without fusion",
    "process_reward_model": "it has another loss; train the reward model without fusion",
    "use_eaft": "it replaces the loss; remove it",
    "label_smoothing_factor": "it would apply to only one of the two losses; remove it",
}


def check_config(cfg: Any) -> FusionBlock:
    """Check a raw axolotl configuration as a whole.

    Raises:
        ConfigError: naming every problem.
    """
    block = fusion_block(cfg)
    problems = [*_unknown_names(block), *_stores(block), *_datasets(cfg, block)]
    if block.sources:
        problems += _settings(cfg)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the configuration: " + "; ".join(problems))
    return block


def require_plugin(cfg: Any, type_name: str) -> FusionBlock:
    """Return the ``fusion:`` block, for a dataset type that needs the plugin.

    axolotl goes on without a plugin that cannot be imported, and drops a ``fusion:`` block without the plugin.

    Raises:
        PluginError: the plugin is not configured, or was not loaded.
        ConfigError: the block is missing or wrong.
    """
    from axolotl.integrations.base import PluginManager

    if PLUGIN not in (cfg.get("plugins") or []):
        raise PluginError(
            f"a dataset of type {type_name} needs the plugin, and `plugins:` does not name it: axolotl ignores the "
            f"`fusion:` block without it. Add `plugins: [{PLUGIN}]`."
        )
    if PLUGIN not in PluginManager.get_instance().plugins:
        raise PluginError(
            f"`plugins:` names {PLUGIN}, but axolotl could not load it; its error is further up in the log. A dataset "
            f"of type {type_name} needs it. Repair that error, usually with pip install 'fusion-plugins[axolotl]'."
        )
    return fusion_block(cfg)


def dataset_types(cfg: Any, key: str = "datasets") -> list[str]:
    """Return the ``type`` of every dataset, as text."""
    entries = cfg.get(key) or []
    return [str(entry.get("type") if hasattr(entry, "get") else getattr(entry, "type", None)) for entry in entries]


def _unknown_names(block: FusionBlock) -> Iterator[str]:
    wanted = {"rule": ("fusion_rules", block.rule), "loss": ("losses", block.loss)}
    wanted["alignment.method"] = ("aligners", block.alignment.method)
    if block.pairs is not None:
        wanted["pairs.rule"] = ("pair_rules", block.pairs.rule)
    for key, (kind, name) in wanted.items():
        known = get_registry(kind)
        if name not in known:
            yield f"fusion.{key}: expected one of {', '.join(sorted(known))}, got {name!r}"


def _stores(block: FusionBlock) -> Iterator[str]:
    for source in block.sources:
        try:
            open_store(source.store)
        except FusionError as error:
            yield f"source {source.name!r}: {error}"


def _datasets(cfg: Any, block: FusionBlock) -> Iterator[str]:
    types = dataset_types(cfg)
    rl = cfg.get("rl")
    if block.sources and rl:
        yield f"fusion.sources is for supervised training, `rl: {rl}` would ignore it; remove one of the two"
    elif block.sources:
        others = sorted({*types, *dataset_types(cfg, "test_datasets")} - {FUSED})
        if others:
            yield f"a dataset has `type: {', '.join(others)}`, which fuses nothing; all must have `type: {FUSED}`"
    if not block.sources and FUSED in types:
        yield f"a dataset has `type: {FUSED}`, but fusion.sources names no source"
    if DPO in types and rl not in PAIR_TRAINERS:
        yield f"a dataset has `type: {DPO}`, which needs `rl: dpo` (or ipo, simpo, orpo); got `rl: {rl}`"
    elif DPO in types and cfg.get("trainer_cls") not in (None, PAIR_TRAINERS[rl]):
        yield (
            f"trainer_cls: {cfg.get('trainer_cls')} would tokenize the pairs of `type: {DPO}` anew, and cut prompt and "
            "answer elsewhere than supervised training does; remove it"
        )
    if BEST in types and rl:
        yield f"a dataset has `type: {BEST}`, which is for supervised training; got `rl: {rl}`"


def _settings(cfg: Any) -> Iterator[str]:
    if str(cfg.get("excess_length_strategy") or "").lower() == "truncate":
        yield (
            "excess_length_strategy: truncate would cut tokens but not their distributions; use drop (axolotl's "
            "default) or raise, and split long texts before `fusion capture`"
        )
    if (cfg.get("context_parallel_size") or 1) > 1:
        yield "context_parallel_size splits tokens but not their distributions; set it to 1"
    for key, why in _REFUSED.items():
        if cfg.get(key):
            yield f"{key} cannot be combined with fusion.sources: {why}"
