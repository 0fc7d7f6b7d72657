"""The bytes of a vocabulary as arrays, the form that compiled kernels read."""

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
