"""Pairs and best answers: cases worked by hand, a brute-force reference, and what always holds."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_plugins.core.preferences.best import BEST_RULES, best_of, best_per_source, best_with_report
from fusion_plugins.core.preferences.candidates import Candidate, Pair, tie_order
from fusion_plugins.core.preferences.gaps import GapWindow
from fusion_plugins.core.preferences.pairs import PAIR_RULES, build_pairs, length_statistics, pairs_with_report
from fusion_plugins.errors import ConfigError

ANY_GAP = GapWindow(None, None)


def one(source, index, reward=None, correct=None, *, prompt_id="p", response=None, domain="instruction", **extra):
    text = f"{source} {index}" if response is None else response
    return Candidate(prompt_id, source, index, "Question?", text, reward, correct, domain, extra)


def key(candidate):
    return candidate.source, candidate.index


def keys(pairs):
    return [(key(pair.chosen), key(pair.rejected)) for pair in pairs]


# The published rule


def test_instruction_pair_is_highest_against_lowest_of_one_source():
    candidates = [one("a", 0, 0.12), one("a", 1, 0.17), one("a", 2, 0.10), one("b", 0, 0.05), one("b", 1, 0.11)]
    (pair,) = build_pairs(candidates)
    assert keys([pair]) == [(("a", 1), ("a", 2))]
    assert pair.gap == pytest.approx(0.07)


def test_among_qualifying_sources_the_one_with_the_highest_chosen_reward_wins():
    # c has the best answer of all, but its gap of 0.3 is outside the window.
    candidates = [one("a", 0, 0.10), one("a", 1, 0.05), one("b", 0, 0.15), one("b", 1, 0.12), one("c", 0, 0.4)]
    candidates.append(one("c", 1, 0.1))
    assert keys(build_pairs(candidates)) == [(("b", 0), ("b", 1))]


@pytest.mark.parametrize(("gap", "kept"), [(0.0099, 0), (0.01, 1), (0.05, 1), (0.1, 1), (0.1001, 0)])
def test_both_limits_of_the_gap_are_inclusive(gap, kept):
    # 0.4 - 0.3 is a little more than 0.1 in binary: the limit must hold all the same.
    for low in (0.0, 0.3, 0.7, 1.1):
        pairs = build_pairs([one("a", 0, low), one("a", 1, low + gap)])
        assert len(pairs) == kept, (low, gap)


def test_math_pair_is_correct_against_incorrect_even_if_another_answer_scores_higher():
    candidates = [
        one("a", 0, 0.30, False, domain="math"),
        one("a", 1, 0.25, True, domain="math"),
        one("a", 2, 0.20, False, domain="math"),
        one("a", 3, 0.21, True, domain="math"),
    ]
    assert keys(build_pairs(candidates)) == [(("a", 1), ("a", 2))]


def test_math_pair_with_a_negative_gap_is_dropped_and_code_is_exempt_from_the_window():
    def candidates(domain):
        return [one("a", 0, 0.1, True, domain=domain), one("a", 1, 0.3, False, domain=domain)]

    pairs, report = pairs_with_report(candidates("math"))
    assert pairs == []
    assert report.dropped_prompts == {"gap_too_small": 1}
    assert keys(build_pairs(candidates("code"))) == [(("a", 0), ("a", 1))]
    assert build_pairs(candidates("code"), window=GapWindow(exempt=frozenset())) == []


def test_correct_and_incorrect_must_come_from_the_same_source_unless_the_rule_says_otherwise():
    candidates = [one("a", 0, 0.20, True, domain="math"), one("b", 0, 0.15, False, domain="math")]
    pairs, report = pairs_with_report(candidates)
    assert pairs == []
    assert report.dropped_prompts == {"rule_found_none": 1}
    assert keys(build_pairs(candidates, "across_sources")) == [(("a", 0), ("b", 0))]


def test_across_sources_takes_the_extremes_of_all():
    candidates = [one("a", 0, 0.12), one("a", 1, 0.17), one("b", 0, 0.09), one("b", 1, 0.11)]
    assert keys(build_pairs(candidates, "across_sources")) == [(("a", 1), ("b", 0))]


def test_an_answer_whose_verifier_failed_is_neither_chosen_nor_rejected():
    candidates = [
        one("a", 0, 0.20, None, domain="math"),
        one("a", 1, 0.15, True, domain="math"),
        one("a", 2, 0.10, False, domain="math"),
        one("a", 3, 0.05, None, domain="math"),
    ]
    assert keys(build_pairs(candidates)) == [(("a", 1), ("a", 2))]
    unknown = [replace(candidate, correct=None) for candidate in candidates]
    pairs, report = pairs_with_report(unknown)
    assert pairs == []
    assert report.dropped_prompts == {"no_verdict": 1}


def test_a_verdict_counts_in_any_domain():
    candidates = [one("a", 0, 0.20, False, domain="physics"), one("a", 1, 0.15, True, domain="physics")]
    assert build_pairs(candidates) == []
    assert keys(build_pairs(candidates, window=ANY_GAP)) == [(("a", 1), ("a", 0))]


def test_verdict_rule_needs_no_rewards_and_ignores_them():
    bare = [one(source, i, None, i % 2 == 0, domain="math") for source in "ab" for i in range(4)]
    (pair,) = build_pairs(bare, "verdict")
    assert pair.chosen.correct is True
    assert pair.rejected.correct is False
    assert pair.chosen.source == pair.rejected.source
    assert pair.gap is None
    rewarded = [replace(candidate, reward=float(candidate.index)) for candidate in bare]
    assert keys(build_pairs(rewarded, "verdict")) == keys([pair])


def test_verdict_rule_favours_no_source():
    candidates = [
        one(source, i, None, i == 0, prompt_id=f"p{n}", domain="math")
        for n in range(300)
        for source in "abc"
        for i in (0, 1)
    ]
    sources = [pair.chosen.source for pair in build_pairs(candidates, "verdict")]
    assert len(sources) == 300
    assert all(70 <= sources.count(source) <= 130 for source in "abc")


def attempts(source, right, wrong, *, prompt_id="p", same=False):
    """Right answers, of one text or of several, then wrong ones."""
    answers = [one(source, i, None, True, prompt_id=prompt_id, domain="math") for i in range(right)]
    answers = [replace(answer, response=f"{source} 5") if same else answer for answer in answers]
    return answers + [one(source, right + i, None, False, prompt_id=prompt_id, domain="math") for i in range(wrong)]


def chosen_sources(candidates):
    """The sources that the two rules `verdict` choose."""
    (pair,) = build_pairs(candidates, "verdict")
    return best_of(candidates, "verdict")["p"].source, pair.chosen.source


@pytest.mark.parametrize("same", [True, False])
def test_by_verdict_the_source_that_is_right_most_often_is_chosen(same):
    """Four right answers of one text are no less evidence than four different ones."""
    candidates = attempts("lucky", 1, 3) + attempts("strong", 3, 1, same=same) + attempts("fair", 2, 2)
    assert chosen_sources(candidates) == ("strong", "strong")
    # In share, not in number: 5 of 8 are less than 3 of 4.
    assert chosen_sources(candidates + attempts("eager", 5, 3)) == ("strong", "strong")


def test_a_source_that_is_always_right_is_chosen_for_every_prompt():
    candidates = [
        answer
        for n in range(200)
        for source, right in (("strong", 4), ("weak1", 1), ("weak2", 1))
        for answer in attempts(source, right, 4 - right, prompt_id=f"p{n}", same=True)
    ]
    assert {candidate.source for candidate in best_of(candidates, "verdict").values()} == {"strong"}


def test_more_right_answers_go_first_among_equal_shares_then_accuracy_over_all_prompts():
    assert best_of(attempts("once", 1, 0) + attempts("often", 4, 0), "verdict")["p"].source == "often"
    equal = attempts("a", 2, 2) + attempts("b", 2, 2)
    for better, worse in ("ab", "ba"):
        elsewhere = attempts(better, 3, 0, prompt_id="q") + attempts(worse, 0, 3, prompt_id="q")
        assert best_of(equal + elsewhere, "verdict")["p"].source == better
        pairs = build_pairs(equal + elsewhere, "verdict")
        assert [pair.chosen.source for pair in pairs] == [better]


def test_responses_without_a_verdict_are_no_evidence():
    candidates = attempts("checked", 3, 1) + attempts("mostly_not", 1, 1)
    candidates += [one("mostly_not", 9 + i, None, None, domain="math") for i in range(4)]
    assert chosen_sources(candidates) == ("checked", "checked")


def test_of_the_chosen_source_the_answer_that_it_gave_most_often_is_taken():
    rare, often = attempts("a", 1, 1), attempts("a", 3, 0, same=True)
    candidates = rare + [replace(answer, index=answer.index + 5) for answer in often]
    assert best_of(candidates, "verdict")["p"].response == "a 5"
    assert build_pairs(candidates, "verdict")[0].chosen.response == "a 5"


def test_evidence_changes_nothing_where_rewards_decide():
    candidates = [replace(answer, reward=0.1) for answer in attempts("strong", 4, 0, same=True)]
    candidates += [one("lucky", 0, 0.2, True, domain="math"), one("lucky", 1, 0.15, False, domain="math")]
    assert best_of(candidates)["p"].source == "lucky"
    assert build_pairs(candidates)[0].chosen.source == "lucky"


@pytest.mark.parametrize(
    ("window", "domain", "rule", "limits"),
    [
        (None, "math", "same_source", (0.01, 0.1)),
        (None, "math", "verdict", None),
        (None, "code", "same_source", None),
        (ANY_GAP, "math", "same_source", None),
        (GapWindow(None, 0.2), "math", "same_source", (None, 0.2)),
    ],
)
def test_limits_are_reported_only_where_they_decided(window, domain, rule, limits):
    candidates = [one("a", 0, 0.2, True, domain=domain), one("a", 1, 0.15, False, domain=domain)]
    assert pairs_with_report(candidates, rule, window=window)[1].limits == limits


def test_equal_rewards_are_ordered_by_the_hash():
    candidates = [one("a", i, 0.5) for i in range(3)] + [one("a", i, 0.45) for i in range(3, 6)]
    (pair,) = build_pairs(candidates)
    assert pair.chosen == min(candidates[:3], key=tie_order)
    assert pair.rejected == min(candidates[3:], key=tie_order)


def test_per_prompt_takes_more_pairs_in_order_of_the_chosen_reward():
    candidates = [
        one(source, i, top - 0.05 * i) for source, top in (("a", 0.2), ("b", 0.4), ("c", 0.3)) for i in (0, 1)
    ]
    pairs, report = pairs_with_report(candidates, per_prompt=2)
    assert [pair.chosen.source for pair in pairs] == ["b", "c"]
    assert report.dropped_pairs == {"beyond_per_prompt": 1}
    with pytest.raises(ConfigError, match="at least 1"):
        build_pairs(candidates, per_prompt=0)


# Quantiles, functions as rules, wrong settings


def test_quantile_window_does_not_depend_on_the_scale_of_the_rewards():
    draw = random.Random(3)
    candidates = [one("a", i, draw.random(), prompt_id=f"p{n:03d}") for n in range(200) for i in range(4)]
    window = GapWindow(0.2, 0.8, unit="quantile")
    pairs, report = pairs_with_report(candidates, window=window)
    stretched = [replace(candidate, reward=-7 + 1000 * candidate.reward) for candidate in candidates]
    assert keys(build_pairs(stretched, window=window)) == keys(pairs)
    assert 118 <= len(pairs) <= 122
    low, high = report.limits
    assert all(low - 1e-6 <= pair.gap <= high + 1e-6 for pair in pairs)


def test_a_function_serves_as_a_rule_and_receives_the_options():
    def first_two(candidates, *, reverse):
        ordered = sorted(candidates, key=key, reverse=reverse)
        return [Pair(ordered[0], ordered[1], None)]

    candidates = [one("a", 0), one("a", 1), one("b", 0)]
    assert keys(build_pairs(candidates, first_two, options={"reverse": True})) == [(("b", 0), ("a", 1))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimum": 0.2, "maximum": 0.1}, "minimum <= maximum"),
        ({"minimum": float("nan")}, "finite"),
        ({"minimum": 0.2, "maximum": 2.0, "unit": "quantile"}, r"\[0, 1\]"),
        ({"unit": "sigma"}, "'reward' or 'quantile'"),
    ],
)
def test_wrong_gap_windows_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GapWindow(**settings)


def test_unknown_rules_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="across_sources, own_answers, same_source, verdict"):
        build_pairs([], "same")
    with pytest.raises(ConfigError, match="reward, verdict"):
        best_of([], "same")


# Cleaning and reporting


def test_every_dropped_response_and_prompt_is_counted():
    candidates = [
        one("a", 0, 0.20, response="same"),
        one("a", 1, 0.20, response="same "),
        one("a", 2, 0.10, response="  "),
        one("a", 3, float("nan")),
        one("b", 0, 0.1, prompt_id="alone"),
        one("b", 0, prompt_id="unscored"),
        one("b", 1, prompt_id="unscored"),
        one("b", 0, 0.3, prompt_id="far"),
        one("b", 1, 0.1, prompt_id="far"),
        one("c", 0, 0.3, prompt_id="both"),
        one("c", 1, 0.1, prompt_id="both"),
        one("d", 0, 0.3, prompt_id="both"),
        one("d", 1, 0.299, prompt_id="both"),
        one("c", 0, 0.3, True, prompt_id="wrong", domain="code"),
        one("c", 1, 0.2, True, prompt_id="wrong", domain="code"),
        one("c", 0, 0.3, False, prompt_id="right", domain="code"),
        one("c", 1, 0.2, False, prompt_id="right", domain="code"),
        one("e", 0, 0.3, prompt_id="good"),
        one("e", 1, 0.25, prompt_id="good"),
    ]
    pairs, report = pairs_with_report(candidates)
    assert [pair.chosen.prompt_id for pair in pairs] == ["good"]
    assert report.prompts == 8
    assert report.kept == 1
    assert report.dropped_responses == {"duplicate_response": 1, "empty_response": 1, "reward_not_finite": 1}
    assert report.dropped_prompts == {
        "fewer_than_two_responses": 2,
        "no_reward": 1,
        "gap_too_large": 1,
        "no_gap_in_window": 1,
        "none_incorrect": 1,
        "none_correct": 1,
    }
    assert report.dropped_pairs == {"gap_too_large": 2, "gap_too_small": 1}
    assert sum(report.dropped_prompts.values()) == report.prompts - report.kept


def test_the_same_text_from_two_sources_never_appears_on_both_sides():
    candidates = [one("a", 0, 0.20, response="x"), one("b", 0, 0.15, response="x")]
    pairs, report = pairs_with_report(candidates, "across_sources")
    assert pairs == []
    assert report.dropped_prompts == {"same_response": 1}


def test_lengths_are_reported_per_domain_source_and_side():
    pairs = [
        Pair(one("a", 0, response="xxxx"), one("a", 1, response="x"), None),
        Pair(one("a", 2, response="xx"), one("b", 1, response="xxx"), None),
    ]
    found = length_statistics(pairs)
    assert found["instruction", "a", "chosen"].mean == 3
    assert found["instruction", "a", "chosen"].count == 2
    assert found["instruction", "b", "rejected"].median == 3
    assert length_statistics([]) == {}


# The best answer


def test_best_is_the_highest_reward_over_all_sources_and_must_be_correct_where_verified():
    candidates = [one("a", 0, 0.1), one("b", 0, 0.3), one("b", 1, 0.2)]
    assert key(best_of(candidates)["p"]) == ("b", 0)
    verified = [one("a", 0, 0.1, True, domain="math"), one("b", 0, 0.3, False, domain="math")]
    verified += [one("b", 1, 0.2, True, domain="math"), one("b", 2, 0.9, None, domain="math")]
    assert key(best_of(verified)["p"]) == ("b", 1)


def test_best_is_none_and_reported_where_nothing_qualifies():
    candidates = [
        one("a", 0, 0.1, False, prompt_id="wrong", domain="math"),
        one("a", 0, 0.1, None, prompt_id="failed", domain="math"),
        one("a", 0, prompt_id="unscored"),
        one("a", 1, prompt_id="unscored"),
        one("a", 0, 0.5, response="", prompt_id="empty"),
        one("q", 0, prompt_id="zh", domain="chinese"),
    ]
    best, report = best_with_report(candidates)
    assert {prompt_id: candidate and key(candidate) for prompt_id, candidate in best.items()} == {
        "wrong": None,
        "failed": None,
        "unscored": None,
        "empty": None,
        "zh": ("q", 0),
    }
    assert report.dropped_prompts == {"none_correct": 1, "no_verdict": 1, "no_reward": 1, "no_usable_response": 1}
    assert report.kept == 1


def test_best_by_verdict_takes_any_correct_answer_and_refuses_to_choose_without_verdicts():
    verified = [one("a", i, None, i > 0, domain="math") for i in range(3)]
    assert best_of(verified, "verdict")["p"].correct is True
    assert best_of([one("a", 0), one("a", 1)], "verdict") == {"p": None}
    assert best_of([one("a", 0)], "verdict")["p"] == one("a", 0)


# What always holds

#: a busy machine is no counterexample
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SCORES = st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.11, 0.5]))


@st.composite
def scored(draw):
    domain = draw(st.sampled_from(["instruction", "math", "code"]))
    rows = draw(st.lists(st.tuples(st.sampled_from("abc"), SCORES, st.sampled_from([None, True, False])), max_size=10))
    verdicts = domain != "instruction"
    return [
        one(s, i, r, c if verdicts else None, domain=domain, response=f"{i % 7}") for i, (s, r, c) in enumerate(rows)
    ]


def plain_same_source(candidates, low=0.01, high=0.1):
    """All ordered pairs of one source, the published conditions written out; None or (chosen reward, gap)."""
    seen, unique = set(), []
    for c in sorted(candidates, key=lambda c: (c.correct is None, c.reward is None, c.index)):
        if (c.source, c.response) not in seen:
            seen.add((c.source, c.response))
            unique.append(c)
    found = []
    for source in "abc":
        mine = [c for c in unique if c.source == source and c.reward is not None]
        domain = mine[0].domain if mine else "instruction"
        good = [c.reward for c in mine if domain == "instruction" or c.correct is True]
        bad = [c.reward for c in mine if domain == "instruction" or c.correct is False]
        if not good or not bad:
            continue
        gap = max(good) - min(bad)
        if domain == "code" or low - 1e-6 <= gap <= high + 1e-6:
            found.append((max(good), gap))
    return max(found) if found else None


@UNHURRIED
@given(scored())
def test_same_source_agrees_with_the_conditions_written_out(candidates):
    expected = plain_same_source(candidates)
    pairs = build_pairs(candidates)
    if expected is None:
        assert pairs == []
    else:
        assert pairs[0].chosen.reward == expected[0]


@UNHURRIED
@given(scored(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(candidates, draw):
    shuffled = draw.sample(candidates, len(candidates))
    for rule in PAIR_RULES:
        assert pairs_with_report(shuffled, rule, window=ANY_GAP) == pairs_with_report(candidates, rule, window=ANY_GAP)
    for rule in BEST_RULES:
        assert best_with_report(shuffled, rule) == best_with_report(candidates, rule)


@UNHURRIED
@given(scored(), st.sampled_from(sorted(PAIR_RULES)))
def test_pairs_are_valid_and_every_prompt_is_counted(candidates, rule):
    pairs, report = pairs_with_report(candidates, rule)
    assert report.kept + sum(report.dropped_prompts.values()) == report.prompts
    for pair in pairs:
        assert pair.chosen.response != pair.rejected.response
        assert rule == "across_sources" or pair.chosen.source == pair.rejected.source
        if pair.chosen.domain != "instruction":
            assert (pair.chosen.correct, pair.rejected.correct) == (True, False)
        elif pair.gap is not None:
            assert 0.01 - 1e-6 <= pair.gap <= 0.1 + 1e-6


# Own answers, pairs of every source, and sources that are seldom right


def test_own_answers_are_the_targets_best_against_its_worst():
    candidates = [
        one("a", 0, 5.0),
        one("a", 1, -5.0),
        *(one("sft", n, reward) for n, reward in enumerate((0.2, 0.9, 0.1))),
    ]
    options = {"own_source": "sft"}
    assert keys(build_pairs(candidates, "own_answers", window=ANY_GAP, options=options)) == [(("sft", 1), ("sft", 2))]
    marked = [replace(each, extra={"is_target": True}) if each.source == "sft" else each for each in candidates]
    assert keys(build_pairs(marked, "own_answers", window=ANY_GAP)) == [(("sft", 1), ("sft", 2))]
    assert build_pairs(candidates, "own_answers", window=ANY_GAP) == []


def test_own_answers_that_are_verified_need_a_right_and_a_wrong_one():
    own = [one("sft", 0, 0.9, False), one("sft", 1, 0.1, True), one("sft", 2, 0.5, False)]
    options = {"own_source": "sft"}
    assert keys(build_pairs(own, "own_answers", window=ANY_GAP, options=options)) == [(("sft", 1), ("sft", 2))]
    assert build_pairs(own[:1] + own[2:], "own_answers", window=ANY_GAP, options=options) == []
    # Verdicts alone: the right answer that was given most often.
    judged = [
        one("sft", n, None, right, response=text)
        for n, (right, text) in enumerate([(True, "five"), (True, "5"), (True, "5"), (False, "6")])
    ]
    (pair,) = build_pairs(judged, "own_answers", options=options)
    assert (pair.chosen.response, pair.rejected.response, pair.gap) == ("5", "6", None)


def test_every_source_gives_a_pair_where_all_are_asked_for():
    candidates = [
        one(source, n, top - 0.05 * n) for source, top in (("a", 0.3), ("b", 0.5), ("c", 0.4)) for n in (0, 1)
    ]
    pairs, report = pairs_with_report(candidates, per_prompt=None)
    assert keys(pairs) == [((s, 0), (s, 1)) for s in "bca"]
    assert report.dropped_pairs == {}
    with pytest.raises(ConfigError, match="at least 1 pair"):
        pairs_with_report(candidates, per_prompt=0)


def seldom_right():
    """ "good" solves 3 of 4 prompts, "lucky" 1 of 4; on prompt p3 only "lucky" has a pair."""
    rows = []
    for number in range(4):
        prompt = f"p{number}"
        for source, right in (("good", number < 3), ("lucky", number == 3)):
            rows += [one(source, n, None, right and n == 0, prompt_id=prompt, domain="math") for n in (0, 1)]
    return rows


@pytest.mark.parametrize(("least", "prompts"), [(0.0, 4), (0.125, 4), (0.126, 3), (0.375, 3), (0.376, 0), (1.0, 0)])
def test_a_source_that_is_seldom_right_gives_no_pair(least, prompts):
    """ "lucky" is right in 1 of 8 responses, "good" in 3 of 8."""
    pairs, report = pairs_with_report(seldom_right(), "verdict", min_accuracy=least)
    assert len(pairs) == report.kept == prompts
    assert report.dropped_prompts.get("source_accuracy_too_low", 0) == 4 - prompts
    with pytest.raises(ConfigError, match=r"share in \[0, 1\]"):
        pairs_with_report(seldom_right(), "verdict", min_accuracy=least + 2)


def test_accuracy_says_nothing_about_pairs_without_verdicts():
    candidates = [one("a", 0, 0.15), one("a", 1, 0.1), *seldom_right()]
    candidates = [
        replace(each, prompt_id="unverified") if each.domain == "instruction" else each for each in candidates
    ]
    pairs, _ = pairs_with_report(candidates, min_accuracy=1.0)
    assert [pair.chosen.prompt_id for pair in pairs] == ["unverified"]


def test_the_best_of_each_source_is_what_the_rule_takes_of_it_alone():
    candidates = [one("a", 0, 0.1), one("a", 1, 0.3), one("b", 0, 0.2), one("c", 0), one("d", 0, 0.4), one("d", 1, 0.4)]
    found = best_per_source(candidates)
    assert [key(each) for each in found[:2]] == [("a", 1), ("b", 0)]
    assert [each.source for each in found] == ["a", "b", "d"]
    verified = [one("a", 0, 0.9, False), one("a", 1, 0.1, True), one("b", 0, 0.5, False), one("c", 0, 0.3, None)]
    assert [key(each) for each in best_per_source(verified)] == [("a", 1)]
    judged = [one(source, n, None, n == 1) for source in "ab" for n in (0, 1)]
    assert [key(each) for each in best_per_source(judged, BEST_RULES["verdict"])] == [("a", 1), ("b", 1)]
    assert best_per_source([one("a", 0), one("b", 0)]) == []
    assert [key(each) for each in best_per_source([one("a", 0, domain="chinese")])] == [("a", 0)]
