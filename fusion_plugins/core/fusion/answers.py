"""How probable a source finds a whole answer: one number per record, over the source's own tokens."""

import numpy as np

from fusion_plugins.core.arrays import BoolArray
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import TURN_ENDS
from fusion_plugins.core.text.types import TokenizedText


def answer_logprob(record: Record, table: TokenTable) -> tuple[float, int]:
    """Return the log-probability of the last answer of a chat, and how many tokens it has.

    The answer is what the assistant generated in its last turn, all tokens from the first to the one that ends the
    turn, as supervised training takes it.

    Args:
        record: what a source said about the chat.
        table: the source's tokens.

    Returns:
        The sum over the tokens in nats, and their number; ``(0.0, 0)`` where the record has no answer. Stores keep
        single log-probabilities in float16, and beside them what this sum lacks by that (``answer_rest``): it is exact
        to 1e-5, or to 1e-4 where an answer of many thousand tokens is not the first. Stores of earlier versions have no
        rest. There the sum is taken from the cross-entropy of all spans, which is exact, but for the end of the turn,
        and for chats with several turns of the assistant.
    """
    counted = supervised_bytes(record.text) > 0
    answer = _last_answer(record.text, table)
    # The log-probability at position t is that of token t + 1.
    logprobs = np.concatenate([[0.0], record.topk.token_logprobs[:-1].astype(np.float64)])
    if not answer.any():
        return 0.0, 0
    if (counted & ~answer).any() or not counted.any():
        return float(logprobs[answer].sum()) + record.answer_rest, int(answer.sum())
    spelled = -record.ce_per_token * int(counted.sum())
    return float(spelled + logprobs[answer & ~counted].sum()) + record.answer_rest, int(answer.sum())


def _last_answer(text: TokenizedText, table: TokenTable) -> BoolArray:
    """Return (T,) bool: the tokens of the last turn; its spans are the last ones that touch each other."""
    answer = np.zeros(len(text.ends), np.bool_)
    spans = text.spans.tolist()
    if not spans:
        return answer
    first = len(spans) - 1
    while first and spans[first - 1][1] == spans[first][0]:
        first -= 1
    turn = TokenizedText(text.input_ids, text.ends, text.spans[first:], text.exact)
    places = np.flatnonzero(supervised_bytes(turn) > 0)
    if places.size:
        stop = spans[-1][1]
        last = _end_of_turn(text, table, int(np.searchsorted(text.ends, stop)) + 1)
        answer[places[0] : max(int(places[-1]) + 1, last)] = True
    return answer


def _end_of_turn(text: TokenizedText, table: TokenTable, first: int) -> int:
    """Return the position behind the token that ends the turn, 0 where other text or none comes first."""
    for position in range(first, len(text.input_ids)):
        token = int(text.input_ids[position])
        role = table.role_of(token)
        if role in TURN_ENDS:
            return position + 1
        if role is not None or table.bytes_of(token).strip():
            break
    return 0
