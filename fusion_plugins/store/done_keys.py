"""The keys of the items of a folder, which no memory holds as a whole."""

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any


class DoneKeys(Set[Any]):
    """The keys of the items that are in a folder: ``in`` looks one up, iteration reads the shards one after the other.

    Args:
        known: whether a key is one of them.
        listed: starts to yield them.
        count: how many there are.
    """

    def __init__(
        self, known: Callable[[Any], bool], listed: Callable[[], Iterator[Any]], count: Callable[[], int]
    ) -> None:
        self._known, self._listed, self._count = known, listed, count

    def __contains__(self, key: object) -> bool:
        return self._known(key)

    def __iter__(self) -> Iterator[Any]:
        return self._listed()

    def __len__(self) -> int:
        return self._count()

    def __repr__(self) -> str:
        return repr(set(self))

    @classmethod
    def _from_iterable(cls, keys: Iterable[Any]) -> Any:
        return set(keys)
