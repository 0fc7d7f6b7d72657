"""The family of a tokenizer.json and the bytes of its printed tokens; tokenizers without bytes are refused."""

import pytest
import tiny
from tokenizer_cases import spec_with, table_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.tokenizer_json import (
    adds_prefix_space,
    byte_alphabet,
    byte_token,
    decoder,
    kind_of,
    model_vocab,
)
from fusion_plugins.errors import TokenizerError

BYTE_LEVEL = {"type": "ByteLevel"}
METASPACE = {"type": "Metaspace", "replacement": "▁"}
SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BPE = {"type": "BPE"}


@pytest.mark.parametrize(("spec", "kind"), [
    ({"model": BPE, "pre_tokenizer": BYTE_LEVEL}, "byte_level"),
    ({"model": {}, "decoder": BYTE_LEVEL}, "byte_level"),
    ({"model": BPE, "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, BYTE_LEVEL]}}, "byte_level"),
    ({"model": BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, BYTE_LEVEL]}},
     "byte_level"),
    ({"model": BPE, "pre_tokenizer": METASPACE, "normalizer": None}, "sentencepiece"),
    ({"model": {"type": "Unigram"}, "decoder": {"type": "Sequence", "decoders": [METASPACE]}}, "sentencepiece"),
    ({"model": BPE, "normalizer": SPACE_TO_MARK}, "sentencepiece"),
    ({"model": BPE | {"byte_fallback": True}}, "sentencepiece"),
])  # fmt: skip
def test_the_family_is_found_in_any_section(spec, kind):
    assert kind_of(spec) == kind


@pytest.mark.parametrize(("model", "message"), [
    ({"type": "WordPiece", "continuing_subword_prefix": "##"}, "got a WordPiece tokenizer: its tokens drop the spaces"),
    ({"type": "WordLevel"}, "got a WordLevel tokenizer: its tokens drop the spaces"),
    (BPE | {"continuing_subword_prefix": "##"}, "mark the parts of a word with '##'"),
    ({"type": "Unigram"}, "neither a byte alphabet nor a mark for spaces"),
])  # fmt: skip
def test_a_model_without_bytes_is_refused_with_the_reason(model, message):
    with pytest.raises(TokenizerError, match=message):
        kind_of({"model": model})


@pytest.mark.parametrize(("section", "part", "expected"), [
    ("normalizer", {"type": "Prepend", "prepend": "▁"}, True),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}]}, True),
    ("normalizer", SPACE_TO_MARK, False),
    ("pre_tokenizer", METASPACE, True),
    ("pre_tokenizer", METASPACE | {"prepend_scheme": "first"}, True),
    ("pre_tokenizer", METASPACE | {"prepend_scheme": "never"}, False),
    ("pre_tokenizer", METASPACE | {"add_prefix_space": False}, False),
    ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, True),
    ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": False}, False),
    ("pre_tokenizer", None, False),
    ("decoder", METASPACE, False),
])  # fmt: skip
def test_a_prefix_space_is_added_by_the_normaliser_or_the_pre_tokenizer(section, part, expected):
    assert adds_prefix_space({"model": BPE, section: part}) is expected


def test_the_byte_alphabet_is_that_of_byte_level_tokenizers():
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    assert [alphabet[character] for character in "aĠĊé"] == [0x61, 0x20, 0x0A, 0xE9]


def test_byte_level_tokens_are_read_by_the_alphabet_or_literally():
    decode = decoder({"model": BPE, "pre_tokenizer": BYTE_LEVEL}, "byte_level")
    assert decode("ĠcafÃ©") == " café".encode()
    assert decode("â") == b"\xe2"
    assert decode("Ġ漢") == "Ġ漢".encode()


def test_sentencepiece_tokens_are_read_by_the_mark_for_spaces():
    decode = decoder({"model": BPE | {"byte_fallback": True}}, "sentencepiece")
    assert [decode(name) for name in ("▁the", "▁▁", "é", "<0x0A>")] == [b" the", b"  ", "é".encode(), b"\n"]
    decode = decoder({"model": BPE, "pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "sentencepiece")
    assert [decode(name) for name in ("_the", "▁", "<0x0A>")] == [b" the", "▁".encode(), b"<0x0A>"]


def test_byte_tokens_need_byte_fallback():
    by_model, by_decoder = {"model": {"byte_fallback": True}}, {"model": {}, "decoder": {"type": "ByteFallback"}}
    for spec in (by_model, by_decoder):
        assert [byte_token(spec, name) for name in ("<0x0A>", "<0xe2>")] == [0x0A, 0xE2]
        assert [byte_token(spec, name) for name in ("<0x0A>x", "<0xG0>", "a")] == [None] * 3
    assert byte_token({"model": {"byte_fallback": False}}, "<0x0A>") is None


def test_the_vocabulary_of_a_model_is_a_mapping_or_a_list():
    assert model_vocab({"model": {"vocab": {"a": 3}}}) == {"a": 3}
    assert model_vocab({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}) == {"<unk>": 0, "a": 1}


def test_wordpiece_is_refused_with_the_reason():
    with pytest.raises(TokenizerError, match="WordPiece tokenizer: its tokens drop the spaces.*another tokenizer"):
        table_of(tiny.wordpiece())


def test_marks_at_the_end_of_words_are_refused():
    with pytest.raises(TokenizerError, match="'</w>' instead of spelling"):
        table_of(spec_with(end_of_word_suffix="</w>"))


def test_tokens_without_any_mark_for_bytes_are_refused():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(TokenizerError, match="neither a byte alphabet nor a mark"):
        table_of(plain)
