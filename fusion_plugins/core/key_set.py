"""A set of keys for folders and texts by the million: a few bytes a key, whatever the keys are."""

from array import array
from collections.abc import Hashable, Iterable
from hashlib import blake2b
from struct import unpack

#: places at the start; their number doubles when three quarters are taken
FIRST_PLACES = 1 << 10


class KeySet:
    """Keys that were added, each with a number, where a Python set of tuples takes 300 bytes a key.

    A key takes 21 to 43 bytes, and 32 to 64 once a number other than 0 was given.

    Keys are strings, or tuples of strings and numbers. 128 bits of a hash stand for a key: two of 10^9 keys are taken
    for one another with a probability of 10^-20.

    Args:
        keys: what to add at the start, with the number 0.

    Example:
        >>> keys = KeySet(["a"])
        >>> keys.add(("b", 1), 7)
        >>> "a" in keys, ("b", 1) in keys, "c" in keys, len(keys), keys.number(("b", 1)), keys.number("c")
        (True, True, False, 2, 7, None)
    """

    def __init__(self, keys: Iterable[Hashable] = ()) -> None:
        self._count = 0
        #: made with the first number that is not 0
        self._numbers: array[int] | None = None
        self._take(FIRST_PLACES)
        for key in keys:
            self.add(key)

    def _take(self, places: int) -> None:
        # An open table: 0 in the first column says that a place is free.
        self._mask = places - 1
        self._first, self._second = array("Q", [0]) * places, array("Q", [0]) * places
        if self._numbers is not None:
            self._numbers = array("q", [0]) * places

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: Hashable) -> bool:
        first, second = _hash(key)
        return bool(self._first[self._place(first, second)])

    def number(self, key: Hashable) -> int | None:
        """Return the number of a key, None where it was not added."""
        first, second = _hash(key)
        place = self._place(first, second)
        if not self._first[place]:
            return None
        return 0 if self._numbers is None else self._numbers[place]

    def add(self, key: Hashable, number: int = 0) -> None:
        """Add a key; one that is there gets the new number."""
        first, second = _hash(key)
        place = self._place(first, second)
        if not self._first[place]:
            self._count += 1
            self._first[place], self._second[place] = first, second
        if number and self._numbers is None:
            self._numbers = array("q", [0]) * (self._mask + 1)
        if self._numbers is not None:
            self._numbers[place] = number
        if 4 * self._count > 3 * self._mask:
            self._grow()

    def _place(self, first: int, second: int) -> int:
        """Return the place of a hash, or the free place where it belongs."""
        firsts, seconds, mask = self._first, self._second, self._mask
        place = second & mask
        while (found := firsts[place]) and (found != first or seconds[place] != second):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        firsts, seconds, numbers = self._first, self._second, self._numbers
        self._take(2 * (self._mask + 1))
        for index, first in enumerate(firsts):
            if first:
                place = self._place(first, seconds[index])
                self._first[place], self._second[place] = first, seconds[index]
                if numbers is not None and self._numbers is not None:
                    self._numbers[place] = numbers[index]


def _hash(key: Hashable) -> tuple[int, int]:
    # A name may hold half a surrogate pair. The form of a key is part of what is hashed: "1" is not 1.
    first, second = unpack("<QQ", blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest())
    return first | 1, second
