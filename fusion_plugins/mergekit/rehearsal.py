"""Goes through the plan of a merge with the shapes of the stored tensors, as the merge will with the tensors.

mergekit plans a merge without a look at the tensors. What does not fit (a tensor that is missing, another shape, a
token beyond the vocabulary) stops the merge when it gets there. The rehearsal takes the same tasks, and tensors without
memory: it finds all of this within seconds, and what the merge would leave out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mergekit.architecture.conversion import can_convert_checkpoint_keys, convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, LoadTensor, SaveTensor
from mergekit.merge_methods.base import MergeMethod, OptionalTensorPolicy, TensorEntry, TensorGroup, TensorMetadata
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary

from fusion_plugins.errors import MergeError
from fusion_plugins.mergekit.adapters import meta_model
from fusion_plugins.mergekit.checkpoints import Checkpoint, first_line
from fusion_plugins.mergekit.quantized import different_integers

ONE_BASE = "give tuned models of one base; fuse other models by training"
SAVED_ALIKE = "save all models in the same way, with all their tensors"
RAW = "merge the files with mergekit-pytorch instead, which needs no description of the architecture"
ALIGN = "add tokenizer: {source: base} (or union) to the configuration"
TOKENIZERS = "give every model a tokenizer that fits it, or leave out tokenizer and tokenizer_source"


@dataclass
class Rehearsal:
    """A plan, and the models that it reads.

    Attributes:
        method: mergekit's merge method.
        models: reference -> what is known of the model.
        read: reference -> names of the stored tensors that the merge reads; filled by :meth:`problems`.
    """

    method: MergeMethod
    models: Mapping[ModelReference, Checkpoint]
    read: dict[ModelReference, set[str]] = field(default_factory=dict)

    def problems(self, tasks: Sequence[Task]) -> Iterator[tuple[str, str] | None]:
        """Yield (problem, cure), or None, after every tensor of the merged model.

        Args:
            tasks: the plan; what it writes is not written.
        """
        self.read = {model: set() for model in self.models}
        tokenizer = next((task for task in tasks if isinstance(task, BuildTokenizer)), None)
        built = None
        if tokenizer is not None:
            try:
                built = tokenizer.execute()
            except Exception as error:
                yield f"mergekit cannot build the tokenizer of the merged model: {first_line(error)}", TOKENIZERS
        for task in tasks:
            if isinstance(task, SaveTensor) and isinstance(task.tensor_task, ExecuteMergeMethodTask):
                yield self._problem_of(task.tensor_task, built, unaligned=tokenizer is None)
        stored = {model.name: model.stored for model in self.models.values() if model.stored is not None}
        yield from different_integers(stored, set().union(*self.read.values()))

    def left_out(self, architecture: Any, checkpoint: Checkpoint) -> set[str]:
        """Return the stored tensors of a model that mergekit does not merge, after :meth:`problems`.

        Args:
            architecture: mergekit's description of the models.
            checkpoint: one of the models.
        """
        weights = architecture.all_weights(checkpoint.config)
        known = {name for each in weights for name in (each.name, *(each.aliases or ()), *(each.tied_names or ()))}
        read = next(names for model, names in self.read.items() if self.models[model] is checkpoint)
        return {name for name in set(checkpoint.tensors) - read - known if not name.endswith("inv_freq")}

    def lost_parameters(self, architecture: Any, base: Checkpoint) -> Iterator[tuple[str, str]]:
        """Yield (problem, cure) if the merged model would lack parameters that the base has, after :meth:`problems`."""
        left = self.left_out(architecture, base)
        if not left:
            return
        try:
            parameters = meta_model(base.config).state_dict()
        except Exception:  # transformers does not know the model: then nobody can tell what it needs
            return
        lost = [name for name in parameters if can_convert_checkpoint_keys(base.config.model_type, left, name)]
        if lost:
            yield (
                f"mergekit does not know {len(lost)} parameter(s) of {base.name}, such as {lost[0]}, or not all models "
                "have them: they would be missing from the merged model",
                f"if all models have them: {RAW}",
            )

    def _problem_of(self, merge: ExecuteMergeMethodTask, tokenizer: Any, *, unaligned: bool) -> tuple[str, str] | None:
        inputs = merge.gather_tensors
        permuted = isinstance(inputs, PermutedVocabulary)
        gather = inputs.gather_tensors if isinstance(inputs, PermutedVocabulary) else inputs
        if not isinstance(gather, GatherTensors):
            return None
        loads = [task for task in gather.arguments().values() if isinstance(task, LoadTensor)]
        tensors: dict[ModelReference, torch.Tensor] = {}
        missing = []
        for load in loads:
            tensor = self._shape_of(load)
            if tensor is not None:
                tensors[load.model] = tensor
            elif not load.optional:
                missing.append(load)
        if missing:
            text = f"{missing[0].model} has no tensor {missing[0].tensor}, which the merge needs"
            return text, SAVED_ALIKE if tensors else RAW
        if permuted and tokenizer is not None:
            try:
                tensors = inputs.execute(tokenizer_info=tokenizer, tensors=tensors)
            except Exception as error:
                text = f"mergekit cannot bring the rows of {merge.output_weight.name} into one order: "
                return text + _vocabulary_reason(error, tokenizer, tensors), TOKENIZERS
        return self._unlike(merge, tensors, unaligned=unaligned) if not permuted or tokenizer is not None else None

    def _unlike(
        self, merge: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, torch.Tensor], *, unaligned: bool
    ) -> tuple[str, str] | None:
        """Check one group of tensors as mergekit's task does before it calls the method."""
        name = merge.output_weight.name
        present = [model for model in merge.model_order if model in tensors]
        absent = [str(model) for model in merge.model_order if model not in tensors]
        if absent and self._copied(merge, present):
            return None
        policy, contract = self.method.spec.optional_tensor_policy, self.method.spec.contract
        if absent and policy == OptionalTensorPolicy.BASE_OR_SKIP and len(present) < contract.min_inputs:
            return f"{name} is missing from {', '.join(absent)} and would be left out of the merged model", SAVED_ALIKE
        try:
            self.method.validate_inputs(present, merge.base_model, group_name=name)
        except ValueError as error:
            return f"{name} is missing from {', '.join(absent)} ({error})", SAVED_ALIKE
        if absent:
            return f"{name} is missing from {', '.join(absent)} and would be merged from the others only", SAVED_ALIKE
        anchor = merge.base_model if merge.base_model in tensors else present[0]
        for model in present:
            ours, theirs = list(tensors[anchor].shape), list(tensors[model].shape)
            if ours == theirs:
                continue
            text = f"{name} is {theirs} in {model} and {ours} in {anchor}"
            rows_only = merge.output_weight.vocabulary_axis is not None and ours[1:] == theirs[1:]
            return (f"vocabularies differ: {text}", ALIGN) if rows_only and unaligned else (text, ONE_BASE)
        entries = tuple(TensorEntry(model, tensors[model], model == merge.base_model) for model in present)
        try:
            TensorGroup(entries, TensorMetadata.from_weight_info(merge.output_weight)).validate_tensors()
        except ValueError as error:
            return str(error), ONE_BASE
        return None

    def _copied(self, merge: ExecuteMergeMethodTask, present: Sequence[ModelReference]) -> bool:
        """Return whether mergekit copies an optional tensor of one model without asking the method."""
        if not merge.output_weight.optional or len(present) != 1:
            return False
        is_base = present[0] == merge.base_model
        policy, contract = self.method.spec.optional_tensor_policy, self.method.spec.contract
        return (
            policy == OptionalTensorPolicy.PASSTHROUGH_SINGLETON
            or (policy == OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and is_base)
            or (policy == OptionalTensorPolicy.BASE_OR_SKIP and is_base and contract.min_inputs > 1)
        )

    def _shape_of(self, load: LoadTensor) -> torch.Tensor | None:
        """Return the tensor that mergekit would load, without memory; None if the model has none."""
        checkpoint = self.models[load.model]
        for name in (load.tensor, *(load.aliases or ()), *(load.tied_names or ())):
            if name in checkpoint.tensors:
                return self._read(load.model, name)
        # transformers may store a tensor in parts or under another name, such as one tensor for every expert.
        sources = {name: lambda name=name: self._read(load.model, name) for name in checkpoint.tensors}
        for target in (load.tensor, *(load.aliases or ())):
            try:
                converted = convert_checkpoint_tensors(checkpoint.config.model_type, sources, target)
            except Exception:
                return None  # parts that do not fit together: the merge stops here, too
            if converted is not None:
                return converted
        return None

    def _read(self, model: ModelReference, name: str) -> torch.Tensor:
        self.read[model].add(name)
        info = self.models[model].tensors[name]
        return torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")


def require_sound(tasks: Sequence[Task], rehearsal: Rehearsal, architecture: Any, base: Checkpoint) -> None:
    """Refuse a plan that would stop later, or lose parameters.

    Args:
        tasks: the plan.
        rehearsal: of it.
        architecture: mergekit's description of the models.
        base: the model whose configuration the merged model gets.

    Raises:
        MergeError: names the first problem and the cure.
    """
    found = [problem for problem in rehearsal.problems(tasks) if problem is not None]
    for text, cure in found or rehearsal.lost_parameters(architecture, base):
        raise MergeError(f"{text}: {cure}.")


def _vocabulary_reason(error: Exception, tokenizer: Any, tensors: Mapping[ModelReference, torch.Tensor]) -> str:
    """Say which token of which model has no row, where that is the reason."""
    for model in tensors:
        known = tokenizer.permutations[model]
        beyond = [token for token, index in tokenizer.tokenizer.get_vocab().items() if index not in known]
        if beyond:
            return f"{len(beyond)} token(s) of the tokenizer of {model} have no row, such as {beyond[0]!r}"
    return first_line(error)
