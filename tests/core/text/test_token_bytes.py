from dataclasses import replace

import numpy as np

from fusion_plugins.core.text.token_bytes import bytes_of_tokens
from fusion_plugins.core.text.token_table import Role, TokenTable


def table(*tokens, special=(), closing=()):
    roles = [None] * len(tokens) + [Role.OTHER] * len(special) + [Role.EOS] * len(closing)
    names = [token.encode() for token in (*tokens, *special, *closing)]
    role_ids = {Role.EOS: len(names) - 1} if closing else {}
    return TokenTable(names, roles, role_ids, False, "byte_level")


def test_the_arrays_hold_every_token():
    tokens = table("a", "", "é", special=("<x>",), closing=("</s>",)).packed
    pieces = [tokens.flat[a:b].tobytes().decode() for a, b in zip(tokens.starts, tokens.starts[1:], strict=False)]
    assert pieces == ["a", "", "é", "<x>", "</s>"]
    assert tokens.special.tolist() == [False, False, False, True, True]
    assert tokens.closing.tolist() == [False] * 4 + [True]


def test_the_arrays_of_a_table_are_made_once():
    made = table("a", "b")
    assert made.packed is made.packed


def test_the_end_of_a_turn_depends_on_the_table_and_not_on_its_fingerprint():
    """One vocabulary ends turns with other tokens in another chat template."""
    names, roles = [b"a", b"<x>", b"</s>"], [None, Role.OTHER, Role.EOS]
    plain = TokenTable(names, roles, {Role.EOS: 2}, False, "byte_level")
    chat = replace(plain, roles=[None, Role.END_OF_TURN, Role.EOS], role_ids={Role.EOS: 2, Role.END_OF_TURN: 1})
    assert plain.fingerprint == chat.fingerprint
    for made in (plain, chat, plain):
        assert made.packed.closing.tolist() == [False, made is chat, True]


def test_bytes_of_tokens_are_those_of_the_table_and_empty_beyond_it():
    made = table("a", "", "é")
    assert bytes_of_tokens(made.packed, np.array([2, 0, 1, 3], np.int32)) == ["é".encode(), b"a", b"", b""]
