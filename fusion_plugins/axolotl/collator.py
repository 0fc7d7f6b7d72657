"""Batches with fused distributions: axolotl's own collator for its columns, and (B, T, K) tensors for ours.

A row of the prepared dataset holds its fused distributions flattened, T*K numbers each, because Arrow turns nested
lists into Python objects one by one. K is the same in all rows. Or it holds only which text it is (see
:mod:`~fusion_plugins.axolotl.text_rows`), and the distributions are made here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_plugins.errors import DataError

FUSED_IDS = "fused_ids"
FUSED_LOGPROBS = "fused_logprobs"
FUSED_TEXT = "fused_text"
#: all columns of ours that a prepared dataset may have
COLUMNS = (FUSED_IDS, FUSED_LOGPROBS, FUSED_TEXT)
#: A log-probability has 11 significant bits, as in the stores.
LOGPROB_TYPE = "float16"
#: how many positions of a batch have a label: a number, not a tensor, so that no GPU has to be asked for it
POSITIONS = "supervised_positions"
Array = npt.NDArray[Any]
Row = Mapping[str, Any]
Fuse = Callable[[Row, Any], tuple[Array, Array]]
CURE = (
    "Every dataset of the run must have `type: fusion_plugins.axolotl.fused` (a run with other datasets among them "
    "would train on those without fusion)."
)


class FusionCollator:
    """Pads one batch.

    Args:
        tokenizer: the target's.
        inner: axolotl's collator class for this run, which gets ``tokenizer`` and ``settings``.
        fuser: called with the tokenizer; returns what fuses a row and its column :data:`FUSED_TEXT`. None for rows that
            hold distributions.
        settings: what axolotl passes to a collator (padding, pad_to_multiple_of, return_tensors).
    """

    def __init__(
        self, tokenizer: Any, *, inner: type, fuser: Callable[[Any], Fuse] | None = None, **settings: Any
    ) -> None:
        self.tokenizer = tokenizer
        self._inner = inner(tokenizer, **settings)
        self._fuse = fuser and fuser(tokenizer)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Collate rows, or (with sample packing) lists of rows that share one sequence."""
        groups = [feature if isinstance(feature, list) else [feature] for feature in features]
        fused = [self._fused_of(group) for group in groups]
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

    def width(self, row: Row) -> int:
        """Return K, of which a row is an example."""
        return self._fused_of([row])[0].shape[1]

    def _fused_of(self, rows: Sequence[Row]) -> tuple[Array, Array]:
        """Ids and log-probabilities (T, K) of the rows of one sequence, one after the other."""
        parts = [self._made(row) if self._fuse else _stored(row) for row in rows]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([logprobs for _, logprobs in parts])

    def _made(self, row: Row) -> tuple[Array, Array]:
        assert self._fuse is not None
        if row.get(FUSED_TEXT) is None:
            raise DataError(f"expected a row that refers to its text, got the columns {sorted(row)}. {CURE}")
        return self._fuse(row, row[FUSED_TEXT])


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


def _stored(row: Row) -> tuple[Array, Array]:
    """Ids and log-probabilities (T, K) that a row holds."""
    if row.get(FUSED_IDS) is None or row.get(FUSED_LOGPROBS) is None:
        raise DataError(f"expected a row with fused distributions, got the columns {sorted(row)}. {CURE}")
    ids, logprobs = _shaped(row, FUSED_IDS, np.int32), _shaped(row, FUSED_LOGPROBS, np.float32)
    # A probability that is too small for the type of the column is none.
    ids[np.isneginf(logprobs)] = -1
    return ids, logprobs


def _shaped(row: Row, name: str, dtype: type) -> Array:
    values: Array = np.array(row[name], dtype=dtype)
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
    return {name: value for name, value in feature.items() if name not in COLUMNS}


def _pad(rows: Sequence[Array], shape: tuple[int, int], fill: float, left: bool) -> Tensor:
    """(B, T, K) from B arrays (t, K) with t <= T."""
    width = rows[0].shape[1]
    padded = np.full((*shape, width), fill, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        place = slice(shape[1] - len(row), None) if left else slice(0, len(row))
        padded[index, place] = row
    return torch.from_numpy(padded)
