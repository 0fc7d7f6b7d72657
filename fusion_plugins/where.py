"""Which rows are meant: conditions on their columns, in the same words for a capture and for a training.

``where: {verdict: incorrect, domain: [math, code], reward: {min: 0.2}}`` takes the rows that meet all its conditions.
A condition is a value, a list of values of which one must be there, or limits. ``verdict`` is what a verifier said:
correct, incorrect or unknown. ``trust`` says where its check ran: ``inside`` the program that it judges, which can
forge such a verdict, or ``outside``.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray
from fusion_plugins.core.preferences.verdict import as_verdict, may_be_forged
from fusion_plugins.errors import ConfigError, DataError

#: column -> value, values or limits
Where = dict[str, Any]
Row = Mapping[str, Any]

VERDICTS = {True: "correct", False: "incorrect", None: "unknown"}
#: what a row without a domain counts to, as everywhere
DOMAIN = "instruction"
_LIMITS = {"min", "max"}
#: column of a condition -> column of the rows
_STORED_AS = {"verdict": "correct", "trust": "scores"}
_KNOWN = {"verdict": tuple(VERDICTS.values()), "trust": ("inside", "outside")}


def checked_where(where: Where | None) -> Where | None:
    """Return conditions as they are, for a validator of settings.

    Raises:
        ValueError: one of them has another form.
    """
    for column, condition in (where or {}).items():
        if isinstance(condition, Mapping):
            if not condition or not condition.keys() <= _LIMITS or not all(map(_is_number, condition.values())):
                raise ValueError(f"{column}: expected limits as {{min: NUMBER, max: NUMBER}}, got {dict(condition)!r}")
            continue
        values = _values(condition)
        if not values or any(isinstance(value, Mapping | list) for value in values):
            raise ValueError(f"{column}: expected a value, a list of values or limits, got {condition!r:.80}")
        known = _KNOWN.get(column)
        if known and (unknown := [value for value in values if value not in known]):
            raise ValueError(f"{column}: expected some of {', '.join(known)}, got {unknown[0]!r:.80}")
    return where


def columns_of(where: Where | None) -> tuple[str, ...]:
    """Return the columns of rows that conditions look at."""
    return tuple(_STORED_AS.get(name, name) for name in where or ())


def require_columns(where: Where | None, found: Collection[str], place: str) -> None:
    """Refuse a condition on a column that no row has: it would leave out every row, or none.

    Raises:
        ConfigError: naming the columns that are missing and those that are there.
    """
    missing = [name for name in where or () if _STORED_AS.get(name, name) not in found]
    if missing:
        said = [f"{name} (read from {_STORED_AS[name]!r})" if name in _STORED_AS else name for name in missing]
        raise ConfigError(
            f"where: expected columns of {place}, which are {', '.join(sorted(found))}; got {', '.join(said)}. "
            "Correct the name, or add the column."
        )


def selects(where: Where | None, row: Row) -> bool:
    """Return whether a row meets all conditions.

    Example:
        >>> wrong = {"correct": False, "domain": "math", "reward": 0.4}
        >>> selects({"verdict": "incorrect", "reward": {"min": 0.3}}, wrong), selects({"domain": ["code"]}, wrong)
        (True, False)
    """
    return all(_meets(condition, value_of(column, row)) for column, condition in (where or {}).items())


def selected(
    where: Where | None, columns: Mapping[str, Sequence[Any]], count: int, named: Callable[[int], str] = "row {}".format
) -> BoolArray:
    """Return (N,) bool, which rows of a table of N rows meet all conditions; each distinct value is looked at once.

    Args:
        where: the conditions.
        columns: name -> N values.
        count: N.
        named: what the row of a place (from 0) is called in messages.

    Raises:
        DataError: a verdict is none; named is the first such row.
    """
    found = np.ones(count, np.bool_)
    for column, condition in (where or {}).items():
        name = _STORED_AS.get(column, column)
        known: dict[Any, bool] = {}
        for place, value in enumerate(columns[name]):
            key = type(value), value if isinstance(value, str | int | float | bool | None) else repr(value)
            if key not in known:
                try:
                    known[key] = _meets(condition, value_of(column, {name: value}))
                except DataError as error:
                    raise DataError(f"{named(place)}: where: {error}") from error
            found[place] &= known[key]
    return found


def value_of(column: str, row: Row) -> Any:
    """Return what a row has in a column of a condition."""
    if column == "verdict":
        return VERDICTS[as_verdict(row.get("correct"))]
    if column == "trust":
        return "inside" if may_be_forged(row.get("scores")) else "outside"
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        value = None
    return DOMAIN if column == "domain" and value in (None, "") else value


def _meets(condition: Any, value: Any) -> bool:
    if isinstance(condition, Mapping):
        least, most = condition.get("min", -math.inf), condition.get("max", math.inf)
        return _is_number(value) and bool(least <= value <= most)
    return any(_equal(one, value) for one in _values(condition))


def _values(condition: Any) -> list[Any]:
    return list(condition) if isinstance(condition, list | tuple) else [condition]


def _equal(left: Any, right: Any) -> bool:
    """Whether two values are the same; a number equals its spelling, as files write either."""
    if left is None or right is None or isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right) or str(left) == str(right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
