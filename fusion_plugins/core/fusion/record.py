"""From what a source model said about one text to a :class:`~fusion_plugins.core.fusion.types.Record`.

Second step of the way of the data: ``TokenizedText`` + rows of a source -> ``Record`` -> store.
"""

import numpy as np

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.types import TokenizedText

__all__ = ["build_record", "cross_entropy", "stored_rows", "supervised_tokens", "tail_mass"]


def stored_rows(text: TokenizedText) -> BoolArray:
    """Return (T,) bool: the rows that another tokenizer's rows can correspond to.

    Row ``t`` counts when ``start <= ends[t] <= stop`` for a supervised span: from the row that predicts the span's
    first token to the row that predicts what follows it. The last row predicts nothing that was read.
    """
    rows = np.zeros(len(text.ends), dtype=np.bool_)
    for start, stop in text.spans:
        rows |= (text.ends >= start) & (text.ends <= stop)
    rows[-1:] = False
    return rows


def supervised_tokens(text: TokenizedText) -> IntArray:
    """Return (T,) int32: how many supervised bytes each token carries; 0 where it is not supervised.

    A token is supervised when it was predicted (it is not the first) and ends inside a span, with bytes of its own.
    """
    before = np.concatenate([text.ends[:1], text.ends[:-1]])
    n_bytes = np.zeros(len(text.ends), dtype=np.int32)
    for start, stop in text.spans:
        inside = (text.ends > start) & (text.ends <= stop)
        n_bytes = np.where(inside, text.ends - np.maximum(before, start), n_bytes)
    return n_bytes.astype(np.int32)


def tail_mass(topk_logprobs: FloatArray) -> FloatArray:
    """Return (T,) float32: one minus the probability that the (T, K) entries hold, never below 0."""
    with np.errstate(divide="ignore"):
        held = np.exp(topk_logprobs.astype(np.float64)).sum(axis=-1)
    return np.clip(1.0 - held, 0.0, 1.0).astype(np.float32)


def cross_entropy(text: TokenizedText, token_logprobs: FloatArray) -> tuple[float, float]:
    """Return the mean cross-entropy of the supervised tokens, in nats per token and in nats per supervised byte.

    Args:
        text: T tokens.
        token_logprobs: (T,) log-probability of the next token; the last one is ignored.

    Returns:
        Two numbers; NaN where no token is supervised.
    """
    n_bytes = supervised_tokens(text)
    nats = -float(token_logprobs[:-1].astype(np.float64)[n_bytes[1:] > 0].sum())
    n_tokens = int((n_bytes > 0).sum())
    return (nats / n_tokens, nats / int(n_bytes.sum())) if n_tokens else (float("nan"), float("nan"))


def build_record(
    id: str, text: TokenizedText, topk_ids: IntArray, topk_logprobs: FloatArray, token_logprobs: FloatArray
) -> Record:
    """Blank the rows that nothing can use and add tail mass and cross-entropies.

    Args:
        id: the text's id.
        text: T tokens of the source's own tokenizer.
        topk_ids: (T, K) int32 by descending probability, -1 where empty; the last row is ignored.
        topk_logprobs: (T, K) float32 true log-probabilities in nats, -inf where empty.
        token_logprobs: (T,) float32 log-probability of the next token; the last one is ignored.
    """
    rows = stored_rows(text)
    ids = np.where(rows[:, None], topk_ids, -1).astype(np.int32)
    logprobs = np.where(ids >= 0, topk_logprobs, -np.inf).astype(np.float32)
    gold = token_logprobs.astype(np.float32).copy()
    gold[-1:] = np.nan
    ce_per_token, ce_per_byte = cross_entropy(text, gold)
    return Record(
        id=id,
        input_ids=text.input_ids,
        offsets=text.ends,
        exact=text.exact,
        spans=text.spans,
        topk_ids=ids,
        topk_logprobs=logprobs,
        token_logprobs=gold,
        tail=tail_mass(logprobs),
        ce_per_token=ce_per_token,
        ce_per_byte=ce_per_byte,
    )
