"""Statistics of units that are larger than a tensor, from one lazy pass over the checkpoints.

mergekit hands a method one tensor at a time, but the weight of a module, a layer or a model depends on all its tensors.
So the plan of a merge gets one :class:`UnitStatistics` task per unit, and the merges of the unit's tensors depend on
it. It runs the same tasks that load the inputs of those merges, one tensor at a time, in an executor of its own. This
way the statistics see whatever mergekit does between the file and the method (slices, tied and renamed tensors,
converted experts, LoRA, permuted or truncated vocabularies), and memory holds one tensor of each model. The graph keeps
the result, a few numbers, until the last tensor of the unit is merged.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference
from mergekit.graph import Executor, Task, TaskUniverse
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.task_adapter import MergeTensorInput, TensorDictWrapper
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from pydantic import ConfigDict, SkipValidation

from fusion_plugins.core.merging.deltas import delta_sums, require_finite, require_weights
from fusion_plugins.errors import MergeError
from fusion_plugins.mergekit.methods import UnitSums

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Unit:
    """The tensors that share one weight per model.

    A unit is equal only to itself, so that mergekit's graph, which hashes tasks often, hashes it by its identity.

    Attributes:
        name: of the unit, such as ``model.layers.3.mlp``.
        measure: square or abs.
        models: all inputs in the order of the plan, the base included.
        base_model: which of them is the base.
        device: where to compute.
        inputs: name of the output tensor -> task that loads its inputs.
    """

    name: str
    measure: str
    models: tuple[ModelReference, ...]
    base_model: ModelReference
    device: str
    inputs: dict[str, Any] = field(default_factory=dict)


class UnitStatistics(Task[UnitSums]):
    """Sums the differences over all tensors of a unit."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    unit: SkipValidation[Unit]
    tokenizer: BuildTokenizer | None = None

    def arguments(self) -> dict[str, Task]:
        """Depend on mergekit's tokenizer where vocabularies are permuted."""
        return {"tokenizer_info": self.tokenizer} if self.tokenizer is not None else {}

    def main_thread_only(self) -> bool:
        """Run before the threads of a multi-GPU merge start, unless the tokenizer is built in one of them."""
        return self.tokenizer is None

    def execute(self, **arguments: Any) -> UnitSums:
        """Read the tensors of the unit, one after the other, and return their sums."""
        unit = self.unit
        LOG.info("Statistics of %s over %d tensors", unit.name, len(unit.inputs))
        universe = TaskUniverse()
        targets = [
            universe.add_task(DeltaSums(unit=unit, name=name, inputs=uncast(unit.inputs[name])[0]))
            for name in unit.inputs
        ]
        # The outer executor has built the tokenizer already. It must not be built again for every unit.
        cached = {}
        if self.tokenizer is not None:
            cached[universe.add_task(self.tokenizer)] = arguments["tokenizer_info"]
        executor = Executor(targets, math_device=unit.device, storage_device="cpu", cached_values=cached)
        found = [value for _, value in executor.run(quiet=True) if value is not None]
        # Unmap the files: pages that were read count as memory of this process until then.
        LoaderCache().flush_all()
        return UnitSums([sums for sums, _ in found], [size for _, size in found])


class DeltaSums(Task[tuple[torch.Tensor, int] | None]):
    """The sums of one tensor: (J,) float64 and the number of elements, or None for what is copied, not merged."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    unit: SkipValidation[Unit]
    name: str
    inputs: MergeTensorInput

    def arguments(self) -> dict[str, Task]:
        """Depend on the loaded tensors."""
        return {"tensors": self.inputs}

    def group_label(self) -> str | None:
        """Keep mergekit's order of loading."""
        return self.inputs.group_label()

    def uses_accelerator(self) -> bool:
        """Compute where mergekit computes."""
        return True

    def execute(self, tensors: Mapping[ModelReference, torch.Tensor | None]) -> tuple[torch.Tensor, int] | None:
        """Return the sums; refuse tensors that are missing, differ in shape, or hold codes or NaN."""
        unit = self.unit
        found = {model: tensor for model in unit.models if (tensor := tensors.get(model)) is not None}
        # mergekit copies such tensors without asking the method: optional ones of the base alone, and integers.
        if set(found) == {unit.base_model} or not all(tensor.is_floating_point() for tensor in found.values()):
            return None
        missing = [str(model) for model in unit.models if model not in found]
        if missing:
            raise MergeError(
                f"tensor {self.name!r} of the unit {unit.name!r}: expected it in all models, got none from "
                f"{', '.join(missing)}. Give this tensor granularity matrix with a filter: a larger unit needs all its "
                "tensors in all models."
            )
        base = found.pop(unit.base_model)
        for model, tensor in found.items():
            if tensor.shape != base.shape:
                raise MergeError(
                    f"tensor {self.name!r} of {model}: expected shape {tuple(base.shape)} as in {unit.base_model}, got "
                    f"{tuple(tensor.shape)}. Vocabularies of different size need tokenizer: {{source: base}}; other "
                    "shapes must be the same."
                )
        labelled = {str(model): tensor for model, tensor in {unit.base_model: base, **found}.items()}
        require_weights(self.name, labelled)
        sums = delta_sums(base, list(found.values()), unit.measure)
        require_finite(sums, self.name, labelled)
        return sums, base.numel()


def uncast(inputs: Task) -> tuple[Task, str | None]:
    """Return the loading task without the cast to ``dtype``, and the dtype that the result is then to have.

    Our functions take the differences of the stored numbers in float32, one chunk at a time, and round the result once.
    A cast to bfloat16 or float16 before that would round the differences of light fine-tunes away, and copies in
    float32 would take time and memory. The dtype is None where the task is returned as it was: without a cast, with one
    to float64, and to float32 where mergekit makes rows for new tokens, which it does in the dtype of the inputs.
    """
    gather = inputs.gather_tensors if isinstance(inputs, PermutedVocabulary | TruncatedVocabulary) else inputs
    loads = list(gather.tensors.values()) if isinstance(gather, TensorDictWrapper) else [gather]
    dtype = next((dtype for load in loads if (dtype := getattr(load, "dtype", None))), None)
    leave = ("float32",) if isinstance(inputs, PermutedVocabulary) else ()
    if dtype is None or dtype.removeprefix("torch.") not in {"float32", "bfloat16", "float16"}.difference(leave):
        return inputs, None
    if isinstance(gather, TensorDictWrapper):
        uncast = {model: load.model_copy(update={"dtype": None}) for model, load in gather.tensors.items()}
        return gather.model_copy(update={"tensors": ImmutableMap(uncast)}), dtype
    stored = gather.model_copy(update={"dtype": None})
    return stored if gather is inputs else inputs.model_copy(update={"gather_tensors": stored}), dtype
