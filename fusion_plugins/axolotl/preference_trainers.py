"""axolotl's preference trainers for rows that are tokenized already: `prompt_ids`, `chosen_ids` and `rejected_ids`.

TRL tokenizes a prompt alone and with its answer, and cuts the second at the length of the first. Where prompt and
answer share a token, that is not where the answer begins; and it adds special tokens that the chat template has written
itself. Our rows are cut in the tokens of the whole text. Rows of other dataset types are prepared as ever.

Three trainers have losses that TRL lacks, and are chosen with ``trainer_cls``: :class:`WRPOTrainer`,
:class:`InfiFPOTrainer` and :class:`FusePOTrainer`. Their formulas are in
:mod:`fusion_plugins.core.preferences.losses`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from axolotl.core.trainers import AxolotlCPOTrainer, AxolotlORPOTrainer
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.utils.collators.dpo import AxolotlDPODataCollatorWithPadding
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import selective_log_softmax, use_adapter

from fusion_plugins.axolotl.response_args import WRPOArgs
from fusion_plugins.core.preferences.losses import PAIR_LOSSES, wrpo, wrpo_alpha

#: the columns of a tokenized row
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
#: TRL's columns of a reference that was computed before
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_NUMBERS = (*REFERENCE_COLUMNS, "weight")


class TokenizedDPOTrainer(AxolotlDPOTrainer):
    """DPO and IPO."""

    #: kinds of answers of a row, in the order of a batch
    answers: tuple[str, ...] = ("chosen", "rejected")
    #: columns of a row with one number
    numbers: tuple[str, ...] = ()

    data_collator: Any
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, data_collator: Any = None, **kwargs: Any) -> None:
        # What axolotl brings for `pad_to_multiple_of` knows the columns of earlier versions of TRL alone.
        if isinstance(data_collator, AxolotlDPODataCollatorWithPadding):
            kwargs["args"].pad_to_multiple_of = data_collator.pad_to_multiple_of
            data_collator = None
        super().__init__(*args, data_collator=data_collator, **kwargs)
        self.data_collator = _Collator(self.data_collator, self.answers, self.numbers)

    @property
    def _columns(self) -> list[str]:
        return ["prompt_ids", *(f"{name}_ids" for name in self.answers), *self.numbers]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*(self._signature_columns or ()), *self._columns}]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return super()._compute_loss(model, _as_floats(inputs), return_outputs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave tokenized rows as they are, and let TRL tokenize the others."""
        if not isinstance(dataset, Dataset) or not set(IDS) <= set(dataset.column_names):
            return super()._prepare_dataset(dataset, *args, **kwargs)
        tokenized = [ids is not None for ids in dataset["prompt_ids"]]
        ours = dataset.select([row for row, found in enumerate(tokenized) if found]).select_columns(self._columns)
        if all(tokenized):
            return ours
        others = dataset.select([row for row, found in enumerate(tokenized) if not found]).remove_columns(list(IDS))
        prepared = super()._prepare_dataset(others, *args, **kwargs).select_columns(list(IDS))
        return concatenate_datasets([ours, prepared.cast(ours.features)])


class _TokenizedRows:
    """What CPO and ORPO have in common: they tokenize row by row."""

    def tokenize_row(self, feature: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return ids, mask and labels of both conversations and of their prompt."""
        if feature.get("prompt_ids") is None:
            row: dict[str, Any] = super().tokenize_row(feature, *args, **kwargs)  # type: ignore[misc]
            return row
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return row


class TokenizedCPOTrainer(_TokenizedRows, AxolotlCPOTrainer):
    """SimPO."""


class TokenizedORPOTrainer(_TokenizedRows, AxolotlORPOTrainer):
    """ORPO."""


class InfiFPOTrainer(TokenizedDPOTrainer):
    """InfiFPO (arXiv 2505.13878): DPO against the sources instead of a reference model.

    The reference's log-probabilities are columns of the dataset, ``ref_chosen_logps`` and ``ref_rejected_logps``, which
    ``fusion.reference`` makes; so no reference model is loaded or kept. The loss is TRL's, as ``dpo_loss_type`` names
    it: with ``sigmoid_norm``, and :func:`~fusion_plugins.core.preferences.losses.fused_reference` as ``fused``,

    ``-log sigma(beta * (mean log pi(y_w) - fused(y_w)) - beta * (mean log pi(y_l) - fused(y_l)))``
    """

    numbers = REFERENCE_COLUMNS

    def __init__(self, model: Any, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        # TRL then reads the columns and keeps no reference model; one that axolotl has loaded is let go.
        kwargs["args"].precompute_ref_log_probs = True
        super().__init__(model, None, *args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class _AnswersTrainer(TokenizedDPOTrainer):
    """DPO's trainer with a loss of its own for each pair, from the log-ratios of two or more answers.

    One forward pass of the model sees all answers of a batch, and so does one of the reference.
    """

    def _pair_losses(self, ratios: list[Tensor], lengths: list[Tensor], inputs: dict[str, Any]) -> Tensor:
        """Return (B,) losses from the log-ratios and the numbers of tokens of each kind of answer, (B,) each."""
        raise NotImplementedError

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = _as_floats(inputs)
        options = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        outputs = model(**options, **({"output_router_logits": True} if self.aux_loss_enabled else {}))
        sums, lengths = _answer_logprobs(outputs.logits, inputs)
        reference = self._reference(model, options, inputs)
        ratios = list((sums - reference).chunk(len(self.answers)))
        losses = self._pair_losses(ratios, list(lengths.chunk(len(self.answers))), inputs)
        loss = losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._note(ratios, list(sums.chunk(len(self.answers))), inputs)
        return (loss, outputs) if return_outputs else loss

    def _reference(self, model: Any, options: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """Return (N,) log-probabilities of all answers under the reference, without gradients."""
        if self.precompute_ref_logps:
            return torch.cat([inputs[name] for name in REFERENCE_COLUMNS])
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is None:  # an adapter is trained: without it the model is the reference
                adapted = self.accelerator.unwrap_model(model)
                with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
                    outputs = self.model(**options)
            else:
                outputs = self.ref_model(**options)
        return _answer_logprobs(outputs.logits, inputs)[0]

    def _note(self, ratios: list[Tensor], sums: list[Tensor], inputs: dict[str, Any]) -> None:
        """Keep the figures of a batch for the log, under TRL's names."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        rewards = {name: self.beta * ratio.detach() for name, ratio in zip(self.answers, ratios, strict=True)}
        margins = rewards["chosen"] - rewards["rejected"]
        figures = {f"rewards/{name}": reward for name, reward in rewards.items()}
        figures |= {f"logps/{name}": logps.detach() for name, logps in zip(self.answers, sums, strict=True)}
        figures |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
        for name, values in figures.items():
            metrics[name].append(self._gathered(values).mean().item())
        if self.model.training:
            self._total_train_tokens += self._gathered(inputs["attention_mask"].sum()).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]

    def _gathered(self, values: Tensor) -> Tensor:
        """Return the values of all processes; DeepSpeed on a CPU has more of them than accelerate knows of."""
        return self.accelerator.gather(values) if self.accelerator.num_processes > 1 else values  # type: ignore[no-any-return]


class WRPOTrainer(_AnswersTrainer):
    """WRPO (arXiv 2412.03187): :func:`~fusion_plugins.core.preferences.losses.wrpo` of three answers per prompt.

    ``-log sigma(beta * (alpha * r(y_source) + (1 - alpha) * r(y_own) - r(y_rejected)))``

    with ``r(y) = log pi(y | x) - log ref(y | x)``. The pair is the target's own (``fusion.pairs.rule: own_answers``),
    the third answer the best one of the sources. ``fusion.wrpo`` sets alpha and its schedule, which follows the steps
    of the trainer itself.
    """

    answers = ("chosen", "rejected", "source")
    #: ``fusion.wrpo``; the plugin sets it
    settings = WRPOArgs()

    @property
    def alpha(self) -> float:
        """Weight of the source's answer at this step of the training; an evaluation has a fixed one."""
        final = self.settings.alpha
        if self.settings.schedule == "constant" or not self.model.training:
            return final
        return wrpo_alpha(final, self.state.global_step, self.state.max_steps)

    def _pair_losses(self, ratios: list[Tensor], lengths: list[Tensor], inputs: dict[str, Any]) -> Tensor:
        own, rejected, source = ratios
        self._metrics["train" if self.model.training else "eval"]["alpha"].append(self.alpha)
        return wrpo(source, own, rejected, beta=self.beta, alpha=self.alpha, label_smoothing=self.label_smoothing)


class FusePOTrainer(_AnswersTrainer):
    """FusePO (FuseRL, arXiv 2504.06562): one pair per source, each with a weight.

    ``mean over the pairs of weight * loss``, with the weights of
    :func:`~fusion_plugins.core.preferences.weights.reward_weights` times the factor that makes their mean 1
    (``fusion.pairs.weighted``), and one of the losses of
    :data:`~fusion_plugins.core.preferences.losses.PAIR_LOSSES` (``dpo_loss_type``).
    """

    numbers = ("weight",)

    def _pair_losses(self, ratios: list[Tensor], lengths: list[Tensor], inputs: dict[str, Any]) -> Tensor:
        chosen, rejected = ratios
        losses = [
            share * PAIR_LOSSES[name](chosen, rejected, (lengths[0], lengths[1]), self.beta)
            for name, share in zip(self.loss_types, self.loss_weights, strict=True)
        ]
        return inputs["weight"] * torch.stack(losses).sum(0)


class _Collator:
    """TRL's collator, for more than two answers, and for columns of one number per row.

    Numbers are integers with the same bits: with DeepSpeed, the Trainer casts floating-point inputs to the model's
    dtype, and bfloat16 keeps only three digits of a log-probability. :func:`_as_floats` takes them back.

    Args:
        inner: the collator of two answers.
        answers: the kinds of answers, in the order of the batch.
        numbers: the columns of numbers.
    """

    def __init__(self, inner: Any, answers: tuple[str, ...], numbers: tuple[str, ...]) -> None:
        self._inner, self._answers, self._numbers = inner, answers, numbers

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        # The inner collator sees every further kind of answer as one more group of rejected ones, and pads all alike.
        further = [f"{name}_ids" for name in self._answers[2:]]
        batch = dict(self._inner([*rows, *({**row, "rejected_ids": row[name]} for name in further for row in rows)]))
        size, groups = len(rows), 1 + len(further)
        # Of the chosen answers, which are there once per group, the first copy stays.
        kept = torch.tensor([*range(size), *range(groups * size, 2 * groups * size)])
        batch |= {name: torch.tensor([row[name] for row in rows]) for name in self._numbers}
        for name, value in batch.items():
            if name in _NUMBERS:
                batch[name] = value[:size].float().view(torch.int32)
            elif further:
                batch[name] = value[kept]
        return batch


def _as_floats(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with the numbers of :class:`_Collator` as such."""
    return {name: value.view(torch.float32) if name in _NUMBERS else value for name, value in inputs.items()}


def _answer_logprobs(logits: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the number of tokens of each answer, (N,) each, from (N, T, V) logits."""
    mask = inputs["completion_mask"][:, 1:]
    logprobs = selective_log_softmax(logits[:, :-1], inputs["input_ids"][:, 1:])
    return (logprobs * mask).sum(1), mask.sum(1).clamp(min=1)
