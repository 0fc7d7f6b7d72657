"""The bytes of a vocabulary as arrays, the form that compiled kernels read."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray


class TokenBytes(NamedTuple):
    """Token ``i`` is ``flat[starts[i] : starts[i + 1]]``; made by :attr:`TokenTable.packed`.

    Cached kernels know the fields by their order: rename the class when it changes
    (see :mod:`fusion_plugins.core.jit`).

    Attributes:
        flat: uint8, the bytes of all tokens.
        starts: (W + 1,) int64.
        special: (W,) bool, the special tokens.
        closing: (W,) bool, the tokens that end a turn or a text.
    """

    flat: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    special: BoolArray
    closing: BoolArray


def bytes_of_tokens(tokens: TokenBytes, ids: npt.NDArray[np.int32]) -> list[bytes]:
    """Return the bytes of each token; empty for an id without a token, as in a padded output layer."""
    size = len(tokens.special)
    return [tokens.flat[tokens.starts[i] : tokens.starts[i + 1]].tobytes() if i < size else b"" for i in ids.tolist()]


def readable_tokens(tokens: Sequence[bytes]) -> list[str]:
    r"""Return the tokens of a text for a reader.

    A character that several tokens share stands at the last of them, the others are empty; bytes of no character are
    written out.

    Example:
        >>> readable_tokens([b"a", b"\xd0", b"\x9f ", b"\xff", b"!"])
        ['a', '', 'П ', '\\xff', '!']
    """
    decoder = getincrementaldecoder("utf-8")("backslashreplace")
    last = len(tokens) - 1
    return [decoder.decode(token, final=place == last) for place, token in enumerate(tokens)]
