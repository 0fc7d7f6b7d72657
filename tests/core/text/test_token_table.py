"""Bytes, roles and fingerprints of vocabularies, and the files and pickles that hold them."""

import copy
import os
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
from tokenizer_cases import REAL, TINY, assert_spells, spec_with, table_of
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import TokenizerError


@pytest.mark.parametrize(("name", "token", "expected"), [
    ("mistral_v1", "▁the", b" the"),
    ("mistral_v1", "<0x0A>", b"\n"),
    ("mistral_v1", "<0xE2>", b"\xe2"),
    ("mistral_v1", "▁▁▁", b"   "),
    ("mistral_v1", "</s>", b"</s>"),
    ("tekken", "Ġthe", b" the"),
    ("tekken", "Ċ", b"\n"),
    ("tekken", "ĠcafÃ©", " café".encode()),
    ("tekken", "â", b"\xe2"),
    ("unigram", "▁", b" "),
])  # fmt: skip
def test_surfaces_become_bytes(tables, name, token, expected):
    tokenizer, table = tables[name]
    assert table.bytes_of(tokenizer.convert_tokens_to_ids(token)) == expected


@pytest.mark.parametrize("name", ["tekken", "mistral_v1", "byte_level", "digit_splitting", "sentencepiece_bpe"])
def test_every_byte_has_a_token_of_its_own(tables, name):
    _, table = tables[name]
    ordinary = {token for token, role in zip(table.tokens, table.roles, strict=True) if role is None}
    assert all(bytes([byte]) in ordinary for byte in range(256))


@pytest.mark.parametrize("name", ["tekken", "mistral_v1"])
def test_no_two_ordinary_tokens_of_tekken_share_their_bytes(tables, name):
    """In SentencePiece a byte token and the character of that byte do share them."""
    _, table = tables[name]
    ordinary = [token for token, role in zip(table.tokens, table.roles, strict=True) if role is None]
    shared = len(ordinary) - len(set(ordinary))
    assert shared == 0 if name == "tekken" else 0 < shared <= 128


def test_roles_of_a_base_model(tables):
    _, table = tables["mistral_v1"]
    assert [table.role_of(token) for token in (0, 1, 2, 3)] == [Role.UNK, Role.BOS, Role.EOS, None]
    assert table.id_of_role(Role.PAD) is None
    _, tekken = tables["tekken"]
    assert tekken.role_of(3) is Role.OTHER
    assert tekken.id_of_role(Role.END_OF_TURN) == tekken.id_of_role(Role.EOS) == 2


def test_end_of_turn_is_what_the_chat_template_writes_after_an_answer(tables):
    _, chatml = tables["byte_level"]
    assert chatml.bytes_of(chatml.id_of_role(Role.END_OF_TURN)) == b"<|im_end|>"
    assert chatml.role_of(chatml.id_of_role(Role.PAD)) is Role.EOS
    _, inst = tables["sentencepiece_bpe"]
    assert inst.id_of_role(Role.END_OF_TURN) == inst.id_of_role(Role.EOS) == 2
    assert inst.role_of(2) is Role.EOS


def test_a_plain_added_token_ends_turns_where_the_template_writes_it(tables):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens([AddedToken("<turn>", special=False), AddedToken("<other>", special=False)])
    before = table_of(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>\n{% endfor %}"
    table = table_of(tokenizer)
    found = tokenizer.convert_tokens_to_ids("<turn>")
    assert (before.role_of(found), table.role_of(found)) == (None, Role.END_OF_TURN)
    assert table.role_of(found + 1) is None
    assert table.id_of_role(Role.END_OF_TURN) == found
    assert bool(table.special[found])
    assert not table.ordinary[found]
    # The template is a setting of the run; the vocabulary is the same.
    assert table.fingerprint == before.fingerprint
    again = TokenTable.from_columns(table.to_columns())
    assert again == table
    assert again.fingerprint == table.fingerprint


@pytest.mark.parametrize("name", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_turn|>"])
def test_end_of_turn_is_known_by_name_without_a_template(name):
    tokenizer = Tokenizer.from_str(tiny.sentencepiece_bpe().backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(name, special=True)])
    table = table_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
    assert table.bytes_of(table.id_of_role(Role.END_OF_TURN)) == name.encode()
    assert table.id_of_role(Role.EOS) == 2


def test_a_template_that_cannot_render_leaves_the_end_of_turn_to_the_names():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_level().backend_tokenizer,
        eos_token="<|endoftext|>",
        chat_template="{{ raise_exception('no plain chats') }}",
    )
    assert table_of(tokenizer).role_of(2) is Role.END_OF_TURN


def test_only_end_of_turn_stands_in_for_the_end_of_the_text():
    table = TokenTable([b"<e>"], [Role.END_OF_TURN], {Role.END_OF_TURN: 0}, False, "byte_level")
    assert table.id_of_role(Role.EOS) == 0
    assert table.id_of_role(Role.BOS) is None


def test_ids_without_a_token_have_no_bytes_and_no_role():
    table = table_of(spec_with(), check=False)
    assert (table.vocab_size, table.tokens) == (6, [b"a", b" a", b"", b"", b"", b"<x>"])
    assert (table.bytes_of(3), table.bytes_of(600), table.role_of(3), table.role_of(600)) == (b"", b"", None, None)
    with pytest.raises(TokenizerError, match="0 or more"):
        table.bytes_of(-1)


def test_ordinary_added_tokens_stand_for_themselves():
    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("Grüße Ġ", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    table = table_of(tokenizer)
    added = tokenizer.convert_tokens_to_ids("Grüße Ġ")
    assert (table.bytes_of(added), table.role_of(added)) == ("Grüße Ġ".encode(), None)
    text = "a Grüße Ġ b"
    found = tokenize(tokenizer, table, text)
    assert added in found.input_ids
    assert_spells(table, found, text)


def test_added_pieces_of_the_model_keep_their_space():
    """Gemma lists pieces such as ▁▁ among its added tokens; they stand for spaces all the same."""
    tokenizer = Tokenizer.from_str(tiny.sentencepiece_bpe().backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("▁the", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    table = table_of(tokenizer)
    assert table.bytes_of(tokenizer.convert_tokens_to_ids("▁the")) == b" the"
    assert_spells(table, tokenize(tokenizer, table, "see the fox"), "see the fox")


def test_byte_tokens_are_ordinary_only_where_they_are_needed(tables):
    tokenizer, table = tables["mistral_v1"]
    ids = tokenizer.convert_tokens_to_ids(["<0x61>", "a", "<0x0A>", "<0xE2>", "</s>"])
    assert [bool(table.ordinary[index]) for index in ids] == [False, True, True, True, False]
    assert len(table.byte_fallback) == 256
    assert not tables["tekken"][1].byte_fallback


def test_slow_tokenizers_are_refused_with_the_cure():
    with pytest.raises(TokenizerError, match="expected a fast tokenizer, got SimpleNamespace.*use_fast=True"):
        table_of(SimpleNamespace(get_vocab=dict))


@pytest.mark.parametrize("name", TINY)
def test_columns_rebuild_the_table(tables, name):
    _, table = tables[name]
    columns = table.to_columns()
    again = TokenTable.from_columns(columns)
    assert again == table
    assert again.fingerprint == table.fingerprint
    assert {len(column) for column in columns.values()} == {table.vocab_size}


def test_damaged_columns_are_refused(tables):
    columns = tables["unigram"][1].to_columns()
    with pytest.raises(TokenizerError, match=r"missing columns: \['roles'\]"):
        TokenTable.from_columns({name: column for name, column in columns.items() if name != "roles"})
    with pytest.raises(TokenizerError, match="ids 0, 1, 2"):
        TokenTable.from_columns(columns | {"id": columns["id"][::-1]})


def test_fingerprint_is_the_same_in_another_process():
    code = (
        "from fusion_plugins.core.text.token_table import Role, TokenTable; "
        "print(TokenTable([b'a', b'', b'</s>'], [None, None, Role.EOS], {Role.EOS: 2}, True, 'byte_level').fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7eb4d65e7e54817dc32249372e97c07da7ae00ab6eb6b57e95e165a51fe54e00"


def test_fingerprint_does_not_depend_on_the_order_of_the_vocabulary(tables):
    tokenizer, table = tables["byte_level"]
    spec = tokenizer.backend_tokenizer.to_str()
    names = list(tokenizer.get_vocab().items())
    random.Random(3).shuffle(names)
    backend = SimpleNamespace(to_str=lambda: spec, get_vocab=lambda with_added_tokens: dict(names))
    shuffled = SimpleNamespace(backend_tokenizer=backend, eos_token_id=0, pad_token_id=0)
    assert table_of(shuffled, check=False).fingerprint == table.fingerprint


def test_fingerprint_sees_ids_bytes_and_roles_but_not_the_settings_of_a_run():
    tokens, roles = [b"a", b"b", b"<s>", b"<e>"], [None, None, Role.BOS, Role.OTHER]
    base = TokenTable(tokens, roles, {Role.BOS: 2}, False, "byte_level").fingerprint
    for other in (
        TokenTable([b"b", b"a", b"<s>", b"<e>"], roles, {Role.BOS: 2}, False, "byte_level"),
        TokenTable([b"a", b"b ", b"<s>", b"<e>"], roles, {Role.BOS: 2}, False, "byte_level"),
        TokenTable(tokens, [None, None, Role.EOS, Role.OTHER], {Role.EOS: 2}, False, "byte_level"),
        TokenTable(tokens[:3], roles[:3], {Role.BOS: 2}, False, "byte_level"),
        TokenTable([b"a", b"b", b"<s>", b"<e>", b""], [*roles, None], {Role.BOS: 2}, False, "byte_level"),
    ):
        assert other.fingerprint != base
    padded = TokenTable(tokens, [None, None, Role.BOS, Role.PAD], {Role.BOS: 2, Role.PAD: 3}, False, "byte_level")
    assert padded.fingerprint == base


@pytest.mark.parametrize("name", TINY | REAL)
def test_a_pickled_table_is_the_same(tables, name):
    table = tables[name][1]
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    known = again.fingerprint
    del again.__dict__["fingerprint"]
    assert again.fingerprint == known == table.fingerprint


def test_a_table_extends_another_one_that_begins_it():
    base = TokenTable([b"a", b"</s>"], [None, Role.EOS], {Role.EOS: 1}, False, "byte_level")
    longer = TokenTable([*base.tokens, b"<x>"], [*base.roles, Role.OTHER], base.role_ids, False, "byte_level")
    other = TokenTable([b"b", b"</s>", b"<x>"], longer.roles, base.role_ids, False, "byte_level")
    assert base.extends(base)
    assert longer.extends(base)
    assert not base.extends(longer)
    assert not other.extends(base)
