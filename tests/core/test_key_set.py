"""The compact set of keys does what a Python set and a dict do."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.core.key_set import FIRST_PLACES, KeySet

KEYS = st.one_of(
    st.text(max_size=5),
    st.tuples(st.text(max_size=3), st.integers()),
    st.sampled_from(["1", "\ud83d", ("1",), ("a", 1), ("a", "1"), ("a", True), ("", None)]),
)


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**62))), st.lists(KEYS))
def test_it_is_a_dict_from_keys_to_numbers(added, others):
    keys, plain = KeySet(), {}
    for key, number in added:
        keys.add(key, number)
        plain[repr(key)] = number  # 1 and True are one key of a dict, and two of a folder
    assert len(keys) == len(plain)
    for key in [*others, *(key for key, _ in added)]:
        assert (key in keys) == (repr(key) in plain)
        assert keys.number(key) == plain.get(repr(key))


@pytest.mark.parametrize("count", [FIRST_PLACES - 1, 3 * FIRST_PLACES, 40_000])
def test_it_grows_and_loses_nothing(count):
    keys = KeySet(f"text-{number}" for number in range(count))
    assert len(keys) == count
    assert all(f"text-{number}" in keys for number in range(count))
    assert not any(f"text-{number}" in keys for number in range(count, 2 * count))
    size = sum(sys.getsizeof(column) for column in (keys._first, keys._second, keys._numbers))
    assert size < 66 * count or count < FIRST_PLACES
