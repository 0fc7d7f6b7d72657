"""Checks what mergekit plans: it plans the merge, and a rehearsal goes through the plan."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config, _set_chat_template
from mergekit.merge_methods.registry import get as get_method
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from fusion_plugins.errors import FusionError
from fusion_plugins.mergekit.adapters import SAVE_AGAIN
from fusion_plugins.mergekit.checkpoints import Checkpoint, read_tensor, stale_copies
from fusion_plugins.mergekit.findings import WIDTHS, MergeCheck, Say, architecture_of, short
from fusion_plugins.mergekit.methods import METHODS
from fusion_plugins.mergekit.quantized import BUFFERS
from fusion_plugins.mergekit.rehearsal import Rehearsal
from fusion_plugins.progress import meter

#: Problems of one kind that are listed.
LISTED = 3


def all_here(config: MergeConfiguration) -> bool:
    """Return whether all models and adapters are folders on this machine."""
    parts = [part for reference in references_of(config) for part in (reference.model, reference.lora)]
    return all(Path(part.path).is_dir() for part in parts if part is not None)


def rehearse_plan(
    config: MergeConfiguration,
    base: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    options: MergeOptions,
    check: MergeCheck,
    say: Say,
) -> None:
    """Let mergekit plan the merge, and go through its plan with the shapes of the tensors."""
    if not all_here(config):
        check.facts.append(("plan", "not checked, since a model is only on the hub; download all models to check it"))
        return
    models = {reference: checkpoints[str(reference)] for reference in references_of(config)}
    say("planning the merge")
    try:
        with _loaders(models, options):
            architecture = get_architecture_info(config, options)
            out_config = _model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
            # A copy, since planning rewrites the configuration.
            planner = MergePlanner(config.model_copy(deep=True), architecture, options, out_config)
            tasks = planner.plan_to_disk(out_path=os.devnull)  # nothing is written before the plan runs
        _set_chat_template(SimpleNamespace(), config)
    except FusionError as error:
        check.error(str(error), "correct the value")
        return
    except Exception as error:
        if any(reference.lora for reference in models) and isinstance(error, AssertionError):
            check.error(f"mergekit cannot merge adapters of a {architecture_of(base.config)}", SAVE_AGAIN)
        else:
            check.error(f"mergekit cannot plan this merge: {short(error)}", "correct what the message names")
        return
    say(f"following {len(tasks)} steps of the plan")
    rehearsal = Rehearsal(get_method(config.merge_method), models)
    with meter("merge-check", len(tasks)) as progress:
        found = []
        for problem in rehearsal.problems(tasks):
            progress.advance()
            found += [problem] if problem is not None else []
    for text, cure in found[:LISTED]:
        check.error(text, cure)
    if len(found) > LISTED:
        check.error(f"{len(found) - LISTED} more tensor(s) of the merged model have such problems", "see above")
    if not found:
        _find_dropped(architecture, rehearsal, base, check)
    _find_two_layouts(rehearsal, check)
    _find_stale(config, rehearsal, check)
    _find_rounded(config, rehearsal, check)


@contextmanager
def _loaders(models: Mapping[ModelReference, Checkpoint], options: MergeOptions) -> Iterator[None]:
    """Give mergekit's planner what it asks about stored tensors, and forget it afterwards: files may change.

    A model with an adapter is taken as the model: merging an adapter changes no name and no shape.
    """
    cache = LoaderCache()
    cache.setup(options)
    kept = dict(cache.loaders)
    for reference, checkpoint in models.items():
        assert checkpoint.stored is not None
        cache.loaders[reference] = LazyTensorLoader(checkpoint.stored.index, options.lazy_unpickle)
    try:
        yield
    finally:
        cache.loaders.clear()
        cache.loaders.update(kept)


def _find_dropped(architecture: Any, rehearsal: Rehearsal, base: Checkpoint, check: MergeCheck) -> None:
    """Find what mergekit will leave out: it writes the tensors that it knows of the architecture, and no others."""
    lost = list(rehearsal.lost_parameters(architecture, base))
    for text, cure in lost:
        check.error(text, cure)
    if lost:
        return
    named: set[str] = set()
    for checkpoint in sorted(rehearsal.models.values(), key=lambda one: one is not base):
        left = sorted(rehearsal.left_out(architecture, checkpoint) - named)
        named.update(left)
        if left:
            check.warning(
                f"mergekit leaves out {len(left)} tensor(s) of {checkpoint.name}, such as {left[0]}",
                "if the merged model needs them, merge the files with mergekit-pytorch instead",
            )


def _find_two_layouts(rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find folders with an index beside a single file that it does not name."""
    for checkpoint in rehearsal.models.values():
        index = checkpoint.stored.index if checkpoint.stored is not None else None
        for name in ("model.safetensors", "pytorch_model.bin"):
            folder = Path(index.base_path) if index is not None else Path(os.devnull)
            if (folder / name).is_file() and (folder / f"{name}.index.json").is_file():
                check.warning(
                    f"{folder} holds {name} and an index of shards: mergekit reads the shards, transformers the file",
                    "remove the one that is out of date",
                )


def _find_stale(config: MergeConfiguration, rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find copies of tensors that mergekit may read in place of those that the index means; our methods do not."""
    if any(method.spec.name == config.merge_method for method in METHODS):
        return
    for checkpoint in rehearsal.models.values():
        for name, file in stale_copies(checkpoint.stored) if checkpoint.stored is not None else ():
            check.error(
                f"{file} holds another copy of {name} than the file that the index names, and mergekit may merge it",
                "save or download the model again",
            )
            break


def _find_rounded(config: MergeConfiguration, rehearsal: Rehearsal, check: MergeCheck) -> None:
    """Find integers that mergekit would round by casting them to a dtype of floats; our methods do not."""
    dtypes = [dtype_from_name(name) for name in (config.dtype, config.out_dtype) if name in WIDTHS]
    if any(method.spec.name == config.merge_method for method in METHODS):
        return
    for reference, checkpoint in rehearsal.models.items():
        for name in sorted(rehearsal.read[reference]):
            if checkpoint.tensors[name].dtype not in BUFFERS or checkpoint.stored is None:
                continue
            tensor = read_tensor(checkpoint.stored, name)
            if any(not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for dtype in dtypes):
                check.error(
                    f"{name} of {checkpoint.name} holds integers that dtype {config.dtype} or out_dtype rounds",
                    "leave out dtype and out_dtype, or merge with varm, which copies integers",
                )
                return


def references_of(config: MergeConfiguration) -> list[ModelReference]:
    """Return the models of a configuration, by name."""
    return sorted(config.referenced_models(), key=str)
