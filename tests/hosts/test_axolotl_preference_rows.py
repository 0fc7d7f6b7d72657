"""Supervised and preference rows of one conversation have the same ids, cut where the answer begins and ends."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import real_assets
import tiny
import trl

from fusion_plugins.axolotl.preference_rows import (
    SUPERVISED,
    conversation,
    leave_out,
    make_rows,
    preference_row,
    supervised_row,
)
from fusion_plugins.axolotl.target_tokenizer import Answer, TargetTokenizer
from fusion_plugins.core import Candidate
from fusion_plugins.core.preferences.candidates import as_candidate
from fusion_plugins.core.text.token_table import Role
from fusion_plugins.errors import DataError

#: answers whose first letters merge with what is before them in one tokenizer or another, or that end oddly
ANSWERS = ("the theory of the other", " five", "\nfive", "  \n\tfive", "42", "数学 5", "five\n", "👩‍👩‍👧", "...", "é")
PROMPTS = ("Say it now: ", "1 + 1 =", "How many?\n", [{"role": "user", "content": "Why? 🎉"}])
TEMPLATES = Path(trl.__file__).with_name("chat_templates")
TURN = (
    "{% for m in messages %}{{ m['role'] }}:SPACE{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:SPACE{% endif %}"
)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return TargetTokenizer.of(changed, {})


def check(target, prompt, chosen, rejected):
    """What holds for every pair; returns its row."""
    answers = [target.answer(prompt, response) for response in (chosen, rejected)]
    row = preference_row(*answers)
    bos = target.table.id_of_role(Role.BOS)
    for answer, response, side in zip(answers, (chosen, rejected), ("chosen", "rejected"), strict=True):
        supervised = supervised_row(answer)
        assert row["prompt_ids"] + row[f"{side}_ids"] == supervised["input_ids"]
        learnt = [label for label in supervised["labels"] if label != -100]
        # Only letters of the prompt, which merged with the other answer, may stand before what SFT learns.
        assert row[f"{side}_ids"][-len(learnt) :] == learnt
        assert response.strip() in target.tokenizer.decode(learnt, clean_up_tokenization_spaces=False)
        assert supervised["input_ids"][:2] != [bos, bos]
        assert target.table.role_of(learnt[-1]) in (Role.EOS, Role.END_OF_TURN)
        assert target.table.role_of(learnt[-2]) not in (Role.EOS, Role.END_OF_TURN)
    return row


def check_all(target, prompts=PROMPTS):
    for prompt in prompts:
        for chosen, rejected in zip(ANSWERS, ANSWERS[1:] + ANSWERS[:1], strict=True):
            check(target, prompt, chosen, rejected)


@pytest.mark.parametrize("name", ["byte_level", "digit_splitting", "sentencepiece_bpe", "mistral_v1"])
def test_both_stages_see_the_same_ids(name):
    tokenizer = getattr(tiny, name)()
    check_all(TargetTokenizer.of(tokenizer, {}))
    check_all(with_template(tokenizer, None), PROMPTS[:3])


@pytest.mark.parametrize("space", [" ", "\n", "\n\n", " \n", ""])
def test_both_stages_see_the_same_ids_where_the_generation_prompt_ends_in_white_space(space):
    check_all(with_template(tiny.byte_level(), TURN.replace("SPACE", space)), PROMPTS[:1])


@pytest.mark.real
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "llama2", "smollm2"])
def test_both_stages_see_the_same_ids_with_real_tokenizers(name):
    real_assets.require()
    check_all(TargetTokenizer.of(real_assets.tokenizer(name), {}), PROMPTS[2:])


def test_an_answer_keeps_its_first_token_where_it_merges_with_the_prompt():
    target = with_template(tiny.mistral_v1(), None)
    prompt, answer = "Say it now: ", "the theory of the other"
    whole = target.tokenizer(prompt + answer)["input_ids"]
    row = check(target, prompt, answer, "the other")
    assert row["prompt_ids"] + row["chosen_ids"] == [*whole, target.tokenizer.eos_token_id]
    names = target.tokenizer.convert_ids_to_tokens(row["chosen_ids"])
    assert names == ["▁the", "▁theory", "▁of", "▁the", "▁other", "</s>"]
    # The prompt alone has one token more: its last space. Cut there, the answer would begin with its second word.
    assert len(target.tokenizer(prompt)["input_ids"]) == len(row["prompt_ids"]) + 1


def test_a_pair_shares_its_prompt_where_only_one_answer_merges_with_it():
    target = with_template(tiny.mistral_v1(), None)
    row = check(target, "Say it now: ", "the other", "\nno")
    names = [target.tokenizer.convert_ids_to_tokens(row[side]) for side in ("chosen_ids", "rejected_ids")]
    assert names == [["▁the", "▁other", "</s>"], ["▁", "<0x0A>", "no", "</s>"]]


def test_reasoning_and_tool_calls_are_in_the_form_of_the_template():
    target = with_template(tiny.byte_level(), (TEMPLATES / "qwen3.jinja").read_text())
    for reply in (
        "<think>\nhm\n</think>\n\nfive",
        "<think>hm</think>five",
        {"content": "five", "reasoning_content": "hm"},
    ):
        answer = target.answer("2 + 3?", reply)
        assert answer.prompt == "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n"
        assert target.tokenizer.decode(answer.answer_ids) == "<think>\nhm\n</think>\n\nfive<|im_end|>"
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
    answer = target.answer("2 + 3?", {"content": "", "tool_calls": [call]}, tools=tools)
    assert answer.text.endswith('<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>')
    assert '"name": "add"' in answer.prompt
    assert answer.text == target.tokenizer.decode(answer.answer_ids)
    row = preference_row(answer, target.answer("2 + 3?", "<think>\nhm\n</think>\n\nfive", tools=tools))
    assert target.tokenizer.decode(row["prompt_ids"]) == answer.prompt


@pytest.mark.parametrize("thought", ["42", "true", '"quoted"', "[1, 2]", '{"a": 1}', "null", "hm"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_a_table_is_a_text_whatever_it_looks_like(name, thought):
    row = {"prompt_id": "p", "source": "s", "prompt": "?", "response": "five", name: thought}
    assert conversation(as_candidate(row, 0))["reply"] == {"content": "five", "reasoning_content": thought}


def test_calls_of_a_table_reach_the_template_as_json_or_as_arrow_writes_them():
    calls = [{"function": {"name": "add", "arguments": '{"a": 2}'}, "id": None}]
    for given in (calls, '[{"function": {"name": "add", "arguments": "{\\"a\\": 2}"}}]'):
        found = conversation(Candidate("p", "s", 0, "?", "", extra={"tool_calls": given, "tools": "[]"}))
        assert found == {
            "prompt": "?",
            "reply": {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
            "tools": [],
        }
    assert conversation(Candidate("p", "s", 0, "?", "5"))["reply"] == "5"


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("{{ bos_token }}{{ bos_token }}" + tiny.INST.removeprefix("{{ bos_token }}"), "Hi", "expected one BOS token"),
        ("{{ raise_exception('no users here') }}", "Hi", "template refuses the chat: no users here"),
        (None, "", "a prompt that is not empty"),
        (None, [{"role": "user", "content": "Hi"}], "no chat template"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "Hi", "changes the text"),
    ],
)
def test_what_cannot_be_a_row_is_refused_with_its_cure(template, prompt, message):
    with pytest.raises(DataError, match=message):
        with_template(tiny.sentencepiece_bpe(), template).answer(prompt, "five")


def test_a_template_whose_prompt_depends_on_the_answer_makes_no_pair():
    chosen = Answer([1, 2], [5], "short: ", "five")
    with pytest.raises(DataError, match="the same text before both answers of a pair, got 'short: ' and 'long: '"):
        preference_row(chosen, replace(chosen, prompt="long: "))
    # Nothing can predict the first token of a text.
    with pytest.raises(DataError, match="the same text before both answers"):
        preference_row(chosen, replace(chosen, prompt_ids=[3, 2]))


def test_a_template_that_writes_lists_as_python_does_is_not_given_lists():
    target = with_template(tiny.byte_level(), "{{ messages[-1]['content'] | length }}:" + tiny.CHATML)
    with pytest.raises(DataError, match="changes the text"):
        target.answer("Hi", "five")


def test_unusable_rows_are_named_and_fatal_or_left_out():
    def make(item):
        if item == "bad":
            raise DataError("the template refuses it.")
        return supervised_row(target.answer("Hi", item))

    target = TargetTokenizer.of(tiny.byte_level(), {})
    items = [("prompt 'a'", "five"), ("prompt 'b'", "bad"), ("prompt 'c'", "\ud83d"), ("prompt 'd'", "six")]
    rows, unusable = make_rows(items, make, SUPERVISED)
    assert rows["name"] == ["prompt 'a'", "prompt 'd'"]
    assert [row.row for row in unusable] == ["prompt 'b'", "prompt 'c'"]
    assert [row["row"] for row in leave_out(unusable, 4, "skip")] == ["prompt 'b'", "prompt 'c'"]
    with pytest.raises(DataError, match=r"2 of 4 rows cannot be used. prompt 'b': the template.*on_unusable: skip"):
        leave_out(unusable, 4, "raise")
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        leave_out(unusable, 2, "skip")
