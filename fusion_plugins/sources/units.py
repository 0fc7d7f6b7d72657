"""Units of work: what is done and committed together, the same in every run over the same input.

A unit is computed anew as a whole when any of it is missing, so that a run that was killed and went on writes the same
numbers as one that was not: padding and batching, which change the last bits, depend on the unit alone.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["plan_units"]

Item = TypeVar("Item")


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
