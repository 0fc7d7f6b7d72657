from dataclasses import replace

import tiny

from fusion_plugins.core.text.token_bytes import is_prefix, longest_beginnings, token_bytes
from fusion_plugins.core.text.token_table import Role, TokenTable


def table(*tokens, special=(), closing=()):
    roles = [None] * len(tokens) + [Role.OTHER] * len(special) + [Role.EOS] * len(closing)
    names = [token.encode() for token in (*tokens, *special, *closing)]
    role_ids = {Role.EOS: len(names) - 1} if closing else {}
    return TokenTable(names, roles, role_ids, False, "byte_level")


def test_the_arrays_hold_every_token():
    tokens = token_bytes(table("a", "", "é", special=("<x>",), closing=("</s>",)))
    pieces = [tokens.flat[a:b].tobytes().decode() for a, b in zip(tokens.starts, tokens.starts[1:], strict=False)]
    assert pieces == ["a", "", "é", "<x>", "</s>"]
    assert tokens.special.tolist() == [False, False, False, True, True]
    assert tokens.closing.tolist() == [False] * 4 + [True]


def test_the_arrays_of_a_vocabulary_are_made_once():
    assert token_bytes(table("a", "b")) is token_bytes(table("a", "b"))
    assert longest_beginnings(table("a"), table("a", "b")) is longest_beginnings(table("a"), table("a", "b"))


def test_what_the_fingerprint_leaves_out_is_told_apart():
    """One vocabulary ends turns with other tokens in another chat template."""
    names, roles = [b"a", b"<x>", b"</s>"], [None, Role.OTHER, Role.EOS]
    plain = TokenTable(names, roles, {Role.EOS: 2}, False, "byte_level")
    chat = replace(plain, roles=[None, Role.END_OF_TURN, Role.EOS], role_ids={Role.EOS: 2, Role.END_OF_TURN: 1})
    assert plain.fingerprint == chat.fingerprint
    for table in (plain, chat, plain):
        assert token_bytes(table).closing.tolist() == [False, table is chat, True]
    twins = TokenTable([b"a", b"a"], [None, None], {}, False, "sentencepiece")
    fallback = replace(twins, byte_fallback=frozenset({0}))
    assert twins.fingerprint == fallback.fingerprint
    assert longest_beginnings(twins, twins).tolist() == [0, 0]
    assert longest_beginnings(twins, fallback).tolist() == [1, 1]


def test_a_prefix_is_compared_after_the_bytes_that_are_skipped():
    tokens = token_bytes(table("abc", "bcd", "abcd", ""))
    assert is_prefix(tokens, 0, tokens, 2, 0)
    assert is_prefix(tokens, 0, tokens, 1, 1)
    assert not is_prefix(tokens, 2, tokens, 0, 0)
    assert not is_prefix(tokens, 0, tokens, 1, 0)
    # Nothing begins with nothing.
    assert not is_prefix(tokens, 3, tokens, 0, 0)
    assert not is_prefix(tokens, 0, tokens, 1, 3)


def test_the_longest_beginning_is_an_ordinary_token_of_the_lowest_id():
    source = table("theory", "the", "x", special=("the",))
    target = table("t", "the", "theo", "the", special=("theory",))
    assert longest_beginnings(source, target).tolist() == [2, 1, -1, -1]


def test_a_byte_fallback_token_is_not_the_beginning_where_the_byte_has_a_token_of_its_own():
    source, target = (TokenTable.from_tokenizer(make()) for make in (tiny.byte_level, tiny.sentencepiece_bpe))
    found = longest_beginnings(source, target)[source.tokens.index(b"e")]
    assert found == tiny.sentencepiece_bpe().convert_tokens_to_ids("e")
