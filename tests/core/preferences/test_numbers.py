"""Figures of rewards of any size."""

import math
import random
import sys

import numpy as np
import pytest

from fusion_plugins.core.preferences.numbers import deviation, difference, mean, quantiles

LARGEST = sys.float_info.max
SIZES = (1.0, 1e-300, 1e150, 1e300, 1e308)


@pytest.mark.parametrize("size", SIZES)
def test_figures_of_rewards_of_any_size_are_those_of_the_same_rewards_in_other_units(size):
    draw = random.Random(0)
    plain = [draw.uniform(-1.7, 1.7) for _ in range(50)]
    values = [value * size for value in plain]
    assert mean(values) / size == pytest.approx(mean(plain))
    assert deviation(values, 1) / size == pytest.approx(float(np.std(plain, ddof=1)))
    assert np.array(quantiles(values, [0.0, 0.2, 0.9])) / size == pytest.approx(np.quantile(plain, [0.0, 0.2, 0.9]))
    assert difference(values[0], values[1]) / size == pytest.approx(plain[0] - plain[1], rel=1e-9)


def test_what_no_float_holds_is_the_largest():
    assert difference(LARGEST, -LARGEST) == LARGEST
    assert difference(-LARGEST, LARGEST) == -LARGEST
    assert deviation([-LARGEST, LARGEST], 1) == LARGEST
    assert mean([-LARGEST, LARGEST, 3.0]) == pytest.approx(1.0)
    assert math.isnan(mean([]))
    assert deviation([0.0, 0.0]) == 0
