"""Tokenizers, texts and checks that the tests of ``core/text`` share."""

import tiny
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.token_table import Role, TokenTable

TINY = {
    "byte_level": tiny.byte_level,
    "digit_splitting": tiny.digit_splitting,
    "sentencepiece_bpe": tiny.sentencepiece_bpe,
    "unigram": tiny.unigram,
}
REAL = {"tekken": tiny.tekken, "mistral_v1": tiny.mistral_v1}
LOSSLESS = {name: make for name, make in (TINY | REAL).items() if name != "unigram"}
HARD_TEXTS = (
    "",
    " ",
    "  two spaces first",
    "tab\tand\r\nlines\n\n\n  end  ",
    "👩\u200d👩\u200d👧\u200d👦 family, 🏳️\u200d🌈 flag",
    "数学题:小明有十二个苹果。",
    "مرحبا \u202eabc\u202c שלום",
    "nul\x00 bell\x07 escape\x1b delete\x7f",
    "e\u0301 é ﬁne ½ Å \u00a0nbsp \ufeffbom \u200bzero",
    "already ▁▁marked Ġ and Ċ and <0x41>",
    "</s> <s> <unk> <|im_end|> names of special tokens",
    "2023 1234567 3.14",
    "\U0010ffff\U00010000\ufffd",
)
SPECIAL_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.sampled_from(list(" \n\tab.,1e\u0301▁Ġé中\u200d👩🏽\u202e\x00\u00a0ﬁ½")), max_size=60),
)


def table_of(tokenizer, **options):
    return TokenTable.from_tokenizer(tokenizer, **options)


def content(table, found):
    """The tokens of a text without the special tokens that the tokenizer or we put around it."""
    ids = found.input_ids.tolist()
    first = 1 if ids and table.role_of(ids[0]) is Role.BOS else 0
    last = len(ids) - 1 if ids and table.role_of(ids[-1]) is Role.EOS else len(ids)
    return list(zip(ids[first:last], found.ends[first:last].tolist(), found.exact[first:last].tolist(), strict=True))


def assert_spells(table, found, text):
    """Each token ends where its bytes end; only the first may begin with the tokenizer's own space.

    A SentencePiece-style tokenizer reads its own mark for a space, U+2581, as a space.
    """
    raw, start = text.encode(), 0
    mark = "\u2581".encode() if table.kind == "sentencepiece" else b" "
    for number, (token, end, exact) in enumerate(content(table, found)):
        piece = table.bytes_of(token)
        meant = raw[start:end].replace(mark, b" ")
        own_space = number == 0 and table.prefix_space and piece == b" " + meant
        assert exact
        assert meant == piece or own_space
        start = end
    assert start == len(raw)


def spec_with(**model):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁a": 1, "<x>": 5}, merges=[], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
