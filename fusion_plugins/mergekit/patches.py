"""Where our part of a merge enters mergekit: its planner and the functions that plan and run a merge.

A merge with a method that is not ours passes through unchanged.
"""

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from mergekit.common import ModelReference
from mergekit.merge_methods.registry import get

from fusion_plugins.errors import ConfigError
from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys
from fusion_plugins.mergekit.methods import METHODS
from fusion_plugins.mergekit.plan import extend_plan
from fusion_plugins.mergekit.record import MergeRecord, append_card


def extend_merge(module: Any) -> None:
    """Extend ``mergekit.merge``, which ``mergekit-yaml`` and ``mergekit-multi`` run."""
    original, planner = module.run_merge, module.MergePlanner

    class FusionPlanner(planner):  # type: ignore[misc, valid-type]
        def plan_to_disk(self, out_path: str) -> list[Any]:
            # Before planning: it rewrites the configuration in place (models become slices).
            config = self.config.model_dump(mode="json", exclude_defaults=True)
            tasks = super().plan_to_disk(out_path)
            if not _is_ours(self.config.merge_method):
                return tasks
            return extend_plan(tasks, _record_of(config, out_path), str(self.options.device))

    @wraps(original)
    def run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> Any:
        if not _is_ours(merge_config.merge_method):
            return original(merge_config, out_path, options=options, config_source=config_source)
        # The source still has the keys that mergekit dropped when it read the configuration.
        raw = yaml.safe_load(config_source) if config_source else None
        _refuse_ignored(merge_config.model_dump(mode="json", exclude_defaults=True), type(merge_config), raw)
        result = original(merge_config, out_path, options=options, config_source=config_source)
        # mergekit writes the card after it has run the plan.
        append_card(Path(out_path))
        return result

    # run_merge looks the planner up in its module, so that replacing the name there is enough.
    module.MergePlanner = FusionPlanner
    module.run_merge = run_merge


def extend_raw_merge(module: Any) -> None:
    """Extend ``mergekit.scripts.merge_raw_pytorch``, which is ``mergekit-pytorch``."""
    original = module.plan_flat_merge

    @wraps(original)
    def plan_flat_merge(config: Any, out_path: str, union: bool, intersection: bool, options: Any) -> list[Any]:
        if not _is_ours(config.merge_method):
            return original(config, out_path, union, intersection, options)
        described = config.model_dump(mode="json", exclude_defaults=True)
        _refuse_ignored(described, type(config), None)
        tasks = original(config, out_path, union, intersection, options)
        return extend_plan(tasks, _record_of(described, out_path), str(options.device))

    module.plan_flat_merge = plan_flat_merge


def _is_ours(method: str) -> bool:
    return any(method == ours.spec.name for ours in METHODS)


def _refuse_ignored(config: Mapping[str, Any], model: type, raw: Any) -> None:
    """Refuse keys and parameters that mergekit would ignore silently."""
    problems = unknown_keys(raw, model) + parameter_problems(config, get(config["merge_method"]).spec)
    if problems:
        raise ConfigError(
            f"merge configuration: expected only keys and parameters that mergekit uses, got: {'; '.join(problems)}. "
            "Correct or remove them (mergekit would ignore them silently); `fusion merge-check` lists them all."
        )


def _record_of(config: Mapping[str, Any], out_path: str) -> MergeRecord:
    """Return an empty record of a merge, for a configuration as plain data."""
    # Not mergekit's referenced_models(): that is a set, and the record keeps the order of the configuration.
    names = []
    for part in [config, *(config.get("modules") or {}).values()]:
        names += [_name(model["model"]) for model in part.get("models") or []]
        names += [_name(source["model"]) for output in part.get("slices") or [] for source in output["sources"]]
    base = _name(config.get("base_model"))
    tuned = [name for name in dict.fromkeys(names) if name != base]
    return MergeRecord(Path(out_path), config["merge_method"], base, tuned, config)


def _name(reference: Any) -> str:
    """Return a model reference as mergekit prints it."""
    return str(ModelReference.model_validate(reference))
