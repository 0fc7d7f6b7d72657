"""Where our part of a merge enters mergekit: its planner, the commands that run a plan, and nothing else.

A merge with a method that is not ours goes through unchanged.
"""

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

from fusion_plugins.errors import ConfigError
from fusion_plugins.mergekit.record import MergeRecord, append_card

__all__ = ["extend_merge", "extend_raw_merge"]


def extend_merge(module: Any) -> None:
    """Extend ``mergekit.merge``, which ``mergekit-yaml`` and ``mergekit-multi`` run."""
    from fusion_plugins.mergekit.plan import extend_plan

    original, planner = module.run_merge, module.MergePlanner

    class RecordingPlanner(planner):  # type: ignore[misc, valid-type]
        def plan_to_disk(self, out_path: str) -> list[Any]:
            config = self.config.model_dump(mode="json", exclude_defaults=True)  # planning changes it
            tasks = super().plan_to_disk(out_path)
            if not is_ours(self.config.merge_method):
                return tasks
            return extend_plan(tasks, record_of(config, out_path), str(self.options.device))

    @wraps(original)
    def run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> Any:
        if not is_ours(merge_config.merge_method):
            return original(merge_config, out_path, options=options, config_source=config_source)
        raw = yaml.safe_load(config_source) if config_source else None
        refuse_misspelt(merge_config.model_dump(mode="json", exclude_defaults=True), type(merge_config), raw)
        result = original(merge_config, out_path, options=options, config_source=config_source)
        append_card(Path(out_path))
        return result

    module.MergePlanner = RecordingPlanner
    module.run_merge = run_merge


def extend_raw_merge(module: Any) -> None:
    """Extend ``mergekit.scripts.merge_raw_pytorch``, which is ``mergekit-pytorch``."""
    from fusion_plugins.mergekit.plan import extend_plan

    original = module.plan_flat_merge

    @wraps(original)
    def plan_flat_merge(config: Any, out_path: str, union: bool, intersection: bool, options: Any) -> list[Any]:
        if not is_ours(config.merge_method):
            return original(config, out_path, union, intersection, options)
        described = config.model_dump(mode="json", exclude_defaults=True)
        refuse_misspelt(described, type(config), None)
        tasks = original(config, out_path, union, intersection, options)
        return extend_plan(tasks, record_of(described, out_path), str(options.device))

    module.plan_flat_merge = plan_flat_merge


def is_ours(method: str) -> bool:
    """Return whether a merge method comes from here."""
    from fusion_plugins.mergekit.methods import METHODS

    return any(method == ours.spec.name for ours in METHODS)


def record_of(config: Mapping[str, Any], out_path: str) -> MergeRecord:
    """Return an empty record of a merge.

    Args:
        config: the merge configuration as plain data, before mergekit plans with it.
        out_path: where the merged model goes.
    """
    base = _name(config.get("base_model"))
    tuned = [name for name in _referenced(config) if name != base]
    return MergeRecord(Path(out_path), config["merge_method"], base, list(dict.fromkeys(tuned)), config)


def refuse_misspelt(config: Mapping[str, Any], model: type, raw: Any) -> None:
    """Refuse what mergekit would ignore.

    Raises:
        ConfigError: names every unknown key and parameter.
    """
    from mergekit.merge_methods.registry import get

    from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys

    problems = unknown_keys(raw, model) + parameter_problems(config, get(config["merge_method"]).spec)
    if problems:
        raise ConfigError("the merge configuration: " + "; ".join(problems))


def _referenced(config: Mapping[str, Any]) -> list[str]:
    names = [_name(model["model"]) for model in config.get("models") or []]
    for part in [config, *(config.get("modules") or {}).values()]:
        names += [_name(model["model"]) for model in part.get("models") or [] if part is not config]
        names += [_name(source["model"]) for output in part.get("slices") or [] for source in output["sources"]]
    return names


def _name(reference: Any) -> str:
    """A model reference as mergekit prints it."""
    from mergekit.common import ModelReference

    return str(ModelReference.model_validate(reference))
