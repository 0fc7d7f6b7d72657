"""Verdicts in the forms that other tools write."""

import doctest
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from fusion_plugins.core.preferences import verdict
from fusion_plugins.core.preferences.verdict import as_verdict
from fusion_plugins.errors import DataError


@pytest.mark.parametrize(
    "value",
    [True, 1, 1.0, "true", "True", "TRUE", " true\n", "1", "1.0", np.True_, np.int64(1), np.float32(1), Decimal(1)],
)
def test_every_way_to_write_true_is_true(value):
    assert as_verdict(value) is True


@pytest.mark.parametrize(
    "value",
    [False, 0, 0.0, -0.0, "false", "False", "FALSE", "0", "0.0", np.False_, np.int8(0), np.float64(0), Decimal("0.0")],
)
def test_every_way_to_write_false_is_false(value):
    assert as_verdict(value) is False


@pytest.mark.parametrize("value", [None, math.nan, np.nan, np.float32("nan"), Decimal("nan"), "", " ", pd.NA, pd.NaT])
def test_nothing_and_nan_are_no_verdict(value):
    assert as_verdict(value) is None


@pytest.mark.parametrize(
    "value",
    [
        *(2, -1, 0.5, 1e-9, math.inf, Fraction(1, 2), Decimal("0.5"), "yes", "correct", "nan", "2", "truefalse"),
        *([True], {"correct": True}, b"true", object(), 1j, np.array([1])),
    ],
)
def test_anything_else_is_an_error_that_shows_it(value):
    with pytest.raises(DataError, match="expected a verdict") as error:
        as_verdict(value)
    assert repr(value)[:20] in str(error.value)


def test_examples_in_docstrings_run():
    result = doctest.testmod(verdict)
    assert result.attempted > 0
    assert result.failed == 0
