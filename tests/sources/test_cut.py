"""Cutting texts: every piece fits every tokenizer, and nothing is lost."""

import json
from itertools import islice

import pytest
import source_checks
import tiny
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.inputs import read_texts
from fusion_plugins.sources.cut import CutConfig, cut_text, cut_texts

LONG = "\n\n".join(tiny.TEXTS * 4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {"byte_level": tiny.byte_level(), "sentencepiece": tiny.sentencepiece_bpe()}
    for name, tokenizer in made.items():
        tokenizer.save_pretrained(folder / name)
    return [str(folder / name) for name in made]


def test_every_piece_fits_every_tokenizer_and_together_they_are_the_text(tokenizers, tmp_path):
    rows = [{"id": "long", "text": LONG}, {"id": "short", "text": "short"}, {"id": "chat", "messages": tiny.CHAT}]
    texts = source_checks.write_rows(tmp_path / "t.jsonl", rows)
    out = tmp_path / "pieces.jsonl"
    report = cut_texts(CutConfig(texts=str(texts), out=str(out), tokenizers=tokenizers, max_length=100))
    pieces = read_texts(out)
    assert report.pieces == len(pieces) > 10
    assert "".join(piece.content for piece in pieces if piece.id.startswith("long#")) == LONG
    assert [piece.id for piece in pieces if not piece.id.startswith("long#")] == ["short", "chat"]
    for tokenizer in (tiny.byte_level(), tiny.sentencepiece_bpe()):
        assert max(len(tokenizer(piece.content)["input_ids"]) for piece in pieces[:-1]) + 1 <= 100


def test_pieces_end_behind_empty_lines_then_lines_then_before_spaces():
    count = len
    assert list(cut_text("aaaa\n\nbbbb\ncc", 8, [count])) == ["aaaa\n\n", "bbbb\ncc"]
    assert list(cut_text("aaaa\nbb cc dd", 8, [count])) == ["aaaa\n", "bb cc dd"]
    assert list(cut_text("aaa bbb ccc", 8, [count])) == ["aaa bbb", " ccc"]
    assert "".join(cut_text("x" * 30, 8, [count])) == "x" * 30


def test_a_letter_stays_with_its_marks():
    text = "e\u0301" * 20 + "👩\u200d👧" * 10
    for piece in cut_text(text, 7, [len]):
        assert piece[0] in "e👩"


@pytest.mark.parametrize(
    "text", ["a" + "\u0301" * 300, "\r" * 300, "x" * 100 + "\r" * 400, "\u200d" * 200 + "a", "y" * 40 + "\r" * 5000]
)
def test_a_run_that_never_ends_is_cut_at_the_limit(text):
    pieces = list(islice(cut_text(text, 16, [lambda piece: len(piece.encode())]), 1000))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 16 for piece in pieces)


@given(
    st.text(st.sampled_from("a \r\n\u0301\u200d\ufe0f\U0001f469"), max_size=200), st.integers(16, 60), st.integers(0, 9)
)
def test_nothing_is_lost_of_texts_that_are_all_marks_and_begin_tokens_count_too(text, most, begin):
    pieces = list(islice(cut_text(text, most, [lambda piece: begin + len(piece.encode()), len]), 1000))
    assert "".join(pieces) == text
    assert all(piece and begin + len(piece.encode()) <= most for piece in pieces)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.integers(16, 60))
def test_nothing_is_lost_whatever_the_text(text, most):
    pieces = list(cut_text(text, most, [lambda piece: len(piece.encode())]))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= most for piece in pieces)


def test_a_chat_that_is_too_long_is_refused_by_name(tokenizers, tmp_path):
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "c", "messages": tiny.CHAT}])
    with pytest.raises(
        DataError, match=r"t\.jsonl:1: chat 'c': expected at most 20 tokens, got \d+; chats are not cut"
    ):
        cut_texts(CutConfig(texts=str(texts), out=str(tmp_path / "o.jsonl"), tokenizers=tokenizers, max_length=20))
    assert not (tmp_path / "o.jsonl").exists()


def test_the_texts_are_not_replaced_by_their_pieces(tokenizers, tmp_path):
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "long", "text": LONG, "more": "of it"}])
    before = texts.read_bytes()
    for read in (str(texts), str(tmp_path)):
        with pytest.raises(ConfigError, match="expected another file than the texts"):
            cut_texts(CutConfig(texts=read, out=str(texts), tokenizers=tokenizers, max_length=20))
    assert texts.read_bytes() == before


def test_the_command_writes_what_capture_then_takes(tokenizers, tmp_path):
    model = source_checks.checkpoint(tmp_path / "model")
    texts = source_checks.write_rows(tmp_path / "t.jsonl", [{"id": "long", "text": LONG}])
    pieces, store = tmp_path / "pieces.jsonl", tmp_path / "store"
    capture = ["capture", "--model", str(model), "--out", str(store), "--texts"]
    refused = CliRunner().invoke(app, [*capture, str(texts)])
    assert "`fusion cut`" in str(refused.exception)
    flags = [part for name in tokenizers for part in ("--tokenizer", name)]
    done = CliRunner().invoke(app, ["cut", "--texts", str(texts), "--out", str(pieces), "--max-length", "256", *flags])
    assert done.exit_code == 0, done.output
    assert CliRunner().invoke(app, [*capture, str(pieces)]).exit_code == 0
    assert json.loads(pieces.read_text().splitlines()[0])["id"] == "long#0"


def test_what_cannot_be_cut_is_left_out_where_that_is_wanted_and_tools_stay_with_their_chat(tokenizers, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
    rows = [{"id": "fits", "messages": tiny.CHAT, "tools": tools}, {"id": "short", "text": "short"}, {"id": "none"}]
    rows += [{"id": "long", "messages": [{"role": "user", "content": LONG}, tiny.CHAT[1]]}]
    texts = source_checks.write_rows(tmp_path / "t.jsonl", rows)
    values = {"texts": str(texts), "out": str(tmp_path / "cut.jsonl"), "tokenizers": tokenizers[:1], "max_length": 200}
    with pytest.raises(DataError, match=r"t\.jsonl:3: expected either a column"):
        cut_texts(CutConfig(**values))
    report = cut_texts(CutConfig(**values, on_unusable="skip"))
    assert list(report.skipped) == ["none", "long"]
    assert "chats are not cut" in report.skipped["long"]
    assert [text.id for text in read_texts(tmp_path / "cut.jsonl")] == ["fits", "short"]
    assert read_texts(tmp_path / "cut.jsonl")[0].tools == tools


def test_a_chat_keeps_its_tools(model, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    texts = tmp_path / "chats.jsonl"
    texts.write_text(json.dumps({"id": "c", "messages": tiny.CHAT, "tools": tools}))
    out = tmp_path / "cut.jsonl"
    cut_texts(CutConfig(texts=str(texts), out=str(out), tokenizers=[str(model)], max_length=200))
    assert read_texts(out) == read_texts(texts)
