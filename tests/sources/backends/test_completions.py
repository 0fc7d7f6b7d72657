"""What servers answer -> responses: reasoning, tool calls, ends of every kind, half characters, impossible counts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.errors import SourceError
from fusion_plugins.sources.backends.base import Response
from fusion_plugins.sources.backends.completions import parse_response, parse_topk
from fusion_plugins.sources.backends.servers import Refused, Trouble


def chat(message, reason="stop", **more):
    return {"choices": [{"message": message, "finish_reason": reason}], **more}


@pytest.mark.parametrize(
    ("message", "reason", "text"),
    [
        ({"content": None, "reasoning_content": "6 * 7 = 42"}, "stop", "<think>\n6 * 7 = 42\n</think>\n\n"),
        ({"content": "42", "reasoning_content": "6 * 7"}, "stop", "<think>\n6 * 7\n</think>\n\n42"),
        ({"content": "\n\n42", "reasoning": "6 * 7\n"}, "stop", "<think>\n6 * 7\n</think>\n\n42"),
        ({"content": "42", "thinking": "6 * 7"}, "stop", "<think>\n6 * 7\n</think>\n\n42"),
        ({"content": None, "reasoning_content": "6 * 7 is"}, "length", "<think>\n6 * 7 is"),
        ({"content": "", "reasoning_content": "6 * 7 is"}, "length", "<think>\n6 * 7 is"),
        ({"content": "42", "reasoning_content": None, "reasoning": ""}, "stop", "42"),
        ({"content": "<think>6 * 7</think>\n42", "reasoning_content": "6 * 7"}, "stop", "<think>6 * 7</think>\n42"),
        # The prompt ended in <think>, and the server has no parser for reasoning.
        ({"content": "6 * 7\n</think>\n\n42"}, "stop", "<think>\n6 * 7\n</think>\n\n42"),
        ({"content": "The tag </think> ends it."}, "stop", "The tag </think> ends it."),
        ({"content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]}, "stop", "42"),
        (
            {"content": [{"type": "thinking", "thinking": [{"text": "6 * 7"}]}, {"type": "text", "text": "42"}]},
            "stop",
            "<think>\n6 * 7\n</think>\n\n42",
        ),
        ({"content": "", "tool_calls": []}, "stop", ""),
    ],
)
def test_reasoning_is_kept_in_one_form(message, reason, text):
    found = parse_response(chat(message, reason))
    assert (found.text, found.finish_reason, found.repaired) == (text, reason, False)


@pytest.mark.parametrize("reason", ["stop", "STOP", "end_turn", "eos_token", "stop_sequence", "EOS", "eos"])
def test_a_complete_answer_ends_with_stop_whatever_its_server_calls_it(reason):
    assert parse_response(chat({"content": "42"}, reason)).finish_reason == "stop"


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "max_tokens", "model_length", "max_output_tokens"])
def test_an_answer_that_was_cut_ends_with_length_so_that_later_steps_leave_it_out(reason):
    assert parse_response(chat({"content": "42"}, reason)).finish_reason == "length"


@pytest.mark.parametrize(
    ("message", "reason", "why"),
    [
        ({"content": None, "tool_calls": [{"function": {"name": "look_up"}}]}, "tool_calls", "call of a tool.*look_up"),
        ({"content": "Wait.", "tool_calls": [{"function": {"name": "f"}}]}, "stop", "call of a tool"),
        ({"content": "", "function_call": {"name": "f"}}, "function_call", "call of a tool"),
        ({"content": ""}, "tool_use", "call of a tool"),
        ({"content": "As I"}, "content_filter", "finish_reason 'content_filter': it was withheld or cut"),
        ({"content": ""}, "SAFETY", "finish_reason 'SAFETY'"),
        ({"content": "a"}, "pause_turn", "finish_reason 'pause_turn'"),
        ({"content": "a"}, {"type": "stop"}, "finish_reason"),
        ({"content": "a"}, 1, "finish_reason 1"),
        ({"content": None}, "stop", "neither a text nor reasoning"),
        ({"content": None, "refusal": "I cannot help."}, "stop", "a refusal: 'I cannot help.'"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "stop", "a part of another kind"),
    ],
)
def test_what_is_no_text_and_never_will_be_is_refused_and_not_asked_for_again(message, reason, why):
    with pytest.raises(Refused, match=why):
        parse_response(chat(message, reason))


@pytest.mark.parametrize("reason", [None, "", "abort", "error", "cancelled", "Timeout"])
def test_an_interrupted_answer_is_asked_for_again(reason):
    with pytest.raises(Trouble, match="incomplete answer"):
        parse_response(chat({"content": "half of"}, reason))


def test_half_characters_and_impossible_counts_are_repaired():
    found = parse_response(chat({"content": "party \ud83d"}, usage={"completion_tokens": 10**30, "prompt_tokens": 4}))
    assert found == Response("party \ufffd", "stop", 0, 4, repaired=True)
    found = parse_response(json.loads('{"choices": [{"text": "\\ud83d\\ude00", "finish_reason": "stop"}]}'))
    assert (found.text, found.repaired) == ("\U0001f600", False)
    found = parse_response(chat({"content": None, "reasoning": "\udc00"}, usage={"completion_tokens": -1}))
    assert (found.text, found.n_tokens, found.repaired) == ("<think>\n\ufffd\n</think>\n\n", 0, True)
    for usage in ({"completion_tokens": float("nan")}, {"completion_tokens": True}, {"prompt_tokens": "7"}):
        assert parse_response(chat({"content": "a"}, usage=usage)).repaired
    for usage in (None, [], {}, "x"):
        assert not parse_response(chat({"content": "a"}, usage=usage)).repaired


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
REASONS = st.sampled_from(["stop", "length", "STOP", "tool_calls", "abort"]) | VALUES
MESSAGES = st.fixed_dictionaries({}, optional={name: VALUES for name in ("content", "reasoning_content", "tool_calls")})
CHOICES = st.fixed_dictionaries(
    {}, optional={"message": MESSAGES | VALUES, "text": VALUES, "finish_reason": REASONS, "prompt_logprobs": VALUES}
)
ANSWERS = st.fixed_dictionaries({}, optional={"choices": st.lists(CHOICES | VALUES, max_size=2), "usage": VALUES})


@settings(max_examples=300, deadline=None)
@given(ANSWERS)
def test_any_json_is_a_response_that_a_row_can_hold_or_an_error_of_ours(answer):
    try:
        found = parse_response(answer)
    except (Trouble, Refused) as problem:
        str(problem).encode()
    else:
        found.text.encode()
        assert 0 <= found.n_tokens < 2**63
        assert found.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "entries",
    [
        {"5": {"logprob": float("nan")}},
        {"5": {"logprob": 0.5}},
        {str(10**20): {"logprob": -1.0}, "5": {"logprob": -1.0}},
        {"-3": {"logprob": -1.0}, "5": {"logprob": -1.0}},
        {"five": {"logprob": -1.0}},
        {"5": {"logprob": None}},
        {"5": -1.0},
        [5],
        None,
        {"6": {"logprob": -1.0}},
    ],
)
def test_entries_that_are_no_log_probabilities_never_reach_a_store(entries):
    answer = {"choices": [{"prompt_logprobs": [None, entries]}]}
    with pytest.raises(Trouble, match="incomplete answer"):
        parse_topk(answer, np.array([4, 5], np.int32), 2, 10)


def test_the_top_k_of_a_prompt_is_read_and_a_server_without_it_is_named():
    answer = {"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -2.0}, "7": {"logprob": -1.0}}]}]}
    found = parse_topk(answer, np.array([4, 5], np.int32), 2, 10)
    assert found.ids.tolist() == [[7, 5], [-1, -1]]
    assert found.token_logprobs[0] == -2.0
    with pytest.raises(SourceError, match="gives no prompt_logprobs"):
        parse_topk({"choices": [{"text": "a"}]}, np.array([4, 5], np.int32), 2, 10)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES | st.dictionaries(st.text("0123456789-e", max_size=25), VALUES), max_size=3))
def test_any_json_for_a_top_k_is_a_result_or_an_error_of_ours(positions):
    try:
        found = parse_topk({"choices": [{"prompt_logprobs": positions}]}, np.array([4, 5], np.int32), 2, 10)
    except (Trouble, SourceError) as problem:
        str(problem).encode()
    else:
        assert not np.isnan(found.logprobs).any()
