"""Batches with fused distributions: axolotl's own collator for its columns, and (B, T, K) tensors for ours.

A row of the prepared dataset holds its fused distributions flattened, T*K numbers each, because Arrow turns nested
lists into Python objects one by one. K is the same in all rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_plugins.errors import DataError

FUSED_IDS = "fused_ids"
FUSED_LOGPROBS = "fused_logprobs"
#: how many positions of a batch have a label: a number, not a tensor, so that no GPU has to be asked for it
POSITIONS = "supervised_positions"
CURE = (
    "Every dataset of the run must have `type: fusion_plugins.axolotl.fused` (a run with other datasets among them "
    "would train on those without fusion)."
)


class FusionCollator:
    """Pads one batch.

    Args:
        tokenizer: the target's.
        inner: axolotl's collator class for this run, which gets ``tokenizer`` and ``settings``.
        settings: what axolotl passes to a collator (padding, pad_to_multiple_of, return_tensors).
    """

    def __init__(self, tokenizer: Any, *, inner: type, **settings: Any) -> None:
        self.tokenizer = tokenizer
        self._inner = inner(tokenizer, **settings)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Collate rows, or (with sample packing) lists of rows that share one sequence."""
        groups = [feature if isinstance(feature, list) else [feature] for feature in features]
        fused = [_fused_of(group) for group in groups]
        stripped = [_without(feature) for feature in features]
        batch = self._inner(stripped, return_tensors=return_tensors)
        shape = batch["input_ids"].shape
        left = self.tokenizer.padding_side == "left"
        batch[FUSED_IDS] = _pad([ids for ids, _ in fused], shape, -1, left)
        # As integers with the same bits: DeepSpeed casts floating-point inputs to the model's dtype, and bfloat16 keeps
        # only three digits of a log-probability.
        logprobs = _pad([values for _, values in fused], shape, -np.inf, left)
        batch[FUSED_LOGPROBS] = logprobs.view(torch.int32)
        batch[POSITIONS] = int((batch["labels"][:, 1:] != -100).sum())
        return batch


def take_fused(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Remove the fused distributions from a batch and return them.

    Returns:
        Ids (B, T, K) int32, -1 where empty, and log-probabilities (B, T, K) float32.

    Raises:
        DataError: the batch has none.
    """
    if FUSED_IDS not in inputs or FUSED_LOGPROBS not in inputs:
        raise DataError(f"expected a batch with fused distributions, got one with {sorted(inputs)}. {CURE}")
    return inputs.pop(FUSED_IDS), inputs.pop(FUSED_LOGPROBS).view(torch.float32)


def take_positions(inputs: dict[str, Any]) -> int | None:
    """Remove from a batch how many of its positions have a label, and return it; None where it does not say."""
    return inputs.pop(POSITIONS, None)


def _fused_of(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities (T, K) of the rows of one sequence, one after the other."""
    if any(row.get(FUSED_IDS) is None or row.get(FUSED_LOGPROBS) is None for row in rows):
        raise DataError(f"expected a row with fused distributions, got the columns {sorted(rows[0])}. {CURE}")
    ids = [_shaped(row, FUSED_IDS, np.int32) for row in rows]
    logprobs = [_shaped(row, FUSED_LOGPROBS, np.float32) for row in rows]
    return np.concatenate(ids), np.concatenate(logprobs)


def _shaped(row: dict[str, Any], name: str, dtype: type) -> np.ndarray:
    values: np.ndarray = np.asarray(row[name], dtype=dtype)
    length = len(row["input_ids"])
    if values.size == 0 or values.size % length:
        raise DataError(
            f"expected column {name} to hold a multiple of {length} numbers, one group per token; got {values.size}: "
            "something cut the tokens but not their distributions. Remove what changes the length of prepared rows "
            "(truncation, for example)."
        )
    return values.reshape(length, -1)


def _without(feature: Any) -> Any:
    if isinstance(feature, list):
        return [_without(row) for row in feature]
    return {name: value for name, value in feature.items() if name not in (FUSED_IDS, FUSED_LOGPROBS)}


def _pad(rows: Sequence[np.ndarray], shape: tuple[int, int], fill: float, left: bool) -> Tensor:
    """(B, T, K) from B arrays (t, K) with t <= T."""
    width = rows[0].shape[1]
    padded = np.full((*shape, width), fill, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        place = slice(shape[1] - len(row), None) if left else slice(0, len(row))
        padded[index, place] = row
    return torch.from_numpy(padded)
