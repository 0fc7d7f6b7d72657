"""The chat templates that trl ships: which chats they can render, and what the assistant generated in them."""

import sys
from pathlib import Path

import axolotl
import pytest
import real_assets
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import chat_matrix  # noqa: E402
from chat_matrix import CHATS  # noqa: E402

from fusion_plugins.core.text.chat import generated_spans  # noqa: E402


@pytest.fixture(scope="module")
def matrix():
    return chat_matrix.matrix(chat_matrix.trl_templates())


def parts(chat, kind):
    raw = chat.text.encode()
    return [raw[part.start : part.stop].decode() for turn in chat.turns for part in turn.parts if part.kind == kind]


def test_the_table_of_the_documents_is_what_the_script_finds(matrix):
    table = chat_matrix.table(matrix)
    assert table in (ROOT / "docs" / "chats.md").read_text()
    counts = {kind: sum(not isinstance(row[kind], str) for row in matrix.values()) for kind in CHATS}
    assert len(matrix) == 25
    assert counts == {
        "plain": 25, "system": 24, "reasoning": 25, "reasoning, 2 turns": 25, "reasoning key": 25, "tool call": 15,
        "parallel calls": 12, "tool result": 15,
    }  # fmt: skip


@pytest.mark.real
def test_the_table_of_real_tokenizers_is_what_the_script_finds():
    real_assets.require()
    templates = chat_matrix.named_templates(real_assets.folder(name) for name in sorted(real_assets.WITH_OWN_TEMPLATE))
    assert chat_matrix.table(chat_matrix.matrix(templates)) in (ROOT / "docs" / "chats.md").read_text()


def test_what_is_refused_is_one_sentence_with_a_cure(matrix):
    refused = [result for row in matrix.values() for result in row.values() if isinstance(result, str)]
    assert len(refused) == 34
    for reason in refused:
        assert "\n" not in reason
        assert "eave the chat out" in reason


def test_answers_and_calls_are_generated_and_nothing_of_other_roles_is(matrix):
    for name, row in matrix.items():
        for kind, chat in row.items():
            if isinstance(chat, str):
                continue
            raw = chat.text.encode()
            generated = [raw[turn.start : turn.stop].decode() for turn in chat.turns]
            messages = [message for message in CHATS[kind][0] if message["role"] == "assistant"]
            for message, text, turn in zip(messages, generated, chat.turns, strict=True):
                answer = (message["content"] or "").split("</think>")[-1].strip()
                assert answer in text, (name, kind)
                for call in message.get("tool_calls", ()):
                    assert call["function"]["name"] in text
                    assert call["function"]["arguments"]["city"] in text
                assert raw[: turn.start].decode().rstrip(), (name, kind)
            for foreign in ("What is", "And twice", "Is it warm", "18 degrees", "Be brief", "Tells the weather"):
                assert not any(foreign in text for text in generated), (name, kind)


def test_reasoning_is_generated_in_the_last_turn_of_the_templates_that_know_it(matrix):
    knows = {name for name, row in matrix.items() if parts(row["reasoning key"], "reasoning") == ["Two and three."]}
    assert {"qwen3", "glm4moe", "gptoss", "nemotron_3_nano", "qwen3_5_think"} < knows
    for name in knows:
        row = matrix[name]
        assert parts(row["reasoning"], "reasoning") == ["Two and three."]
        assert parts(row["reasoning, 2 turns"], "reasoning")[1] == "Twice five."
    channel = matrix["gptoss"]["reasoning"]
    assert channel.text.endswith(
        "<|channel|>analysis<|message|>Two and three.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Five.<|return|>"
    )


def test_turns_agree_with_the_marks_for_training_in_trl_s_templates():
    """trl's marks also hold what the generation prompt writes, and gpt-oss's end of a turn that is not the last."""
    compared = 0
    for template in chat_matrix.training_templates().values():
        for kind, (messages, tools) in CHATS.items():
            chat = chat_matrix.outcome(template, kind)
            try:
                (text,), (marks,) = render_jinja_template(
                    [messages], tools, chat_template=template, return_assistant_tokens_mask=True,
                    bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                )  # fmt: skip
            except Exception:
                continue  # needs the messages in another form
            if isinstance(chat, str) or text != chat.text:
                continue
            theirs = [text[start:stop] for start, stop in marks if text[start:stop] != "</s>"]
            raw = chat.text.encode()
            for turn, marked in zip(chat.turns, theirs, strict=True):
                own = raw[turn.start : turn.stop].decode().removesuffix("</s>")
                marked = marked.removesuffix("<|end|>") if not own.endswith("<|end|>") else marked
                assert marked.removesuffix("</s>").endswith(own)
                prompt = chat_matrix.renderer(template, tools)(messages[: turn.message], True)
                assert marked.removesuffix("</s>").removesuffix(own) in prompt[-40:]
                compared += 1
    assert compared > 150


def generated(name, messages, tools=None):
    chat = generated_spans(chat_matrix.renderer(chat_matrix.trl_templates()[name], tools), messages)
    raw = chat.text.encode()
    return [raw[turn.start : turn.stop].decode() for turn in chat.turns]


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


QUESTION = {"role": "user", "content": "What is 2 + 3?"}


@pytest.mark.parametrize(("name", "first"), [
    ("llama3", "Hello.<|eot_id|>"),
    ("qwen2_5_vl", "Hello.<|im_end|>\n"),
    ("qwen3_6", "Hello.<|im_end|>\n"),
    ("gptoss", "<|channel|>final<|message|>Hello."),
    ("nemotron_3_nano", "</think>Hello.<|im_end|>\n"),
    ("llava_next", " Hello.</s> "),
])  # fmt: skip
def test_a_chat_that_begins_with_an_answer(name, first):
    """Templates render no messages as BOS, a system message, an error or nothing; none of it is generated."""
    found = generated(name, [answer("Hello."), QUESTION, answer("Five.")])
    assert found[0] == first
    assert "Five." in found[1]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"])
def test_a_chat_that_begins_with_a_call_or_with_reasoning(name):
    messages = [CHATS["tool call"][0][1], *CHATS["tool result"][0][2:]]
    assert generated(name, messages, chat_matrix.TOOLS)[0].startswith('<tool_call>\n{"name": "get_weather"')
    reasoned = [answer("<think>\nhm\n</think>\n\nHello."), QUESTION, answer("Five.")]
    assert generated(name, reasoned)[0] in ("<think>\nhm\n</think>\n\nHello.<|im_end|>\n", "Hello.<|im_end|>\n")


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>\n", "\n<think>\n</think>"])
def test_an_empty_block_of_reasoning_is_syntax(block):
    """What models write that can reason and do not; a template may write it in its own way, or leave it out."""
    for name in chat_matrix.trl_templates():
        first, last = generated(name, [QUESTION, answer(f"{block}Five."), QUESTION, answer(f"{block}Ten.")])
        assert "Five." in first
        assert "Ten." in last
    assert generated("qwen3", [QUESTION, answer(f"{block}Five.")]) == ["<think>\n\n</think>\n\nFive.<|im_end|>\n"]
    assert generated("llama3", [QUESTION, answer(f"{block}Five.")]) == [f"{block.lstrip()}Five.<|eot_id|>"]
    call = {**CHATS["tool call"][0][1], "content": block}
    assert "get_weather" in generated("qwen3", [QUESTION, call], chat_matrix.TOOLS)[0]


@pytest.mark.parametrize("name", ["mistral_v2v3", "mistral_v3_tekken"])
def test_a_template_that_writes_the_tools_before_the_last_question(name):
    """An earlier question, rendered as the last one, has the tools before it, so that the beginnings differ."""
    file = Path(axolotl.__file__).parent / "utils" / "chat_templates" / "templates" / f"{name}.jinja"
    messages, tools = CHATS["tool result"]
    chat = generated_spans(
        chat_matrix.renderer(file.read_text(encoding="utf-8"), tools),
        [*messages, {"role": "user", "content": "And in Rome?"}, answer("I do not know.")],
    )
    raw = chat.text.encode()
    call, *answers = [raw[turn.start : turn.stop].decode().strip() for turn in chat.turns]
    assert call.startswith("[TOOL_CALLS]")
    assert call.endswith("</s>")
    assert answers == ["Rather cool.</s>", "I do not know.</s>"]
