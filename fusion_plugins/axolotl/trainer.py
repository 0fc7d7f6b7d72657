"""axolotl's trainer with one more loss term: ``w * LM + (1 - w) * fusion``, both summed over tokens and divided once.

The fused distributions stay sparse, and the logits of a whole batch are never held: while the model runs, its output
layer computes both losses chunk by chunk inside its own forward, where sharded weights are present (ZeRO-3, FSDP), and
returns their sums instead of the logits. Some models change the logits after the output layer (soft-capping, scaling).
A probe finds these before the first step; their losses are computed from the full logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from torch import Tensor

from fusion_plugins.axolotl.args import FusionBlock, fusion_block
from fusion_plugins.axolotl.collator import FUSED_IDS, FUSED_LOGPROBS, take_fused
from fusion_plugins.core.fusion.losses import Divergence, token_losses
from fusion_plugins.errors import DataError
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


class FusionTrainer(AxolotlTrainer):
    """Trains on the language-model loss and the fused distributions."""

    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a loss function of its own the Trainer counts the tokens of the global batch and scales nothing itself.
        self.compute_loss_func = self._weighted_loss
        self._batch: _Batch | None = None
        self._losses_in_head: bool | None = None
        self._logits_wanted = False

    @cached_property
    def _fusion(self) -> FusionBlock:
        return fusion_block(self.axolotl_cfg)

    @cached_property
    def _kind(self) -> Divergence:
        kind: Divergence = lookup("losses", self._fusion.loss)
        return kind

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in (FUSED_IDS, FUSED_LOGPROBS):
            if self._signature_columns and name not in self._signature_columns:
                self._signature_columns = [*self._signature_columns, name]

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
            with self._replaced_head(model, self._losses_of_head):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._batch = None

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one batch; when its logits are wanted, the output layer is left alone."""
        self._logits_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._logits_wanted = False

    @property
    def lm_weight(self) -> float:
        """Weight of the language-model loss at this step."""
        weight = self._fusion.lm_loss_weight
        if self._fusion.lm_loss_schedule == "rise":
            weight += (1 - weight) * min(1.0, self.state.global_step / max(1, self.state.max_steps))
        return weight

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """``(w * sum LM + (1 - w) * sum fusion) / tokens``, tokens counted over the whole global batch."""
        assert self._batch is not None
        positions, fused_positions = self._batch.counts
        if self._in_head:
            lm, fusion = outputs["logits"].flatten()[:2]
        else:
            found = token_losses(outputs["logits"], None, labels, self._batch.fused, **self._options)
            lm, fusion = found.lm, found.fusion
        weight = self.lm_weight
        metrics = {
            "lm_loss": lm.detach() / positions.clamp_min(1),
            "fusion_loss": fusion.detach() / fused_positions.clamp_min(1),
            "fusion_coverage": fused_positions / positions.clamp_min(1),
            "lm_weight": weight,
        }
        if self.model.training:
            self.store_metrics(metrics, train_eval="train")
        else:
            self.store_metrics({f"eval_{name}": value for name, value in metrics.items()}, train_eval="eval")
        tokens = positions.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return (weight * lm + (1 - weight) * fusion) / tokens

    @property
    def _options(self) -> dict[str, Any]:
        return {"kind": self._kind, "temperature": self._fusion.temperature}

    @property
    def _in_head(self) -> bool:
        return bool(self._losses_in_head) and not self._logits_wanted

    def _losses_of_head(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        assert self._batch is not None
        found = token_losses(hidden, head, self._batch.labels, self._batch.fused, **self._options)
        return torch.stack([found.lm, found.fusion]).view(1, 1, -1)

    def _head_is_last(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Whether the model returns the output of its output layer unchanged. One forward pass, without gradients."""
        if self.args.torch_compile or self._head(model) is None:
            return False

        def probe(head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            # The layer runs once all the same: sharded layers expect the same number of calls on every rank.
            first = head(hidden[:1, :1]).float().flatten()[:1]
            return torch.cat([first * 0, first.new_tensor(PROBE)]).view(1, 1, -1)

        try:
            with torch.no_grad(), self._replaced_head(model, probe, always=True):
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
