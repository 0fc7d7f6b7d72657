"""Weights of answers by their rewards."""

import math

import pytest

from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.core.preferences.weights import reward_weights, with_mean_one
from fusion_plugins.errors import ConfigError


def answers(*rewards, prompt_id="p"):
    return [Candidate(prompt_id, f"s{place}", 0, "?", str(place), reward) for place, reward in enumerate(rewards)]


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_weights_are_the_softmax_of_the_rewards_of_each_prompt(temperature):
    rewards = {"p": [0.1, 0.17, -0.4], "q": [3.0], "r": [12.0, 12.0]}
    candidates = [each for prompt, own in rewards.items() for each in answers(*own, prompt_id=prompt)]
    mixed = candidates[::2] + candidates[1::2]
    for candidate, weight in zip(mixed, reward_weights(mixed, temperature), strict=True):
        raised = [math.exp(reward / temperature) for reward in rewards[candidate.prompt_id]]
        assert weight == pytest.approx(math.exp(candidate.reward / temperature) / sum(raised), abs=1e-9)


def test_large_rewards_do_not_overflow_and_only_differences_count():
    assert reward_weights(answers(1e5, 1e5 + 1)) == pytest.approx(reward_weights(answers(0.0, 1.0)))
    assert reward_weights(answers(0.0, 1e6)) == [0.0, 1.0]
    assert reward_weights(answers(-1e308, 1e308)) == [0.0, 1.0]


def test_without_a_reward_of_each_all_answers_of_the_prompt_count_alike():
    mixed = [*answers(1.0, None), *answers(0.0, math.log(3), prompt_id="q")]
    assert reward_weights(mixed) == pytest.approx([0.5, 0.5, 0.25, 0.75])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ConfigError, match="expected a positive number"):
        reward_weights(answers(1.0), temperature)


def test_the_mean_weight_of_a_dataset_is_one():
    weights = with_mean_one(reward_weights([*answers(0.0, 1.0, 2.0), *answers(5.0, prompt_id="q")]))
    assert sum(weights) == pytest.approx(4)
    assert weights[3] == pytest.approx(2)
    assert with_mean_one([]) == []
