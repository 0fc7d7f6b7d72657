"""axolotl's trainer with one more loss term: ``w * LM + (1 - w) * fusion``, both summed over tokens and divided once.

The fused distributions stay sparse, and the logits of a whole batch are never held: while the model runs, its output
layer computes both losses chunk by chunk inside its own forward, where sharded weights are present (ZeRO-3, FSDP), and
returns their sums instead of the logits. Some models change the logits after the output layer (soft-capping, scaling).
A probe finds these before the first step; their losses are computed from the full logits.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.axolotl.collator import COLUMNS, take_fused
from fusion_plugins.axolotl.figures import Figures, perplexity
from fusion_plugins.core.fusion.losses import Divergence, token_losses
from fusion_plugins.core.fusion.one_pass import weighted_losses
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.plugins import lookup

LOG = get_logger(__name__)
#: What the output layer returns in the probe: values that bfloat16 cannot represent, so that a later cast is noticed
#: too.
PROBE = (1234.5678, -0.3141592, 77.0077)


@dataclass(frozen=True)
class _Batch:
    """Labels (B, T) and fused ids and log-probabilities (B, T, K) of the running forward pass."""

    labels: Tensor
    fused: tuple[Tensor, Tensor]

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """() positions with a label, and () those of them with a fused distribution."""
        positions = self.labels[:, 1:] != -100
        return positions.sum(), (positions & (self.fused[0][:, :-1] >= 0).any(-1)).sum()


class _OwnPerplexity(Trainer):
    """Comes after axolotl's trainer, which takes exp of the whole loss for a perplexity, and puts it right."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in [name for name in logs if name.endswith("lm_loss")]:
            logs[f"{name.removesuffix('lm_loss')}ppl"] = perplexity(logs[name])
        super().log(logs, start_time)


class FusionTrainer(AxolotlTrainer, _OwnPerplexity):
    """Trains on the language-model loss and the fused distributions."""

    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a loss function of its own the Trainer counts the tokens of the global batch and scales nothing itself.
        self.compute_loss_func = self._weighted_loss
        self._batch: _Batch | None = None
        self._losses_in_head: bool | None = None
        self._logits_wanted = False
        self._training_figures = Figures()
        #: None outside of an evaluation: callbacks evaluate single batches, which belong to no figures
        self._evaluation_figures: Figures | None = None

    @cached_property
    def _fusion(self) -> FusionBlock:
        return fusion_block(self.axolotl_cfg)

    @cached_property
    def _kind(self) -> Divergence:
        kind: Divergence = lookup("losses", self._fusion.loss)
        return kind

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in COLUMNS:
            if self._signature_columns and name not in self._signature_columns:
                self._signature_columns = [*self._signature_columns, name]

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Rows as arrays: to make Python lists of fused distributions takes longer than everything else with them.
        return super()._get_dataloader(dataset.with_format("numpy"), *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run the model on one micro-batch; see :meth:`_weighted_loss`.

        Raises:
            DataError: the batch has no fused distributions.
        """
        inputs = dict(inputs)
        fused = take_fused(inputs)
        if "labels" not in inputs:
            raise DataError(
                f"expected a batch with labels, got one with {sorted(inputs)}. Use datasets of `type: "
                "fusion_plugins.axolotl.fused`, whose rows have labels."
            )
        if self._losses_in_head is None:
            self._losses_in_head = self._head_is_last(model, inputs)
        self._batch = _Batch(inputs["labels"], fused)
        try:
            with self._replaced_head(model, partial(self._losses_of_head, self._head(model))):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._batch = None

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one batch; when its logits are wanted, the output layer is left alone."""
        self._logits_wanted = not prediction_loss_only
        try:
            if self._evaluation_figures is not None:
                inputs = self._without_repeated_rows(inputs)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._logits_wanted = False

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Evaluate, with the loss and its terms over all positions instead of the mean of the batches' means."""
        self._evaluation_figures = Figures()
        try:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            figures = self._figures(self._evaluation_figures)
        finally:
            self._evaluation_figures = None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the terms of the loss beside it."""
        # Only a step of the training has the key, and all processes log it.
        if "loss" in logs:
            logs |= {name: value for name, value in self._figures(self._training_figures).items() if name != "loss"}
        super().log(logs, start_time)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # auto_find_batch_size begins anew with a smaller batch.
        self._training_figures = Figures()
        return super()._inner_training_loop(*args, **kwargs)

    def _figures(self, figures: Figures) -> dict[str, float]:
        return figures.take(partial(self.accelerator.reduce, reduction="sum"), self.args.device)

    def _without_repeated_rows(self, inputs: Any) -> Any:
        """Without labels in the rows that fill the last batches of an evaluation: other processes have them already."""
        state = self.accelerator.gradient_state
        repeated = self.accelerator.num_processes > 1 and self.accelerator.even_batches and state.end_of_dataloader
        if not repeated or state.remainder <= 0:
            return inputs
        first = self.accelerator.process_index * self.args.per_device_eval_batch_size
        own = max(0, state.remainder - first)
        labels = inputs["labels"].clone()
        labels[own:] = -100
        return {**inputs, "labels": labels}

    @property
    def lm_weight(self) -> float:
        """Weight of the language-model loss at this step of the training; an evaluation has a fixed one."""
        weight = self._fusion.lm_loss_weight
        if self._fusion.lm_loss_schedule == "rise" and self.model.training:
            weight += (1 - weight) * min(1.0, self.state.global_step / max(1, self.state.max_steps))
        return weight

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """``(w * sum LM + (1 - w) * sum fusion) / tokens + router loss``, with the tokens of the whole global batch."""
        assert self._batch is not None
        positions, fused_positions = self._batch.counts
        weight, router = self.lm_weight, self._router_loss(outputs)
        if self._in_head:
            loss, lm, fusion = outputs["logits"].flatten()[:3]
        else:
            found = token_losses(outputs["logits"], None, labels, self._batch.fused, **self._options)
            loss, lm, fusion = weight * found.lm + (1 - weight) * found.fusion, found.lm, found.fusion
        figures = self._training_figures if self.model.training else self._evaluation_figures
        if figures is not None:
            figures.add(
                lm=lm,
                fusion=fusion,
                positions=positions,
                fused_positions=fused_positions,
                weight=weight,
                router=router,
            )
        tokens = positions.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return loss / tokens + router / self._batches_of_a_step(num_items_in_batch)

    def _router_loss(self, outputs: Any) -> Tensor | float:
        """The weighted loss that balances the experts of a mixture; 0 for other models.

        A model computes it where its configuration has ``output_router_logits``, but adds it only to a loss of its own.
        """
        balance = outputs.get("aux_loss")
        if balance is None:
            return 0.0
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        for owner in (model, model.config, model.config.get_text_config()):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                if hasattr(owner, name):
                    return torch.as_tensor(balance, device=outputs["logits"].device) * getattr(owner, name)
        raise ConfigError(
            f"{type(model).__name__} has a router loss, but no weight for it: expected router_aux_loss_coef in its "
            "configuration. Set output_router_logits: false to train without."
        )

    def _batches_of_a_step(self, num_items_in_batch: Any) -> int:
        """The micro-batches over which a mean of their losses is taken, as the token count does for the sums."""
        batches = self.current_gradient_accumulation_steps if self.model.training else 1
        # The Trainer multiplies by this what it expects to be divided by the tokens of all processes.
        averaged = self.args.average_tokens_across_devices and num_items_in_batch is not None
        return batches * (self.accelerator.num_processes if averaged else 1)

    @property
    def _options(self) -> dict[str, Any]:
        return {"kind": self._kind, "temperature": self._fusion.temperature}

    @property
    def _in_head(self) -> bool:
        return bool(self._losses_in_head) and not self._logits_wanted

    def _losses_of_head(self, layer: Any, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return the weighted loss and its two terms (1, 1, 3): what the output layer gives in place of logits."""
        assert self._batch is not None
        labels, fused, weight = self._batch.labels, self._batch.fused, self.lm_weight
        # Any other layer (LoRA on the head, a quantised one, one that is split between devices) computes more than one
        # product, so its own forward runs, and once more in the backward pass.
        if type(layer) is torch.nn.Linear and not isinstance(layer.weight, DTensor):
            once = weighted_losses(hidden, layer.weight, layer.bias, labels, fused, lm_weight=weight, **self._options)
            return torch.stack([once.total, once.lm, once.fusion]).view(1, 1, -1)
        found = token_losses(hidden, head, labels, fused, **self._options)
        return torch.stack([weight * found.lm + (1 - weight) * found.fusion, found.lm, found.fusion]).view(1, 1, -1)

    def _head_is_last(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Whether the model returns the output of its output layer unchanged. One forward pass, without gradients."""
        if self.args.torch_compile or self._head(model) is None:
            return False

        def probe(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            # The layer runs once all the same: sharded layers expect the same number of calls on every rank.
            first = head(hidden[:1, :1]).float().flatten()[:1]
            return torch.cat([first * 0, first.new_tensor(PROBE)]).view(1, 1, -1)

        try:
            # A resumed run probes too, at another step: the probe must not take random numbers (dropout, NEFTune) from
            # the training.
            with (
                torch.no_grad(),
                _same_random_numbers(self.args.device),
                self._replaced_head(model, probe, always=True),
            ):
                logits = model(**{name: value for name, value in inputs.items() if name != "labels"})["logits"]
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
            LOG.info(f"fusion: {type(model).__name__} needs its logits ({error})")
            return False
        unchanged = logits.numel() == 1 + len(PROBE) and torch.equal(
            logits.flatten()[1:].double(), torch.tensor(PROBE, dtype=torch.float32, device=logits.device).double()
        )
        LOG.info(f"fusion: losses are computed {'inside the output layer' if unchanged else 'from the logits'}")
        return unchanged

    def _head(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model).get_output_embeddings()

    @contextmanager
    def _replaced_head(
        self, model: Any, replacement: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], *, always: bool = False
    ) -> Iterator[None]:
        """Within the context, the output layer returns ``replacement(its forward, its input)``."""
        if not (always or self._in_head):
            yield
            return
        head = self._head(model)
        own = vars(head).get("forward")
        forward = head.forward
        head.forward = lambda hidden: replacement(forward, hidden)
        try:
            yield
        finally:
            if own is None:
                del head.forward
            else:
                head.forward = own


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Within the context random numbers are drawn that are drawn again after it."""
    python, arrays = random.getstate(), np.random.get_state()
    own = {} if device.type in ("cpu", "mps") else {"devices": [device.index or 0], "device_type": device.type}
    try:
        with torch.random.fork_rng(**{"devices": [], **own}):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
