"""The trainer: language-model loss and fusion loss over the tokens of the whole global batch.

Fused distributions stay sparse, and the logits of a whole batch are never held: while the model runs, its output
layer computes both losses chunk by chunk inside its own forward, where sharded weights are present (ZeRO-3, FSDP), and
returns their sums instead of the logits. A probe finds out before the first step what the model does to the output of
the layer: soft-capping and scaling go into the losses; after any other change they are computed from the full logits.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import Trainer

from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.axolotl.collator import COLUMNS, take_chunks, take_fused, take_origin, take_positions
from fusion_plugins.axolotl.figures import Figures, perplexity
from fusion_plugins.axolotl.fusion_losses import bound_loss
from fusion_plugins.axolotl.output_layer import (
    BehindModel,
    Part,
    Probe,
    carried,
    innermost,
    linear_parts,
    received,
    replaced,
    with_weights,
)
from fusion_plugins.axolotl.running_batch import RunningBatch
from fusion_plugins.core.fusion.chunk_losses import ChunkLoss, Chunks, is_per_chunk
from fusion_plugins.core.fusion.divergences import Divergence
from fusion_plugins.core.fusion.logit_change import LogitChange
from fusion_plugins.core.fusion.losses import token_losses
from fusion_plugins.core.fusion.one_pass import Sums, chunk_rows, weighted_losses
from fusion_plugins.errors import ConfigError, DataError

LOG = get_logger(__name__)
#: means over the positions in a chunk: whether one begins there, is one token, is known to the sampler
CHUNK_FIGURES = ("chunks_begun", "one_token_chunks", "sampled_known")


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
        self._batch: RunningBatch | None = None
        self._behind_model = BehindModel()
        self._losses_in_head: bool | None = None
        #: what the model does to the output of its output layer, and the width of that
        self._change = LogitChange()
        self._vocabulary = 0
        self._said: set[str] = set()
        self._logits_wanted = False
        self._training_figures = Figures()
        #: None outside of an evaluation: callbacks evaluate single batches, which belong to no figures
        self._evaluation_figures: Figures | None = None

    @cached_property
    def _fusion(self) -> FusionBlock:
        return fusion_block(self.axolotl_cfg)

    @cached_property
    def _kind(self) -> Divergence | ChunkLoss:
        return bound_loss(self._fusion)

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
        take = take_chunks if is_per_chunk(self._kind) else take_fused
        fused, origin, at_most = take(inputs), take_origin(inputs), take_positions(inputs)
        if "labels" not in inputs:
            raise DataError(
                f"expected a batch with labels, got one with {sorted(inputs)}. Use datasets of `type: "
                "fusion_plugins.axolotl.fused`, whose rows have labels."
            )
        if self._losses_in_head is None:
            self._behind_model.watch(self._head_owner(model))
            self._losses_in_head = self._head_is_last(model, inputs)
        labels = inputs["labels"]
        self._batch = RunningBatch(labels, fused, origin, labels.numel() if at_most is None else at_most)
        try:
            with replaced(self._head(model), self._losses_of_head) if self._in_head else nullcontext():
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
        self._evaluation_figures = self._new_figures()
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
        self._training_figures = self._new_figures()
        return super()._inner_training_loop(*args, **kwargs)

    def _new_figures(self) -> Figures:
        of_chunks = CHUNK_FIGURES if is_per_chunk(self._kind) else ()
        return Figures((*of_chunks, "kept_mass", *(f"share_{source.name}" for source in self._fusion.sources)))

    def _figures(self, figures: Figures) -> dict[str, float]:
        found = figures.take(partial(self.accelerator.reduce, reduction="sum"), self.args.device)
        if begun := found.pop(CHUNK_FIGURES[0], None):
            found["tokens_per_chunk"] = 1 / begun
        return found

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
        positions, fused_positions, entropy = self._batch.counts
        weight, router = self.lm_weight, self._router_loss(outputs)
        if self._in_head:
            found = Sums(*received(self._behind_model.taken(outputs), self._change))
        else:
            found = self._one_pass(self._behind_model.taken(outputs), None, None)
        figures = self._training_figures if self.model.training else self._evaluation_figures
        if figures is not None:
            of_fused, agreed = self._batch.of_fused(len(self._fusion.sources)), found.agreed
            if isinstance(self._batch.fused, Chunks):
                of_fused, agreed = torch.cat([self._batch.of_chunks(), of_fused]), entropy
            figures.add(
                lm=found.lm,
                fusion=found.fusion,
                agreed=agreed,
                entropy=entropy,
                of_fused=of_fused,
                positions=positions,
                fused_positions=fused_positions,
                weight=weight,
                router=router,
            )
        tokens = positions.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return found.total / tokens + router / self._batches_of_a_step(num_items_in_batch)

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

    def _one_pass(self, states: Tensor, weight: Tensor | None, bias: Tensor | None, **more: Any) -> Sums:
        assert self._batch is not None
        return weighted_losses(
            states,
            weight,
            bias,
            self._batch.labels,
            self._batch.fused,
            lm_weight=self.lm_weight,
            chunk_size=self._fusion.loss_chunk,
            at_most=self._batch.at_most,
            **self._options,
            **more,
        )

    @cached_property
    def _losses_of_head(self) -> Callable[[Tensor], Tensor]:
        """The forward pass of the output layer that returns sums (1, 1, 4) of the running batch instead of logits."""
        layer = self._head(self.model)
        own = "forward" in vars(layer)  # something else is in its place already: it must run
        forward = layer.forward

        def losses(hidden: Tensor) -> Tensor:
            parts = None if own else linear_parts(layer, hidden)
            if parts is None:
                self._say_once(
                    f"the output layer is a {type(layer).__name__} with more than a product in it: it runs once more "
                    "in the backward pass"
                )
                return carried(self._losses_of_any_head(forward, hidden), self._change)
            return with_weights(layer, parts, sums)

        def sums(parts: Sequence[Part]) -> Tensor:
            (first, states), *others = parts
            low_rank = [(inputs, layer.weight) for layer, inputs in others]
            found = self._one_pass(states, first.weight, first.bias, low_rank=low_rank, change=self._change)
            return carried(found, self._change)

        # A compiled model leaves its graph for this one call: the loss makes its gradients itself.
        return torch.compiler.disable(losses)

    def _losses_of_any_head(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Sums:
        """The layer's own forward pass by chunks, and once more in the backward pass."""
        assert self._batch is not None
        found = token_losses(
            hidden,
            lambda states: self._change(forward(states)),
            self._batch.labels,
            self._batch.fused,
            chunk_size=self._fusion.loss_chunk or chunk_rows(self._vocabulary),
            at_most=self._batch.at_most,
            **self._options,
        )
        weight = self.lm_weight
        return Sums(weight * found.lm + (1 - weight) * found.fusion, found.lm, found.fusion, found.agreed)

    def _head_is_last(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Whether the losses can be computed in the output layer. One forward pass, without gradients.

        They can where the model returns the output of the layer as it is, or capped, scaled or cut.
        """
        layer = self._head(model)
        if layer is None:
            self._say_once("losses are computed from the logits: the model names no output layer")
            return False
        probe = Probe(layer.forward)
        try:
            change = probe.change(self._probed_logits(model, inputs, probe))
        except torch.OutOfMemoryError:
            raise  # says nothing about the model; and axolotl may begin anew with a smaller batch
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
            self._say_once(f"losses are computed from the logits, which {type(model).__name__} needs ({error})")
            return False
        if change is None:
            self._say_once("losses are computed from the logits: the model changes them in a way of its own")
            return False
        self._change, self._vocabulary = change, probe.vocabulary
        self._say_once(f"losses are computed inside the output layer; {change.described()}")
        return True

    def _probed_logits(self, model: Any, inputs: dict[str, Any], probe: Probe) -> Tensor:
        """Return the logits that the model makes of the probe's numbers. A batch is prepared as for the training."""
        found = []

        def keep(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
            found.append(self._behind_model.taken(outputs))
            return found[0].new_zeros(())

        # A resumed run probes too, at another step: the probe must not take random numbers (dropout, NEFTune) from the
        # training, and the batch is counted once.
        own, tokens = self.compute_loss_func, dict(getattr(self.state, "tokens", {}))
        self.compute_loss_func = keep
        behind = self._head_owner(model).register_forward_hook(_without_gradients)
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                _same_random_numbers(self.args.device),
                replaced(self._head(model), probe),
            ):
                super().compute_loss(model, dict(inputs))
        finally:
            self.compute_loss_func = own
            behind.remove()
            if tokens:
                self.state.tokens = tokens
            elif hasattr(self.state, "tokens"):
                del self.state.tokens
        return found[0]

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            LOG.info(f"fusion: {message}")

    def _head_owner(self, model: Any) -> Any:
        return self.accelerator.unwrap_model(model)

    def _head(self, model: Any) -> Any:
        return innermost(self._head_owner(model).get_output_embeddings())


def _without_gradients(*_: Any) -> None:
    """Ends, as a hook behind the model, what the probe began in its output layer."""
    torch.set_grad_enabled(False)


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
