"""Batches with fused distributions: axolotl's own collator for its columns, and (B, T, K) tensors for ours.

A row of the prepared dataset holds its fused distributions flattened, T*K numbers each, because Arrow turns nested
lists into Python objects one by one. K is the same in all rows. For a loss of chunks it holds the chunks of its tokens
in their place. Or it holds only which text it is (see :mod:`~fusion_plugins.axolotl.text_rows`), and the distributions
or chunks are made here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusion_plugins.axolotl.array_padding import ArrayPadding
from fusion_plugins.core.fusion.chunk_losses import Chunks
from fusion_plugins.errors import DataError

FUSED_IDS = "fused_ids"
FUSED_LOGPROBS = "fused_logprobs"
FUSED_KEPT = "fused_kept"
FUSED_SOURCE = "fused_source"
FUSED_TEXT = "fused_text"
CHUNK_PLACE = "chunk_place"
CHUNK_LOGPROB = "chunk_logprob"
SAMPLED_LOGPROB = "sampled_logprob"
#: all columns of ours that a prepared dataset may have
COLUMNS = (
    *(FUSED_IDS, FUSED_LOGPROBS, FUSED_KEPT, FUSED_SOURCE, FUSED_TEXT),
    *(CHUNK_PLACE, CHUNK_LOGPROB, SAMPLED_LOGPROB),
)
#: A log-probability has 11 significant bits, as in the stores.
LOGPROB_TYPE = "float16"
#: how many positions of a batch have a label: a number, not a tensor, so that no GPU has to be asked for it
POSITIONS = "supervised_positions"
#: how many positions its longest chunk has, likewise
LONGEST = "longest_chunk"
Array = npt.NDArray[Any]
Row = Mapping[str, Any]
Fuse = Callable[[Sequence[Row], Sequence[Any]], Sequence["Fused | TokenChunks"]]
_AS_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16}
CURE = (
    "Every dataset of the run must have `type: fusion_plugins.axolotl.fused` (a run with other datasets among them "
    "would train on those without fusion)."
)


class Fused(NamedTuple):
    """The fused distributions of one row.

    Attributes:
        ids: (T, K) int32, -1 for an empty entry.
        logprobs: (T, K) float32, -inf for an empty entry.
        kept: (T,) float16 true probability that the entries hold.
        source: (T,) int16 number of the source that teaches the position; -1 for several, and for none.
    """

    ids: Array
    logprobs: Array
    kept: Array
    source: Array


class TokenChunks(NamedTuple):
    """The chunks of one row, for a loss of chunks; see :class:`fusion_plugins.core.fusion.chunk_losses.Chunks`.

    Attributes:
        place: (T,) int32 place of the position in its chunk, from 1 on; 0 for none.
        logprobs: (T,) float32 log-probability of the position's whole chunk under the sources.
        sampled: (T,) float32 log-probability that the sampler gave the next token; NaN where unknown.
        source: (T,) int16 as in :class:`Fused`.
    """

    place: Array
    logprobs: Array
    sampled: Array
    source: Array


#: the columns of the fields, and what stands in them where there is no token
FILLS: Mapping[type, Mapping[str, float]] = {
    Fused: {FUSED_IDS: -1, FUSED_LOGPROBS: -np.inf, FUSED_KEPT: 0, FUSED_SOURCE: -1},
    TokenChunks: {CHUNK_PLACE: 0, CHUNK_LOGPROB: 0, SAMPLED_LOGPROB: np.nan, FUSED_SOURCE: -1},
}


class FusionCollator:
    """Pads one batch.

    Args:
        tokenizer: the target's.
        inner: axolotl's collator class for this run, which gets ``tokenizer`` and ``settings``.
        fuser: called with the tokenizer; returns what fuses rows by their columns :data:`FUSED_TEXT`. None for rows
            that hold distributions.
        settings: what axolotl passes to a collator (padding, pad_to_multiple_of, return_tensors).
    """

    def __init__(
        self, tokenizer: Any, *, inner: type, fuser: Callable[[Any], Fuse] | None = None, **settings: Any
    ) -> None:
        self.tokenizer = tokenizer
        self._inner = inner(ArrayPadding(tokenizer), **settings)
        self._fuse = fuser and fuser(tokenizer)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Collate rows, or (with sample packing) lists of rows that share one sequence."""
        groups = [feature if isinstance(feature, list) else [feature] for feature in features]
        fused = self.fused([row for group in groups for row in group])
        stripped = [without_columns(feature, COLUMNS) for feature in features]
        batch = self._inner(stripped, return_tensors=return_tensors)
        shape = batch["input_ids"].shape
        left = self.tokenizer.padding_side == "left"
        of_groups, kind = iter(fused), type(fused[0])
        sequences: list[Any] = [
            kind(*map(np.concatenate, zip(*islice(of_groups, len(group)), strict=True))) for group in groups
        ]
        for (name, fill), rows in zip(FILLS[kind].items(), zip(*sequences, strict=True), strict=True):
            values = _pad(list(rows), shape, fill, left)
            # As integers with the same bits: DeepSpeed casts floating-point inputs to the model's dtype, and bfloat16
            # keeps only three digits of a log-probability.
            batch[name] = values.view(_AS_INTEGERS[values.dtype]) if values.is_floating_point() else values
        if kind is TokenChunks:
            batch[LONGEST] = max(1, int(batch[CHUNK_PLACE].max()))
        batch[POSITIONS] = int((batch["labels"][:, 1:] != -100).sum())
        return batch

    def width(self, row: Row) -> int:
        """Return K, of which a row is an example; chunks take as much memory as two entries."""
        (found,) = self.fused([row])
        return 2 if isinstance(found, TokenChunks) else int(found.ids.shape[1])

    def fused(self, rows: Sequence[Row]) -> Sequence[Fused | TokenChunks]:
        """Return the distributions or chunks of rows, as they hold them or as the stores give them."""
        if self._fuse is None:
            read = _stored_chunks if rows[0].get(CHUNK_PLACE) is not None else _stored
            return [read(row) for row in rows]
        if any(row.get(FUSED_TEXT) is None for row in rows):
            raise DataError(f"expected rows that refer to their texts, got the columns {sorted(rows[0])}. {CURE}")
        return self._fuse(rows, [row[FUSED_TEXT] for row in rows])


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


def take_chunks(inputs: dict[str, Any]) -> Chunks:
    """Remove the chunks from a batch and return them, (B, T).

    Raises:
        DataError: the batch has none.
    """
    if CHUNK_PLACE not in inputs:
        raise DataError(f"expected a batch with chunks, got one with {sorted(inputs)}. {CURE}")
    place, longest = inputs.pop(CHUNK_PLACE), inputs.pop(LONGEST, None)
    logprobs, sampled = (inputs.pop(name).view(torch.float32) for name in (CHUNK_LOGPROB, SAMPLED_LOGPROB))
    return Chunks(place, logprobs, sampled, max(1, int(place.max())) if longest is None else longest)


def take_origin(inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Remove from a batch where its distributions come from, and return it; None where it does not say.

    Returns:
        (B, T) float16 kept mass, and (B, T) int16 number of the source.
    """
    kept, source = inputs.pop(FUSED_KEPT, None), inputs.pop(FUSED_SOURCE, None)
    if source is None:
        return None
    if kept is None:  # chunks, which are of whole probabilities
        return torch.full_like(source, torch.nan, dtype=torch.float16), source
    return kept.view(torch.float16), source


def take_positions(inputs: dict[str, Any]) -> int | None:
    """Remove from a batch how many of its positions have a label, and return it; None where it does not say."""
    return inputs.pop(POSITIONS, None)


def _stored(row: Row) -> Fused:
    """Return the distributions that a row holds."""
    if any(row.get(name) is None for name in FILLS[Fused]):
        raise DataError(f"expected a row with fused distributions, got the columns {sorted(row)}. {CURE}")
    ids, logprobs = _shaped(row, FUSED_IDS, np.int32), _shaped(row, FUSED_LOGPROBS, np.float32)
    # A probability that is too small for the type of the column is none.
    ids[np.isneginf(logprobs)] = -1
    kept, source = np.asarray(row[FUSED_KEPT], np.float16), np.asarray(row[FUSED_SOURCE], np.int16)
    return Fused(ids, logprobs, kept, source)


def _stored_chunks(row: Row) -> TokenChunks:
    """Return the chunks that a row holds."""
    if any(row.get(name) is None for name in FILLS[TokenChunks]):
        raise DataError(f"expected a row with chunks, got the columns {sorted(row)}. {CURE}")
    types = (np.int32, np.float32, np.float32, np.int16)
    return TokenChunks(*(_shaped(row, name, kind)[:, 0] for name, kind in zip(FILLS[TokenChunks], types, strict=True)))


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


def without_columns(feature: Any, names: Collection[str]) -> Any:
    """Return a row, or the rows of a packed sequence, without some columns."""
    if isinstance(feature, list):
        return [without_columns(row, names) for row in feature]
    return {name: value for name, value in feature.items() if name not in names}


def _pad(rows: Sequence[Array], shape: tuple[int, int], fill: float, left: bool) -> Tensor:
    """(B, T, K) from B arrays (t, K) with t <= T, or (B, T) from (t,)."""
    padded = np.full((*shape, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        place = slice(shape[1] - len(row), None) if left else slice(0, len(row))
        padded[index, place] = row
    return torch.from_numpy(padded)
