"""Chats rendered by templates: the bytes that the assistant generated, and templates that change or refuse them."""

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.text import rendering
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer, tokenize_chat
from fusion_plugins.errors import DataError

CONTENT = st.text(min_size=1, max_size=20)
THINKING = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfive"}


def user(content):
    return {"role": "user", "content": content}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, name="get_weather"):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def parts(chat, *kinds):
    raw = chat.text.encode()
    found = [part for turn in chat.turns for part in turn.parts if not kinds or part.kind in kinds]
    return [raw[part.start : part.stop].decode() for part in found]


def generated(chat):
    return [chat.text.encode()[turn.start : turn.stop].decode() for turn in chat.turns]


def answers(chat):
    return [message["content"] for message in chat if message["role"] == "assistant"]


def templated(template, tools=None, **options):
    """Render with a template alone, as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages, prompt):
        found, _ = render_jinja_template([messages], tools, chat_template=template, add_generation_prompt=prompt,
                                         bos_token="<s>", eos_token="</s>", **options)  # fmt: skip
        return found[0]

    return render


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}: "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.sentencepiece_bpe])
def test_parts_hold_the_answers(make):
    chat = generated_spans(chat_renderer(make()), tiny.CHAT)
    assert chat.text == chat_renderer(make())(tiny.CHAT, False)
    assert parts(chat) == answers(tiny.CHAT)
    assert chat.unchanged


def test_a_turn_begins_behind_the_generation_prompt_and_has_its_end():
    chatml = generated_spans(chat_renderer(tiny.byte_level()), tiny.CHAT)
    inst = generated_spans(chat_renderer(tiny.sentencepiece_bpe()), tiny.CHAT)
    assert generated(chatml) == [f"{text}<|im_end|>\n" for text in answers(tiny.CHAT)]
    assert generated(inst) == [f" {text}</s>" for text in answers(tiny.CHAT)]


def test_without_a_generation_prompt_what_precedes_a_plain_answer_is_prompt():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.tool_calls %}"
        "[CALLS] {{ m.tool_calls[0].function.name }}</s>{% else %}<by the assistant>\n{{ m.content }}</s>{% endif %}"
        "{% endfor %}"
    )
    chat = [user("?"), answer("plain"), user("?"), answer(None, tool_calls=[call({}, "f")])]
    assert generated(generated_spans(templated(template), chat)) == ["plain</s>", "[CALLS] f</s>"]


@pytest.mark.parametrize("make", [tiny.byte_level, tiny.mistral_v1])
def test_spans_tile_the_turns_and_stop_before_the_end_of_turn(make):
    tokenizer = make()
    table = TokenTable.from_tokenizer(tokenizer)
    chat = generated_spans(chat_renderer(tokenizer), tiny.CHAT)
    found = tokenize_chat(tokenizer, table, chat)
    assert chat.spans.shape == found.spans.shape == (3 * len(answers(tiny.CHAT)), 2)
    assert found.spans[:, 1].tolist()[:2] == found.spans[:, 0].tolist()[1:3]
    raw = chat.text.encode()
    assert [raw[start:stop].decode() for start, stop in found.spans[1::3]] == answers(tiny.CHAT)
    assert not any(raw[start:stop].strip() for start, stop in found.spans[2::3])
    assert set(found.spans[:, 1].tolist()) <= set(found.ends.tolist())
    assert found.exact.all()


@settings(max_examples=80, deadline=None)
@given(chat=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
def test_parts_hold_any_answers(chat):
    messages = [message for question, text in chat for message in (user(question), answer(text))]
    found = generated_spans(chat_renderer(tiny.byte_level()), messages)
    assert found.unchanged
    assert parts(found) == answers(messages)


def test_stripped_answers_are_found_and_reported():
    found = generated_spans(chat_renderer(tiny.sentencepiece_bpe()), [user("?"), answer("\n 42 \n")])
    assert not found.unchanged
    assert parts(found) == ["42"]


@pytest.mark.parametrize(("cut", "expected"), [
    (str.strip, "a\n b"),
    (str.lstrip, "a\n b \n"),
    (lambda content: content.rstrip("\n"), "\n a\n b "),
    (lambda content: content.strip("\n"), " a\n b "),
])  # fmt: skip
def test_every_way_of_stripping_is_found(cut, expected):
    def render(messages, prompt):
        return "".join(f"<{message['role']}>\n{cut(message['content'])}<end>\n" for message in messages)

    found = generated_spans(render, [answer("\n a\n b \n"), answer("plain")])
    assert parts(found) == [expected, "plain"]
    assert not found.unchanged


def test_an_answer_that_repeats_the_question_is_found_in_its_own_place():
    found = generated_spans(chat_renderer(tiny.byte_level()), [user("same"), answer("same")])
    assert found.turns[0].start == found.text.encode().rindex(b"same")


def test_the_mark_may_be_a_part_of_the_chat():
    found = generated_spans(chat_renderer(tiny.byte_level()), [user("FUSIONMARK0E"), answer("FUSIONMARKX0E")])
    assert found.unchanged
    assert parts(found) == ["FUSIONMARKX0E"]


def test_messages_are_not_changed():
    chat = [user("Weather?"), answer(None, tool_calls=[call('{"city": "Paris"}')], thinking="hm"), THINKING]
    before = json.dumps(chat)
    generated_spans(templated(CHATML), chat)
    assert json.dumps(chat) == before


@pytest.mark.parametrize("message", [
    THINKING,
    answer("five", reasoning_content="hm"),
    answer("five", reasoning="hm"),
    answer("five", thinking="hm"),
])  # fmt: skip
def test_reasoning_is_generated_in_the_form_of_the_template(message):
    found = generated_spans(templated(CHATML), [user("2 + 3?"), message])
    assert generated(found) == ["<think>\nhm\n</think>\n\nfive<|im_end|>\n"]
    assert parts(found) == ["hm", "five"]


def test_reasoning_of_an_earlier_turn_is_left_out_where_the_template_leaves_it_out():
    found = generated_spans(templated(CHATML), [user("2 + 3?"), THINKING, user("And 1?"), THINKING])
    assert generated(found) == ["five<|im_end|>\n", "<think>\nhm\n</think>\n\nfive<|im_end|>\n"]
    assert parts(found) == ["", "five", "hm", "five"]
    assert not found.unchanged


def test_a_template_without_reasoning_gets_the_content_as_it_is_written():
    plain = chat_renderer(tiny.byte_level())
    tagged = generated_spans(plain, [user("2 + 3?"), THINKING])
    keyed = generated_spans(plain, [user("2 + 3?"), answer("five", thinking="hm")])
    assert generated(tagged) == ["<think>\nhm\n</think>\n\nfive<|im_end|>\n"]
    assert generated(keyed) == ["five<|im_end|>\n"]
    assert (parts(tagged), parts(keyed)) == (["hm", "five"], ["", "five"])


def test_a_generation_prompt_that_opens_the_reasoning_is_prompt():
    template = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    found = generated_spans(templated(template), [user("?"), answer("<tool>"), user("2 + 3?"), THINKING])
    assert generated(found) == ["<tool><|im_end|>\n", "hm\n</think>\n\nfive<|im_end|>\n"]


@pytest.mark.parametrize("arguments", [{"city": "Paris", "days": 2}, '{"city": "Paris", "days": 2}'])
@pytest.mark.parametrize("content", [None, "", "Let me see."])
def test_tool_calls_are_generated_with_their_syntax_and_results_are_not(content, arguments):
    chat = [
        user("Weather?"),
        {"role": "assistant", "content": content, "tool_calls": [call(arguments), call({"city": "Rom\u00e9"}, "f")]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call00001"},
        answer("Sunny."),
    ]
    found = generated_spans(templated(CHATML), chat)
    calls = '<tool_call>get_weather: {"city": "Paris", "days": 2}</tool_call><tool_call>f: {"city": "Romé"}</tool_call>'
    assert generated(found) == [f"{content or ''}{calls}<|im_end|>\n", "Sunny.<|im_end|>\n"]
    assert parts(found, "name") == ["get_weather", "f"]
    assert parts(found, "arguments") == ['{"city": "Paris", "days": 2}', '{"city": "Romé"}']
    assert [turn.message for turn in found.turns] == [1, 3]


def test_calls_without_a_function_level_are_read():
    flat = answer(None, tool_calls=[{"name": "f", "arguments": {"a": "b"}}])
    assert generated(generated_spans(templated(CHATML), [user("?"), flat])) == [
        '<tool_call>f: {"a": "b"}</tool_call><|im_end|>\n'
    ]


@pytest.mark.parametrize("written", ["'' + call.function.arguments", "call.function.arguments"])
def test_a_template_that_takes_arguments_as_text_gets_json(written):
    template = CHATML.replace("call.function.arguments | tojson", written)
    found = generated_spans(templated(template), [user("?"), answer(None, tool_calls=[call({"a": "b c"})])])
    assert parts(found) == ["get_weather", '{"a": "b c"}']


def test_a_template_that_asks_for_contents_without_text_or_in_parts_gets_them():
    refuses = CHATML.replace(
        "{{ m.content }}", "{% if m.content is none %}-{% else %}{{ m.content[0].text }}{% endif %}"
    )
    found = generated_spans(templated(refuses), [user("?"), answer("yes")])
    assert generated(found) == ["yes<|im_end|>\n"]


def test_turns_of_other_roles_are_their_contents():
    found = generated_spans(chat_renderer(tiny.byte_level()), tiny.CHAT[:2], roles=("user", "assistant"))
    assert [turn.role for turn in found.turns] == ["user", "assistant"]
    assert generated(found)[0] == tiny.CHAT[0]["content"]


def test_a_template_that_rewrites_an_answer_is_refused():
    def upper(messages, prompt):
        return " ".join(message["content"].upper() for message in messages)

    def shorten(messages, prompt):
        return "".join(message["content"].split("so")[-1] for message in messages)

    for render in (upper, shorten):
        with pytest.raises(DataError, match=r"unchanged or to strip white space.*Give the contents in the form"):
            generated_spans(render, [user("q"), answer("so yes")])


def test_a_template_that_drops_an_answer_or_a_call_is_refused():
    with pytest.raises(DataError, match="message 1 is not in the text"):
        generated_spans(lambda messages, prompt: str(messages[-1]["content"]), tiny.CHAT)
    one = CHATML.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match="the call of second in message 1 is not in the text"):
        generated_spans(templated(one), [user("?"), answer(None, tool_calls=[call({}, "first"), call({}, "second")])])
    with pytest.raises(DataError, match="the call of get_weather in message 1 is not in the text"):
        generated_spans(chat_renderer(tiny.byte_level()), [user("?"), answer(None, tool_calls=[call({"a": 1})])])


@pytest.mark.parametrize("template", [
    "{{ raise_exception('System role not supported') }}",
    "{{ messages[0].content.nothing.at.all }}",
    "{{ 1 / 0 }}",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
])  # fmt: skip
def test_a_template_that_raises_is_one_sentence(template):
    with pytest.raises(DataError, match="the chat template refuses the chat: .*leave the chat out") as found:
        generated_spans(templated(template), tiny.CHAT)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("chat", [[], [user("q")]])
def test_chats_without_answers_are_refused(chat):
    with pytest.raises(DataError, match="at least one assistant message"):
        generated_spans(chat_renderer(tiny.byte_level()), chat)


@pytest.mark.parametrize("calls", [["f"], [{"name": ""}], [{"function": {"arguments": {}}}]])
def test_broken_calls_are_refused(calls):
    with pytest.raises(DataError, match="expected a tool call as"):
        generated_spans(templated(CHATML), [user("?"), answer(None, tool_calls=calls)])


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="it takes longer than 0.3 seconds. Use another chat template"):
        generated_spans(templated(endless), tiny.CHAT)
