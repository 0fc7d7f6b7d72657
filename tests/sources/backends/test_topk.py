"""The top-k of the entries that an engine reports."""

import subprocess
import sys

import numpy as np
import pytest

from fusion_plugins.sources.backends.topk import spare_entries, topk_of_entries, with_last_position


def test_entries_are_sorted_by_probability_and_ties_by_lowest_id():
    ids = np.array([[7, 3, 5], [2, 1, 0]], np.int32)
    logprobs = np.array([[-1.0, -1.0, -0.5], [-3.0, -2.0, -1.0]], np.float32)
    topk = topk_of_entries(ids, logprobs, np.array([-0.5, -9.0], np.float32), 2, 8)
    np.testing.assert_array_equal(topk.ids, [[5, 3], [0, 1], [-1, -1]])
    np.testing.assert_array_equal(topk.logprobs, np.array([[-0.5, -1.0], [-1.0, -2.0], [-np.inf] * 2], np.float32))
    np.testing.assert_array_equal(topk.token_logprobs, np.array([-0.5, -9.0, np.nan], np.float32))
    assert (topk.ids.dtype, topk.logprobs.dtype, topk.token_logprobs.dtype) == (np.int32, np.float32, np.float32)


def test_ids_beyond_the_vocabulary_make_room_for_spare_entries():
    ids = np.array([[9, 1, 8, 0]], np.int32)
    logprobs = np.array([[-0.1, -0.2, -0.3, -np.inf]], np.float32)
    topk = topk_of_entries(ids, logprobs, np.array([-0.2], np.float32), 3, 8)
    # 0 has probability 0, but the tokenizer knows it: it comes before the empty entry.
    np.testing.assert_array_equal(topk.ids[0], [1, 0, -1])
    np.testing.assert_array_equal(topk.logprobs[0], np.array([-0.2, -np.inf, -np.inf], np.float32))


def test_fewer_entries_than_k_leave_the_others_empty_and_a_text_of_one_token_has_none():
    topk = topk_of_entries(np.array([[4]], np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32), 3, 8)
    np.testing.assert_array_equal(topk.ids, [[4, -1, -1], [-1, -1, -1]])
    nothing = topk_of_entries(np.empty((0, 0), np.int32), np.empty((0, 0), np.float32), np.empty(0, np.float32), 3, 8)
    np.testing.assert_array_equal(nothing.ids, [[-1, -1, -1]])
    assert np.isnan(nothing.token_logprobs).tolist() == [True]


def plain_topk(ids, logprobs, k, vocab_size):
    rows = []
    for row_ids, row_logprobs in zip(ids.tolist(), logprobs.tolist(), strict=True):
        entries = [(-p, i) for i, p in zip(row_ids, row_logprobs, strict=True) if 0 <= i < vocab_size]
        held = [(i, -p) for p, i in sorted(entries)][:k]
        rows.append(held + [(-1, -np.inf)] * (k - len(held)))
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_entries_in_any_order_with_ties_gaps_and_padding_are_those_of_a_plain_sort(seed):
    rng = np.random.default_rng(seed)
    width, vocab_size, k = 12, 30, int(rng.integers(1, 14))
    ids = np.array([rng.permutation(40)[:width] for _ in range(200)], np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    # Few different values, as the logits of a model in bfloat16 have; some rows in order, some probabilities 0 or 1.
    logprobs = -rng.integers(0, 5, ids.shape).astype(np.float32) / 7
    logprobs[rng.random(ids.shape) < 0.1] = -np.inf
    logprobs[::2] = -np.sort(-logprobs[::2], axis=-1)
    topk = topk_of_entries(ids, logprobs, logprobs[:, 0], k, vocab_size)
    expected = plain_topk(ids, logprobs, k, vocab_size)
    assert topk.ids[:-1].tolist() == [[i for i, _ in row] for row in expected]
    np.testing.assert_array_equal(topk.logprobs[:-1], np.array([[p for _, p in row] for row in expected], np.float32))


def test_the_last_position_is_empty():
    topk = with_last_position(np.ones((2, 3), np.int32), np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    assert topk.ids[-1].tolist() == [-1, -1, -1]
    assert np.isneginf(topk.logprobs[-1]).all()
    assert np.isnan(topk.token_logprobs[-1])


@pytest.mark.parametrize(("width", "spare"), [(100, 0), (90, 0), (116, 16), (9000, 64)])
def test_spare_entries_make_up_for_a_padded_output_up_to_a_limit(width, spare):
    assert spare_entries(width, 100) == spare


def test_servers_and_engines_get_no_torch_from_here():
    code = "import sys, fusion_plugins.sources.backends.topk; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
