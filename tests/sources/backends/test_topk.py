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
