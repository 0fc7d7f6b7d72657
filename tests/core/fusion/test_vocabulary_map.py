"""Vocabulary maps: the published results, special tokens by role, and each method's own rule."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.vocabulary_map import METHODS, map_vocabulary
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import encoder
from fusion_plugins.errors import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden"
TOKEN = st.text(alphabet="ab é", min_size=1, max_size=4)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def surfaces(tokenizer, size=None):
    return tokenizer.convert_ids_to_tokens(list(range(size or len(tokenizer))))


def pairs(found, target):
    return [None if index < 0 else target[index] for index in found.target_ids.tolist()]


@cache
def real(make):
    return TokenTable.from_tokenizer(make())


def table(tokens, **roles):
    """A table of ordinary tokens and then one special token for each role."""
    names = [f"<{name}>".encode() for name in roles]
    role_ids = {role: len(tokens) + number for number, role in enumerate(roles.values()) if role is not Role.OTHER}
    return TokenTable([*tokens, *names], [None] * len(tokens) + list(roles.values()), role_ids, False, "byte_level")


@pytest.mark.parametrize(("name", "vocabulary"), [
    ("vocab_mapping", lambda: surfaces(tiny.mistral_v1())),
    ("vocab_mapping_reverse", lambda: surfaces(tiny.tekken(), 21000)),
])  # fmt: skip
def test_published_map_of_the_real_tokenizers(name, vocabulary):
    expected, target = golden(name), vocabulary()
    assert len(target) == expected["target_vocab_size"]
    found = map_vocabulary([row[0] for row in expected["rows"]], target)
    assert pairs(found, target) == [row[1] for row in expected["rows"]]
    assert found.distances.tolist() == [row[2] for row in expected["rows"]]


@settings(max_examples=100, deadline=None)
@given(source=st.lists(TOKEN, max_size=6), target=st.lists(TOKEN, min_size=1, max_size=8))
def test_min_edit_is_the_reference(source, target):
    found = map_vocabulary(source, target)
    expected = [reference.nearest_token(token, target) for token in source]
    assert list(zip(found.target_ids.tolist(), found.distances.tolist(), strict=True)) == expected


@pytest.mark.parametrize("method", ["exact", "min_edit", "first_token"])
def test_a_vocabulary_maps_to_itself(method):
    made = real(tiny.digit_splitting)
    found = map_vocabulary(made, made, method=method)
    assert found.target_ids.tolist() == list(range(made.vocab_size))
    assert not found.distances.any()
    assert found.method == method
    assert found.target_ids.dtype == found.distances.dtype == np.int32


def test_bytes_are_compared_and_not_surfaces():
    """A line break is Ċ for one tokenizer and <0x0A> for the other; a space is Ġ for one and ▁ for the other."""
    source = real(tiny.byte_level)
    target = real(tiny.sentencepiece_bpe)
    found = map_vocabulary(source, target, method="exact")
    for piece in (b"\n", b" the", b"\xe2", b"ing"):
        assert target.tokens[found.target_ids[source.tokens.index(piece)]] == piece


@pytest.mark.parametrize("method", ["exact", "min_edit", "first_token"])
def test_letters_do_not_map_to_byte_tokens_that_the_target_never_uses(method):
    """<0x61> has the bytes of a and a lower id; the tokenizer uses it for nothing."""
    source, target = real(tiny.tekken), real(tiny.mistral_v1)
    small = TokenTable(source.tokens[:1400], source.roles[:1400], source.role_ids, False, "byte_level")
    names = surfaces(tiny.mistral_v1())
    found = map_vocabulary(small, target, method=method)
    got = [names[found.target_ids[small.tokens.index(piece)]] for piece in (b"a", b"1", b"(", b"\n", b"\xe2")]
    assert got == ["a", "1", "(", "<0x0A>", "<0xE2>"]


def test_byte_tokens_map_as_sources():
    table_of_bytes = real(tiny.mistral_v1)
    found = map_vocabulary(table_of_bytes, table_of_bytes, method="exact")
    names = surfaces(tiny.mistral_v1())
    moved = {names[row]: names[column] for row, column in enumerate(found.target_ids.tolist()) if row != column}
    assert moved["<0x61>"] == "a"
    assert len(moved) == sum(chr(byte).replace(" ", "▁") in names for byte in range(128))


def test_str_distances_count_code_points_and_bytes_distances_count_bytes():
    assert map_vocabulary(["né"], ["n"]).distances.tolist() == [1]
    assert map_vocabulary(["né".encode()], [b"n"]).distances.tolist() == [2]


def test_equal_tokens_and_ties_go_to_the_lowest_id():
    assert map_vocabulary(["ab", "a"], ["b", "ab", "ab", "c"]).target_ids.tolist() == [1, 0]


def test_exact_leaves_the_rest_unmapped():
    found = map_vocabulary([b"a", b"b"], [b"x", b"a"], method="exact")
    assert (found.target_ids.tolist(), found.distances.tolist()) == ([1, -1], [0, -1])


@pytest.mark.parametrize("method", ["min_edit", "first_token"])
def test_beyond_the_bound_a_token_stays_unmapped(method):
    found = map_vocabulary([b"ab", b"abc", b"abcd"], [b"ab"], method=method, max_distance=1)
    assert (found.target_ids.tolist(), found.distances.tolist()) == ([0, 0, -1], [0, 1, -1])


def test_special_tokens_map_by_role_and_only_by_role():
    source = table([b"a", b"<eos>"], eos=Role.EOS, bos=Role.BOS, pad=Role.PAD, turn=Role.END_OF_TURN, tool=Role.OTHER)
    target = table([b"<pad>", b"", b"a"], tool=Role.OTHER, start=Role.BOS, stop=Role.EOS)
    for method in ("exact", "min_edit", "first_token"):
        found = map_vocabulary(source, target, method=method).target_ids.tolist()
        assert found[0] == 2
        assert found[1] in (0, -1)
        assert found[2:] == [5, 4, -1, 5, 3]


def test_a_token_that_ends_turns_and_texts_maps_to_the_end_of_a_turn():
    both = TokenTable([b"</s>"], [Role.EOS], {Role.EOS: 0, Role.END_OF_TURN: 0}, False, "byte_level")
    only_texts = TokenTable([b"</s>"], [Role.EOS], {Role.EOS: 0}, False, "byte_level")
    target = table([], stop=Role.EOS, turn=Role.END_OF_TURN)
    assert map_vocabulary(both, target).target_ids.tolist() == [1]
    assert map_vocabulary(only_texts, target).target_ids.tolist() == [0]
    assert map_vocabulary(target, both).target_ids.tolist() == [0, 0]


def test_special_tokens_of_real_tokenizers_map_by_role():
    source, target = real(tiny.tekken), real(tiny.mistral_v1)
    found = map_vocabulary(source, target, method="exact")
    assert found.target_ids[:4].tolist() == [0, 1, 2, -1]
    assert found.distances[:4].tolist() == [0, 0, 0, -1]
    share = (found.target_ids >= 0).mean()
    assert 0.2 < share < 0.25


def test_an_id_without_a_token_is_neither_mapped_nor_a_target():
    source = TokenTable([b"", b"a"], [None, None], {}, False, "byte_level")
    target = TokenTable([b"", b"abcdef"], [None, None], {}, False, "byte_level")
    assert map_vocabulary(source, target).target_ids.tolist() == [-1, 1]


def test_first_token_is_the_longest_beginning_without_an_encoding():
    found = map_vocabulary([b"123", b"ab", b"zz", b"b"], [b"1", b"12", b"b", b"a", b"12"], method="first_token")
    assert (found.target_ids.tolist(), found.distances.tolist()) == ([1, 3, -1, 2], [1, 1, -1, 0])


def test_first_token_follows_the_encoding_of_the_target():
    """The target has a token 12 but never uses it, because it splits digits."""
    found = map_vocabulary(
        [b"12", b"a", b"\xff"],
        [b"1", b"12", b"a", b"\xff"],
        method="first_token",
        encode=lambda piece: {b"12": [0]}.get(piece, []),
    )
    assert found.target_ids.tolist() == [0, 2, 3]


def test_first_token_of_real_tokenizers_begins_the_source_token():
    source, target = real(tiny.byte_level), real(tiny.mistral_v1)
    found = map_vocabulary(source, target, method="first_token", encode=encoder(tiny.mistral_v1(), target))
    for token, role, index in zip(source.tokens, source.roles, found.target_ids.tolist(), strict=True):
        assert role is not None or token.startswith(target.tokens[index])


def test_statistics_prefer_the_equal_then_a_beginning_then_the_frequent():
    source, target = [b"?\n", b"ab", b"cd", b"never"], [b"\n", b"?", b"ab", b"b", b"x", b"y"]
    counts = AlignmentCounts.from_pairs([0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 3, 4, 5], [45, 38, 1, 9, 2, 3, 3])
    found = map_vocabulary(source, target, method="statistics", counts=counts)
    assert found.target_ids.tolist() == [1, 2, 4, -1]
    assert found.distances.tolist() == [1, 0, 2, -1]


def test_one_to_many_shares_by_count_among_tokens_that_begin_alike():
    source, target = [b"1", b"2", b"cd", b"12x"], [b"1", b"12", b"13", b"2", b"c"]
    counts = AlignmentCounts.from_pairs([0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 3, 0], [2, 5, 1, 9, 4, 7])
    found = map_vocabulary(source, target, method="one_to_many", counts=counts)
    shares = found.shares
    assert shares.starts.tolist() == [0, 3, 4, 4, 4]
    assert shares.target_ids.tolist() == [1, 0, 2, 3]
    assert shares.weights.tolist() == [0.625, 0.25, 0.125, 1.0]
    # Tokens that were never aligned go where `first_token` sends them.
    assert found.target_ids.tolist() == [0, 3, 4, 1]


def test_one_to_many_keeps_the_most_frequent():
    target = [b"a" * n for n in range(1, 31)]
    counts = AlignmentCounts.from_pairs([0] * 30, range(30), range(1, 31))
    shares = map_vocabulary([b"a"], target, method="one_to_many", counts=counts).shares
    assert shares.target_ids.tolist() == list(range(29, 13, -1))
    assert shares.weights.sum() == pytest.approx(1.0)


def test_statistics_never_choose_a_special_token_for_an_ordinary_one():
    source, target = table([b"a", b"b"], eos=Role.EOS), table([b"x"], eos=Role.EOS)
    counts = AlignmentCounts.from_pairs([0, 0, 1], [1, 0, 1], [9, 1, 9])
    found = map_vocabulary(source, target, method="statistics", counts=counts)
    assert found.target_ids.tolist() == [0, -1, 1]


def test_wrong_calls_say_what_is_expected():
    with pytest.raises(
        ConfigError, match="'nearest'; expected one of min_edit, exact, statistics, one_to_many, first_token"
    ):
        map_vocabulary(["a"], ["b"], method="nearest")
    with pytest.raises(ConfigError, match="expects `counts`"):
        map_vocabulary(["a"], ["b"], method="statistics")
    with pytest.raises(ConfigError, match="got empty ones. Count aligned texts first"):
        map_vocabulary(["a"], ["b"], method="statistics", counts=AlignmentCounts())
    with pytest.raises(ConfigError, match="all str or all bytes.*got bytes and str"):
        map_vocabulary(["a"], [b"b"])
    assert set(METHODS) == {"exact", "min_edit", "first_token", "statistics", "one_to_many"}


def test_counts_may_be_a_mapping_of_pairs_and_tokens_numpy_strings():
    counts = {(0, 1): 3, (1, 0): 2, (0, 0): 1}
    plain = map_vocabulary(["ab", "c"], ["cd", "abc"], method="statistics", counts=counts)
    arrays = map_vocabulary(np.array(["ab", "c"]), np.array(["cd", "abc"]), method="statistics", counts=counts)
    assert plain.target_ids.tolist() == arrays.target_ids.tolist() == [1, 0]
    with pytest.raises(ConfigError, match="expected `counts` as AlignmentCounts"):
        map_vocabulary(["a"], ["b"], method="statistics", counts=np.ones((1, 1)))


def test_empty_vocabularies_map_to_nothing():
    for method in ("exact", "min_edit", "first_token"):
        assert map_vocabulary([], ["a"], method=method).target_ids.tolist() == []
        assert map_vocabulary(["a"], [], method=method).target_ids.tolist() == [-1]
