"""Counts of aligned tokens, and what is chosen by them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion import counts as counts_module
from fusion_plugins.core.fusion.counts import MOST_SHARES, AlignmentCounts, by_count, shares_by_count
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.errors import DataError, MismatchError


def columns_of(counts):
    return [column.tolist() for column in counts.pairs()]


def all_of(target):
    return np.ones(len(target), np.bool_)


def test_counts_are_of_distinct_source_ids_once_per_target_position():
    """Published rule: aligned source ids 5, 5, 7 add one to 5 and one to 7."""
    counts = AlignmentCounts()
    counts.add([5, 5, 7, 5], [3, 3, 4], [[0, 1, 2], [3], []])
    assert [column.tolist() for column in counts.pairs()] == [[5, 7], [3, 3], [2, 1]]
    assert len(counts) == 2


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), max_size=8), min_size=1, max_size=5
    ),
    cut=st.integers(0, 5),
)
def test_counts_of_shards_add_up_in_any_order(texts, cut):
    def counted(parts):
        made = AlignmentCounts()
        for part in parts:
            made.add([s for s, _ in part], [t for _, t in part], [[at] for at in range(len(part))])
        return made

    whole, left, right = counted(texts), counted(texts[:cut]), counted(texts[cut:])
    right.merge(left)
    assert [column.tolist() for column in right.pairs()] == [column.tolist() for column in whole.pairs()]
    again = AlignmentCounts.from_pairs(*whole.pairs())
    assert [column.tolist() for column in again.pairs()] == [column.tolist() for column in whole.pairs()]
    expected = {}
    for pair in (pair for part in texts for pair in part):
        expected[pair] = expected.get(pair, 0) + 1
    assert (
        dict(zip(zip(*(c.tolist() for c in whole.pairs()[:2]), strict=True), whole.pairs()[2].tolist(), strict=True))
        == expected
    )


def test_counts_of_another_alignment_are_refused():
    with pytest.raises(DataError, match="alignment of 2 target positions, got one of 1"):
        AlignmentCounts().add([1], [1, 2], [[0]])


@pytest.mark.parametrize("position", [-1, 2])
def test_positions_that_no_token_has_are_refused(position):
    with pytest.raises(DataError, match=f"positions of 2 source tokens, got .*{position}"):
        AlignmentCounts().add([1, 2], [5, 6], [[0], [1, position]])


def test_counts_of_other_vocabularies_are_refused():
    counts = AlignmentCounts.from_pairs([5], [0], [1])
    with pytest.raises(MismatchError, match="2 and 1 tokens, got pairs up to"):
        map_vocabulary(["a", "b"], ["c"], method="statistics", counts=counts)
    for choose in (by_count, shares_by_count):
        with pytest.raises(MismatchError, match=r"2 and 1 tokens, got pairs up to \(5, 0\)"):
            choose(["a", "b"], ["c"], counts, all_of(["c"]))
        with pytest.raises(MismatchError, match=r"2 and 1 tokens, got pairs up to \(0, 3\)"):
            choose(["a", "b"], ["c"], AlignmentCounts.from_pairs([0], [3], [1]), all_of(["c"]))


def test_texts_add_up_by_source_id_then_target_id():
    """Text 1 aligns 9-4 twice and 2-6 once; text 2 aligns 9-4 and 9-1, and leaves its last target token alone."""
    counts = AlignmentCounts()
    counts.add([9, 2, 9], [4, 6, 4], [[0], [1], [2]])
    counts.add([9, 9], [4, 1, 8], [[0], [1], []])
    assert columns_of(counts) == [[2, 9, 9], [6, 1, 4], [1, 1, 3]]
    assert len(counts) == 3
    assert {column.dtype for column in counts.pairs()} == {np.dtype(np.int64)}


def test_a_target_token_counts_once_with_each_of_its_source_tokens():
    """Source "1" "2" "1" is target "121": one count for "1", one for "2"."""
    counts = AlignmentCounts()
    counts.add([1, 2, 1], [5], [[0, 1, 2]])
    assert columns_of(counts) == [[1, 2], [5, 5], [1, 1]]


def test_pairs_that_wait_are_counted_as_those_that_do_not(monkeypatch):
    monkeypatch.setattr(counts_module, "_PENDING", 3)
    counts = AlignmentCounts()
    for _ in range(5):
        counts.add([1, 2], [3, 4], [[0], [1]])
    assert columns_of(counts) == [[1, 2], [3, 4], [5, 5]]


def test_nothing_aligned_is_nothing_counted():
    counts = AlignmentCounts()
    counts.add([], [], [])
    counts.add([1, 2], [3], [[]])
    assert len(counts) == 0
    assert columns_of(counts) == [[], [], []]


def test_a_merge_adds_equal_pairs_and_leaves_the_other_shard_as_it_was():
    left, right = AlignmentCounts(), AlignmentCounts.from_pairs([7, 1], [3, 8], [10, 20])
    left.add([7, 5], [3, 3], [[0], [1]])
    left.merge(right)
    assert columns_of(left) == [[1, 5, 7], [8, 3, 3], [20, 1, 11]]
    assert columns_of(right) == [[1, 7], [8, 3], [20, 10]]
    left.merge(AlignmentCounts())
    assert columns_of(left) == [[1, 5, 7], [8, 3, 3], [20, 1, 11]]


def test_pairs_that_are_given_twice_add_up():
    assert columns_of(AlignmentCounts.from_pairs([2, 1, 2], [3, 3, 3], [4, 5, 6])) == [[1, 2], [3, 3], [5, 10]]


def test_a_refused_text_is_not_counted():
    counts = AlignmentCounts.from_pairs([1], [2], [3])
    with pytest.raises(DataError, match="alignment of 1 target positions, got one of 2"):
        counts.add([1], [2], [[0], [0]])
    with pytest.raises(DataError, match="positions of 1 source tokens, got 0 to 1"):
        counts.add([1], [2], [[0, 1]])
    assert columns_of(counts) == [[1], [2], [3]]


TARGET = [b"a", b"ab", b"xbc", b"y", b"w"]


@pytest.mark.parametrize(("token", "counted", "chosen"), [
    pytest.param(b"ab", {b"a": 9, b"ab": 1, b"xbc": 20}, b"ab", id="the equal token, however rare"),
    pytest.param(b"abc", {b"ab": 1, b"xbc": 9}, b"ab", id="one that it begins with before a frequent one"),
    pytest.param(b"x", {b"y": 9, b"xbc": 1}, b"xbc", id="one that begins with it before a nearer one"),
    pytest.param(b"abc", {b"a": 2, b"ab": 1}, b"a", id="of two beginnings the frequent one"),
    pytest.param(b"q", {b"xbc": 3, b"y": 2}, b"xbc", id="the frequent one before the nearest"),
    pytest.param(b"q", {b"xbc": 2, b"y": 2}, b"y", id="of equally frequent ones the nearest"),
    pytest.param(b"q", {b"w": 2, b"y": 2}, b"y", id="of equally near ones the lowest id"),
])  # fmt: skip
def test_by_count_prefers(token, counted, chosen):
    counts = AlignmentCounts.from_pairs([1] * len(counted), [TARGET.index(t) for t in counted], [*counted.values()])
    found = by_count([b"never", token], TARGET, counts, all_of(TARGET))
    assert found.tolist() == [-1, TARGET.index(chosen)]
    assert found.dtype == np.int32
    text = by_count(["never", token.decode()], [t.decode() for t in TARGET], counts, all_of(TARGET))
    assert text.tolist() == found.tolist()


def test_by_count_chooses_among_allowed_tokens_only():
    """The equal token is not allowed: "ab" goes to "a"; "y" was aligned with nothing else and goes nowhere."""
    counts = AlignmentCounts.from_pairs([0, 0, 1], [0, 1, 3], [1, 9, 9])
    allowed = np.array([True, False, True, False, True])
    assert by_count([b"ab", b"y"], TARGET, counts, allowed).tolist() == [0, -1]


def test_shares_are_in_proportion_to_the_counts():
    """Source "1" goes 5/8 to "12", 2/8 to "1", 1/8 to "13", and not to "2": neither begins with the other.

    All of "cd" goes to "c"; "x" has no pair. The equal token has its share like the others.
    """
    source, target = [b"x", b"1", b"cd"], [b"1", b"12", b"13", b"2", b"c"]
    counts = AlignmentCounts.from_pairs([1, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 0], [2, 5, 1, 50, 3, 30])
    shares = shares_by_count(source, target, counts, all_of(target))
    assert shares.starts.tolist() == [0, 0, 3, 4]
    assert shares.target_ids.tolist() == [1, 0, 2, 4]
    assert shares.weights.tolist() == [0.625, 0.25, 0.125, 1.0]
    assert (shares.starts.dtype, shares.target_ids.dtype, shares.weights.dtype) == (np.int32, np.int32, np.float32)


def test_shares_of_tokens_that_are_not_allowed_go_to_the_others():
    target = [b"1", b"12", b"13"]
    counts = AlignmentCounts.from_pairs([0, 0, 0, 1], [0, 1, 2, 1], [3, 5, 1, 7])
    shares = shares_by_count([b"1", b"12"], target, counts, np.array([True, False, True]))
    assert shares.starts.tolist() == [0, 2, 2]
    assert shares.target_ids.tolist() == [0, 2]
    assert shares.weights.tolist() == [0.75, 0.25]


def test_of_too_many_equal_shares_the_lowest_ids_are_kept():
    """Of 20 target tokens the last has 17 counts, the others 1: it gets 17/32, the first 15 get 1/32 each."""
    target = [b"a" * n for n in range(1, 21)]
    counts = AlignmentCounts.from_pairs([0] * 20, range(20), [1] * 19 + [17])
    shares = shares_by_count([b"a"], target, counts, all_of(target))
    assert MOST_SHARES == 16
    assert shares.target_ids.tolist() == [19, *range(15)]
    assert shares.weights.tolist() == [17 / 32] + [1 / 32] * 15


def test_without_pairs_nothing_is_chosen_and_nothing_shared():
    counts = AlignmentCounts.from_pairs([0], [0], [4])
    nothing = np.zeros(1, np.bool_)
    for found, allowed in ((AlignmentCounts(), all_of([b"a"])), (counts, nothing)):
        assert by_count([b"a", b"b"], [b"a"], found, allowed).tolist() == [-1, -1]
        shares = shares_by_count([b"a", b"b"], [b"a"], found, allowed)
        assert (shares.starts.tolist(), shares.target_ids.tolist(), shares.weights.tolist()) == ([0, 0, 0], [], [])
