import pickle

import numpy as np
import pytest
import reference
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion.align import ALIGNERS, align_texts, align_tokens
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError


@st.composite
def two_cuts(draw):
    """One text as two lists of bytes tokens."""
    text = draw(st.text(alphabet="ab é漢1", min_size=1, max_size=25)).encode()
    lists = []
    for _ in range(2):
        places = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=len(text))) | {len(text)})
        lists.append([text[a:b] for a, b in zip([0, *places], places, strict=False) if a < b])
    return lists


@settings(max_examples=150, deadline=None)
@given(two_cuts())
def test_offsets_rows_are_those_that_have_read_the_same_bytes(lists):
    source, target = lists
    found = align_tokens(source, target)
    assert found.source_positions.tolist() == reference.same_prefix_rows(source, target)
    assert found.coverage == np.mean(found.source_positions >= 0)


@settings(max_examples=150, deadline=None)
@given(two_cuts())
def test_offsets_match_tokens_exactly_when_they_share_bytes(lists):
    source, target = lists
    spans = [np.cumsum([0, *map(len, tokens)]) for tokens in lists]
    shared = [
        [u for u in range(len(source)) if max(spans[0][u], spans[1][t]) < min(spans[0][u + 1], spans[1][t + 1])]
        for t in range(len(target))
    ]
    found = align_tokens(source, target)
    assert found.target_to_source == shared
    assert found.source_to_target == [[t for t in range(len(target)) if u in shared[t]] for u in range(len(source))]


@settings(max_examples=100, deadline=None)
@given(two_cuts(), st.sampled_from(sorted(ALIGNERS)), st.sampled_from(["fusellm", "fusechat"]))
def test_alignments_are_monotone_and_the_same_every_time(lists, method, tie_order):
    found = align_tokens(*lists, method=method, tie_order=tie_order)
    again = align_tokens(*lists, method=method, tie_order=tie_order)
    assert found.target_to_source == again.target_to_source
    flat = [u for row in found.target_to_source for u in row]
    assert flat == sorted(flat)
    used = found.source_positions[found.source_positions >= 0]
    assert (np.diff(used) > 0).all()
    assert 0.0 <= found.coverage <= 1.0


@settings(max_examples=100, deadline=None)
@given(two_cuts())
def test_swapping_the_sides_swaps_the_alignment_and_keeps_the_cost(lists):
    source, target = lists
    there, back = align_tokens(source, target), align_tokens(target, source)
    assert there.target_to_source == back.source_to_target
    assert align_tokens(source, target, method="dtw").cost == align_tokens(target, source, method="dtw").cost


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=3), max_size=10))
def test_equal_lists_are_matched_one_to_one(tokens):
    assert align_tokens(tokens, tokens).target_to_source == [[i] for i in range(len(tokens))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", ""]), min_size=1, max_size=10))
def test_dtw_matches_equal_lists_one_to_one(tokens):
    found = align_tokens(tokens, tokens, method="dtw")
    assert found.target_to_source == [[i] for i in range(len(tokens))]
    assert found.cost == 0


@settings(max_examples=100, deadline=None)
@given(two_cuts())
def test_strict_offsets_keep_the_rows_whose_next_tokens_are_the_same_bytes(lists):
    source, target = lists
    found = align_tokens(source, target, method="offsets_strict").source_positions
    expected = [
        u if 0 <= u < len(source) - 1 and t < len(target) - 1 and source[u + 1] == target[t + 1] else -1
        for t, u in enumerate(reference.same_prefix_rows(source, target))
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (["Ġfox", "Ġjumps"], ["▁fo", "x", "▁j", "umps"]),
        (["fox", "Ġjumps"], ["▁fo", "x", "▁j", "umps"]),
        (["fox", " jumps"], ["▁fo", "x", "▁j", "umps"]),
        (["Ġfox", "Ġjumps"], [b" fo", b"x", b" j", b"umps"]),
    ],
)
def test_surfaces_of_both_families_are_read_as_bytes(source, target):
    found = align_tokens(source, target)
    assert found.target_to_source == [[0], [0], [1], [1]]
    assert found.source_positions.tolist() == [-1, 0, -1, 1]


def test_byte_tokens_of_a_character_are_matched_with_the_byte_level_ones():
    found = align_tokens(["ä½", "ł"], ["▁", "<0xE4>", "<0xBD>", "<0xA0>"])
    assert found.target_to_source == [[], [0], [0], [1]]
    assert found.source_positions.tolist() == [-1, -1, 0, 1]


def test_different_texts_are_refused_with_the_place():
    with pytest.raises(AlignmentError, match=r"at byte 3 the source continues b'abcd' and the target b'abce'"):
        align_tokens([b"ab", b"cd"], [b"abc", b"e"])


def test_an_unknown_method_and_an_unknown_tie_order_are_refused():
    with pytest.raises(ConfigError, match="expected one of dtw, offsets, offsets_strict"):
        align_tokens([b"a"], [b"a"], method="bytes")
    with pytest.raises(ConfigError, match="tie_order: expected one of fusellm, fusechat, got 'first'"):
        align_tokens([b"a"], [b"a"], method="dtw", tie_order="first")


def test_an_aligner_of_another_package_is_called_as_its_hook_says():
    calls = []

    def aligner(source, target):
        calls.append((source, target))
        return align_tokens(source, target)

    assert align_tokens([b"a"], [b"a"], method=aligner).source_positions.tolist() == [0]
    assert calls == [([b"a"], [b"a"])]


def plain(ends, spans, exact=None):
    n = len(ends)
    exact = np.ones(n, np.bool_) if exact is None else np.array(exact)
    return TokenizedText(np.zeros(n, np.int32), np.array(ends, np.int32), np.array(spans, np.int32), exact)


@pytest.mark.parametrize("method", sorted(ALIGNERS))
def test_an_alignment_survives_being_pickled(method):
    found = align_tokens([b"the", b" 1", b"2"], [b"the", b" 12"], method=method)
    again = pickle.loads(pickle.dumps(found))
    assert again.target_to_source == found.target_to_source == [[0], [1, 2]]
    assert again.source_to_target == found.source_to_target


def test_of_several_tokens_at_one_byte_the_last_is_the_row_and_at_the_end_the_first():
    source = plain([0, 3, 7, 7], [[0, 7]])  # BOS, ..., EOS
    target = plain([0, 0, 4, 7, 7], [[0, 7]])  # BOS, a dummy prefix, ..., EOS
    assert align_texts(source, target).source_positions.tolist() == [-1, 0, -1, 2, -1]


def test_rows_of_two_templates_are_compared_inside_each_message():
    # Messages of 4 and 3 bytes; the templates around them have other lengths.
    source = plain([2, 5, 9, 13, 20, 23, 25], [[5, 9], [20, 23]])
    target = plain([9, 10, 11, 13, 14, 30, 31, 33, 40], [[9, 13], [30, 33]])
    assert align_texts(source, target).source_positions.tolist() == [1, -1, -1, 2, -1, 4, -1, 5, -1]


def test_a_position_inside_a_changed_character_is_never_a_row():
    source = plain([1, 2, 3], [[0, 3]])
    target = plain([1, 2, 3], [[0, 3]], [True, False, True])
    assert align_texts(source, target).source_positions.tolist() == [0, -1, 2]


def test_texts_with_other_numbers_of_messages_are_refused():
    with pytest.raises(AlignmentError, match="the source has 1, the target 2"):
        align_texts(plain([3], [[0, 3]]), plain([3, 6], [[0, 3], [3, 6]]))


@pytest.mark.parametrize("pair", [("byte_level", "sentencepiece_bpe"), ("unigram", "digit_splitting")])
def test_aligned_rows_of_real_tokenizers_have_read_the_same_text(pair):
    tokenizers = [getattr(tiny, name)() for name in pair]
    tables = [TokenTable.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    text = "数学 costs 12 € or 120;\n\tcafé 👩‍👩‍👧 the end"
    source, target = (tokenize(t, table, text) for t, table in zip(tokenizers, tables, strict=True))
    rows = align_texts(source, target).source_positions
    used = np.flatnonzero(rows >= 0)
    assert len(used) > 15
    assert source.ends[rows[used]].tolist() == target.ends[used].tolist()
