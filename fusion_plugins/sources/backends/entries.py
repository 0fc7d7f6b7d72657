"""Bring the entries that an engine or a server reports into the order that the store keeps."""

import numpy as np

from fusion_plugins.core.arrays import FloatArray, IntArray
from fusion_plugins.core.fusion.types import TopK

__all__ = ["rows_of_entries", "spare_entries"]

#: at most so many entries more than k are asked for, to make up for ids beyond the tokenizer
MOST_SPARE = 64


def spare_entries(logits_width: int, vocab_size: int) -> int:
    """Return how many entries to ask for beyond k.

    A padded output matrix has rows for ids that no tokenizer knows. Engines rank them like any other; they are dropped
    here, and the spare entries take their place.
    """
    return min(max(logits_width - vocab_size, 0), MOST_SPARE)


def rows_of_entries(ids: IntArray, logprobs: FloatArray, gold_logprobs: FloatArray, k: int, vocab_size: int) -> TopK:
    """Sort by descending probability, ties by lowest id; drop unknown ids; cut to k; add the empty last row.

    Args:
        ids: (T - 1, J) int32, distinct within a row; below 0 where empty.
        logprobs: (T - 1, J) float32 nats.
        gold_logprobs: (T - 1,) float32 of the next token.
        k: entries to keep per row.
        vocab_size: ids that the tokenizer knows.
    """
    known = (ids >= 0) & (ids < vocab_size)
    logprobs = np.where(known, logprobs, -np.inf).astype(np.float32)
    ids = np.where(known, ids, -1).astype(np.int32)
    # Unknown ids go behind everything, also behind entries of probability 0.
    order = np.lexsort((ids, -logprobs, ~known), axis=-1)[:, :k]
    n_rows, width = order.shape
    topk_ids = np.full((n_rows + 1, k), -1, np.int32)
    topk_logprobs = np.full((n_rows + 1, k), -np.inf, np.float32)
    topk_ids[:-1, :width] = np.take_along_axis(ids, order, axis=-1)
    topk_logprobs[:-1, :width] = np.take_along_axis(logprobs, order, axis=-1)
    return TopK(topk_ids, topk_logprobs, np.append(gold_logprobs.astype(np.float32), np.float32(np.nan)))
