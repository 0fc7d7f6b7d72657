"""What a sparse distribution tells about its entries."""

import numpy as np
import pytest

from fusion_plugins.core.fusion.types import SparseDistributions


def distributions(ids):
    ids = np.array(ids, np.int32)
    logprobs = np.where(ids >= 0, np.float32(-1), np.float32(-np.inf))
    return SparseDistributions(ids, logprobs, np.zeros(ids.shape[:-1], np.float32))


def test_an_entry_holds_a_probability_where_it_has_an_id():
    """Id 0 is a token like any other."""
    found = distributions([[0, 5], [3, -1], [-1, -1]])
    assert found.mask.tolist() == [[True, True], [True, False], [False, False]]
    assert found.present.tolist() == [True, True, False]
    assert found.mask.dtype == found.present.dtype == np.bool_


def test_an_entry_counts_wherever_it_is():
    assert distributions([[-1, 0], [-1, -1]]).present.tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_without_positions_or_entries_nothing_is_present(shape):
    found = distributions(np.empty(shape))
    assert found.mask.shape == shape
    assert found.present.tolist() == [False] * shape[0]


def test_texts_of_a_batch_have_one_more_axis():
    found = distributions([[[4, -1], [-1, -1]], [[-1, -1], [2, 1]]])
    assert found.mask.shape == (2, 2, 2)
    assert found.present.tolist() == [[True, False], [False, True]]
