"""Edit distances and the search for the nearest token, held against the plain reference."""

import random

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion.nearest import edit_distance, nearest_tokens, pair_distances
from fusion_plugins.core.jit import compiled

LETTERS = "abé中\U0001f9ff "
TEXT = st.text(alphabet=LETTERS, max_size=7)
BYTES = st.one_of(st.binary(max_size=6), TEXT.map(str.encode))


@pytest.mark.parametrize(("left", "right", "expected"), [
    ("kitten", "sitting", 3),
    ("", "abc", 3),
    ("é", "e", 1),
    ("é".encode(), b"e", 2),
    (b" the", b"the", 1),
])  # fmt: skip
def test_distances_worked_by_hand(left, right, expected):
    assert edit_distance(left, right) == expected == reference.levenshtein(left, right)
    assert pair_distances([left], [right]).tolist() == [expected]


@settings(max_examples=200, deadline=None)
@given(pair=st.one_of(st.tuples(TEXT, TEXT), st.tuples(BYTES, BYTES)))
def test_distance_is_the_reference_and_symmetric(pair):
    left, right = pair
    assert edit_distance(left, right) == edit_distance(right, left) == reference.levenshtein(left, right)


@settings(max_examples=250, deadline=None)
@given(sides=st.one_of(
    st.tuples(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=1, max_size=12)),
    st.tuples(st.lists(BYTES, min_size=1, max_size=5), st.lists(BYTES, min_size=1, max_size=12)),
))  # fmt: skip
def test_nearest_is_the_first_of_the_nearest(sides):
    source, target = sides
    index, distance = nearest_tokens(source, target)
    expected = [reference.nearest_token(token, target) for token in source]
    assert list(zip(index.tolist(), distance.tolist(), strict=True)) == expected
    assert index.dtype == distance.dtype == np.int32


def test_nearest_of_tokens_around_and_beyond_a_machine_word():
    rng = random.Random(5)
    lengths = (0, 1, 2, 30, 63, 64, 65, 66, 130)
    tokens = ["".join(rng.choices("abcd", k=length)) for length in lengths for _ in range(3)]
    target = [token[:5] + token[6:] + "d" for token in tokens] + tokens[::4]
    index, distance = nearest_tokens(tokens, target)
    assert list(zip(index.tolist(), distance.tolist(), strict=True)) == [
        reference.nearest_token(token, target) for token in tokens
    ]


def test_many_different_letters_share_signature_bits_without_harm():
    rng = random.Random(6)
    alphabet = [chr(0x4E00 + index) for index in range(300)]
    target = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(60)]
    source = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(40)]
    index, distance = nearest_tokens(source, target)
    assert list(zip(index.tolist(), distance.tolist(), strict=True)) == [
        reference.nearest_token(token, target) for token in source
    ]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_nothing_beyond_the_limit_is_found(limit):
    source, target = ["abc", "abX", "aXX", "XXX", ""], ["abc", "zzzz"]
    index, distance = nearest_tokens(source, target, max_distance=limit)
    expected = [0 if near <= limit else -1 for near in (0, 1, 2, 3, 3)]
    assert index.tolist() == expected
    assert [near for near in distance.tolist() if near > limit] == []
    assert ((distance == -1) == (index == -1)).all()


def test_threads_do_not_change_the_result():
    rng = random.Random(7)
    source = [bytes(rng.choices(b"abcdef", k=rng.randint(1, 9))) for _ in range(2500)]
    target = [bytes(rng.choices(b"abcdef", k=rng.randint(1, 9))) for _ in range(400)]
    one, many = nearest_tokens(source, target, threads=1), nearest_tokens(source, target, threads=4)
    assert (one[0] == many[0]).all()
    assert (one[1] == many[1]).all()


def test_empty_sides_find_nothing():
    assert nearest_tokens([], ["a"])[0].tolist() == []
    assert nearest_tokens(["a"], [])[0].tolist() == [-1]
    assert nearest_tokens([""], ["b", ""]) == (1, 0)


def test_kernels_compile_where_no_cache_can_be_written():
    """A function without a file of its own has no place for a cache, as in a read-only installation."""
    space = {}
    exec("def double(number):\n    return 2 * number\n", space)
    assert compiled(space["double"])(21) == 42
