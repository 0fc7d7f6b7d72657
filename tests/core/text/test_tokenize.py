"""Tokenized texts: their tokens spell the text, for every text and tokenizer; spans; and encoding of single pieces."""

import copy
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from tokenizer_cases import HARD_TEXTS, LOSSLESS, REAL, SPECIAL_TEXT, TINY, assert_spells, table_of

from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import encoder, tokenize, tokenize_many
from fusion_plugins.errors import DataError, TokenizerError


@pytest.mark.parametrize("name", LOSSLESS)
def test_tokens_spell_hard_texts(tables, name):
    tokenizer, table = tables[name]
    for text in (*HARD_TEXTS, *tiny.TEXTS):
        assert_spells(table, tokenize(tokenizer, table, text), text)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=60, deadline=None)
@given(text=SPECIAL_TEXT)
def test_tokens_spell_any_text(tables, name, text):
    tokenizer, table = tables[name]
    text = text.replace("▁", "")  # SentencePiece's own mark is not told from a space
    assert_spells(table, tokenize(tokenizer, table, text), text)


@pytest.mark.parametrize("name", TINY | REAL)
def test_ends_cover_the_text_and_special_tokens_have_no_width(tables, name):
    tokenizer, table = tables[name]
    text = "Anna has 12 apples. 四十二 👩\u200d👧"
    found = tokenize(tokenizer, table, text)
    assert found.input_ids.dtype == found.ends.dtype == found.spans.dtype == np.int32
    assert found.input_ids[-1] == table.id_of_role(Role.EOS)
    assert found.ends[-1] == found.ends[-2] == len(text.encode())
    assert found.spans.tolist() == [[0, len(text.encode())]]
    bos = table.id_of_role(Role.BOS)
    assert bos is None or (found.input_ids[0] == bos and found.ends[0] == 0)


def test_end_token_is_not_doubled(tables):
    tokenizer, table = tables["unigram"]
    assert tokenize(tokenizer, table, "the fox").input_ids.tolist().count(table.id_of_role(Role.EOS)) == 1


def test_names_of_special_tokens_are_text_in_a_plain_text_and_special_in_a_chat(tables):
    tokenizer, table = tables["byte_level"]
    special = table.id_of_role(Role.END_OF_TURN)
    plain = tokenize(tokenizer, table, "a<|im_end|>b")
    chat = tokenize(tokenizer, table, "a<|im_end|>b", special_tokens=False, append_eos=False)
    assert special not in plain.input_ids
    assert (chat.input_ids.tolist().count(special), chat.ends.tolist()[-2:]) == (1, [11, 12])


def test_truncation_shrinks_the_spans(tables):
    tokenizer, table = tables["byte_level"]
    text = "The quick brown fox jumps over the lazy dog."
    whole = tokenize(tokenizer, table, text)
    found = tokenize(tokenizer, table, text, spans=[(2, 6), (4, 44), (40, 44)], max_length=5)
    cut = int(whole.ends[4])
    assert 6 < cut < 40
    assert found.input_ids.tolist() == whole.input_ids[:5].tolist()
    assert found.spans.tolist() == [[2, 6], [4, cut], [40, 40]]


def test_tiny_tekken_and_mistral_encode_as_their_own_libraries_do():
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(tiny.mistral_data("tekken_240911.json"))
    sentencepiece = SentencePieceTokenizer(str(tiny.mistral_data("tokenizer.model.v1")))
    for text in (*HARD_TEXTS[3:9], *tiny.TEXTS):
        assert tiny.tekken()(text)["input_ids"] == tekken.encode(text, bos=True, eos=False)
        assert tiny.mistral_v1()(text)["input_ids"] == sentencepiece.encode(text, bos=True, eos=False)


def test_an_outdated_table_is_refused(tables):
    tokenizer, table = tables["byte_level"]
    old = TokenTable(table.tokens[:40], table.roles[:40], {}, False, "byte_level")
    with pytest.raises(TokenizerError, match="expected ids up to 39, the last of the token table"):
        tokenize(tokenizer, old, "the fox")


def test_lone_surrogates_are_refused(tables):
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        tokenize(*tables["byte_level"], "ab\ud800")


@pytest.mark.parametrize("spans", [[(0, 99)], [(3, 2)], [(-1, 2)]])
def test_spans_outside_the_text_are_refused(tables, spans):
    with pytest.raises(DataError, match="inside the text's 3 bytes"):
        tokenize(*tables["byte_level"], "fox", spans=spans)


def test_encoder_does_not_depend_on_the_settings_of_the_tokenizer():
    tokenizer = copy.deepcopy(tiny.sentencepiece_bpe())
    table = table_of(tokenizer)
    pieces = (b" the", b" the quick brown fox", b"<s>x")
    expected = [encoder(tokenizer, table)(piece) for piece in pieces]
    assert all(table.role_of(token) is None for ids in expected for token in ids)
    tokenizer("x", split_special_tokens=False)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=2, pad_token="</s>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert [encoder(tokenizer, table)(piece) for piece in pieces] == expected
    assert tokenizer.backend_tokenizer.padding is not None


@pytest.mark.parametrize("name", TINY | REAL)
def test_encoder_encodes_as_inside_a_text(tables, name):
    tokenizer, table = tables[name]
    encode = encoder(tokenizer, table)
    for piece in (b"the", b" the", b"ing", b" apples", b"12"):
        ids = encode(piece)
        assert b"".join(table.bytes_of(token) for token in ids) == piece
    assert encode(b"\xe2\x80") == []
    assert json.dumps(encode(b" the"))


def test_encoder_does_not_see_the_dummy_prefix(tables):
    tokenizer, table = tables["mistral_v1"]
    encode = encoder(tokenizer, table)
    assert [table.bytes_of(token) for token in encode(b"ing")] == [b"ing"]
    assert [table.bytes_of(token) for token in encode(b" ing")] == [b" ing"]


@pytest.mark.parametrize("name", TINY)
def test_texts_together_are_tokenized_as_one_by_one(tables, name):
    tokenizer, table = tables[name]
    texts = [*HARD_TEXTS, "", "the end</s>", "x" * 500]
    together = tokenize_many(tokenizer, table, texts)
    assert len(together) == len(texts)
    for text, found in zip(texts, together, strict=True):
        expected = tokenize(tokenizer, table, text)
        for part in ("input_ids", "ends", "spans", "exact"):
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part), err_msg=f"{part} of {text!r}")
    assert tokenize_many(tokenizer, table, []) == []
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        tokenize_many(tokenizer, table, ["sound", "a\ud83d"])
