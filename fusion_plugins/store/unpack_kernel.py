"""The arrays of a record from its unpacked bytes, checked, in one compiled pass."""

from typing import Any

import numpy as np

from fusion_plugins.core.jit import compiled
from fusion_plugins.store.patterns import IN_TOP_K, NOTHING, Array

INT32_MAX = 0x7FFFFFFF
#: what no record can have, in the order in which it is looked for
PROBLEMS = (
    "input_ids: expected numbers from 0 on, got less",
    "ends: expected bytes that never go back, got others",
    "ends: expected numbers of 31 bits, got more",
    "spans: expected 0 <= start <= stop",
    "topk_ids: expected numbers from -1 on, got less",
    "topk_logprobs: expected descending logarithms of probabilities, got others",
    "tail: expected probabilities, got others",
)
#: as many of them are of the text
TEXT_PROBLEMS = 4


@compiled
def _number(body: Array, at: int, n_bytes: int, step: int) -> Any:
    """Return a number without sign whose bytes, the lowest first, are ``step`` apart."""
    found = np.int64(0)
    for byte in range(n_bytes):
        found |= np.int64(body[at + byte * step]) << (8 * byte)
    return found


@compiled
def _unpack_tokens(body: Array, input_ids: Array, ends: Array, exact: Array) -> Any:
    """Fill the arrays of a text; return whether an id is negative, a width is, and the text is too long."""
    n_tokens = len(input_ids)
    negative = False
    going_back = False
    end = np.int64(0)
    for token in range(n_tokens):
        id = _number(body, token, 4, n_tokens)
        width = _number(body, 4 * n_tokens + token, 4, n_tokens)
        negative |= id > INT32_MAX
        going_back |= width > INT32_MAX
        end += width
        input_ids[token] = id
        ends[token] = end & INT32_MAX
        # Eight truths per byte, the first one in the highest bit.
        exact[token] = (body[8 * n_tokens + (token >> 3)] >> (7 - (token & 7))) & 1
    return negative, going_back, end > INT32_MAX


@compiled
def _unpack_spans(body: Array, at: int, spans: Array) -> Any:
    """Fill the spans; return whether one is none."""
    wrong = False
    for span in range(len(spans)):
        start, stop = _number(body, at + 8 * span, 4, 1), _number(body, at + 8 * span + 4, 4, 1)
        wrong |= not start <= stop <= INT32_MAX
        spans[span, 0], spans[span, 1] = start, stop
    return wrong


@compiled
def _unpack_ids(body: Array, at: int, id_bytes: int, ids: Array) -> Any:
    """Fill the ids of the entries; return whether one is below -1."""
    flat = ids.ravel()
    wrong = False
    # The largest number stands for -1.
    if id_bytes == 2:
        for place in range(len(flat)):
            id = _number(body, at + 2 * place, 2, 1)
            flat[place] = -1 if id == 0xFFFF else id
    else:
        for place in range(len(flat)):
            id = _number(body, at + 4 * place, 4, 1)
            wrong |= INT32_MAX < id < 0xFFFFFFFF
            flat[place] = -1 if id == 0xFFFFFFFF else id
    return wrong


@compiled
def unpack_text(body: Array, input_ids: Array, ends: Array, exact: Array, spans: Array) -> Any:
    """Fill the arrays of a record's text, which come first; otherwise as :func:`unpack_arrays`."""
    n_tokens = len(input_ids)
    negative, going_back, too_far = _unpack_tokens(body, input_ids, ends, exact)
    no_span = _unpack_spans(body, 8 * n_tokens + (n_tokens + 7) // 8, spans)
    problems = (negative, going_back, too_far, no_span)
    for number in range(len(problems)):
        if problems[number]:
            return number
    return -1


@compiled
def unpack_arrays(
    body: Array,
    id_bytes: int,
    most: float,
    values: Array,
    input_ids: Array,
    ends: Array,
    exact: Array,
    spans: Array,
    ids: Array,
    topk_logprobs: Array,
    token_logprobs: Array,
    tail: Array,
) -> Any:
    """Fill the arrays of a record; return the number of the first of :data:`PROBLEMS`, -1 if there is none.

    Ids have no upper bound here: a model's head may be wider than its vocabulary, and whoever looks an id up asks for
    its bounds. Log-probabilities are never above 0, because only their magnitudes are kept.

    Args:
        body: bytes of all arrays, one after another, as ``docs/store.md`` describes them: exactly as many as they need.
        id_bytes: 2 or 4.
        most: largest number that is taken for a probability.
        values: (65536,) float32, bit pattern of a magnitude -> log-probability.
        input_ids: (U,) int32.
        ends: (U,) int32.
        exact: (U,) bool.
        spans: (M, 2) int32.
        ids: (U, K) int32.
        topk_logprobs: (U, K) float32.
        token_logprobs: (U,) float32.
        tail: (U,) float32.
    """
    n_tokens, top_k = ids.shape
    ids_at = 8 * n_tokens + (n_tokens + 7) // 8 + 8 * len(spans)
    ranks_at = ids_at + id_bytes * top_k * n_tokens
    next_at = ranks_at + 2 * top_k * n_tokens
    tail_at = next_at + 2 * n_tokens

    problem = unpack_text(body, input_ids, ends, exact, spans)
    if problem >= 0:
        return problem
    below = _unpack_ids(body, ids_at, id_bytes, ids)
    no_logprob = False
    no_tail = False
    for token in range(n_tokens):
        next_pattern = _number(body, next_at + token, 2, n_tokens)
        wanted = next_pattern == IN_TOP_K and token + 1 < n_tokens
        found = 0
        pattern = 0
        for rank in range(top_k):
            # Kept as the difference to the rank before, which is never negative.
            pattern += _number(body, ranks_at + 2 * n_tokens * rank + token, 2, n_tokens)
            no_logprob |= pattern > NOTHING
            topk_logprobs[token, rank] = values[pattern & 0xFFFF]
            # A stranger's record may lack it: the first rank stands in for it.
            if wanted and (rank == 0 or (found == 0 and ids[token, rank] == input_ids[token + 1])):
                next_pattern = pattern & 0xFFFF
                found = ids[token, rank] == input_ids[token + 1]
        token_logprobs[token] = values[next_pattern]
        chance = -values[_number(body, tail_at + token, 2, n_tokens)]  # the table negates what it looks up
        no_tail |= not 0 <= chance <= most  # nan is neither
        tail[token] = chance

    problems = (below, no_logprob, no_tail)
    for number in range(len(problems)):
        if problems[number]:
            return TEXT_PROBLEMS + number
    return -1
