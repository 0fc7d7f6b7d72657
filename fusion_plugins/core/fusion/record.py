"""A source's tokens and distributions of one text -> a :class:`~fusion_plugins.core.fusion.types.Record`."""

import numpy as np

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText


def supervised_positions(text: TokenizedText) -> BoolArray:
    """Return (T,) bool: the positions whose distributions a store keeps and training uses.

    Position ``t`` counts when ``start <= ends[t] <= stop`` for a supervised span: from the position that predicts the
    span's first token to the one that predicts what follows the span. A first token may begin before the span; then the
    position before it counts as well. The last position never counts: it has no label.
    """
    positions = np.zeros(len(text.ends), dtype=np.bool_)
    for start, stop in text.spans:
        positions |= (text.ends >= start) & (text.ends <= stop)
        first = int(np.searchsorted(text.ends, start, side="right"))
        if start < stop and 0 < first < len(text.ends):
            positions[first - 1] = True
    positions[-1:] = False
    return positions


def supervised_bytes(text: TokenizedText) -> IntArray:
    """Return (T,) int32: how many supervised bytes each token has; 0 where it is not supervised.

    A token is supervised when it was predicted (it is not the first) and ends inside a span, with bytes of its own.
    """
    before = np.concatenate([text.ends[:1], text.ends[:-1]])
    n_bytes = np.zeros(len(text.ends), dtype=np.int32)
    for start, stop in text.spans:
        inside = (text.ends > start) & (text.ends <= stop)
        n_bytes = np.where(inside, text.ends - np.maximum(before, start), n_bytes)
    return n_bytes.astype(np.int32)


def tail_mass(logprobs: FloatArray) -> FloatArray:
    """Return (T,) float32: one minus the probability that the (T, K) entries hold, never below 0."""
    with np.errstate(divide="ignore"):
        held = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
    return np.clip(1.0 - held, 0.0, 1.0).astype(np.float32)


def cross_entropy(text: TokenizedText, token_logprobs: FloatArray) -> tuple[float, float]:
    """Return the mean cross-entropy of the supervised tokens, in nats per token and in nats per supervised byte.

    Args:
        text: T tokens.
        token_logprobs: (T,) log-probability of the next token; the last one is ignored.

    Returns:
        Two numbers; NaN where no token is supervised.
    """
    n_bytes = supervised_bytes(text)
    nats = -float(token_logprobs[:-1].astype(np.float64)[n_bytes[1:] > 0].sum())
    n_tokens = int((n_bytes > 0).sum())
    return (nats / n_tokens, nats / int(n_bytes.sum())) if n_tokens else (float("nan"), float("nan"))


def build_record(id: str, text: TokenizedText, topk: TopK) -> Record:
    """Empty the positions that nothing uses; add tail mass and cross-entropies.

    Args:
        id: the text's id.
        text: T tokens of the source's own tokenizer.
        topk: its distributions; the last position is ignored.
    """
    ids = np.where(supervised_positions(text)[:, None], topk.ids, -1).astype(np.int32)
    logprobs = np.where(ids >= 0, topk.logprobs, -np.inf).astype(np.float32)
    token_logprobs = topk.token_logprobs.astype(np.float32).copy()
    token_logprobs[-1:] = np.nan
    ce_per_token, ce_per_byte = cross_entropy(text, token_logprobs)
    return Record(id, text, TopK(ids, logprobs, token_logprobs), tail_mass(logprobs), ce_per_token, ce_per_byte)
