"""Batches are the same in every run, and what is finished is committed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.sources.batches import LazyBatches, commit_batches, missing_batches, plan_batches


@given(st.lists(st.integers(1, 9)), st.integers(1, 12))
def test_a_batch_stays_within_the_budget_unless_it_is_one_item_and_no_item_is_lost(sizes, budget):
    batches = list(plan_batches(sizes, int, budget))
    assert [size for batch in batches for size in batch] == sizes
    assert all(sum(batch) <= budget or len(batch) == 1 for batch in batches)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert sum(batch) + following[0] > budget


@given(st.lists(st.integers(1, 9), unique=True), st.sets(st.integers(1, 9)))
def test_what_is_done_does_not_move_the_borders_of_batches(items, done):
    everything = list(plan_batches(items, int, 10))
    whole = list(missing_batches(items, int, 10, done.__contains__, whole=True))
    assert whole == [batch for batch in everything if not set(batch) <= done]
    missing = list(missing_batches(items, int, 10, done.__contains__, whole=False))
    assert missing == [[item for item in batch if item not in done] for batch in whole]


def test_lazy_batches_are_made_one_ahead_and_known_until_they_are_committed():
    made = []

    def make(number, batch):
        made.append(number)
        return [f"{number}:{item}" for item in batch]

    batches = LazyBatches(4, [["a", "b"], ["c"], ["d"], ["e"]], make)
    assert len(batches) == 4
    assert made == []
    taken = iter(batches)
    assert next(taken) == ["0:a", "0:b"]
    assert set(made) <= {0, 1}
    assert batches.under_way[0] == ["a", "b"]
    assert list(taken) == [["1:c"], ["2:d"], ["3:e"]]


def test_a_batch_is_committed_once_it_is_complete_in_its_own_order_and_then_forgotten():
    results = [((1, 0), "c"), ((0, 1), "b"), ((0, 0), "a")]
    under_way, committed = {0: ["a", "b"], 1: ["c"]}, []
    commit_batches(under_way, results, lambda batch, found: committed.append((batch, list(found.items()))))
    assert committed == [(["c"], [(0, "c")]), (["a", "b"], [(0, "a"), (1, "b")])]
    assert under_way == {}


def test_when_the_results_end_early_what_is_there_of_every_batch_is_committed():
    def results():
        yield (1, 1), "d"
        yield (0, 0), "a"
        raise KeyboardInterrupt

    committed = []
    with pytest.raises(KeyboardInterrupt):
        commit_batches({0: ["a", "b"], 1: ["c", "d"]}, results(), lambda *batch: committed.append(batch))
    assert committed == [(["a", "b"], {0: "a"}), (["c", "d"], {1: "d"})]
