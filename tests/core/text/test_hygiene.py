"""Repetitions, texts of evaluations, and refusals."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.core.text.hygiene import KnownTexts, jaccard, numbers, refusal_of, same_text, shingles, words

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "I am sorry, I cannot provide instructions for making weapons.",
    "Sorry, I can't comply with this.",
    "I cannot fulfill your request. I am just an AI assistant.",
    "I apologize, but I am unable to assist you with this matter.",
    "Unfortunately, I'm not able to help with hacking into accounts.",
    "As an AI language model, I cannot browse the internet.",
    "I can't help you with that, but here is a hotline.",
    "I will not engage in this conversation.",
    "I won't provide that information.",
    "I do not feel comfortable writing such a story.",
    "**I'm sorry**, but I can't generate explicit content.",
    "No, I cannot help with that.",
    "I'm really sorry, but as an AI developed by Acme, I can't participate in that.",
    "I must decline to provide guidance on this topic.",
    "很抱歉，我无法提供这方面的帮助。",
    "对不起，我不能回答这个问题。",
    "抱歉，作为一个AI助手，我无法协助您完成该请求。",
    "作为一个人工智能，我无法浏览网页。",
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Lo siento, pero no puedo ayudar con eso.",
]
ANSWERS = [
    "I'm sorry for your loss. Here are some words for the card.",
    "I can't stress enough how important tests are.",
    "I cannot help but notice that the series diverges.",
    "Sorry to hear that! Try restarting the router.",
    "Unfortunately, the matrix is singular, so it has no inverse.",
    "I can't give you an exact date, but the war began about 1618.",
    "The program cannot help with that case because the list is empty.",
    "'I'm sorry, but I can't help you,' said the knight." + " He rode on through the forest." * 60,
    "I will not be able to come on Monday. Could we meet on Tuesday?",
    "No. 17 is prime.",
    "As an AI researcher, I can recommend three books.",
    "Here is a polite refusal: I'm sorry, but I can't attend.",
    "I can answer this in two ways.",
    "Apologies were common in letters of that time.",
    "抱歉让您久等了，答案是 42。",
    "作为一个人工智能专业的学生，我推荐三本书。",
    "Es tut mir leid, das zu hören. Versuchen Sie einen Neustart.",
    "Je suis désolé pour le retard. Voici la réponse.",
    "42",
    "",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals_are_found(answer):
    assert refusal_of(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_not_taken_for_refusals(answer):
    assert refusal_of(answer) is None


@given(st.text(max_size=300))
def test_any_text_is_read_in_short_time(text):
    refusal_of(text)
    refusal_of("I'm sorry " * 30 + text)
    assert same_text(same_text(text)) == same_text(text)


def test_texts_are_the_same_but_for_their_encoding():
    assert same_text("Caf\u00e9?\r\nYes ") == same_text("Cafe\u0301?\nYes")
    assert same_text("def f():\n    return 1") != same_text("def f():\n  return 1")
    assert same_text("What?") != same_text("what?")


@given(
    st.lists(st.sampled_from("abcdefgh"), max_size=30),
    st.lists(st.sampled_from("abcdefgh"), max_size=30),
    st.integers(1, 4),
)
def test_the_similarity_is_that_of_the_sets_of_runs(one, other, size):
    def runs(tokens):
        return {tuple(tokens[start : start + size]) for start in range(max(1, len(tokens) - size + 1))}

    found = jaccard(shingles(" ".join(one), size), shingles(" ".join(other), size))
    assert found == pytest.approx(len(runs(one) & runs(other)) / len(runs(one) | runs(other)))


EVALUATION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


@pytest.mark.parametrize(
    "text",
    [
        EVALUATION,
        f"Solve step by step: {EVALUATION} How many in total?",
        EVALUATION.upper().replace(",", " -- "),
        "A rewritten start. She sold clips to 48 of her friends in April and then she sold half!",
        "什么？ " + EVALUATION,
    ],
)
def test_a_text_that_shares_a_run_with_an_evaluation_is_found(text):
    known = KnownTexts(10)
    known.add(EVALUATION, "gsm8k.jsonl:1")
    where, run = known.find(text)
    assert where == "gsm8k.jsonl:1"
    assert len(run.split()) >= 10


@pytest.mark.parametrize(
    "text",
    [
        "She sold half as many clips in May.",
        "Natalia has 48 friends.",
        "",
        "Sold clips to 47 of her friends in April and then she sold",
    ],
)
def test_a_text_that_shares_less_is_not(text):
    known = KnownTexts(10)
    known.add(EVALUATION, "gsm8k.jsonl:1")
    assert known.find(text) is None


def test_short_texts_of_evaluations_are_found_whole_and_the_shortest_only_as_the_whole_prompt():
    known = KnownTexts(13)
    known.add("What is the capital of France?", "a:1")
    known.add("Yes or no?", "a:2")
    known.add("!?", "a:3")
    known.add("小明有十二个苹果，又买了三十个", "a:4")
    assert known.find("Tell me: what is the capital of France, please?")[0] == "a:1"
    assert known.find("Is it so, yes or no?") is None
    assert known.find("Yes, or no")[0] == "a:2"
    assert known.find("问题：小明有十二个苹果，又买了三十个。一共有多少？")[0] == "a:4"
    assert known.find("!?") is None


def test_what_is_found_does_not_depend_on_the_rest_of_a_long_text():
    draw = random.Random(0)
    known = KnownTexts(13)
    known.add(EVALUATION, "a:1")
    rest = [" ".join(draw.choices(["red", "green", "blue"], k=200)) for _ in range(2)]
    assert known.find(f"{rest[0]} {EVALUATION} {rest[1]}")[0] == "a:1"
    assert known.find(" ".join(rest)) is None


def test_numbers_are_compared_as_they_are_written():
    assert numbers("12 apples, １３ pears") == numbers("13 pears, 12 apples")
    assert numbers("12 apples") != numbers("12 apples, 12 pears")
    assert numbers("1.5") != numbers("15")
    assert words("naïve Straße") == ["naïve", "straße"]
