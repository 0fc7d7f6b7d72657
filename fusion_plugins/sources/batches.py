"""Batches: what is asked of a source and committed together, the same in every run over the same input.

Padding and the texts that share a forward pass change the last bits of the numbers. Both depend on the batch alone, and
a batch of which anything is missing is done again as a whole. So a run that was killed and resumed writes the same
numbers as one that was not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from fusion_plugins.sources.background import ahead

Item = TypeVar("Item")
Content = TypeVar("Content")
Result = TypeVar("Result")


def plan_batches(items: Iterable[Item], size: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Cut items, in order, into batches whose sizes add up to at most ``budget`` (or one item that is larger).

    Example:
        >>> list(plan_batches("aa b cc d".split(), len, 3))
        [['aa', 'b'], ['cc', 'd']]
    """
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and total + size(item) > budget:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def missing_batches(
    items: Iterable[Item], size: Callable[[Item], int], budget: int, done: Callable[[Item], bool], *, whole: bool
) -> Iterator[list[Item]]:
    """Yield the batches of which something is missing; one is in memory at a time.

    Args:
        items: everything, also what is done already.
        size: size of an item.
        budget: see :func:`plan_batches`.
        done: whether an item is done. Each item is asked for once, when its batch is complete.
        whole: return the whole batch, not only its missing items.

    Example:
        >>> list(missing_batches([1, 2, 3, 4, 5, 6], lambda item: 1, 2, lambda item: item < 4, whole=True))
        [[3, 4], [5, 6]]
    """
    # The plan covers what is done too: otherwise the borders would depend on where earlier runs have stopped.
    for batch in plan_batches(items, size, budget):
        missing = [item for item in batch if not done(item)]
        if missing:
            yield batch if whole else missing


class LazyBatches(Generic[Item, Content]):
    """Batches in the form that a source takes, each made while it works on the one before, so that few are in memory.

    Args:
        count: number of the batches.
        batches: yields the items that the batches are made of.
        make: turns the number and the items of a batch into its contents.

    Attributes:
        under_way: number -> items of the batches that the source has and that are not committed.
    """

    def __init__(
        self,
        count: int,
        batches: Iterable[Sequence[Item]],
        make: Callable[[int, Sequence[Item]], list[Content]],
    ) -> None:
        self._count, self._batches, self._make = count, batches, make
        self.under_way: dict[int, Sequence[Item]] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[list[Content]]:
        return ahead(self._made())

    def _made(self) -> Iterator[list[Content]]:
        for number, batch in enumerate(self._batches):
            self.under_way[number] = batch
            yield self._make(number, batch)


def commit_batches(
    under_way: dict[int, Sequence[Item]],
    results: Iterable[tuple[tuple[int, int], Result]],
    commit: Callable[[Sequence[Item], Mapping[int, Result]], None],
) -> None:
    """Collect results and commit each batch once it is complete; then forget it.

    When the results end early (a source failed, Ctrl-C), the results of unfinished batches are committed too.

    Args:
        under_way: number -> items of the batches that the source has been asked for.
        results: ((number of the batch, index within it), result), in any order.
        commit: takes the batch's items, and index -> result in ascending order.
    """
    pending: dict[int, dict[int, Result]] = defaultdict(dict)
    try:
        for (number, index), result in results:
            pending[number][index] = result
            if len(pending[number]) == len(under_way[number]):
                commit(under_way.pop(number), dict(sorted(pending.pop(number).items())))
    finally:
        for number in sorted(pending):
            commit(under_way.pop(number), dict(sorted(pending[number].items())))
