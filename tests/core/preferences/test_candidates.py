"""Candidates: rows that become them, what cleaning leaves out, and the order of ties."""

import math
import random
from dataclasses import replace

import pytest

from fusion_plugins.core.preferences.best import best_of
from fusion_plugins.core.preferences.candidates import Candidate, Evidence, as_candidate, clean, is_verified, tie_order
from fusion_plugins.core.preferences.pairs import build_pairs
from fusion_plugins.errors import DataError

ROW = {"prompt_id": "p", "source": "a", "prompt": "Why?", "response": "So."}


def one(source, index, reward=None, correct=None, *, prompt_id="p", response=None, domain="instruction"):
    text = f"{source} {index}" if response is None else response
    return Candidate(prompt_id, source, index, "Question?", text, reward, correct, domain)


def key(candidate):
    return candidate.source, candidate.index


# Rows


def test_candidates_may_be_rows():
    shared = {"prompt_id": "p", "source": "a", "prompt": "Why?", "seed": 1}
    rows = [shared | {"index": i, "response": f"r{i}", "reward": reward} for i, reward in enumerate((0.5, 0.45))]
    [pair] = build_pairs(rows, rule="same_source")
    assert (pair.chosen.response, pair.rejected.response, pair.chosen.extra) == ("r0", "r1", {"seed": 1})
    with pytest.raises(DataError, match="expected a value for prompt_id, got none.*has the keys source"):
        build_pairs([{"source": "a"}])


@pytest.mark.parametrize("nothing", [{}, dict.fromkeys(("index", "reward", "correct", "domain", "dataset"))])
def test_missing_and_null_optional_values_take_the_defaults(nothing):
    assert as_candidate(ROW | nothing, 0) == Candidate("p", "a", 0, "Why?", "So.", None, None, "instruction", {})


def test_values_get_the_types_of_a_candidate():
    row = {"prompt_id": 7, "source": "a", "prompt": "Why?", "response": "So.", "index": 2.0, "domain": ""}
    assert as_candidate(row | {"reward": 1, "correct": True}, 0) == Candidate("7", "a", 2, "Why?", "So.", 1, True)


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(1, True), (0, False), (1.0, True), (0.0, False), ("true", True), ("False", False), (float("nan"), None)],
)
def test_a_verdict_is_read_in_any_of_the_usual_forms(value, verdict):
    assert as_candidate(ROW | {"correct": value}, 0).correct is verdict
    assert clean([one("a", 0, correct=value)]).by_prompt["p"][0].correct is verdict


def test_keys_of_messages_that_hold_null_are_left_out():
    messages = [{"role": "user", "content": "Why?", "name": None}]
    assert as_candidate(ROW | {"prompt": messages}, 0).prompt == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": None}, r"row 3 \(prompt 'p', source 'a'\): expected a value for response, got none"),
        ({"prompt_id": None}, r"row 3 \(prompt None, source 'a'\): expected a value for prompt_id"),
        ({"response": ["So."]}, r"expected text as response, got \['So.'\]"),
        ({"prompt": ["Why?"]}, "expected text or a list of messages as prompt"),
        ({"index": "first"}, "expected an integer as index, got 'first'"),
        ({"reward": "high"}, "expected a finite number as reward, got 'high'"),
        ({"reward": "1"}, "expected a finite number as reward, got '1'"),
        ({"reward": math.nan}, "expected a finite number as reward, got nan"),
        ({"reward": -math.inf}, "expected a finite number as reward, got -inf"),
        ({"reward": 10**400}, "expected a finite number as reward, got 1000"),
        ({"correct": 0.5}, "expected true or false, 1 or 0 as correct, got 0.5"),
        ({"correct": "right"}, "expected true or false, 1 or 0 as correct, got 'right'"),
        ({"reward": "high", "domain": 3}, "a finite number as reward, got 'high'; expected text as domain, got 3"),
    ],
)
def test_a_wrong_row_is_refused_by_name(change, message):
    with pytest.raises(DataError, match=message):
        as_candidate(ROW | change, 3)


def test_the_number_of_a_wrong_row_is_its_place_among_all():
    with pytest.raises(DataError, match="row 2 "):
        clean([ROW, one("a", 0), {"source": "a"}])


# Cleaning


def test_groups_and_their_candidates_have_an_order_of_their_own():
    candidates = [
        one(source, index, prompt_id=f"p{prompt}") for prompt in range(3) for source in "ab" for index in (0, 1)
    ]
    groups = clean(random.Random(1).sample(candidates, len(candidates)))
    assert list(groups.by_prompt) == ["p0", "p1", "p2"]
    assert [key(candidate) for candidate in groups.by_prompt["p1"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert groups.dropped == {}


def test_unusable_responses_are_counted_and_a_prompt_without_any_other_stays():
    groups = clean([one("a", 0, response=" "), one("a", 1, float("inf")), one("b", 0, prompt_id="q")])
    assert groups.by_prompt == {"p": [], "q": [one("b", 0, prompt_id="q")]}
    assert groups.dropped == {"empty_response": 1, "reward_not_finite": 1}


def test_equal_texts_of_two_sources_both_stay():
    groups = clean([one("a", 0, response="x"), one("b", 0, response="x"), one("b", 1, response="x\n")])
    assert [key(candidate) for candidate in groups.by_prompt["p"]] == [("a", 0), ("b", 0)]
    assert groups.dropped == {"duplicate_response": 1}


def test_of_repeated_responses_the_one_with_verdict_and_reward_stays():
    candidates = [
        one("a", 0, None, None, response="42", domain="math"),
        one("a", 1, 0.5, True, response="42", domain="math"),
    ]
    assert key(best_of(candidates)["p"]) == ("a", 1)


def test_one_prompt_id_with_two_prompts_or_domains_is_refused():
    with pytest.raises(DataError, match="different prompt text.*joined to the wrong prompt"):
        build_pairs([one("a", 0, 0.1), replace(one("a", 1, 0.2), prompt="Another?")])
    with pytest.raises(DataError, match="different prompt domain"):
        best_of([one("a", 0, 0.1), one("b", 0, 0.2, domain="math")])


# Verdicts and ties


def test_a_prompt_is_verified_by_its_domain_or_by_any_verdict():
    assert is_verified([one("a", 0, domain="math")])
    assert is_verified([one("a", 0), one("a", 1, correct=False)])
    assert not is_verified([one("a", 0, 0.5), one("a", 1)])


def test_the_order_of_ties_is_fixed_and_takes_any_text():
    # Another order would change the pairs of a run that is repeated after an update.
    assert tie_order(one("a", 0)).hex() == "2e1cf1a1f4cd68c0670aae157577688b"
    assert tie_order(one("a", 0)) != tie_order(one("a", 1))
    assert tie_order(one("a", 0, response="\ud800"))


# Evidence


def test_evidence_counts_every_response_before_any_is_left_out():
    solver = [one("a", index, correct=True, response="five") for index in range(3)] + [one("a", 3)]
    other = [one("b", 0, correct=True), one("b", 1, correct=False, response=" "), one("b", 2, correct=False)]
    elsewhere = [one("b", 0, correct=False, prompt_id="q")]
    groups = clean([*solver, *other, *elsewhere])
    first = groups.by_prompt["p"][0].evidence
    assert first == Evidence(repeats=3, right=3, judged=3, accuracy=1.0, always_solved=True)
    # An empty answer is no candidate, but it is an attempt that failed.
    assert groups.by_prompt["p"][2].evidence == Evidence(1, right=1, judged=3, accuracy=0.25, always_solved=True)
    assert not groups.by_prompt["q"][0].evidence.always_solved


@pytest.mark.parametrize("reason", ["length", "max_output_tokens", "abort", "Timeout"])
def test_truncated_responses_are_left_out_but_their_verdicts_count(reason):
    rows = [replace(one("a", index, correct=index > 0), extra={"finish_reason": reason}) for index in (0, 1)]
    groups = clean([*rows, one("a", 2, correct=True)], keep_truncated=False)
    assert [key(candidate) for candidate in groups.by_prompt["p"]] == [("a", 2)]
    assert groups.dropped == {"truncated": 2}
    assert groups.by_prompt["p"][0].evidence.chance == pytest.approx(3 / 5)
    assert len(clean(rows).by_prompt["p"]) == 2


def test_cleaning_twice_counts_the_same():
    once = clean([one("a", index, correct=True, response="five") for index in range(4)])
    again = clean(once.by_prompt["p"])
    assert again.by_prompt["p"][0].evidence == once.by_prompt["p"][0].evidence


@pytest.mark.parametrize(("steady", "lucky"), [((8, 10), (1, 1)), ((4, 5), (1, 1)), ((3, 4), (1, 1)), ((4, 4), (2, 2))])
def test_a_single_right_answer_is_little_evidence_also_where_sources_answer_unequally_often(steady, lucky):
    candidates = []
    for source, (right, total) in (("steady", steady), ("lucky", lucky)):
        for index in range(total):
            correct = index < right
            text = f"{source} says {5 if correct else index}"
            candidates.append(Candidate("p", source, index, "?", text, correct=correct, domain="math"))
    assert best_of(candidates, "verdict")["p"].source == "steady"
    solved = any(candidate.evidence.always_solved for candidate in clean(candidates).by_prompt["p"])
    assert solved is (steady == (4, 4))
