"""Records by worked numbers: which positions and bytes are supervised, tail mass and cross-entropies."""

import math

import numpy as np
import pytest

from fusion_plugins.core.fusion.record import (
    build_record,
    cross_entropy,
    supervised_bytes,
    supervised_positions,
    tail_mass,
)
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText

ENDS = [3, 5, 8, 10, 12]


def text_of(ends, *spans):
    n = len(ends)
    return TokenizedText(
        np.arange(n, dtype=np.int32), np.array(ends, np.int32), np.array(spans, np.int32).reshape(-1, 2),
        np.ones(n, np.bool_),
    )  # fmt: skip


@pytest.mark.parametrize(("spans", "positions", "n_bytes"), [
    # Tokens 1 and 2 are inside; position 2 predicts what follows the span.
    pytest.param([(3, 8)], [1, 1, 1, 0, 0], [0, 2, 3, 0, 0], id="whole tokens"),
    # Position 0 has not reached the span, but predicts the token that does; one byte of token 1 is inside.
    pytest.param([(4, 8)], [1, 1, 1, 0, 0], [0, 1, 3, 0, 0], id="a token that starts before the span"),
    pytest.param([(3, 9)], [1, 1, 1, 0, 0], [0, 2, 3, 0, 0], id="a token that ends behind the span"),
    # Nothing predicts the first token.
    pytest.param([(0, 5)], [1, 1, 0, 0, 0], [0, 2, 0, 0, 0], id="from the beginning"),
    # The last position has no label, although it ends inside the span.
    pytest.param([(10, 12)], [0, 0, 0, 1, 0], [0, 0, 0, 0, 2], id="to the end"),
    pytest.param([(3, 5), (10, 12)], [1, 1, 0, 1, 0], [0, 2, 0, 0, 2], id="two spans"),
    pytest.param([(5, 5)], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], id="an empty span"),
    pytest.param([(6, 7)], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], id="inside one token"),
    pytest.param([], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], id="no span"),
])  # fmt: skip
def test_supervised_positions_and_bytes(spans, positions, n_bytes):
    text = text_of(ENDS, *spans)
    found, counted = supervised_positions(text), supervised_bytes(text)
    assert found.tolist() == list(map(bool, positions))
    assert counted.tolist() == n_bytes
    assert (found.dtype, counted.dtype) == (np.bool_, np.int32)


def test_a_token_without_bytes_is_predicted_and_not_supervised():
    """Token 2 ends the turn: position 1 predicts it, and it has no byte of the text."""
    text = text_of([3, 5, 5, 6], (3, 5))
    assert supervised_positions(text).tolist() == [True, True, True, False]
    assert supervised_bytes(text).tolist() == [0, 2, 0, 0]


def test_an_empty_text_has_nothing_supervised():
    text = text_of([], (0, 0))
    assert supervised_positions(text).tolist() == supervised_bytes(text).tolist() == []
    assert all(map(math.isnan, cross_entropy(text, np.empty(0, np.float32))))


def test_the_tail_is_what_the_entries_do_not_hold():
    """.5 + .25, .5 alone, nothing at all, all of it; 1.1 is a rounding error of the source and leaves nothing."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([[0.5, 0.25], [0.5, 0], [0, 0], [0.5, 0.5], [0.7, 0.4]], np.float32))
    found = tail_mass(logprobs)
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0, 0.0, 0.0], atol=1e-6)
    assert found.dtype == np.float32
    assert found.min() >= 0.0


def test_the_cross_entropy_is_a_mean_over_tokens_and_over_bytes():
    """Tokens 1 (2 bytes) and 2 (3 bytes) cost 1 + 2 = 3 nats: 1.5 a token, .6 a byte."""
    logprobs = np.array([-1, -2, -4, -8, np.nan], np.float32)
    assert cross_entropy(text_of(ENDS, (3, 8)), logprobs) == pytest.approx((1.5, 0.6))


def test_spans_share_one_mean():
    """Tokens 1 and 4, of 2 bytes each, cost 1 + 8 = 9 nats."""
    logprobs = np.array([-1, -2, -4, -8, np.nan], np.float32)
    assert cross_entropy(text_of(ENDS, (3, 5), (10, 12)), logprobs) == pytest.approx((4.5, 2.25))


def test_the_last_log_probability_is_ignored():
    text = text_of(ENDS, (10, 12))
    for last in (np.nan, -100.0):
        assert cross_entropy(text, np.array([-1, -2, -4, -8, last], np.float32)) == pytest.approx((8.0, 4.0))


@pytest.mark.parametrize("spans", [[], [(5, 5)], [(0, 3)]])
def test_without_a_supervised_token_there_is_no_cross_entropy(spans):
    assert all(map(math.isnan, cross_entropy(text_of(ENDS, *spans), np.full(5, -1, np.float32))))


def test_a_record_by_the_worked_numbers():
    """Tokens end at 1, 2, 4, 5 and 6, the span is 1 to 4: positions 0 to 2 are kept.

    Position 1 has one entry (.5), the others two (.5 and .25). Tokens 1 (1 byte) and 2 (2 bytes) have the
    probabilities 1/2 and 1/4: ln 2 + ln 4 = 3 ln 2 nats, 1.5 ln 2 a token, ln 2 a byte.
    """
    text = text_of([1, 2, 4, 5, 6], (1, 4))
    ids = np.array([[7, 8], [9, -1], [7, 8], [7, 8], [7, 8]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.25]] * 5, np.float32))
    token_logprobs = np.log(np.array([0.5, 0.25, 0.1, 0.1, 0.1], np.float32))
    given = [array.copy() for array in (ids, logprobs, token_logprobs)]
    record = build_record("r", text, TopK(ids, logprobs, token_logprobs))

    assert record.id == "r"
    assert record.text is text
    assert record.topk.ids.tolist() == [[7, 8], [9, -1], [7, 8], [-1, -1], [-1, -1]]
    probabilities = [[0.5, 0.25], [0.5, 0], [0.5, 0.25], [0, 0], [0, 0]]
    np.testing.assert_allclose(np.exp(record.topk.logprobs), probabilities, atol=1e-7)
    np.testing.assert_allclose(record.tail, [0.25, 0.5, 0.25, 1.0, 1.0], atol=1e-6)
    # The label's log-probability is kept at every position that has a label.
    np.testing.assert_array_equal(record.topk.token_logprobs[:4], token_logprobs[:4])
    assert math.isnan(record.topk.token_logprobs[4])
    assert record.ce_per_token == pytest.approx(1.5 * math.log(2))
    assert record.ce_per_byte == pytest.approx(math.log(2))
    for array, before in zip((ids, logprobs, token_logprobs), given, strict=True):
        np.testing.assert_array_equal(array, before)


def test_a_record_has_the_types_of_a_store():
    topk = TopK(np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float64), np.zeros(2, np.float64))
    record = build_record("r", text_of([1, 2], (0, 2)), topk)
    assert record.topk.ids.dtype == np.int32
    assert {a.dtype for a in (record.topk.logprobs, record.topk.token_logprobs, record.tail)} == {np.dtype(np.float32)}
