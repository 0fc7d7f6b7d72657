"""The class of a label, also where the token is only a part of a character."""

import numpy as np
import pytest
import tiny

from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.doctor.label_classes import CLASSES, label_classes, token_classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一二三四", "cjk"),
        ("한국", "cjk"),
        ("👩🎉", "other"),
        ("٣٤", "digits"),
        ("12", "digits"),
        ("\n\n", "white space"),
        ("é", "other"),
    ],
)
@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece_bpe])
def test_a_label_has_the_class_of_its_character_even_where_the_token_is_only_a_part_of_it(make, text, expected):
    tokenizer = make()
    table = TokenTable.from_tokenizer(tokenizer)
    tokens = tokenize(tokenizer, table, f"x{text}x", append_eos=False)
    found = label_classes(tokens, table, token_classes(table))
    names = {
        CLASSES[index]
        for index, begin, end in zip(found, [0, *tokens.ends], tokens.ends, strict=False)
        if begin >= 1 and end <= len(text.encode()) + 1 and end > begin
    }
    assert names == {expected}


def test_special_tokens_are_a_class_of_their_own():
    tokenizer = tiny.byte_level()
    assert CLASSES[token_classes(TokenTable.from_tokenizer(tokenizer))[tokenizer.eos_token_id]] == "special"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (b"a1", "digits"),
        ("1中".encode(), "digits"),
        (" 中a".encode(), "cjk"),
        (b" \n", "white space"),
        (b" a", "other"),
        (b"", "special"),
    ],
)
def test_digits_count_before_cjk_and_white_space_is_all_of_a_token(token, expected):
    table = TokenTable([token], [None], {}, False, "byte_level")
    assert CLASSES[token_classes(table)[0]] == expected


def test_classes_are_one_small_number_per_token():
    table = TokenTable.from_tokenizer(tiny.byte_level())
    classes = token_classes(table)
    assert classes.shape == (table.vocab_size,)
    assert classes.dtype == np.uint8
