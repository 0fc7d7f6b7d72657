"""Token bytes, roles and exact ends: cases worked by hand, and what holds for every text and tokenizer."""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import encoder, tokenize
from fusion_plugins.errors import DataError, TokenizerError

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


def table_of(tokenizer):
    return TokenTable.from_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def tables():
    return {name: (make(), table_of(make())) for name, make in (TINY | REAL).items()}


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


def test_truncation_shrinks_the_spans(tables):
    tokenizer, table = tables["byte_level"]
    text = "The quick brown fox jumps over the lazy dog."
    whole = tokenize(tokenizer, table, text)
    found = tokenize(tokenizer, table, text, spans=[(2, 6), (4, 44), (40, 44)], max_length=5)
    cut = int(whole.ends[4])
    assert 6 < cut < 40
    assert found.input_ids.tolist() == whole.input_ids[:5].tolist()
    assert found.spans.tolist() == [[2, 6], [4, cut], [40, 40]]


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
    table = table_of(tokenizer)
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


def test_tiny_tekken_and_mistral_encode_as_their_own_libraries_do():
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(tiny.mistral_data("tekken_240911.json"))
    sentencepiece = SentencePieceTokenizer(str(tiny.mistral_data("tokenizer.model.v1")))
    for text in (*HARD_TEXTS[3:9], *tiny.TEXTS):
        assert tiny.tekken()(text)["input_ids"] == tekken.encode(text, bos=True, eos=False)
        assert tiny.mistral_v1()(text)["input_ids"] == sentencepiece.encode(text, bos=True, eos=False)


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


def spec_with(**model):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁a": 1, "<x>": 5}, merges=[], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_ids_without_a_token_have_no_bytes_and_no_role():
    table = table_of(spec_with())
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


def test_slow_tokenizers_are_refused_with_the_cure():
    with pytest.raises(TokenizerError, match="expected a fast tokenizer, got SimpleNamespace.*use_fast=True"):
        table_of(SimpleNamespace(get_vocab=dict))


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
    assert table_of(shuffled).fingerprint == table.fingerprint


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
