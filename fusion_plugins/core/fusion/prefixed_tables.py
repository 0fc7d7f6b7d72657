"""The source's tokens with white space before an answer taken off, as the projection's kernel reads them.

A token that begins with the *source's prefix* stands there without it, and with the *target's prefix* before what
remains. That goes where any token goes: to the target token of these bytes; else where the map sends the source token
of these bytes; else to the longest target token at its beginning. All other tokens go nowhere.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray, as_array
from fusion_plugins.core.fusion.projection_kernel import IS_EXACT, Tables
from fusion_plugins.core.fusion.vocabulary_map import ASKED_THE_TOKENIZER
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.token_index import Strings, TokenIndex


class Prefixes(NamedTuple):
    """What stands before an answer, as far as it is part of its first token.

    Attributes:
        source: bytes at the beginning of the source's token.
        target: bytes at the beginning of the target's.
        read: the token of the target that stands before the position, and whose bytes are in the source's token.
        joined: whether the source has a token of its own for its prefix.
    """

    source: bytes = b""
    target: bytes = b""
    read: bytes = b""
    joined: bool = False

    @property
    def block(self) -> int:
        """Which of the copies of the source's vocabulary has the tokens without their prefix."""
        return int(any(self))

    @property
    def block_behind(self) -> int:
        """Which of them has the answer's first token: behind a space of its own, it has no prefix to take off."""
        if not self.joined:
            return self.block
        return 2 if self.target else 0


@dataclass(frozen=True)
class PrefixedTables:
    """Makes the tables of prefixes, each pair of them once.

    Attributes:
        source: the source's W tokens.
        target: the target's V tokens.
        ordinary: (V,) bool, the tokens that the target uses for text.
        plain: both for the kernel.
        method: of the vocabulary map.
    """

    source: TokenBytes
    target: TokenBytes
    ordinary: BoolArray
    plain: Tables
    method: str
    made: dict[Prefixes, Tables] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # What is made on the way is neither sent to other processes nor part of what a plan is.
        return {**self.__dict__, "made": {}}

    def of(self, prefixes: Prefixes) -> Tables:
        """Return the tables in which the source's tokens stand without their prefix, behind the tokens as they are."""
        if not any(prefixes):
            return self.plain
        if prefixes not in self.made:
            self.made[prefixes] = _tables(self, prefixes)
        return self.made[prefixes]


def _tables(made: PrefixedTables, prefixes: Prefixes) -> Tables:
    """Put the source's tokens without their prefix, and with the target's, behind the tokens as they are."""
    plain = made.plain
    spelled, destinations = _spelled(made, prefixes), _Destinations.of(made)
    found = destinations.find(spelled)
    mapped, row = destinations.mapped_as(found), found.row
    if prefixes.read:
        elsewhere = ~destinations.begin_behind(prefixes.read, spelled, found.same)
        mapped[elsewhere], row[elsewhere] = -1, -1
    # A token that is one of the source's is divided as that is.
    widths = np.append(np.diff(plain.share_starts), 0)[row]
    own = [np.arange(plain.share_starts[at], plain.share_starts[at + 1]) for at in row[widths > 0].tolist()]
    shares = np.concatenate([np.arange(len(plain.share_ids)), *own]).astype(np.int64)
    copies = 1 + len(mapped) // len(plain.mapped) if len(mapped) else 1
    return plain._replace(
        mapped=np.concatenate([plain.mapped, mapped]),
        share_starts=as_array(
            np.concatenate([plain.share_starts, plain.share_starts[-1] + np.cumsum(widths)]), np.int32
        ),
        share_ids=plain.share_ids[shares],
        share_weights=plain.share_weights[shares],
        s_bytes=np.concatenate([plain.s_bytes, spelled.flat]),
        s_starts=np.concatenate([plain.s_starts, plain.s_starts[-1] + spelled.starts[1:]]),
        s_special=np.tile(plain.s_special, copies),
        s_closing=np.tile(plain.s_closing, copies),
    )


def _spelled(made: PrefixedTables, prefixes: Prefixes) -> Strings:
    """Return the source's tokens with their prefix changed, and behind them those of an answer behind a space."""
    tokens, ordinary = Strings.of(made.source), ~made.source.special
    changed = tokens.replaced(ordinary & tokens.start_with(prefixes.source), len(prefixes.source), prefixes.target)
    if prefixes.block_behind != 2:
        return changed
    behind = tokens.replaced(ordinary & (tokens.lengths > 0), 0, prefixes.target)
    return Strings(
        np.concatenate([changed.flat, behind.flat]),
        np.concatenate([changed.starts, changed.starts[-1] + behind.starts[1:]]),
    )


class _Found(NamedTuple):
    """Some strings looked up in both vocabularies.

    Attributes:
        begins: (N,) int32 the longest target token that each begins with, -1 for none.
        same: (N,) bool, where that is the whole string.
        row: (N,) int32 the source's token of the same bytes, -1 for none; -1 also where there is one of the target.
    """

    begins: IntArray
    same: BoolArray
    row: IntArray


class _Destinations(NamedTuple):
    """Says which target tokens some strings go to, as the map says it of the source's tokens."""

    source: TokenIndex
    target: TokenIndex
    mapped: IntArray
    method: str

    @classmethod
    def of(cls, made: PrefixedTables) -> "_Destinations":
        source, target = TokenIndex.of(made.source, ~made.source.special), TokenIndex.of(made.target, made.ordinary)
        return cls(source, target, made.plain.mapped, made.method)

    def find(self, strings: Strings) -> _Found:
        """Look strings up."""
        begins = self.target.longest(strings)
        same = self.target.are_whole(begins, strings)
        return _Found(begins, same, np.where(same, -1, self.source.find(strings)))

    def mapped_as(self, found: _Found) -> IntArray:
        """Return (N, 2): rows of `Tables.mapped`."""
        begins, same, row = found
        mapped = np.stack([np.full_like(begins, -1) if self.method == "exact" else begins, begins], axis=1)
        mapped[row >= 0] = self.mapped[row[row >= 0]]
        mapped[same, 0], mapped[same, 1] = begins[same], IS_EXACT
        return mapped

    def begin_behind(self, read: bytes, strings: Strings, in_target: BoolArray) -> BoolArray:
        """Return (N,) bool: whether the target splits each string behind ``read``, which is a token of its own."""
        whole = strings.replaced(strings.lengths > 0, 0, read)
        found = self.find(whole)
        first = self.mapped_as(found)[:, 0] if self.method in ASKED_THE_TOKENIZER else found.begins
        # The last of several spaces goes to the word: "▁" "▁of".
        word = strings.start_with(b" ") & in_target & ~found.same
        token = self.target.find(Strings(np.frombuffer(read, np.uint8), np.array([0, len(read)])))[0]
        return word | ((first == token) & (token >= 0))
