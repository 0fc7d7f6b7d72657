"""Refuses configurations that would silently train without fusion or misalign the fused distributions.

Runs before anything is loaded. All problems of one configuration are reported together.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from axolotl.utils.logging import get_logger

from fusion_plugins.axolotl.args import FOR_RESPONSES, FOR_SOURCES, FusionBlock, fusion_block
from fusion_plugins.axolotl.block_settings import BlockSettings
from fusion_plugins.axolotl.dataset_keys import problems_of, problems_of_scored
from fusion_plugins.axolotl.fusion_losses import problems_of_fusion_loss
from fusion_plugins.axolotl.losses import OWN_TRAINERS, PAIR_TRAINERS, problems_of_losses
from fusion_plugins.axolotl.prepared import remembered_store
from fusion_plugins.axolotl.source_args import SourceArgs
from fusion_plugins.core.fusion.vocabulary_map import COUNTED
from fusion_plugins.errors import ConfigError, FusionError, PluginError
from fusion_plugins.install import install_command
from fusion_plugins.plugins import get_registry
from fusion_plugins.store import open_store

LOG = get_logger(__name__)
PLUGIN = "fusion_plugins.axolotl.FusionPlugin"
FUSED = "fusion_plugins.axolotl.fused"
BEST = "fusion_plugins.axolotl.best_of_sources"
DPO = "fusion_plugins.multi_source_dpo"

TYPES = (FUSED, BEST, DPO)

_WHEN_PREPARED = "the rows are made when the dataset is prepared"
_TOKEN_SCALING = "it weighs the positions of Liger's loss, which is replaced; remove it"
_OTHER_LOSS = "it has another loss; train the reward model without fusion"
#: axolotl settings that cannot be combined with our supervised datasets: key -> why not and what to do
_REFUSED = {
    "streaming": f"{_WHEN_PREPARED}; remove it",
    "pretraining_dataset": f"{_WHEN_PREPARED}; use `datasets:`",
    "skip_prepare_dataset": f"{_WHEN_PREPARED}; remove it",
    "reward_model": _OTHER_LOSS,
    "process_reward_model": _OTHER_LOSS,
}
#: the same for the best responses
_REFUSED_WITH_BEST = _REFUSED | {"train_on_inputs": "the answers alone are trained on; remove it"}
#: the same for the best response of every source, each with a weight
_REFUSED_WITH_WEIGHTS = _REFUSED_WITH_BEST | {
    "use_eaft": "it replaces the loss; remove it",
    "label_smoothing_factor": "the weighted loss has none; remove it",
    "liger_use_token_scaling": _TOKEN_SCALING,
    "trainer_cls": "weighted answers have a trainer of their own, and axolotl would ignore yours; remove it",
    "batch_flattening": "weighted answers have a collator of their own, and axolotl would ignore the setting; use "
    "sample_packing",
    "processor_type": "the rows are text; remove it",
    "orpo_alpha": "it replaces the loss; remove it",
    "do_bench_eval": "the rows of the benchmark have no weights; evaluate the trained model instead",
}
#: the same for datasets of type fused
_REFUSED_WITH_SOURCES = _REFUSED | {
    "use_eaft": "it replaces the loss; remove it",
    "label_smoothing_factor": "it would apply to only one of the two losses; remove it",
    "liger_use_token_scaling": _TOKEN_SCALING,
    "do_bench_eval": "the rows of the benchmark have no fused distributions; evaluate the trained model instead",
    "trainer_cls": "fusion has a trainer of its own, and axolotl would ignore yours; remove it",
    "batch_flattening": "fusion has a collator of its own, and axolotl would ignore the setting; use sample_packing",
    "processor_type": "fused rows are text; remove it",
    "orpo_alpha": "it replaces the loss; remove it",
}
_GAPS = {"min_gap", "max_gap", "gap_unit", "gap_exempt"}
#: columns by which axolotl knows rows that are tokens already
_TOKENIZED = {"input_ids", "attention_mask", "labels"}
#: two names of one setting: how many processes share one sequence
_SPLITS_SEQUENCES = ("context_parallel_size", "sequence_parallel_degree")


def check_config(cfg: Any) -> FusionBlock:
    """Check an axolotl configuration as a whole, but for what only preparing and training need.

    axolotl does not tell a plugin which command runs. Commands that train nothing read the same configuration, often on
    a machine without the stores and the packages that register rules; so these are left to :func:`check_ready`.

    Raises:
        ConfigError: naming every problem.
    """
    block = fusion_block(cfg)
    parts = (
        _idle(block),
        _datasets(cfg, block),
        _entries(cfg),
        _rows(cfg),
        _settings(cfg, block),
        _losses(cfg, block),
        problems_of_fusion_loss(block) if block.sources else (),
        _other_trainers(cfg, block),
    )
    problems = [problem for part in parts for problem in part]
    if problems:
        _refuse([*_unknown_names(block), *_unknown_options(block), *problems])
    return block


def check_ready(cfg: Any, block: FusionBlock, *, rows_wanted: bool = True) -> None:
    """Check that what preparing and training need is there: every registered name, and the stores.

    Args:
        cfg: the configuration.
        block: its ``fusion:`` block.
        rows_wanted: rows must be prepared. If not, a store may be gone from which rows were prepared before, unless
            they are fused while training.

    Raises:
        ConfigError: naming every problem.
    """
    rows_wanted = rows_wanted or block.prepared == "stores"
    sources = [*block.sources, *(block.reference.sources if block.reference else [])]
    stores = [source for source in sources if rows_wanted or not remembered_store(cfg, source.store)]
    problems = [*_unknown_names(block), *_unknown_options(block), *_stores(stores), *_other_trainers(cfg, block)]
    if problems:
        _refuse(problems)


def _refuse(problems: list[str]) -> NoReturn:
    raise ConfigError(f"{len(problems)} problem(s) in the configuration: " + "; ".join(problems))


def require_plugin(cfg: Any, type_name: str) -> FusionBlock:
    """Return the ``fusion:`` block, for a dataset type that needs the plugin.

    axolotl goes on without a plugin that cannot be imported, and drops a ``fusion:`` block without the plugin.

    Raises:
        PluginError: the plugin is not configured, or was not loaded.
        ConfigError: the block is missing or wrong.
    """
    from axolotl.integrations.base import PluginManager

    configured = cfg.get("plugins") or []
    if not {PLUGIN, f"{__package__}.plugin.FusionPlugin"} & set(configured):
        raise PluginError(
            f"a dataset of type {type_name} needs the plugin, and `plugins:` does not name it: axolotl ignores the "
            f"`fusion:` block without it. Add `plugins: [{PLUGIN}]`."
        )
    if not any(_is_ours(plugin) for name, plugin in PluginManager.get_instance().plugins.items() if name in configured):
        raise PluginError(
            f"`plugins:` names {PLUGIN}, but axolotl could not load it; its error is further up in the log. A dataset "
            f"of type {type_name} needs it. Repair that error, usually with {install_command('axolotl')}."
        )
    block = fusion_block(cfg)
    check_ready(cfg, block)
    return block


def dataset_types(cfg: Any, key: str = "datasets") -> list[str]:
    """Return the ``type`` of every dataset, as text."""
    entries = cfg.get(key) or []
    return [str(entry.get("type") if hasattr(entry, "get") else getattr(entry, "type", None)) for entry in entries]


def registered_names(block: FusionBlock) -> dict[str, tuple[str, str]]:
    """Return key of the block -> kind of extension and the name that the key gives."""
    names = {key: ("fusion_rules", rule) for key, (rule, _) in block.rules.items()}
    names["loss"] = ("losses", block.loss)
    names["alignment.method"] = ("aligners", block.alignment.method)
    if block.pairs is not None:
        names["pairs.rule"] = ("pair_rules", block.pairs.rule)
    return names


def _unknown_names(block: FusionBlock) -> Iterator[str]:
    for key, (kind, name) in registered_names(block).items():
        known = get_registry(kind)
        if name not in known:
            yield f"fusion.{key}: expected one of {', '.join(sorted(known))}, got {name!r}"


def _idle(block: FusionBlock) -> Iterator[str]:
    """Settings of the block that would do nothing.

    A value that is the default does no harm, and axolotl writes all of them into the configurations that it saves.
    """
    given = _changed(block)
    for_sources = FOR_SOURCES - ({"on_missing_text"} if block.reference else set())
    if not block.sources and (idle := sorted(for_sources & given)):
        yield (
            f"{_keys(idle)}: for fused distributions alone, and fusion.sources names no source; remove what would do "
            "nothing, or add sources"
        )
    for_responses = FOR_RESPONSES - ({"min_trust"} if block.weights_from else set())
    if block.sources and (idle := sorted(for_responses & given)):
        cure = "remove it"
        if idle == ["min_trust"]:
            cure = "give weights_from, or say where: {trust: outside} to leave out answers whose verdict can be forged"
        yield f"{_keys(idle)}: for scored responses alone, which a run with fusion.sources does not read; {cure}"
    if block.reference is not None and block.on_missing_text == "skip_source":
        yield "fusion.on_missing_text: skip_source is for fusion.sources; with fusion.reference set raise or skip"
    if "tie_order" in _changed(block.alignment) and block.alignment.method != "dtw":
        yield f"fusion.alignment.tie_order: for dtw alone, and the method is {block.alignment.method}; remove it"
    if block.prepared == "stores" and block.projection.vocabulary_map in COUNTED:
        yield (
            f"fusion.prepared: stores cannot be combined with vocabulary_map: {block.projection.vocabulary_map}, which "
            "goes by counts over a whole dataset; use prepared: rows"
        )
    if block.projection.max_distance is not None and block.projection.vocabulary_map == "exact":
        yield "fusion.projection.max_distance: the vocabulary_map exact maps equal tokens only; remove it"
    if block.pairs is not None and block.pairs.rule == "verdict" and (idle := sorted(_GAPS & _changed(block.pairs))):
        yield f"{_keys(idle, 'fusion.pairs')}: pairs of the rule verdict have no reward gap; remove it"


def _changed(settings: BlockSettings) -> set[str]:
    """Return the keys whose value is not the default."""
    return {
        name
        for name, field in type(settings).model_fields.items()
        if getattr(settings, name) != field.get_default(call_default_factory=True)
    }


def _keys(names: Sequence[str], group: str = "fusion") -> str:
    return ", ".join(f"{group}.{name}" for name in names)


def _unknown_options(block: FusionBlock) -> Iterator[str]:
    """Options that a rule does not take; where the rule is unknown, that is said elsewhere."""
    given = {
        "rule_options" if key == "rule" else f"{key}.rule_options": ("fusion_rules", rule, options)
        for key, (rule, options) in block.rules.items()
    }
    if block.pairs is not None:
        given["pairs.options"] = ("pair_rules", block.pairs.rule, block.pairs.options)
    for key, (kind, name, options) in given.items():
        rule = get_registry(kind).get(name) if options else None
        if rule is None:
            continue
        known = inspect.signature(rule).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            continue
        takes = [parameter.name for parameter in known if parameter.kind is parameter.KEYWORD_ONLY]
        taken = {parameter.name for parameter in known}
        for option in options:
            if option not in taken:
                yield f"fusion.{key}: {name} takes {', '.join(takes) or 'no options'}, got {option!r}"


def _stores(sources: Sequence[SourceArgs]) -> Iterator[str]:
    for source in sources:
        try:
            open_store(source.store)
        except FusionError as error:
            yield f"source {source.name!r}: {error}"


def _datasets(cfg: Any, block: FusionBlock) -> Iterator[str]:
    types = [*dataset_types(cfg), *dataset_types(cfg, "test_datasets")]
    rl = cfg.get("rl")
    if block.sources and rl:
        yield f"fusion.sources is for supervised training, `rl: {rl}` would ignore it; remove one of the two"
    elif block.sources:
        others = sorted({*types} - {FUSED})
        if others:
            yield (
                f"a dataset has `type: {', '.join(others)}`, which fuses nothing; all must have `type: {FUSED}`. Rows "
                "that no source is to teach go into the file of the others, see fusion.on_no_source: lm_loss"
            )
    if not block.sources and FUSED in types:
        yield f"a dataset has `type: {FUSED}`, but fusion.sources names no source"
    if DPO in types and rl not in PAIR_TRAINERS:
        yield f"a dataset has `type: {DPO}`, which needs `rl: dpo` (or ipo, simpo, orpo); got `rl: {rl}`"
    elif DPO in types and cfg.get("trainer_cls") not in (None, PAIR_TRAINERS[rl], *OWN_TRAINERS):
        yield (
            f"trainer_cls: {cfg.get('trainer_cls')} would tokenize the pairs of `type: {DPO}` anew, and cut prompt and "
            f"answer elsewhere than supervised training does; remove it, or take one of {', '.join(OWN_TRAINERS)}"
        )
    if DPO in types and rl == "simpo" and cfg.get("simpo_gamma") is None:
        yield "rl: simpo needs simpo_gamma, the margin of its loss; 0.5 is TRL's default"
    if BEST in types and rl:
        yield f"a dataset has `type: {BEST}`, which is for supervised training; got `rl: {rl}`"
    if not block.sources and not {*types} & {*TYPES}:
        yield (
            f"no dataset has one of the types {', '.join(TYPES)}: nothing would be fused or chosen. Give a dataset one "
            "of them, or remove the plugin and the block"
        )


def _losses(cfg: Any, block: FusionBlock) -> Iterator[str]:
    types = {*dataset_types(cfg), *dataset_types(cfg, "test_datasets")}
    yield from problems_of_losses(cfg, block, pairs=DPO in types, all_pairs=types == {DPO})


def _entries(cfg: Any) -> Iterator[str]:
    for key in ("datasets", "test_datasets"):
        for entry in cfg.get(key) or []:
            if entry.get("type") in TYPES:
                yield from (problems_of if entry.get("type") == FUSED else problems_of_scored)(entry)


def _rows(cfg: Any) -> Iterator[str]:
    """Problems of the files that the entries name; missing files are left to axolotl."""
    for key in ("datasets", "test_datasets"):
        for entry in cfg.get(key) or []:
            path = Path(str(entry.get("path")))
            # A fused run finds out by itself, when its first batch has no distributions.
            if entry.get("type") == BEST and _is_tokenized(path):
                yield (
                    f"{path} has the columns {', '.join(sorted(_TOKENIZED))}: axolotl would take these rows as they "
                    f"are and never ask `type: {BEST}`. Give it the scored responses"
                )
            if key == "test_datasets" and entry.get("type") == DPO and path.is_dir() and not entry.get("split"):
                yield (
                    f"test_datasets: {path} is a folder, in which axolotl looks for a split called test; give the "
                    "entry `split: train` for all of its rows"
                )


def _is_tokenized(file: Path) -> bool:
    """Whether the first row of a JSONL file is one that axolotl takes for prepared."""
    if file.suffix not in (".jsonl", ".json") or not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as rows:
        try:
            row = json.loads(next(rows, ""))
        except ValueError:
            return False
    return isinstance(row, dict) and row.keys() >= _TOKENIZED


def _settings(cfg: Any, block: FusionBlock) -> Iterator[str]:
    if not block.sources and cfg.get("rl"):
        return
    refused, what = _REFUSED_WITH_BEST, f"`type: {BEST}`"
    if block.sources:
        refused, what = _REFUSED_WITH_SOURCES, "fusion.sources"
    elif block.sft is not None and block.sft.per_prompt == "all":
        refused, what = _REFUSED_WITH_WEIGHTS, "fusion.sft.per_prompt: all"
    for key, why in refused.items():
        if cfg.get(key):
            yield f"{key} cannot be combined with {what}: {why}"
    weighted = block.sft is not None and block.sft.per_prompt == "all"
    for key in _SPLITS_SEQUENCES if block.sources or weighted else ():
        if cfg.get(key) not in (None, 0, 1, "0", "1"):
            yield f"{key} splits tokens but not their {'distributions' if block.sources else 'weights'}; set it to 1"
    if not block.sources:
        return
    yield from _dispatched(cfg)
    if str(cfg.get("excess_length_strategy") or "").lower() == "truncate":
        yield (
            "excess_length_strategy: truncate would cut tokens but not their distributions; use drop (axolotl's "
            "default) or raise, and split long texts before `fusion capture`"
        )


def _dispatched(cfg: Any) -> Iterator[str]:
    if (cfg.get("accelerator_config") or {}).get("dispatch_batches"):
        yield (
            "accelerator_config.dispatch_batches cannot be combined with fusion.sources: accelerate joins tensors "
            "only, and a batch also has its count of positions; remove it"
        )


def _other_trainers(cfg: Any, block: FusionBlock) -> Iterator[str]:
    """Of several plugins with a trainer or a collator, axolotl uses the first and ignores the others."""
    from axolotl.integrations.base import PluginManager

    for name, plugin in PluginManager.get_instance().plugins.items():
        if name not in (cfg.get("plugins") or []) or _is_ours(plugin):
            continue
        try:
            collator = plugin.get_collator_cls_and_kwargs(cfg)
            trainer = plugin.get_trainer_cls(cfg)
        except Exception as error:  # code of another package, which may expect a validated configuration
            LOG.info(f"fusion: {name} does not say whether it has a trainer: {error}")
            continue
        # The trainer of preference pairs is axolotl's; other rows than a collator expects are of no use to it.
        own = block.sources or cfg.get("rl") or (block.sft and block.sft.per_prompt == "all")
        if collator is not None or (trainer is not None and own):
            yield (
                f"{PLUGIN} and {name} cannot train together: {name} brings a trainer or a collator of its own, and "
                "axolotl uses only one. Remove one of the two plugins"
            )


def _is_ours(plugin: Any) -> bool:
    return type(plugin).__name__ == "FusionPlugin" and type(plugin).__module__.startswith("fusion_plugins.")
