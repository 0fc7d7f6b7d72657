"""Verdicts as other tools write them: true and false, 1 and 0, "true" and "false".

A column of verdicts that went through CSV, pandas or a database is no longer boolean. Read as it stands, ``1`` would be
no verdict and ``"false"`` a true one.
"""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from fusion_plugins.errors import DataError

_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "": None}


def as_verdict(value: Any) -> bool | None:
    """Return a verdict as True, False or None.

    Args:
        value: True or False; 1 or 0; 1.0 or 0.0; the words "true" and "false" in any case, "1" or "0"; numpy's scalars
            of these, or a Decimal of a database. None, NaN, pandas' NA and an empty text are no verdict.

    Raises:
        DataError: anything else; a share of passed tests such as 0.5 is a score, no verdict. The caller names the row.

    Example:
        >>> [as_verdict(value) for value in (True, 0, 1.0, "False", float("nan"))]
        [True, False, True, False, None]
    """
    numeric = isinstance(value, Real | Decimal)
    if value is None or type(value).__name__ in ("NAType", "NaTType") or (numeric and math.isnan(value)):
        return None
    if isinstance(value, bool | np.bool_) or (numeric and value in (0, 1)):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    raise DataError(
        f"expected a verdict (true or false, 1 or 0, or null for none), got {value!r:.60}. Turn a score into a verdict "
        "with a threshold of your own, and leave null where nothing was checked."
    )


def verdict_details(scores: Any) -> Mapping[str, Any]:
    """Return what the scorer that gave the verdict notes about it; empty where none does.

    Args:
        scores: the column ``scores`` of `fusion score`, as a mapping or as JSON text.

    Example:
        >>> verdict_details('{"code": {"correct": true, "trust": "inside"}, "reward": {"reward": 0.1}}')["trust"]
        'inside'
    """
    if isinstance(scores, str):
        try:
            scores = json.loads(scores)
        except (ValueError, RecursionError):
            return {}
    results = scores.values() if isinstance(scores, Mapping) else ()
    return next((each for each in results if isinstance(each, Mapping) and each.get("correct") is not None), {})


def may_be_forged(scores: Any) -> bool:
    """Whether the check that gave the verdict ran inside the program that it judges (``trust: inside``).

    Args:
        scores: as for :func:`verdict_details`.
    """
    return verdict_details(scores).get("trust") == "inside"
