"""Chats rendered by templates: the bytes of each answer, and templates that change them."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.text.chat import render_chat
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.errors import DataError

CONTENT = st.text(min_size=1, max_size=20)


def renderer(tokenizer):
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def contents(text, spans):
    return [text.encode()[start:stop].decode() for start, stop in spans]


def answers(chat):
    return [message["content"] for message in chat if message["role"] == "assistant"]


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece_bpe])
def test_spans_hold_the_answers(make):
    text, spans, unchanged = render_chat(renderer(make()), tiny.CHAT)
    assert text == renderer(make())(tiny.CHAT)
    assert contents(text, spans) == answers(tiny.CHAT)
    assert unchanged


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.mistral_v1])
def test_answers_end_at_token_ends(make):
    tokenizer = make()
    table = TokenTable.from_tokenizer(tokenizer)
    text, spans, _ = render_chat(renderer(tokenizer), tiny.CHAT)
    found = tokenize(tokenizer, table, text, spans=spans, special_tokens=False, append_eos=False)
    assert set(spans[:, 1].tolist()) <= set(found.ends.tolist())
    assert found.ends[-1] == len(text.encode())
    assert found.exact.all()


@settings(max_examples=80, deadline=None)
@given(chat=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_spans_hold_any_answers(chat):
    messages = [
        message
        for question, answer in chat
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
    text, spans, unchanged = render_chat(renderer(tiny.byte_level()), messages)
    assert unchanged
    assert contents(text, spans) == answers(messages)


def test_stripped_answers_are_found_and_reported():
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\n 42 \n"}]
    text, spans, unchanged = render_chat(renderer(tiny.sentencepiece_bpe()), chat)
    assert not unchanged
    assert contents(text, spans) == ["42"]


@pytest.mark.parametrize(("cut", "expected"), [
    (str.strip, "a\n b"),
    (str.lstrip, "a\n b \n"),
    (lambda content: content.rstrip("\n"), "\n a\n b "),
    (lambda content: content.strip("\n"), " a\n b "),
])  # fmt: skip
def test_every_way_of_stripping_is_found(cut, expected):
    def render(messages):
        return "".join(f"<{message['role']}>\n{cut(message['content'])}<end>\n" for message in messages)

    chat = [{"role": "assistant", "content": "\n a\n b \n"}, {"role": "assistant", "content": "plain"}]
    text, spans, unchanged = render_chat(render, chat)
    assert contents(text, spans) == [expected, "plain"]
    assert not unchanged


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place():
    chat = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "same"}]
    text, spans, _ = render_chat(renderer(tiny.byte_level()), chat)
    assert spans[0, 0] == text.encode().rindex(b"same")


def test_the_marker_may_stand_in_the_chat():
    chat = [{"role": "user", "content": "FUSIONMARK0E"}, {"role": "assistant", "content": "FUSIONMARKX0E"}]
    text, spans, unchanged = render_chat(renderer(tiny.byte_level()), chat)
    assert unchanged
    assert contents(text, spans) == ["FUSIONMARKX0E"]


def test_messages_are_not_changed():
    chat = [dict(message) for message in tiny.CHAT]
    render_chat(renderer(tiny.byte_level()), chat)
    assert chat == tiny.CHAT


def test_a_template_that_rewrites_an_answer_is_refused():
    def upper(messages):
        return " ".join(message["content"].upper() for message in messages)

    def shorten(messages):
        return "".join(message["content"].split("</think>")[-1] for message in messages)

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so</think>yes"}]
    with pytest.raises(DataError, match="leave assistant messages unchanged or to strip white space"):
        render_chat(upper, chat)
    with pytest.raises(DataError, match="Give the contents in the form"):
        render_chat(shorten, chat)


def test_a_template_that_drops_an_answer_is_refused():
    with pytest.raises(DataError, match="message 1 is not in the text"):
        render_chat(lambda messages: str(messages[-1]["content"]), tiny.CHAT)


@pytest.mark.parametrize("chat", [
    [],
    [{"role": "user", "content": "q"}],
    [{"role": "assistant", "content": None}],
    [{"role": "assistant", "tool_calls": []}],
])  # fmt: skip
def test_chats_without_answers_are_refused(chat):
    with pytest.raises(DataError, match="at least one assistant message"):
        render_chat(renderer(tiny.byte_level()), chat)
