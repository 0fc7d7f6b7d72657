"""Conditions on the columns of rows."""

import json

import pytest

from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.where import checked_where, columns_of, require_columns, selected, selects

FORGEABLE = {"correct": True, "scores": json.dumps({"code": {"correct": True, "trust": "inside"}, "reward": {}})}
SURE = {"correct": True, "scores": {"code": {"correct": True, "trust": "outside"}}}
OF_MATHS = {"correct": True, "scores": {"math": {"correct": True}}}
UNJUDGED = {"correct": None, "scores": None}


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({"trust": "outside"}, [SURE, OF_MATHS, UNJUDGED]),
        ({"trust": "inside"}, [FORGEABLE]),
        ({"trust": ["inside", "outside"]}, [FORGEABLE, SURE, OF_MATHS, UNJUDGED]),
        ({"trust": "outside", "verdict": "correct"}, [SURE, OF_MATHS]),
    ],
)
def test_trust_is_that_of_the_check_that_gave_the_verdict(where, rows):
    every = [FORGEABLE, SURE, OF_MATHS, UNJUDGED]
    assert [row for row in every if selects(checked_where(where), row)] == rows
    columns = {name: [row[name] for row in every] for name in columns_of(where)}
    assert selected(where, columns, len(every)).tolist() == [row in rows for row in every]


@pytest.mark.parametrize(("column", "value"), [("trust", "both"), ("verdict", "right"), ("trust", None)])
def test_a_value_that_a_condition_cannot_have_is_refused(column, value):
    with pytest.raises(ValueError, match=f"{column}: expected some of"):
        checked_where({column: value})


@pytest.mark.parametrize(("column", "stored"), [("trust", "scores"), ("verdict", "correct")])
def test_a_condition_whose_column_has_another_name_is_told_with_that_name(column, stored):
    with pytest.raises(ConfigError, match=rf"which are prompt; got {column} \(read from '{stored}'\)"):
        require_columns({column: "outside"}, ["prompt"], "rows.jsonl")


@pytest.mark.parametrize("verdict", [0.5, "maybe", 2])
def test_a_verdict_that_is_none_is_told_with_its_row(verdict):
    columns = {"correct": [True, None, verdict, verdict]}
    with pytest.raises(DataError, match="^rows.jsonl: row 3: where: expected a verdict"):
        selected({"verdict": "correct"}, columns, 4, lambda place: f"rows.jsonl: row {place + 1}")
