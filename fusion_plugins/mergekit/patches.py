"""Where our part of a merge enters mergekit: its planner and the functions that plan and run a merge.

A merge with a method that is not ours passes through unchanged; only the record of an earlier merge into its folder is
removed.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.registry import get
from safetensors import SafetensorError

from fusion_plugins.errors import ConfigError, FusionError, MergeError
from fusion_plugins.escape import for_terminal
from fusion_plugins.mergekit.adapters import adapter_problems
from fusion_plugins.mergekit.checkpoints import (
    Checkpoint,
    IndexedLoader,
    first_line,
    read_config,
    read_file,
    read_folder,
    read_index,
)
from fusion_plugins.mergekit.ignored_keys import parameter_problems, unknown_keys
from fusion_plugins.mergekit.methods import METHODS
from fusion_plugins.mergekit.plan import extend_plan
from fusion_plugins.mergekit.quantized import different_integers, require_mergeable
from fusion_plugins.mergekit.record import MergeRecord, append_card, remove_record, require_writable
from fusion_plugins.mergekit.rehearsal import Rehearsal, require_sound

#: What a merge raises for wrong files and settings: our errors, and those of mergekit and the libraries below it.
CAUSED_BY_USERS = (FusionError, OSError, SafetensorError, RuntimeError, ValueError)


def extend_merge(module: Any) -> None:
    """Extend ``mergekit.merge``, which ``mergekit-yaml`` and ``mergekit-multi`` run."""
    original, planner = module.run_merge, module.MergePlanner

    class FusionPlanner(planner):  # type: ignore[misc, valid-type]
        def plan_to_disk(self, out_path: str) -> list[Any]:
            if not _is_ours(self.config.merge_method):
                return super().plan_to_disk(out_path)  # type: ignore[no-any-return]
            # Before planning: it rewrites the configuration in place (models become slices).
            config = self.config.model_dump(mode="json", exclude_defaults=True)
            models = self._read(self.config.referenced_models())
            base = models[self.config.base_model or next(iter(models))]
            tasks = super().plan_to_disk(out_path)
            stored = {str(reference): model.stored for reference, model in models.items() if model.stored is not None}
            extended = extend_plan(tasks, _record_of(config, out_path), stored, str(self.options.device))
            require_sound(tasks, Rehearsal(get(self.config.merge_method), models), self.arch_info, base)
            remove_record(Path(out_path))  # only now: a merge that is refused leaves the old weights there
            return extended

        def _read(self, references: Iterable[ModelReference]) -> dict[ModelReference, Checkpoint]:
            """Read what the models are stored in, and make mergekit read them as their index says."""
            loaders, models = LoaderCache(), {}
            for reference in references:
                loader = loaders.get(reference)
                stored = read_index(loader.index)
                config = read_config(reference, trust_remote_code=self.options.trust_remote_code)
                models[reference] = Checkpoint(str(reference), config, stored.tensors, None, None, stored)
                if not isinstance(loader, IndexedLoader):
                    loaders.loaders[reference] = IndexedLoader(loader.index, loader.lazy_unpickle)
            return models

    @wraps(original)
    def run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> Any:
        if not _is_ours(merge_config.merge_method):
            remove_record(Path(out_path))
            return original(merge_config, out_path, options=options, config_source=config_source)
        with _told_in_one_sentence():
            # The source still has the keys that mergekit dropped when it read the configuration.
            raw = yaml.safe_load(config_source) if config_source else None
            _refuse_ignored(merge_config.model_dump(mode="json", exclude_defaults=True), type(merge_config), raw)
            _refuse_unreadable(merge_config.referenced_models(), options)
            require_writable(Path(out_path))
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
            remove_record(Path(out_path))
            return original(config, out_path, union, intersection, options)  # type: ignore[no-any-return]
        with _told_in_one_sentence():
            described = config.model_dump(mode="json", exclude_defaults=True)
            _refuse_ignored(described, type(config), None)
            require_writable(Path(out_path))
            files = dict.fromkeys([config.base_model, *(model.model for model in config.models)])
            stored = {file: read_file(Path(file)) for file in files if file is not None}
            tasks = original(config, out_path, union, intersection, options)
            for text, cure in different_integers(stored, set().union(*(model.tensors for model in stored.values()))):
                raise MergeError(f"{text}: {cure}.")
            tasks = extend_plan(tasks, _record_of(described, out_path), stored, str(options.device))
            remove_record(Path(out_path))
            return tasks

    module.plan_flat_merge = plan_flat_merge
    command = module.main.callback

    @wraps(command)
    def callback(*arguments: Any, **options: Any) -> Any:
        with _told_in_one_sentence((FusionError,)):
            return command(*arguments, **options)

    module.main.callback = callback


def _refuse_unreadable(references: Iterable[ModelReference], options: Any) -> None:
    """Refuse what makes a merge fail, or its result noise, while nothing is removed or written yet."""
    stored = {}
    for reference in references:
        config = read_config(reference, trust_remote_code=options.trust_remote_code)
        if reference.lora is not None:
            for text, cure in adapter_problems(reference, config, options.lora_merge_cache):
                raise MergeError(f"{text}: {cure}.")
        if Path(reference.model.path).is_dir():
            stored[str(reference)] = read_folder(Path(reference.model.path))
    require_mergeable(stored)


@contextmanager
def _told_in_one_sentence(errors: tuple[type[Exception], ...] = CAUSED_BY_USERS) -> Iterator[None]:
    """Inside a command of mergekit, turn what a user can cause into one message and exit status 1.

    From Python code, errors pass unchanged.

    Args:
        errors: the types to turn.
    """
    try:
        yield
    except errors as error:
        if click.get_current_context(silent=True) is None:
            raise
        text = str(error) if isinstance(error, FusionError) else f"the merge stopped: {first_line(error)}"
        raise click.ClickException(for_terminal(text)) from error


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
