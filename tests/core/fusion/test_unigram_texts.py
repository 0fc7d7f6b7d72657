"""Texts that a Unigram tokenizer changes or does not know are still the texts of the other side."""

import unicodedata

import numpy as np
import pytest
import tiny
import unigrams
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record_of

from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import AlignmentError

FORMS = ("tiny", *unigrams.FORMS)
TEXTS = [
    "\n\nHello world",
    "\n \n the fox",
    "\n\n",
    "the \n \n\n fox",
    "  \n\n  x\n",
    "\r\nthe\r\n\tfox ",
    "漢字",  # without a piece, and
    "日本a",  # of six bytes,
    "¤a£",  # five,
    "¤¤ the",  # four,
    "the 👩a",  # and of the length of <unk>
    "𠀀x the 𠀀",
    "é¤£ of the",
    "a\x7fb",
    "ﬁne ½ ① ＡＢ ㈱",
    "e\u0301 ö\u0308 \u0301x",
    "\u200bthe\u200b fox\ufeff",
    "\u3000the\u00a0fox\u2028",
    "👩\u200d👩\u200d👧 ½\u200dx",
    "<unk> </s> <s>",
]
ALPHABET = st.sampled_from(list(" \n\n\t\r ab the.é\u0301▁中漢字日\u200d👩¤£ﬁ½\u00a0\u200b\ufeff①"))


@pytest.fixture(scope="module")
def sides():
    """Name -> tokenizer and table, of the Unigram tokenizers and of the byte-level one that they are held against."""
    made = {name: tiny.unigram() if name == "tiny" else unigrams.unigram(name) for name in FORMS}
    made["bytes"] = tiny.byte_level()
    return {name: (tokenizer, TokenTable.from_tokenizer(tokenizer)) for name, tokenizer in made.items()}


def read(sides, name, text, **options):
    tokenizer, table = sides[name]
    tokens = tokenize(tokenizer, table, text, **options)
    zeros = np.zeros(len(tokens.input_ids), np.float32)
    return record_of("r", tokens, np.zeros((len(zeros), 1), np.int32), zeros[:, None], zeros), tokens, table


def same_text(sides, name, text):
    """Both directions: the Unigram tokenizer as source, and as target."""
    for source, target in ((name, "bytes"), ("bytes", name)):
        record, _, source_table = read(sides, source, text)
        _, tokens, target_table = read(sides, target, text)
        own, other = common_text(record, tokens, source_table.packed, target_table.packed)
        # Nothing was stripped or cut, so nothing is narrowed.
        assert own.text.spans.tolist() == other.spans.tolist() == [[0, len(text.encode())]]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", TEXTS)
def test_hard_texts_are_the_same_text_on_both_sides(sides, name, text):
    same_text(sides, name, text)


@settings(max_examples=40)
@given(text=st.text(ALPHABET, min_size=1, max_size=16))
@pytest.mark.parametrize("name", FORMS)
def test_any_text_is_the_same_text_on_both_sides(sides, name, text):
    same_text(sides, name, text)


def letters(text: str) -> str:
    """What a normaliser may not change."""
    folded = unicodedata.normalize("NFKD", text.replace("▁", " "))
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] not in "ZCM")


@settings(max_examples=40)
@given(text=st.text(ALPHABET, min_size=1, max_size=16))
@pytest.mark.parametrize("name", FORMS)
def test_exact_ends_cut_the_text_where_the_tokens_do(sides, name, text):
    _, tokens, table = read(sides, name, text, append_eos=False)
    raw, start, spelled, unknown = text.encode(), 0, b"", False
    for token, end, exact in zip(tokens.input_ids.tolist(), tokens.ends.tolist(), tokens.exact.tolist(), strict=True):
        unknown |= table.role_of(token) is Role.UNK
        spelled += b"" if table.role_of(token) else table.bytes_of(token)
        if exact:
            piece = raw[start:end].decode(errors="replace")
            whole = "\ufffd" not in piece  # a byte token ends inside a character
            assert unknown or not whole or letters(piece) == letters(spelled.decode())
            start, spelled, unknown = end, b"", False


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("\n\nHello world", "\n\nHello there"),
        ("the 漢 fox", "the 漢 dog"),
        ("\n the fox", "\n the fox sleeps"),
        ("a dog there sleeps\n\n", "a dog these sleeps\n\n"),
    ],
)
def test_another_text_is_still_refused(sides, name, text, other):
    record, _, source_table = read(sides, name, text)
    _, tokens, target_table = read(sides, "bytes", other)
    with pytest.raises(AlignmentError, match="of another text"):
        common_text(record, tokens, source_table.packed, target_table.packed)


@pytest.mark.parametrize("name", FORMS)
def test_white_space_that_a_template_stripped_is_left_out_also_where_no_token_spells_it(sides, name):
    kept, stripped = "\n\nthe fox, the dog", "the fox, the dog"
    record, tokens, table = read(sides, name, kept)
    _, target, target_table = read(sides, "bytes", stripped)
    own, other = common_text(record, target, table.packed, target_table.packed)
    (start, stop), (t_start, t_stop) = own.text.spans.tolist()[0], other.spans.tolist()[0]
    assert kept.encode()[start:stop] == stripped.encode()[t_start:t_stop]
    assert t_stop == len(stripped)
