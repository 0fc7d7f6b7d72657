"""The ids and digests of a large set of texts, in little memory: its fingerprint, and the ids that appear twice."""

import heapq
from array import array
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusion_plugins.core.text.content_id import sorted_fingerprint

#: ids that are Python strings at a time while a set is sorted
SORTED_AT_ONCE = 1 << 14


class TextIndex:
    """Ids and digests of many texts, in 48 bytes each and the bytes of the id; an id that is the digest takes none."""

    def __init__(self) -> None:
        self._names, self._stops, self._named = bytearray(), array("q", [0]), bytearray()
        self._unnamed = bytearray()

    def add(self, id: str, digest: str) -> None:
        """Add a text: its id, and the sha256 (hex) that stands for its content."""
        if id == digest:
            self._unnamed += bytes.fromhex(digest)
        else:
            self._names += id.encode()
            self._stops.append(len(self._names))
            self._named += bytes.fromhex(digest)

    def close(self) -> tuple[str, frozenset[str]]:
        """Return the fingerprint, where each id counts once, and the ids that appear twice."""
        twice: set[str] = set()

        def once() -> Iterator[tuple[str, str]]:
            before = None
            for id, digest in heapq.merge(self._sorted_named(), self._sorted_unnamed()):
                if id == before:
                    twice.add(id)
                else:
                    yield id, digest
                before = id

        return sorted_fingerprint(once()), frozenset(twice)

    def _sorted_named(self) -> Iterator[tuple[str, str]]:
        names = pa.LargeStringArray.from_buffers(
            len(self._stops) - 1, pa.py_buffer(self._stops), pa.py_buffer(self._names)
        )
        digests = np.frombuffer(self._named, np.uint8).reshape(-1, 32)
        order = pc.sort_indices(names)  # by the bytes of UTF-8, which is the order of Python's strings
        for start in range(0, len(order), SORTED_AT_ONCE):
            part = order.slice(start, SORTED_AT_ONCE)
            for id, place in zip(names.take(part).to_pylist(), part.to_pylist(), strict=True):
                yield id, digests[place].tobytes().hex()

    def _sorted_unnamed(self) -> Iterator[tuple[str, str]]:
        digests = np.frombuffer(self._unnamed, np.uint8).reshape(-1, 32)
        words = digests.view(">u8")
        for place in np.lexsort(words.T[::-1]):
            digest = digests[place].tobytes().hex()
            yield digest, digest
