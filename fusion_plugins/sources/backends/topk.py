"""The top-k that a store keeps, from the entries that an engine or a server reports; without torch."""

import numpy as np

from fusion_plugins.core.arrays import FloatArray, IntArray
from fusion_plugins.core.fusion.types import TopK

#: spare entries that are asked for at most
MOST_SPARE = 64
#: sorts behind every entry
UNKNOWN = np.iinfo(np.int64).max


def spare_entries(logits_width: int, vocab_size: int) -> int:
    """Return how many entries to ask for beyond k.

    An output matrix that is padded has rows for ids that no tokenizer knows. Engines rank them like any other id; they
    are dropped here, and the spare entries take their place.
    """
    return min(max(logits_width - vocab_size, 0), MOST_SPARE)


def topk_of_entries(ids: IntArray, logprobs: FloatArray, token_logprobs: FloatArray, k: int, vocab_size: int) -> TopK:
    """Sort by descending probability, ties by lowest id; drop unknown ids; keep k; add the last position.

    Args:
        ids: (T - 1, J) int32, distinct within a position; below 0 where empty.
        logprobs: (T - 1, J) float32 nats.
        token_logprobs: (T - 1,) float32 nats, of the next token.
        k: entries to keep per position.
        vocab_size: ids that the tokenizer knows.
    """
    known = (ids >= 0) & (ids < vocab_size)
    # One number per entry that sorts like (-logprob, id): patterns of floats from 0 on are in the order of the floats.
    # An entry of probability 0 has -inf, which goes before what is unknown.
    nats = np.maximum(0.0 - logprobs.astype(np.float32), 0.0)
    keys = nats.view(np.uint32).astype(np.int64) << 32 | ids
    keys[~known] = UNKNOWN
    if (keys[:, 1:] < keys[:, :-1]).any():  # engines give them in order, but for ties
        keys.sort(axis=-1)
    keys = keys[:, :k]
    held = keys != UNKNOWN
    n_positions, width = keys.shape
    topk_ids = np.full((n_positions, k), -1, np.int32)
    topk_logprobs = np.full((n_positions, k), -np.inf, np.float32)
    topk_ids[:, :width] = np.where(held, keys & 0xFFFFFFFF, -1)
    topk_logprobs[:, :width] = np.where(held, 0.0 - (keys >> 32).astype(np.uint32).view(np.float32), -np.inf)
    return with_last_position(topk_ids, topk_logprobs, token_logprobs.astype(np.float32))


def topk_and_asked(
    ids: IntArray,
    logprobs: FloatArray,
    token_logprobs: FloatArray,
    asked: tuple[IntArray, FloatArray],
    k: int,
    vocab_size: int,
) -> TopK:
    """As :func:`topk_of_entries`, with entries that were asked for.

    Args:
        ids: (T - 1, J) int32.
        logprobs: (T - 1, J) float32 nats.
        token_logprobs: (T - 1,) float32 nats.
        asked: ids (T - 1, A) int32, -1 for none, and what they have, float32 nats.
        k: entries to keep per position, J + A or fewer.
        vocab_size: ids that the tokenizer knows.
    """
    # One entry per id: what is among the most probable ones is not asked for a second time.
    wanted = np.where((asked[0][:, :, None] == ids[:, None, :]).any(-1), -1, asked[0])
    return topk_of_entries(
        np.concatenate([ids, wanted], -1).astype(np.int32),
        np.concatenate([logprobs, asked[1]], -1).astype(np.float32),
        token_logprobs,
        k,
        vocab_size,
    )


def with_last_position(ids: IntArray, logprobs: FloatArray, token_logprobs: FloatArray) -> TopK:
    """Add the last position of a text, which is empty: no token follows that could be compared with a distribution.

    Args:
        ids: (T - 1, K) int32.
        logprobs: (T - 1, K) float32 nats.
        token_logprobs: (T - 1,) float32 nats.
    """
    k = ids.shape[-1]
    return TopK(
        np.concatenate([ids, np.full((1, k), -1, np.int32)]),
        np.concatenate([logprobs, np.full((1, k), -np.inf, np.float32)]),
        np.append(token_logprobs, np.float32(np.nan)),
    )
