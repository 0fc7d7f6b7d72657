"""The source's tokens with white space before an answer taken off, as the projection's kernel reads them.

A token that begins with the *source's prefix* stands there without it, and with the *target's prefix* before what
remains. That goes where any token goes: to the target token of these bytes; else where the map sends the source token
of these bytes; else to the longest target token at its beginning. All other tokens go nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fusion_plugins.core.arrays import BoolArray, as_array
from fusion_plugins.core.fusion.projection_kernel import IS_EXACT, Tables
from fusion_plugins.core.fusion.vocabulary_map import ASKED_THE_TOKENIZER, longest_beginning
from fusion_plugins.core.text.token_bytes import TokenBytes, bytes_of_tokens


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
    plain, size = made.plain, len(made.plain.mapped)
    tokens = bytes_of_tokens(made.source, np.arange(size, dtype=np.int32))
    find = _Destinations(made, tokens)
    spelled = [
        prefixes.target + token[len(prefixes.source) :] if token.startswith(prefixes.source) and not special else b""
        for token, special in zip(tokens, plain.s_special.tolist(), strict=True)
    ]
    if prefixes.block_behind == 2:
        spelled += [
            prefixes.target + token if token and not special else b""
            for token, special in zip(tokens, plain.s_special.tolist(), strict=True)
        ]
    known = [find(token, prefixes.read) if token else (-1, -1, -1) for token in spelled]
    mapped = np.array(known, np.int32).reshape(-1, 3)
    # A token that is one of the source's is divided as that is.
    widths = np.append(np.diff(plain.share_starts), 0)[mapped[:, 2]]
    own = [np.arange(plain.share_starts[row], plain.share_starts[row + 1]) for row in mapped[widths > 0, 2].tolist()]
    shares = np.concatenate([np.arange(len(plain.share_ids)), *own]).astype(np.int64)
    lengths = np.fromiter(map(len, spelled), np.int64, len(spelled))
    copies = 1 + len(spelled) // size if size else 1
    return plain._replace(
        mapped=np.concatenate([plain.mapped, mapped[:, :2]]),
        share_starts=as_array(
            np.concatenate([plain.share_starts, plain.share_starts[-1] + np.cumsum(widths)]), np.int32
        ),
        share_ids=plain.share_ids[shares],
        share_weights=plain.share_weights[shares],
        s_bytes=np.concatenate([plain.s_bytes, np.frombuffer(b"".join(spelled), np.uint8)]),
        s_starts=np.concatenate([plain.s_starts, plain.s_starts[-1] + np.cumsum(lengths)]),
        s_special=np.tile(plain.s_special, copies),
        s_closing=np.tile(plain.s_closing, copies),
    )


class _Destinations:
    """Says which target token some bytes go to, as the map says it of the source's tokens."""

    def __init__(self, made: PrefixedTables, tokens: Sequence[bytes]) -> None:
        self._mapped, self._method = made.plain.mapped, made.method
        names = bytes_of_tokens(made.target, np.arange(len(made.ordinary), dtype=np.int32))
        self._target = {names[index]: index for index in np.flatnonzero(made.ordinary)[::-1].tolist()}
        ordinary = np.flatnonzero(~made.plain.s_special)[::-1].tolist()
        self._source = {tokens[index]: index for index in ordinary if tokens[index]}
        self._longest = max(map(len, self._target), default=0)

    def __call__(self, token: bytes, read: bytes) -> tuple[int, int, int]:
        """Return a row of `Tables.mapped`, and the source's token of these bytes, -1 for none."""
        if read and not self._begins_with(read, token):
            return -1, -1, -1
        if token in self._target:
            return self._target[token], IS_EXACT, -1
        if token in self._source:
            row = self._source[token]
            return int(self._mapped[row, 0]), int(self._mapped[row, 1]), row
        begins = longest_beginning(token, self._target, self._longest)
        return (-1 if self._method == "exact" else begins), begins, -1

    def _begins_with(self, read: bytes, token: bytes) -> bool:
        """Whether the target splits such bytes behind ``read``, which is a token of its own."""
        if token.startswith(b" ") and token in self._target and read + token not in self._target:
            return True  # the last of several spaces goes to the word: "▁" "▁of"
        return self._first(read + token) == self._target.get(read)

    def _first(self, token: bytes) -> int | None:
        """Return the target's first token of some bytes, as far as is known."""
        if token in self._target:
            return self._target[token]
        row = self._source.get(token, -1)
        if row >= 0 and self._method in ASKED_THE_TOKENIZER:
            return int(self._mapped[row, 0])
        return longest_beginning(token, self._target, self._longest)
