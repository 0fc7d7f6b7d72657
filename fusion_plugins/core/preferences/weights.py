"""How much each of several answers to one prompt counts, by their rewards (FuseRL, arXiv 2504.06562).

FuseRL trains on the best answer of every source (FuseSFT) and on one pair per source (FusePO), each weighted by a
softmax of the rewards over the sources of the prompt.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fusion_plugins.core.preferences.candidates import Candidate
from fusion_plugins.errors import ConfigError


def reward_weights(candidates: Sequence[Candidate], temperature: float = 1.0) -> list[float]:
    """Return the weight of each of some answers: ``softmax(reward / temperature)`` over those of the same prompt.

    The weights of a prompt sum to 1. Where one of its answers has no reward, all have the same weight.

    Args:
        candidates: the answers that are trained on; for pairs the chosen ones.
        temperature: in units of the reward; small ones favour the best answer.

    Returns:
        One weight per candidate, in the same order.

    Raises:
        ConfigError: the temperature is not positive and finite.

    Example:
        >>> worse, better = (Candidate("p", "a", n, "?", "!", reward) for n, reward in enumerate((0.0, math.log(3))))
        >>> [round(weight, 3) for weight in reward_weights([worse, better])]
        [0.25, 0.75]
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature of the weights: expected a positive number, got {temperature}")
    prompts: dict[str, list[int]] = defaultdict(list)
    for place, candidate in enumerate(candidates):
        prompts[candidate.prompt_id].append(place)
    weights = [0.0] * len(candidates)
    for places in prompts.values():
        rewards = np.array([candidates[place].reward for place in places], np.float64)  # None becomes nan
        if np.isnan(rewards).any():
            rewards = np.zeros(len(places))
        # The difference first: rewards may be large, and only their differences count.
        with np.errstate(over="ignore"):  # a difference that no float holds is a weight of 0
            raised = np.exp((rewards - rewards.max()) / temperature)
        for place, weight in zip(places, raised / raised.sum(), strict=True):
            weights[place] = float(weight)
    return weights


def with_mean_one(weights: Sequence[float]) -> list[float]:
    """Return weights times the factor that makes their mean 1.

    Then the size of the loss, and with it the learning rate, means what it means without weights.

    Example:
        >>> with_mean_one([0.25, 0.75, 1.0])
        [0.375, 1.125, 1.5]
    """
    total = math.fsum(weights)
    return [weight * len(weights) / total for weight in weights]
