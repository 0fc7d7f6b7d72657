"""What a planned merge gets from us: statistics of large units, and a record of the weights.

mergekit plans a merge as a graph of tasks: one ``SaveTensor`` per output tensor, which depends on one
``ExecuteMergeMethodTask``, and one ``FinalizeModel``, which depends on all ``SaveTensor`` tasks. :func:`extend_plan`
rebuilds this graph for a merge with one of our methods:

- every ``ExecuteMergeMethodTask`` becomes a :class:`FusionMergeTask`. That is mergekit's own task, which also depends
  on the statistics of its unit and gives the method a :class:`~fusion_plugins.mergekit.methods.Planned`;
- a last task writes the record.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ImmutableMap, ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import FinalizeModel, GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from pydantic import ConfigDict, SkipValidation

from fusion_plugins.core.merging.varm import ACROSS_TENSORS, unit_of
from fusion_plugins.errors import MergeError
from fusion_plugins.mergekit.checkpoints import Stored
from fusion_plugins.mergekit.methods import Planned, UnitSums
from fusion_plugins.mergekit.quantized import BUFFERS, require_mergeable
from fusion_plugins.mergekit.record import MergeRecord
from fusion_plugins.mergekit.unit_sums import Unit, UnitStatistics, uncast


class FusionMergeTask(ExecuteMergeMethodTask):
    """mergekit's merge of one tensor, with what the plan knows as one more argument of the method."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    record: SkipValidation[MergeRecord]
    statistics: UnitStatistics | None = None
    result_dtype: str | None = None  # where the configuration says one

    def arguments(self) -> dict[str, Task]:
        """Depend on the statistics of the unit, besides the tensors."""
        unit = {"unit": self.statistics} if self.statistics is not None else {}
        return super().arguments() | unit

    def execute(
        self, tensors: dict[ModelReference, torch.Tensor], unit: UnitSums | None = None, **_: Any
    ) -> torch.Tensor | None:
        """Merge."""
        dtype = dtype_from_name(self.result_dtype)
        # mergekit's task calls the method with its `parameters`, so this is how one more argument gets there.
        parameters = {**dict(self.parameters.items()), "planned": Planned(self.record, unit, dtype)}
        task = self.model_copy(update={"parameters": ImmutableMap(parameters)})
        merged = super(FusionMergeTask, task).execute(tensors)
        # What mergekit copies without asking the method has the dtype of the checkpoint.
        if dtype is None or merged is None or not merged.is_floating_point():
            return merged
        merged = merged.to(dtype)
        if dtype == torch.float16 and not bool(merged.isfinite().all()):
            raise MergeError(
                f"tensor {self.output_weight.name!r}: expected numbers of at most 65,504, the largest of float16, got "
                "larger ones. Set dtype or out_dtype to bfloat16 or float32."
            )
        return merged


class WriteRecord(Task[None]):
    """Writes the record when the checkpoint is complete."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    finalize: FinalizeModel
    record: SkipValidation[MergeRecord]

    def arguments(self) -> dict[str, Task]:
        """Wait for the checkpoint."""
        return {"_finalize": self.finalize}

    def main_thread_only(self) -> bool:
        """Run after the threads of a multi-GPU merge."""
        return True

    def execute(self, **_: Any) -> None:
        """Write."""
        self.record.write()


def extend_plan(tasks: Sequence[Task], record: MergeRecord, stored: Mapping[str, Stored], device: str) -> list[Task]:
    """Return the planned tasks with our merge tasks in them, and one that writes the record.

    Args:
        tasks: what mergekit planned.
        record: where the weights go.
        stored: model -> what it is stored in.
        device: where mergekit computes.

    Raises:
        MergeError: a model is quantized.
    """
    # Here, since ``dtype`` makes mergekit cast codes to floats before a method sees them.
    require_mergeable(stored)
    merges = [task.tensor_task for task in tasks if isinstance(task, SaveTensor)]
    tokenizer = next((task for task in tasks if isinstance(task, BuildTokenizer)), None)
    statistics = _plan_units([task for task in merges if isinstance(task, ExecuteMergeMethodTask)], device, tokenizer)
    saves: list[Task] = []
    others: list[Task] = []
    for task in tasks:
        # Tasks are immutable and hold the tasks they depend on, so a new merge task needs a new SaveTensor, and new
        # SaveTensor tasks need a new FinalizeModel. mergekit lists it after all SaveTensor tasks.
        if isinstance(task, SaveTensor):
            merge = _extended(task.tensor_task, record, statistics, task.dtype)
            dtype = task.dtype
            if isinstance(merge, FusionMergeTask) and _reads_integers(merge, stored):
                # Positions and counters, which a cast to the dtype of the weights would round.
                merge, dtype = _uncast(merge), None
            saves.append(task.model_copy(update={"tensor_task": merge, "dtype": dtype}))
        elif isinstance(task, FinalizeModel):
            finalize = task.model_copy(update={"tensor_save_tasks": tuple(saves)})
            others += [finalize, WriteRecord(finalize=finalize, record=record)]
        else:
            others.append(task)
    return saves + others


def _plan_units(
    merges: Sequence[ExecuteMergeMethodTask], device: str, tokenizer: BuildTokenizer | None
) -> dict[str, UnitStatistics]:
    """Return output tensor -> statistics of its unit, for the tensors whose unit is larger than a tensor.

    A unit holds the tensors of one module, layer or model that are merged with the same granularity, the same measure
    and the same models: a filter or a slice that changes one of these divides the unit.
    """
    units: dict[tuple[Any, ...], Unit] = {}
    member_of: dict[str, tuple[Any, ...]] = {}
    for merge in merges:
        settings = dict(merge.parameters.items())
        granularity = settings.get("granularity")  # None for methods that have no such parameter
        if granularity not in ACROSS_TENSORS or merge.base_model is None:
            continue
        name = merge.output_weight.name
        key = (unit_of(name, granularity), granularity, settings["measure"], merge.model_order, merge.base_model)
        unit = units.setdefault(key, Unit(key[0], settings["measure"], merge.model_order, merge.base_model, device))
        unit.inputs[name] = merge.gather_tensors
        member_of[name] = key
    tasks = {}
    for key, unit in units.items():
        permuted = any(isinstance(inputs, PermutedVocabulary) for inputs in unit.inputs.values())
        tasks[key] = UnitStatistics(unit=unit, tokenizer=tokenizer if permuted else None)
    return {name: tasks[key] for name, key in member_of.items()}


def _reads_integers(merge: FusionMergeTask, stored: Mapping[str, Stored]) -> bool:
    gather = merge.gather_tensors
    if not isinstance(gather, GatherTensors):
        return False
    named = [stored[str(model)].tensors.get(weight.name) for model, weight in gather.weight_info.items()]
    return any(info is not None and info.dtype in BUFFERS for info in named)


def _uncast(merge: FusionMergeTask) -> FusionMergeTask:
    gather = merge.gather_tensors.model_copy(update={"dtype": None})
    return merge.model_copy(update={"gather_tensors": gather, "result_dtype": None})


def _extended(task: Task, record: MergeRecord, statistics: dict[str, UnitStatistics], saved_as: str | None) -> Task:
    if not isinstance(task, ExecuteMergeMethodTask):
        return task
    fields = {name: getattr(task, name) for name in ExecuteMergeMethodTask.model_fields}
    fields["gather_tensors"], dtype = uncast(task.gather_tensors)
    if dtype is not None:
        fields["dtype"] = None  # mergekit-pytorch's, which casts the inputs too
    # Constructed, not validated: every value was validated in the task that it is taken from.
    return FusionMergeTask.model_construct(
        **fields,
        record=record,
        statistics=statistics.get(task.output_weight.name),
        result_dtype=saved_as or task.out_dtype or dtype,
    )
