"""Units of work: what is done and committed together, the same in every run over the same input.

A unit is computed anew as a whole when any of it is missing, so that a run that was killed and went on writes the same
numbers as one that was not: padding and batching, which change the last bits, depend on the unit alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

__all__ = ["MadeUnits", "plan_units", "run_units"]

Item = TypeVar("Item")
Content = TypeVar("Content")
Result = TypeVar("Result")


def plan_units(items: Iterable[Item], size: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Cut items, in order, into runs whose sizes add up to at most ``budget`` (or one item that is larger).

    Example:
        >>> list(plan_units("aa b cc d".split(), len, 3))
        [['aa', 'b'], ['cc', 'd']]
    """
    unit: list[Item] = []
    total = 0
    for item in items:
        if unit and total + size(item) > budget:
            yield unit
            unit, total = [], 0
        unit.append(item)
        total += size(item)
    if unit:
        yield unit


class MadeUnits(Generic[Item, Content]):
    """Units in the form that a source takes, made when they are asked for, so that few are in memory.

    Args:
        units: what they are made of.
        make: takes the unit's number and its items.
    """

    def __init__(self, units: Sequence[Sequence[Item]], make: Callable[[int, Sequence[Item]], list[Content]]) -> None:
        self._units, self._make = units, make

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[list[Content]]:
        for number, unit in enumerate(self._units):
            yield self._make(number, unit)


def run_units(
    units: Sequence[Sequence[Item]],
    results: Iterable[tuple[tuple[int, int], Result]],
    commit: Callable[[int, Mapping[int, Result]], None],
) -> None:
    """Collect results and commit each unit once it is complete.

    When the results end early (a source failed, Ctrl-C), what has come of the open units is committed too.

    Args:
        units: what was asked for.
        results: ((number of the unit, index within it), result), in any order.
        commit: takes the unit's number, and index -> result in ascending order.
    """
    pending: dict[int, dict[int, Result]] = defaultdict(dict)
    try:
        for (number, index), result in results:
            pending[number][index] = result
            if len(pending[number]) == len(units[number]):
                commit(number, dict(sorted(pending.pop(number).items())))
    finally:
        for number in sorted(pending):
            commit(number, dict(sorted(pending[number].items())))
