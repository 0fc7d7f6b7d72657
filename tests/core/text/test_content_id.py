"""Ids of texts and chats, and the fingerprint of a set of texts."""

import hashlib

from fusion_plugins.core.text.content_id import content_id, texts_fingerprint

CHAT = [{"role": "user", "content": "Käse"}, {"role": "assistant", "content": "ja"}]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_id_of_a_text_is_the_hash_of_its_bytes():
    assert content_id("Straße\n") == sha256("Straße\n")
    assert content_id("Straße") != content_id("Straße\n")


def test_the_id_of_a_chat_is_the_hash_of_its_canonical_json():
    canonical = '[{"content":"Käse","role":"user"},{"content":"ja","role":"assistant"}]'
    assert content_id(CHAT) == sha256(canonical)
    assert content_id([{"name": None, "content": m["content"], "role": m["role"]} for m in CHAT]) == sha256(canonical)


def test_the_id_of_a_chat_changes_with_every_value_and_the_order_of_the_messages():
    variants = [CHAT, CHAT[::-1], CHAT[:1], [CHAT[0] | {"name": "Ann"}, CHAT[1]], [CHAT[0], CHAT[1] | {"content": ""}]]
    assert len({content_id(chat) for chat in variants}) == 5
    assert content_id("Käse") != content_id(CHAT[:1])


def test_the_fingerprint_of_texts_is_that_of_a_set_of_pairs():
    pairs = [("b", "2"), ("ä", "1")]
    assert texts_fingerprint(pairs) == sha256('["b", "2"]["ä", "1"]')
    assert texts_fingerprint(iter(pairs[::-1])) == texts_fingerprint(pairs)
    assert texts_fingerprint([]) == sha256("")


def test_the_fingerprint_of_texts_changes_with_an_id_and_with_a_content():
    sets = [[("a", "1")], [("b", "1")], [("a", "2")], [("a", "1"), ("b", "1")], [("1", "a")], [("a1", "")]]
    assert len({texts_fingerprint(pairs) for pairs in sets}) == 6
