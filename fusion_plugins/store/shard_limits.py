"""How large a shard becomes, and which shards are joined: small neighbours, and those of an older version."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fusion_plugins.store.manifest import ShardInfo


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full.

    Attributes:
        rows: items after which it is.
        tokens: tokens after which it is.
        version: of the layout that is written.
    """

    rows: int
    tokens: int
    version: int

    def filled(self, rows: int, tokens: int) -> bool:
        """Return whether so many items and tokens fill a shard."""
        return rows >= self.rows or tokens >= self.tokens

    def is_small(self, shard: ShardInfo) -> bool:
        """Return whether a shard is to be joined with its neighbours."""
        return 2 * shard.rows < self.rows and 2 * shard.tokens < self.tokens

    def small_tail(self, shards: Sequence[ShardInfo]) -> list[ShardInfo]:
        """Return the small shards at the end that are not of an older version."""
        return list(takewhile(self._is_joined, reversed(shards)))[::-1]

    def groups(self, shards: Sequence[ShardInfo], *, older: bool) -> list[list[ShardInfo]]:
        """Return runs of neighbouring shards that fit into one; with ``older``, those of older versions among them.

        A shard of an older version that fits nowhere is a group of its own.
        """
        groups: list[list[ShardInfo]] = [[]]
        for shard in shards:
            if not (self._is_joined(shard) or (older and shard.version < self.version)):
                groups.append([])
                continue
            together = [*groups[-1], shard]
            if sum(each.rows for each in together) > self.rows or sum(each.tokens for each in together) > self.tokens:
                groups.append([shard])
            else:
                groups[-1] = together
        return [group for group in groups if len(group) > 1 or any(each.version < self.version for each in group)]

    def _is_joined(self, shard: ShardInfo) -> bool:
        return self.is_small(shard) and shard.version >= self.version
