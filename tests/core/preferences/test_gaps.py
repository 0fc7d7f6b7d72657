"""The window of reward gaps: the published one is ArmoRM's, another is measured."""

import json
import random

import numpy as np
import pytest

from fusion_plugins.core.preferences.candidates import Candidate, as_candidate
from fusion_plugins.core.preferences.gaps import GapWindow, check_gap_window, propose_window, reward_scales
from fusion_plugins.errors import ConfigError

OWN = (GapWindow(0.5, 4.0), GapWindow(0.2, 0.9, unit="quantile"), GapWindow(None, None), GapWindow(0.01, None))


def scored(model=None, rewards=(0.1, 0.15), *, text=True):
    scores = {"math": {"correct": True}, "reward": {"reward": rewards[0], "model": model}} if model else {}
    extra = {"scores": json.dumps(scores) if text else scores}
    return [Candidate("p", "a", n, "Q", f"r{n}", reward=reward, extra=extra) for n, reward in enumerate(rewards)]


@pytest.mark.parametrize("model", ["RLHFlow/ArmoRM-Llama3-8B-v0.1", "armorm", "/models/armorm-copy"])
def test_the_published_window_is_for_armorm(model):
    check_gap_window(GapWindow(), scored(model, (0.1, 5.0)))


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("model", ["Skywork/Skywork-Reward-V2-Llama-3.1-8B", "skywork-v2-qwen3-8b", "gpt-x"])
def test_the_published_window_is_refused_for_any_other_reward_model(model, text):
    # Also where its rewards happen to be small.
    with pytest.raises(ConfigError, match=rf"scale of ArmoRM.*got those of {model}.*fusion report.*gap_unit: quantile"):
        check_gap_window(GapWindow(), scored(model, text=text))
    for window in OWN:
        check_gap_window(window, scored(model))


def test_of_two_reward_models_the_other_one_is_named():
    with pytest.raises(ConfigError, match="got those of other."):
        check_gap_window(GapWindow(), scored("armorm") + scored("other"))


@pytest.mark.parametrize(
    ("rewards", "fits"), [((0.05, 0.2), True), ((-0.4, 1.2), True), ((3.0, -7.5), False), ((0.1, 9), False)]
)
def test_large_rewards_of_which_nobody_says_where_they_are_from_are_pointed_out(rewards, fits):
    doubt = check_gap_window(GapWindow(), scored(None, rewards))
    assert doubt is None if fits else f"got rewards from {min(rewards):.4g} to {max(rewards):.4g}" in doubt
    assert check_gap_window(GapWindow(0.5, 4.0), scored(None, rewards)) is None


@pytest.mark.parametrize("scores", [None, "", "no JSON", "[1]", {"reward": None}, {"reward": {"model": "m"}}, 7])
def test_scores_of_other_tools_are_no_error(scores):
    assert reward_scales([Candidate("p", "a", 0, "Q", "r", reward=0.1, extra={"scores": scores})]) == set()


@pytest.mark.parametrize("scale", [1.0, 0.01, 40.0])
def test_the_proposed_window_keeps_the_same_share_on_any_scale(scale):
    draw = random.Random(0)
    gaps = [draw.expovariate(1) * scale for _ in range(1000)]
    found = propose_window(gaps)
    assert found.limits == pytest.approx(tuple(np.quantile(gaps, (0.2, 0.9))))
    assert found.kept == sum(found.limits[0] <= gap <= found.limits[1] for gap in gaps) == 700
    assert found.published == sum(0.01 <= gap <= 0.1 for gap in gaps)
    assert found.window == GapWindow(0.2, 0.9, unit="quantile")


def test_without_gaps_nothing_is_proposed():
    assert propose_window([]) is None


# Reasoning beside the response


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_whatever_name(name):
    row = {"prompt_id": "p", "source": "a", "prompt": "Q", "response": "five", name: "hm, 5"}
    assert as_candidate(row, 0).extra == {"reasoning_content": "hm, 5"}


def test_of_several_columns_of_reasoning_the_first_with_a_text_counts():
    row = {"prompt_id": "p", "source": "a", "prompt": "Q", "response": "five"}
    more = {"reasoning_content": " ", "reasoning": "hm", "thinking": "hm"}
    assert as_candidate(row | more, 0).extra == {"reasoning_content": "hm"}
    # A server's settings may have the same name; they are no reasoning, and stay.
    assert as_candidate(row | {"reasoning": {"effort": "low"}}, 0).extra == {"reasoning": {"effort": "low"}}
    assert as_candidate(row | {"thinking": ""}, 0).extra == {}
