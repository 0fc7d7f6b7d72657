"""The split: published counts, and what goes to which stage."""

import pytest

from fusion_plugins.core.preferences.best import best_of
from fusion_plugins.core.preferences.candidates import Candidate, Pair
from fusion_plugins.core.preferences.pairs import build_pairs
from fusion_plugins.core.preferences.split import SplitRule, split_prompts
from fusion_plugins.errors import ConfigError


def one(source, index, reward=None, correct=None, *, prompt_id="p", domain="instruction", **extra):
    return Candidate(prompt_id, source, index, "Question?", f"{source} {index}", reward, correct, domain, extra)


def instruction_prompts(count, dataset="set"):
    return [
        one("a", i, 0.2 - 0.05 * i, prompt_id=f"{dataset}-{n}", dataset=dataset) for n in range(count) for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("prompts", "sft", "dpo"), [(51_098, 20_439, 30_659), (20_374, 8_149, 12_225), (9_435, 3_774, 5_661)]
)
def test_published_counts_of_the_instruction_sets_come_out(prompts, sft, dpo):
    best = {f"{n}": one("a", 0, 0.5, prompt_id=f"{n}") for n in range(prompts)}
    pairs = [Pair(candidate, candidate, 0.05) for candidate in best.values()]
    split = split_prompts(best, pairs)
    assert (len(split.sft), len(split.dpo)) == (sft, dpo)


def test_each_dataset_is_divided_on_its_own_and_no_prompt_is_in_both_stages():
    candidates = instruction_prompts(9, "x") + instruction_prompts(4, "y")
    split = split_prompts(best_of(candidates), build_pairs(candidates))
    assert sorted(prompt_id[0] for prompt_id in split.sft) == list("xxxy")
    assert not set(split.sft) & set(split.dpo)
    assert len(split.sft) + len(split.dpo) == 13


def test_unpaired_instruction_prompts_are_dropped_or_moved_to_sft():
    candidates = [*instruction_prompts(5), one("a", 0, 0.9, prompt_id="far"), one("a", 1, 0.1, prompt_id="far")]
    best, pairs = best_of(candidates), build_pairs(candidates)
    split = split_prompts(best, pairs)
    assert "far" not in split.sft + split.dpo
    assert split.dropped == {"no_pair": 1}
    assert "far" in split_prompts(best, pairs, SplitRule(unpaired="sft")).sft


def test_verified_prompts_with_a_pair_go_to_dpo_and_other_solved_ones_to_sft():
    candidates = [
        one("a", i, 0.2 - 0.05 * i, i == 0, prompt_id=f"pair{n}", domain="math") for n in range(4) for i in (0, 1)
    ]
    candidates += [one("a", i, 0.2 + 0.1 * i, True, prompt_id="easy", domain="math") for i in (0, 1)]
    candidates += [one("a", 0, 0.2, False, prompt_id="hard", domain="math")]
    best, pairs = best_of(candidates), build_pairs(candidates)
    split = split_prompts(best, pairs)
    assert split.dpo == ("pair0", "pair1", "pair2", "pair3")
    assert split.sft == ("easy",)
    assert split.dropped == {"no_best_answer": 1}
    half = split_prompts(best, pairs, SplitRule(verified_dpo_share=0.5))
    assert (len(half.dpo), len(half.sft)) == (2, 3)


def judged(source, right, *, prompt_id, reward=None):
    """Four answers, of which some are right."""
    return [
        one(source, i, reward and reward - 0.02 * i, i < right, prompt_id=prompt_id, domain="math") for i in range(4)
    ]


def test_by_verdict_a_prompt_that_some_source_always_solves_goes_to_sft():
    candidates = [
        answer
        for n in range(1000)
        for source, right in (("strong", 4), ("weak1", 1), ("weak2", 1))
        for answer in judged(source, right, prompt_id=f"easy{n}")
    ]
    candidates += judged("strong", 3, prompt_id="open") + judged("weak1", 1, prompt_id="open")
    best, pairs = best_of(candidates, "verdict"), build_pairs(candidates, "verdict")
    split = split_prompts(best, pairs)
    assert (len(split.sft), split.dpo, split.dropped) == (1000, ("open",), {})
    assert {best[prompt_id].source for prompt_id in split.sft} == {"strong"}
    # Its pair stays the only use of a prompt without a best answer.
    assert len(split_prompts(dict.fromkeys(best), pairs).dpo) == 1001


def test_where_rewards_make_the_pair_an_always_solved_prompt_stays_in_dpo():
    candidates = judged("strong", 4, prompt_id="p", reward=0.3) + judged("weak", 1, prompt_id="p", reward=0.2)
    split = split_prompts(best_of(candidates), build_pairs(candidates))
    assert (split.sft, split.dpo) == ((), ("p",))


def test_chinese_goes_to_sft_only():
    candidates = [one("q", i, 0.2 - 0.05 * i, prompt_id=f"{n}", domain="chinese") for n in range(3) for i in (0, 1)]
    split = split_prompts(best_of(candidates), build_pairs(candidates))
    assert (len(split.sft), len(split.dpo)) == (3, 0)


def test_seed_changes_who_goes_where_but_not_how_many():
    candidates = instruction_prompts(50)
    splits = [split_prompts(best_of(candidates), build_pairs(candidates), SplitRule(seed=seed)) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].sft != splits[2].sft
    assert len(splits[0].sft) == len(splits[2].sft) == 20


def test_a_share_is_rounded_down_as_it_is_written():
    # As a float, 0.29 of 100 is a little less than 29.
    candidates = instruction_prompts(100)
    split = split_prompts(best_of(candidates), build_pairs(candidates), SplitRule(sft_share=0.29))
    assert (len(split.sft), len(split.dpo)) == (29, 71)


def test_a_prompt_with_a_pair_but_no_best_answer_stays_in_dpo():
    candidates = instruction_prompts(5)
    best = dict.fromkeys(best_of(candidates))
    split = split_prompts(best, build_pairs(candidates), SplitRule(sft_share=1))
    assert (len(split.sft), len(split.dpo)) == (0, 5)
    assert split_prompts(best, []).dropped == {"no_best_answer": 5}


def test_shares_outside_zero_to_one_are_refused():
    with pytest.raises(ConfigError, match="sft_share"):
        SplitRule(sft_share=1.4)
    with pytest.raises(ConfigError, match="unpaired"):
        SplitRule(unpaired="keep")
