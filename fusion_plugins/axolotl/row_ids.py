"""Ids of rows as their file spells them, where the host's reader has made something else of them.

The JSON reader of ``datasets`` takes ids that look like dates for times, and integers beyond 64 bits for floating-point
numbers. `fusion capture` keeps what the file says, so such ids would be missing in every store.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from fusion_plugins.errors import MismatchError
from fusion_plugins.store import Store

_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def with_written_ids(dataset: Any, stores: Sequence[Store], path: str) -> Any:
    """Return a dataset in whose column ``id`` the times and numbers are again what the stores call them.

    Args:
        dataset: as ``datasets`` has read it.
        stores: the ids that can be meant.
        path: of the dataset, for the message.

    Raises:
        MismatchError: several ids of a store became the same value.
    """
    if "id" not in dataset.column_names:
        return dataset
    values = dataset["id"][:]
    if not any(isinstance(value, datetime | float) for value in values):
        return dataset
    known = {id for store in stores for id in store.ids()}
    ids = written_ids(values, known, path)
    return dataset.remove_columns("id").add_column("id", ids)


def written_ids(values: Sequence[Any], known: Iterable[str], path: str) -> list[str | None]:
    """Return for each value the id that it was read from; a value that no id reads as becomes text.

    Args:
        values: the column of a dataset.
        known: the ids that can be meant.
        path: of the dataset, for the message.

    Raises:
        MismatchError: several ids read as one of the values.

    Example:
        >>> written_ids([datetime(2024, 1, 2), 2.0**70, None], ["2024-01-02", str(2**70)], "a.jsonl")
        ['2024-01-02', '1180591620717411303424', None]
    """
    spelled: dict[Any, set[str]] = {}
    kinds = [(float, _number), (datetime, _time)]
    readers: list[Callable[[str], Any]] = [read for kind, read in kinds if any(isinstance(v, kind) for v in values)]
    for id in known:
        for read in readers:
            if (value := read(id)) is not None:
                spelled.setdefault(value, set()).add(id)
    return [_written(value, spelled, path) for value in values]


def _written(value: Any, spelled: dict[Any, set[str]], path: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, datetime | float):
        return str(value)
    ids = spelled.get(_naive(value) if isinstance(value, datetime) else value, set())
    if len(ids) > 1:
        raise MismatchError(
            f"{path}: the ids {', '.join(sorted(ids)[:3])} were all read as {value!r}, because the JSON reader takes "
            "them for times or floating-point numbers. Begin each id with a letter, or write the file as Parquet with "
            "a column of strings; then capture the stores again."
        )
    return next(iter(ids), str(value))


def _number(id: str) -> float | None:
    try:
        return float(id)
    except ValueError:
        return None


def _time(id: str) -> datetime | None:
    try:
        return _naive(datetime.fromisoformat(id)) if _DATE.match(id) else None
    except ValueError:
        return None


def _naive(value: datetime) -> datetime:
    """Return a time as the JSON reader gives it: in UTC, without saying so."""
    return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
