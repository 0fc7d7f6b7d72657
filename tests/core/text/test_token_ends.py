"""Where each token ends: cases worked by hand, and texts that a normaliser changes."""

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from tokenizer_cases import SPECIAL_TEXT, content, table_of
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.token_ends import ends_by_bytes, token_ends
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize

BOS, EOS, UNK = (b"<s>", Role.BOS), (b"</s>", Role.EOS), (b"<unk>", Role.UNK)


def ends_of(text, tokens, *, prefix_space=False):
    """The ends, and whether they are exact, of tokens (bytes or bytes and role, first character, character after)."""
    named = [token if isinstance(token, tuple) else (token, None) for token, _, _ in tokens]
    table = TokenTable([name for name, _ in named], [role for _, role in named], {}, prefix_space, "sentencepiece")
    offsets = np.array([offset for _, *offset in tokens], np.int64).reshape(-1, 2)
    ends, exact = token_ends(table, np.arange(len(tokens), dtype=np.int32), offsets, text, text.encode())
    assert (ends.dtype, exact.dtype) == (np.int32, np.bool_)
    by_bytes = ends_by_bytes(table, np.arange(len(tokens), dtype=np.int32), text.encode())
    if by_bytes is not None:  # without the offsets, never something else
        assert [found.tolist() for found in by_bytes] == [ends.tolist(), exact.tolist()]
        assert (by_bytes[0].dtype, by_bytes[1].dtype) == (np.int32, np.bool_)
    return ends.tolist(), exact.tolist()


def test_tokens_that_spell_the_text_end_where_their_bytes_end():
    assert ends_of("fox é", [(b"fox", 0, 3), (b" \xc3", 3, 5), (b"\xa9", 4, 5)]) == ([3, 5, 6], [True] * 3)
    assert ends_of("", []) == ([], [])


def test_a_space_that_the_tokenizer_added_has_no_width():
    assert ends_of("fox!", [(b" fox", 0, 3), (b"!", 3, 4)], prefix_space=True) == ([3, 4], [True] * 2)
    assert ends_of("fox", [(b" ", 0, 1), (b"fox", 0, 3)], prefix_space=True) == ([0, 3], [True] * 2)


def test_most_texts_need_no_offsets_and_those_that_do_are_left_to_them():
    table = TokenTable([b"<s>", b" fox", b"fox", b"!"], [Role.BOS, None, None, None], {}, True, "sentencepiece")

    def ends(text, *ids):
        found = ends_by_bytes(table, np.array(ids, np.int32), text.encode())
        return found and found[0].tolist()

    assert ends("fox!", 0, 1, 3, 0) == ends("fox!", 0, 2, 3, 0) == [0, 3, 4, 4]
    assert ends("fox fox", 1, 1) == [3, 7]
    assert ends("<s>fox", 0, 2) is None, "the special token is of the text"
    assert ends("fox?", 2, 3) is ends("fo", 2) is ends("fox", 1, 1) is ends("", 0) is ends("") is None


def test_special_tokens_have_a_width_only_inside_the_text():
    assert ends_of("fox", [(BOS, 0, 0), (b"fox", 0, 3), (EOS, 0, 0)]) == ([0, 3, 3], [True] * 3)
    assert ends_of("<s>fox</s>", [(BOS, 0, 3), (b"fox", 3, 6), (EOS, 6, 10)]) == ([3, 6, 10], [True] * 3)
    # The second added space is behind a special token, so the running sums of the whole text do not fit.
    tokens = [(b" a", 0, 1), (EOS, 1, 5), (b" \xc3\xa9", 5, 6)]
    assert ends_of("a</s>é", tokens, prefix_space=True) == ([1, 5, 7], [True] * 3)


def test_only_the_end_of_a_changed_character_is_exact():
    """The letter and its accent (3 bytes) became one character (2 bytes), which two tokens share."""
    assert ends_of("e\u0301", [(b"\xc3", 0, 2), (b"\xa9", 0, 2)]) == ([3, 3], [False, True])
    assert ends_of("ﬁ\u0300", [(b"f", 0, 1), (b"\xc3\xac", 0, 2)])[1] == [False, True]


def test_an_unknown_character_has_its_width_in_the_text():
    assert ends_of("x漢y", [(b"x", 0, 1), (UNK, 1, 2), (b"y", 2, 3)]) == ([1, 4, 5], [True] * 3)


def test_text_that_no_token_spells_belongs_to_the_token_before_it():
    assert ends_of("the## fox ", [(b"the", 0, 3), (b" fox", 5, 9)]) == ([5, 10], [True] * 2)
    # Offsets without the space that the token spells.
    assert ends_of("the## fox", [(b"the", 0, 3), (b" fox", 6, 9)]) == ([5, 9], [True] * 2)


@settings(max_examples=150, deadline=None)
@given(text=SPECIAL_TEXT)
def test_exact_places_are_prefixes_where_a_normaliser_changes_the_text(tables, text):
    """Up to an exact place, the tokens spell what the normaliser makes of the text up to there."""
    tokenizer, table = tables["unigram"]
    normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
    found = tokenize(tokenizer, table, text)
    raw, spelled = text.encode(), b""
    assert (np.diff(found.ends) >= 0).all()
    for token, end, exact in content(table, found):
        if table.role_of(token) is Role.UNK:
            break
        spelled += table.bytes_of(token)
        if exact:
            # A run of spaces becomes one, wherever it is cut.
            assert normalise(raw[:end].decode()).strip(" ") == spelled.decode().strip(" ")


def test_multi_byte_characters_are_cut_at_bytes(tables):
    tokenizer, table = tables["sentencepiece_bpe"]
    found = tokenize(tokenizer, table, "a\U0001f9ffb")
    tail = content(table, found)[-5:]
    assert [table.bytes_of(token) for token, _, _ in tail] == [b"\xf0", b"\x9f", b"\xa7", b"\xbf", b"b"]
    assert [end for _, end, _ in tail] == [2, 3, 4, 5, 6]


def test_dummy_prefix_behind_special_tokens_has_no_width(tables):
    """In the legacy form the tokenizer puts its space behind every special token of a chat."""
    tokenizer, table = tables["mistral_v1"]
    text = "<s>Hi</s>é!</s>"
    found = tokenize(tokenizer, table, text, special_tokens=False, append_eos=False)
    pairs = [(table.bytes_of(token), int(end)) for token, end in zip(found.input_ids, found.ends, strict=True)]
    assert pairs == [(b"<s>", 3), (b" Hi", 5), (b"</s>", 9), (b" \xc3\xa9", 11), (b"!", 12), (b"</s>", 16)]
    assert found.exact.all()


def with_normaliser(normaliser, *, trim_offsets):
    """Byte-level BPE as in Qwen-2 (NFC), and with the offset trimming of GPT-2's post-processor."""
    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.normalizer = normaliser
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_characters_that_a_normaliser_composes_are_inexact_inside(trim_offsets):
    tokenizer = with_normaliser(normalizers.NFC(), trim_offsets=trim_offsets)
    table = table_of(tokenizer)
    text = "fox e\u0301 fox"
    found = tokenize(tokenizer, table, text)
    spelled = [(table.bytes_of(t), end, exact) for t, end, exact in content(table, found)]
    assert b"".join(token for token, _, _ in spelled) == "fox é fox".encode()
    assert [end for _, end, exact in spelled if exact and end > 3][:2] == [4, 7]
    assert [4 < end <= 7 for _, end, exact in spelled if not exact] == [True]
    assert spelled[-1][1:] == (11, True)


def test_a_mark_that_joins_the_letter_before_it_is_no_place_to_end(tables):
    """NFKC turns a ligature of f and i and a grave accent into f and i with grave: no place lies between the two."""
    tokenizer, table = tables["unigram"]
    spelled = content(table, tokenize(tokenizer, table, "ﬁ\u0300"))
    assert [(end, exact) for _, end, exact in spelled] == [(3, False), (5, True)]


def test_dropped_text_belongs_to_the_token_before_it():
    tokenizer = with_normaliser(
        normalizers.Sequence([normalizers.Replace("#", ""), normalizers.Strip()]), trim_offsets=False
    )
    table = table_of(tokenizer, check=False)
    found = tokenize(tokenizer, table, "the## fox ")
    assert [(table.bytes_of(t), end, exact) for t, end, exact in content(table, found)] == [
        (b"the", 5, True),
        (b" fox", 10, True),
    ]


def test_added_token_that_swallows_the_spaces_after_it_ends_behind_them():
    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    table = table_of(tokenizer)
    found = tokenize(tokenizer, table, "fox<|end|> \nfox", special_tokens=False, append_eos=False)
    swallowed = found.input_ids.tolist().index(tokenizer.convert_tokens_to_ids("<|end|>"))
    assert (found.ends[swallowed - 1], found.ends[swallowed], found.ends[-1]) == (3, 12, 15)
