"""Supervised training on the best answer of every source, each with a weight (FuseSFT of FuseRL, arXiv 2504.06562).

``sum over tokens of weight(answer) * -log pi(token) / tokens``, with the weights of
:func:`~fusion_plugins.core.preferences.weights.reward_weights` times the factor that makes their mean 1. The tokens are
those of the whole global batch, as without weights. The weight of a row becomes one value per token, so that rows can
be packed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion_plugins.axolotl.collator import without_columns
from fusion_plugins.errors import ConfigError, DataError

WEIGHT = "weight"
TOKEN_WEIGHTS = "token_weights"


class WeightedCollator:
    """axolotl's collator, and the weight of each token's row; a row of another dataset type counts 1.

    Args:
        tokenizer: the target's.
        inner: axolotl's collator class for this run, which gets ``tokenizer`` and ``settings``.
        settings: what axolotl passes to a collator.
    """

    def __init__(self, tokenizer: Any, *, inner: type, **settings: Any) -> None:
        self.tokenizer = tokenizer
        self._inner = inner(tokenizer, **settings)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Collate rows, or (with sample packing) lists of rows that share one sequence."""
        groups = [feature if isinstance(feature, list) else [feature] for feature in features]
        batch = self._inner(
            [without_columns(feature, (WEIGHT,)) for feature in features], return_tensors=return_tensors
        )
        weights = np.ones(tuple(batch["input_ids"].shape), np.float32)
        for row, group in zip(weights, groups, strict=True):
            values = np.concatenate([np.full(len(each["input_ids"]), _weight(each), np.float32) for each in group])
            first = len(row) - len(values) if self.tokenizer.padding_side == "left" else 0
            row[first : first + len(values)] = values
        # As integers with the same bits: DeepSpeed casts floating-point inputs to the model's dtype.
        batch[TOKEN_WEIGHTS] = torch.from_numpy(weights).view(torch.int32)
        return batch


class WeightedTrainer(AxolotlTrainer):
    """Trains on rows that have weights."""

    _signature_columns: list[str] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With a loss function of its own the Trainer counts the tokens of the global batch and scales nothing itself.
        self.compute_loss_func = self._weighted_loss
        self._weights: Tensor | None = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*(self._signature_columns or ()), WEIGHT, TOKEN_WEIGHTS}]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Run the model on one micro-batch; see :meth:`_weighted_loss`.

        Raises:
            DataError: the batch has no weights.
        """
        inputs = dict(inputs)
        if TOKEN_WEIGHTS not in inputs or "labels" not in inputs:
            raise DataError(f"expected a batch with labels and the weights of its tokens, got {sorted(inputs)}.")
        self._weights = inputs.pop(TOKEN_WEIGHTS).view(torch.float32)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of the module's docstring."""
        assert self._weights is not None
        if outputs.get("aux_loss") is not None:
            raise ConfigError(
                "expected a model without a router loss, which weighted answers do not have, got one. Set "
                "output_router_logits: false in the model's configuration (`overrides_of_model_config`)."
            )
        return weighted_loss(outputs["logits"], labels, self._weights, num_items_in_batch)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, tokens: Any = None) -> Tensor:
    """Return the weighted sum of the cross-entropies of the next tokens, over the number of tokens.

    Args:
        logits: (B, T, V).
        labels: (B, T) token ids, -100 where nothing is supervised.
        weights: (B, T) of each token.
        tokens: by how many to divide; the supervised ones by default.
    """
    following, weights = labels[:, 1:], weights[:, 1:]
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    losses = cross_entropy(flat, following.reshape(-1).to(flat.device), reduction="none", ignore_index=-100)
    total = (losses * weights.reshape(-1).to(losses)).sum()
    return total / ((following != -100).sum().clamp_min(1) if tokens is None else tokens)


def _weight(row: Any) -> float:
    value = row.get(WEIGHT)
    return 1.0 if value is None else float(value)
