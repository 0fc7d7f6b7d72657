"""Mathematics verdicts on real problems, and what must never become a silent "incorrect"."""

import json
from pathlib import Path

import pytest

from fusion_plugins.errors import ConfigError
from fusion_plugins.scoring.answers import gold_answer
from fusion_plugins.scoring.math_scorer import MathScorer

DATA = Path(__file__).parents[1] / "data"


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer():
    with_limit = MathScorer(timeout=30, workers=2)
    yield with_limit
    with_limit.close()


def judge(scorer, *cases):
    return scorer.score([{"reference": reference, "response": response} for reference, response in cases])


def verdicts(scorer, cases):
    return [score.correct for score in judge(scorer, *cases)]


# Real problems


def test_published_solutions_of_math_problems_are_correct(scorer):
    problems = rows("math.jsonl")
    assert len(problems) == 44
    found = judge(scorer, *((row["answer"], row["solution"]) for row in problems))
    assert [
        (row["answer"], score.reason) for row, score in zip(problems, found, strict=True) if not score.correct
    ] == []


def test_solutions_of_other_math_problems_are_incorrect(scorer):
    problems = rows("math.jsonl")
    others = problems[1:] + problems[:1]
    assert not any(verdicts(scorer, [(a["answer"], b["solution"]) for a, b in zip(problems, others, strict=True)]))


def test_grade_school_answers_are_found_after_the_hashes_and_as_the_last_number(scorer):
    problems = rows("gsm8k.jsonl")
    gold = [row["answer"] for row in problems]
    assert all(verdicts(scorer, [(answer, answer) for answer in gold]))
    assert all(verdicts(scorer, [(answer, f"So the answer is {gold_answer(answer)} dollars.") for answer in gold]))
    wrong = verdicts(
        scorer, [(answer, f"So the answer is {int(gold_answer(answer).replace(',', '')) + 1}.") for answer in gold]
    )
    assert wrong == [False] * len(gold)


# Forms


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("#### 18", "She makes $18 every day."),
        ("... so \\boxed{\\frac{1}{2}}", "The probability is $\\frac12$."),
        ("0.5", "\\boxed{1/2}"),
        ("145.0", "145"),
        ("1,234", "\\boxed{1234}"),
        ("18", "\\boxed{18\\text{ dollars}}"),
        ("18", "\\boxed{18 dollars}"),
        ("18", "\\boxed 18"),
        ("4", "First \\boxed{3}, but then \\boxed{4}."),
        ("2380元", "一共要付2380元。"),
        ("2380", "所以答案是\\boxed{2380元}"),
        ("2380", "答案是２３８０元"),
        ("-5", "The result is -5"),
        ("1500000", "It is 1.5e6."),
        ("1.5e6", "\\boxed{1500000}"),
        ("x^2+1", "\\boxed{(x+1)^2-2x}"),
        ("\\text{east}", "\\boxed{east}"),
        ("7", "#### 1. Add\n3 + 4 = 7\n#### Result\nIt is 7."),
        ("30000", "\\boxed{3万}"),
        ("5 million", "\\boxed{5,000,000}"),
        ("-5", "The answer is −5."),
        ("5", "<think>maybe \\boxed{7}</think> The answer is 5."),
        ("3, -1", "$x=\\boxed{3}$ or $x=\\boxed{-1}$"),
        ("3, -1", "The answer is -1 and 3."),
        ("7", "The answer is 7.\n\n#### 3 key points"),
        ("6", "So \\boxed{6}. I used \\boxed as asked."),
        ("B", "The answer is B."),
        ("B", "所以选B。"),
        ("(B) 12", "The answer is 12."),
        ("B", "I considered A and C. The correct option is (B) because it is even."),
        ("30", "The answer is 90/3=30"),
        ("145", "Each group has 290/2 = 145 bananas."),
        ("145", "Each group has $\\frac{290}{2} = 145$ bananas."),
        ("3-5", "It takes 3 to 5 days."),
        ("3:30 PM", "The train leaves at 3:30 p.m."),
        ("March 5, 2020", "It was on 2020-03-05."),
        ("1e-7", "\\boxed{10^{-7}}"),
        ("no", "**No**"),
        ("yes", "The answer is: Yes."),
        ("1024", "\\boxed{2^{10}}"),
        ("y = 2x + 3", "So $y = 3 + 2x$."),
        ("11\\sqrt{2}", "We get $x = 11\\sqrt{2}$."),
        ("8400", "The difference: $32,400 - $24,000 = $8,400"),
        ("1,-2", "Thus we get 1,-2."),
    ],
)
def test_forms_of_the_same_answer_are_correct(scorer, reference, response):
    (score,) = judge(scorer, (reference, response))
    assert score.correct is True, score


@pytest.mark.parametrize(
    ("reference", "response"),
    [
        ("#### 18", "She makes $19 every day."),
        ("3", "First \\boxed{3}, but then \\boxed{4}."),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}"),
        ("\\text{east}", "\\boxed{west}"),
        ("2380元", "一共要付2381元。"),
        ("-5", "The result is 5"),
        ("5 million", "\\boxed{5}"),
        ("3 dozen", "3"),
        ("5", "The answer is −5."),
        ("7", "<think>maybe \\boxed{7}</think> The answer is 5."),
        ("7", "<think>It is 7"),
        ("1e-7", "\\boxed{2e-7}"),
        ("B", "The answer is C."),
        ("B", "答案是C"),
        ("145", "Each group has 290/2 bananas."),
        ("145", "Each group has 290/2"),
        ("145", "The answer is $\\frac{290}{2}$."),
        ("145", "\\boxed{290/2}"),
        ("72.5", "Each gets 290/4 = "),
        ("4", "It is 2 + 2."),
        ("3", "$x=\\boxed{3}$ or $x=\\boxed{-1}$"),
        ("30", "The answer is 30/3=10"),
        ("3-5", "It takes 3 to 6 days."),
        ("3:30 PM", "The train leaves at 3:30 a.m."),
        ("yes", "The answer is no."),
        ("52_8", "\\boxed{52_9}"),
    ],
)
def test_other_answers_are_incorrect(scorer, reference, response):
    (score,) = judge(scorer, (reference, response))
    assert score.correct is False, score


WAYS_TO_SAY_IT = [
    ("20 thousand", "The answer is 20,000"),
    ("2亿", "\\boxed{200000000}"),
    ("12", "The answer is a dozen."),
    ("4", "The answer is four."),
    ("-3", "The answer is –3."),
    ("-3", "\\boxed{–3}"),
    ("3, -1", "x_1=\\boxed{3}, x_2=\\boxed{-1}"),
    ("3, -1", "$\\boxed{3} \\text{ and } \\boxed{-1}$"),
    ("x=3 or x=-1", "The answer is x = -1 or x = 3."),
    ("7", "The answer is 7.\n\n#### Section 3"),
    ("7", "#### Step 3\nSo 7"),
    ("7", "\\boxed{\\boxed{7}}"),
    ("B", "Option B is correct."),
    ("B", "So I choose B."),
    ("B", "B is correct because 3 > 2."),
    ("B", "The correct answer is Paris (B)."),
    ("B", "\\boxed{\\text{B}}"),
    ("3:00", "It starts at 3 o'clock."),
    ("下午3点半", "The answer is 3:30 PM."),
    ("12/25/2020", "The answer is December 25, 2020."),
    ("25/12/2020", "It was on December 25, 2020."),
    ("5000000", "\\boxed{5\\text{ million}}"),
    ("5 million", "\\boxed{5 \\times 10^6}"),
    ("3/4", "The answer is $\\frac{3}{4}$ of a pie."),
    ("5", "The answer is 5 (not 7)."),
    ("7", "The answer is not 5. It is 7."),
    ("42", "Therefore the answer is:\n\n$$\n42\n$$"),
    ("42", "**Final Answer**\n\n42"),
    ("42", "### Answer\n\n$42$"),
    ("42", "Ans: 42"),
    ("1000000", "\\boxed{1 000 000}"),
    ("5", "\\boxed{5}. Again: \\boxed{14"),
    ("75%", "The probability is 3/4."),
    ("0.75", "The probability is 3/4."),
    ("3", "The answer is $3$ apples, not $5$."),
    ("10", "答案为10个苹果"),
    ("1/2", "答案是：$\\frac{1}{2}$"),
    ("3/2", "The answer is 1½."),
    ("25", "It is 5^2 = 25."),
    ("2", "The answer is √4"),
    ("8", "She has eight apples left."),
    ("100", "The answer is one hundred."),
    ("0", "The answer is zero."),
    ("0", "\\boxed{0}"),
    ("x", "\\boxed{x}"),
    ("A", "The answer is A."),
    ("18", "She makes 9 * 2 = $18 every day."),
    ("$18", "#### 18"),
    ("1,2,3", "The answer is 1, 2, and 3."),
    ("(1,2)", "The answer is (1, 2)."),
    ("Monday", "The answer is Monday."),
    ("true", "True"),
    ("90", "The angle is $90^\\circ$."),
    ("6", "The answer is 6 because 2*3=6, which is more than 5."),
    ("5", "So we have 3 steps. <answer>5</answer> That took 3 steps."),
    ("-5", "The answer is minus 5."),
    ("-5", "The answer is \u20125."),
    ("-5", "答案是负5"),
    ("$3$ dozen", "\\boxed{36}"),
    ("5 lakh", "\\boxed{500000}"),
    ("8!", "\\boxed{40320}"),
    ("8", "The answer is 8!"),
    ("8", "**8!**"),
    ("2\\sqrt{3}", "2√3"),
    ("yes", "The answer is yes, because no one left."),
    ("1", "The second one says 2: 1"),
    ("5", "The final result: 5 (after 3 iterations)"),
    ("C", "选项C正确"),
    ("Room 12", "\\boxed{room 12.}"),
    ("x=3,y=4", "\\boxed{y=4,x=3}"),
    ("5", "<|begin_of_thought|>\\boxed{7}<|end_of_thought|><|begin_of_solution|>The answer is 5.<|end_of_solution|>"),
]
NOT_THE_ANSWER = [
    # points, braces and spaces mean something in a formula
    ("12.5", "\\boxed{125}"),
    ("1.5", "15"),
    ("10.0", "\\boxed{100}"),
    ("0.5", "\\boxed{05}"),
    ("3 1/2", "\\boxed{31/2}"),
    ("\\frac{1}{23}", "\\boxed{\\frac{12}{3}}"),
    ("\\frac{11}{2}", "\\boxed{\\frac{1}{12}}"),
    ("x^{1}2", "\\boxed{x^{12}}"),
    ("8!", "\\boxed{8}"),
    ("5", "The answer is negative 5."),
    ("5", "The answer is not 5."),
    ("5 crore", "\\boxed{5}"),
    ("x=3,y=4", "\\boxed{x=4,y=3}"),
    ("5", "<answer> 6 </answer> and not 5"),
    ("7", "[THINK]maybe \\boxed{7}[/THINK]The answer is 5."),
    ("7", "◁think▷maybe \\boxed{7}◁/think▷ The answer is 5."),
    ("7", "<thoughts>\\boxed{7}</thoughts>\nThe answer is 5."),
    (
        "7",
        "<|channel|>analysis<|message|>\\boxed{7}<|end|><|start|>assistant<|channel|>final<|message|>The answer is 5.",
    ),
    ("7", "<|START_THINKING|>\\boxed{7}<|END_THINKING|><|START_RESPONSE|>The answer is 5.<|END_RESPONSE|>"),
    ("7", "[THINK]maybe \\boxed{7}"),
    ("B", "First I got $\\boxed{\\text{(B)}}$, but that is wrong. It is $\\boxed{3.21}$."),
    ("1.5 billion", "\\boxed{1.5}"),
    ("B", "Option A is wrong. Option C is right."),
    ("B", "The answer is (C)."),
    ("145", "The answer is 290/2 bananas."),
    ("145", "Each group has 290 ÷ 2 bananas."),
    ("145", "Each group has $290 / 2$ bananas."),
    ("145", "So it is 87 + 58"),
    ("145", "The answer is 90 + 55 apples."),
    ("7", "3 + 4 = 7. The answer is"),
    ("145", "290/2 = 145, check: 145 /"),
    ("14", "The total is \\boxed{14"),
    ("1e-7", "It is 2 × 10^{-7}"),
    ("-1", "\\boxed{1}"),
    ("18", "Janet makes $18 per day at the market, which is $2 per egg."),
    ("Monday", "**Tuesday**"),
]


def test_more_ways_to_say_the_same_answer_are_correct(scorer):
    scores = judge(scorer, *WAYS_TO_SAY_IT)
    assert [
        (case, score) for case, score in zip(WAYS_TO_SAY_IT, scores, strict=True) if score.correct is not True
    ] == []


def test_more_answers_that_are_wrong_unfinished_or_not_worked_out_are_incorrect(scorer):
    scores = judge(scorer, *NOT_THE_ANSWER)
    assert [
        (case, score) for case, score in zip(NOT_THE_ANSWER, scores, strict=True) if score.correct is not False
    ] == []


def test_a_response_without_any_answer_is_incorrect_and_says_so(scorer):
    (score,) = judge(scorer, ("18", "I do not know."))
    assert score.correct is False
    assert "no answer" in score.reason


def test_only_marked_answers_count_when_asked_for():
    scorer = MathScorer(marked_only=True, workers=1, timeout=20)
    try:
        assert verdicts(scorer, [("18", "It is 18."), ("18", "#### 18"), ("18", "\\boxed{18}")]) == [False, True, True]
        assert scorer.facts["marked_only"] is True
    finally:
        scorer.close()


# No verdict is not "incorrect"


def test_what_the_verifier_cannot_read_has_no_verdict(scorer):
    unreadable_gold, unreadable_answer, missing, empty = judge(
        scorer, ("\\frac{", "18"), ("18", "\\boxed{((((}"), (None, "18"), ("", "18")
    )
    assert unreadable_gold.correct is None
    assert "gold answer cannot be read" in unreadable_gold.reason
    assert unreadable_answer.correct is None
    assert "answer cannot be read" in unreadable_answer.reason
    assert missing.correct is empty.correct is None
    assert missing.reason == "no gold answer"


def test_a_time_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="timeout"):
        MathScorer(timeout=0)
