"""The form in which a tokenized text moves through the package.

* **Ends.** ``ends[t]`` is the byte offset, in the UTF-8 text, at which token ``t`` ends. A token without bytes of the
  text (BOS, EOS, a dummy prefix) ends where the token before it ends.
* **Spans.** ``spans[m] = (start, stop)`` are the bytes of the ``m``-th supervised piece: the whole of a plain text, or
  the content of one assistant message of a chat. Pieces of two renderings of one chat correspond by ``m``.

Shape letters: T tokens, M spans.
"""

from dataclasses import dataclass

from fusion_plugins.core.arrays import BoolArray, IntArray


@dataclass(frozen=True)
class TokenizedText:
    """One text as one tokenizer splits it.

    Attributes:
        input_ids: (T,) int32 token ids.
        ends: (T,) int32 byte offset at which each token ends, non-decreasing.
        spans: (M, 2) int32 byte ranges of the supervised pieces.
        exact: (T,) bool, whether the tokens up to this one spell a prefix of the text. False inside a character that
            the tokenizer's normaliser changed: such a position is never aligned.
    """

    input_ids: IntArray
    ends: IntArray
    spans: IntArray
    exact: BoolArray
