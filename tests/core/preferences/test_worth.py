"""What scored responses say about training on them: verdicts on inputs whose answer is known."""

import json
import math
import random
from dataclasses import replace

import pytest

from fusion_plugins.core.preferences.candidates import as_candidate
from fusion_plugins.core.preferences.worth import examine_worth, response_of
from fusion_plugins.core.preferences.worth_types import FEWEST_PROMPTS, Response
from fusion_plugins.errors import DataError


def response(prompt, source, answer, gold, *, own=False, reward=None, domain="math", judged=True):
    right = (answer == gold) if judged else None
    return Response(f"p{prompt}", source, domain, own, right, reward, len(answer), answer, gold)


def world(prompts=200, samples=4, seed=0, **sources):
    """Answers to sums with 40 results; a source is the share of the prompts that it masters, elsewhere it guesses."""
    draw = random.Random(seed)
    found = []
    for prompt in range(prompts):
        gold = str(draw.randrange(40))
        for source, skill in sources.items():
            masters = draw.random() < skill
            found += [
                response(prompt, source, gold if masters else str(draw.randrange(40)), gold, own=source == "target")
                for _ in range(samples)
            ]
    return found


def only(responses):
    (found,) = examine_worth(responses)
    return found, {each.name: each for each in found.sources}


def test_a_constant_answer_is_luck_and_dealt_it_is_right_exactly_as_often():
    golds = [str(2 if prompt % 9 == 0 else 100 + prompt) for prompt in range(180)]
    rows = [response(p, "constant", "2", gold) for p, gold in enumerate(golds) for _ in range(3)]
    rows += [response(p, "target", "no", gold, own=True) for p, gold in enumerate(golds)]
    found, sources = only(rows)
    constant = sources["constant"]
    assert constant.value == pytest.approx(20 / 180)
    assert constant.dealt == pytest.approx(constant.value, abs=1e-12)
    assert constant.repeats == 1.0
    # It is right more often than the target, and still there is nothing to learn.
    assert constant.difference_interval[0] > 0
    assert constant.verdict == "luck"
    assert found.conclusion == "not worth it"
    assert any("that is luck" in reason for reason in found.reasons)


def test_a_constant_answer_is_luck_with_other_numbers_of_answers_and_without_gold_answers():
    rows = []
    for prompt in range(100):
        right = prompt % 4 == 0
        for _ in range(1 + prompt % 3):
            rows.append(Response(f"p{prompt}", "a", "math", False, right, None, 1, "yes", f"\0p{prompt}"))
    found, sources = only(rows)
    assert sources["a"].value == sources["a"].dealt == pytest.approx(0.25)
    assert found.conclusion == "not enough data"  # nobody knows what the target says
    assert any("no answers of the target" in reason for reason in found.reasons)


def test_guesses_of_the_right_kind_of_number_are_luck_and_do_not_repeat():
    found, sources = only(world(prompts=400, guesser=0.0, target=0.0))
    assert sources["guesser"].value == pytest.approx(1 / 40, abs=0.01)
    assert sources["guesser"].dealt == pytest.approx(1 / 40, abs=0.01)
    assert sources["guesser"].repeats < 0.1
    assert sources["guesser"].verdict == "luck"
    assert found.target.verdict == "luck"
    assert found.conclusion == "not worth it"


def test_a_strong_source_is_worth_it_and_weak_ones_are_named_to_be_left_out():
    found, sources = only(world(strong=0.95, weak=0.1, target=0.5))
    assert (sources["strong"].verdict, sources["weak"].verdict) == ("better", "worse")
    assert [each.name for each in found.sources] == ["strong", "weak"]
    assert found.conclusion == "worth it"
    assert any(reason.startswith("weak is worse than the target on math") for reason in found.reasons)
    assert sources["strong"].repeats > 0.9
    assert found.solved > 0.95


def test_sources_that_are_all_worse_are_not_worth_it_although_they_solve_what_the_target_does_not():
    found, sources = only(world(one=0.1, two=0.1, target=0.6))
    assert found.conclusion == "not worth it"
    assert {each.verdict for each in sources.values()} == {"worse"}
    assert found.only_sources > 0.1
    assert any("one and two are worse than the target on math" in reason for reason in found.reasons)


def test_specialists_are_worth_it_together_where_neither_is_alone():
    """Two sources master different halves of the prompts, the target other 60 %: alone 50, together all."""
    rows, draw = [], random.Random(1)
    for prompt in range(200):
        gold = str(draw.randrange(40))
        for source, masters in {"odd": prompt % 2 == 1, "even": prompt % 2 == 0, "target": prompt % 5 < 3}.items():
            answers = [gold if masters else str(draw.randrange(40)) for _ in range(4)]
            rows += [response(prompt, source, answer, gold, own=source == "target") for answer in answers]
    found, sources = only(rows)
    assert all(each.verdict != "better" for each in sources.values())
    assert found.together.value > 0.9
    assert found.conclusion == "worth it"
    assert any("rule verdict" in reason for reason in found.reasons)


def test_the_best_source_of_a_prompt_is_measured_by_answers_that_did_not_choose_it():
    """Each answer is right by a coin of its own: the source that was luckiest on a prompt is no better there."""
    draw, rows = random.Random(0), []
    for prompt in range(500):
        for source in ("a", "b", "c", "d"):
            answers = [str(prompt) if draw.random() < 0.3 else "no" for _ in range(2)]
            rows += [response(prompt, source, answer, str(prompt)) for answer in answers]
    found, sources = only(rows)
    assert found.solved > 0.9
    assert found.together.value == pytest.approx(0.3, abs=0.05)
    assert sources["a"].repeats == pytest.approx(0.3, abs=0.07)


def test_equal_sources_are_no_better():
    rows = world(prompts=2000, samples=2, source=0.5, seed=3)
    own = [response(int(r.prompt_id[1:]), "target", r.answer, r.gold, own=True) for r in rows]
    found, sources = only([*rows, *own])
    assert sources["source"].verdict == "same"
    assert found.conclusion == "not worth it"
    assert any("no better than the target" in reason for reason in found.reasons)


def test_a_source_that_is_never_right_is_no_better_than_a_target_that_is_never_right():
    rows = [response(p, source, "?", "1", own=source == "target") for p in range(50) for source in ("a", "target")]
    found, sources = only(rows)
    assert sources["a"].verdict == "same"
    assert found.conclusion == "not worth it"


@pytest.mark.parametrize("prompts", [1, 2, FEWEST_PROMPTS - 1])
def test_few_prompts_are_not_enough(prompts):
    rows = [response(p, source, "1", "1" if source == "a" else "2") for p in range(prompts) for source in ("a", "b")]
    rows += [response(p, "target", "0", "1", own=True) for p in range(prompts)]
    found, sources = only(rows)
    assert found.conclusion == "not enough data"
    assert any(f"fewer than {FEWEST_PROMPTS} prompts" in reason for reason in found.reasons)


def test_many_answers_to_few_prompts_are_no_evidence():
    wide, _ = only(world(prompts=35, samples=40, a=0.6, target=0.5))
    assert wide.conclusion == "not enough data"
    low, high = wide.sources[0].interval
    assert high - low > 0.3


def test_rewards_decide_where_there_are_no_verdicts():
    draw, rows = random.Random(0), []
    for prompt in range(150):
        ease = draw.gauss(0, 3)
        for source, skill in {"good": 1.0, "bad": -1.0, "target": 0.0}.items():
            for _ in range(2):
                reward = ease + skill + draw.gauss(0, 1)
                rows.append(
                    response(
                        prompt, source, "x", "y", own=source == "target", reward=reward, domain="chat", judged=False
                    )
                )
    found, sources = only(rows)
    assert found.measure == "reward"
    assert (sources["good"].verdict, sources["bad"].verdict) == ("better", "worse")
    # The prompts' own differences, which are three times as large, do not widen the interval: it is paired.
    low, high = sources["good"].difference_interval
    assert 0.7 < low < 1.0 < high < 1.3
    assert math.isnan(found.solved)
    assert math.isnan(sources["good"].dealt)
    assert sources["good"].gap == pytest.approx(1.0, abs=0.25)


def test_each_domain_has_its_own_verdict_and_a_few_verdicts_do_not_replace_rewards():
    maths = world(strong=0.9, target=0.2)
    chat = [
        response(p, s, "x", "x" if s == "strong" else "y", own=s == "target", reward=0.5, domain="chat", judged=p < 5)
        for p in range(60)
        for s in ("strong", "target")
    ]
    found = examine_worth([*chat, *maths])
    assert [(each.domain, each.measure) for each in found] == [("chat", "reward"), ("math", "verdict")]
    assert [each.conclusion for each in found] == ["not worth it", "worth it"]


def test_answers_without_a_verdict_do_not_count():
    rows = world(strong=0.9, target=0.2)
    failed = [response(p, "strong", "?", "1", judged=False) for p in range(200)]
    assert only(rows)[1]["strong"].value == only([*rows, *failed])[1]["strong"].value
    assert only([*rows, *failed])[1]["strong"].responses == 1000


def test_what_a_scorer_compared_is_what_is_dealt():
    row = {"prompt_id": "p", "source": "a", "prompt": "?", "response": "So it is \\boxed{2}.", "correct": True}
    scores = {"reward": {"reward": 0.1}, "math": {"correct": True, "answer": "2", "gold": "2.0"}}
    for written in (scores, json.dumps(scores)):
        found = response_of(as_candidate(row | {"scores": written}, 0))
        assert (found.answer, found.gold, found.correct) == ("2", "2.0", True)
    plain = response_of(as_candidate(row | {"reference": "2", "scores": "no json"}, 0))
    assert (plain.answer, plain.gold) == ("So it is \\boxed{2}.", "2")
    assert response_of(replace(as_candidate(row, 0), reward=math.nan)).reward is None
    assert response_of(as_candidate(row, 0), "a").own


def test_an_answer_that_was_judged_right_once_is_right_wherever_that_gold_answer_is():
    """ "1/2" is right for 0.5 because the verifier said so; no rule of spelling is needed."""
    rows = []
    for p in range(60):
        gold = "0.5" if p % 2 else str(p)
        rows.append(Response(f"p{p}", "a", "math", False, p % 2 == 1, None, 3, "1/2", gold))
    assert only(rows)[1]["a"].dealt == pytest.approx(0.5)


def test_two_targets_are_refused():
    rows = [response(0, "a", "1", "1", own=True), response(0, "b", "1", "1", own=True)]
    with pytest.raises(DataError, match="own answers of one source, got those of a, b"):
        examine_worth(rows)
