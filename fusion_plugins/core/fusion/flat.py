"""Several texts as a few flat arrays, the form in which compiled kernels take them.

A kernel is called once per batch of texts, because a call from Python costs as much as the work on a hundred tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray, as_array
from fusion_plugins.core.fusion.types import AnyRecord, TopK
from fusion_plugins.core.text.types import TokenizedText

Starts = npt.NDArray[np.int64]


class Texts(NamedTuple):
    """B texts in one tokenizer's tokens, one after the other.

    Text ``b`` has the tokens ``starts[b] .. starts[b + 1] - 1`` and the spans ``span_starts[b] .. span_starts[b + 1] -
    1``. Ends and spans count bytes from the start of each text.

    Cached kernels know the fields by their order: rename the class when it changes (see
    :mod:`fusion_plugins.core.jit`).

    Attributes:
        ids: (N,) int32.
        ends: (N,) int32.
        exact: (N,) bool.
        spans: (M, 2) int32.
        starts: (B + 1,).
        span_starts: (B + 1,).
    """

    ids: IntArray
    ends: IntArray
    exact: BoolArray
    spans: IntArray
    starts: Starts
    span_starts: Starts

    @classmethod
    def of(cls, texts: Sequence[TokenizedText]) -> "Texts":
        """Put texts one after the other."""
        ids, spans = [text.input_ids for text in texts], [text.spans for text in texts]
        ends, exact = [text.ends for text in texts], [text.exact for text in texts]
        return cls(
            joined(ids, np.int32),
            joined(ends, np.int32),
            joined(exact, np.bool_),
            joined(spans, np.int32),
            starts_of(ids),
            starts_of(spans),
        )

    def take(self, numbers: npt.NDArray[np.intp]) -> "Texts":
        """Return some of the texts, by ascending numbers."""
        if len(numbers) == len(self.starts) - 1:
            return self
        tokens, spans = places_of(self.starts, numbers), places_of(self.span_starts, numbers)
        return Texts(
            self.ids[tokens],
            self.ends[tokens],
            self.exact[tokens],
            self.spans[spans],
            _starts(np.diff(self.starts)[numbers]),
            _starts(np.diff(self.span_starts)[numbers]),
        )

    def spans_of(self, b: int) -> IntArray:
        """Return the spans of one text."""
        return self.spans[self.span_starts[b] : self.span_starts[b + 1]]

    def same_spans(self, other: "Texts") -> BoolArray:
        """(B,) bool, whether each text has the same spans as in other tokens."""
        if self.spans is other.spans:
            return np.ones(len(self.starts) - 1, np.bool_)
        if np.array_equal(self.span_starts, other.span_starts):
            found: BoolArray = self._per_text((self.spans != other.spans).any(axis=1)) == 0
            return found
        return np.array([np.array_equal(self.spans_of(b), other.spans_of(b)) for b in range(len(self.starts) - 1)])

    def n_bytes(self) -> Starts:
        """(B,) number of bytes in the spans of each text."""
        return self._per_text(self.spans[:, 1] - self.spans[:, 0])

    def _per_text(self, values: npt.NDArray[Any]) -> Starts:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        found: Starts = sums[self.span_starts[1:]] - sums[self.span_starts[:-1]]
        return found

    def with_spans(self, spans: IntArray, span_starts: Starts) -> "Texts":
        """Return the texts with other spans."""
        return self._replace(spans=spans, span_starts=span_starts)


class Entries(NamedTuple):
    """What a source says at each token of its texts.

    Attributes:
        ids: (N, K) int32.
        logprobs: (N, K) float32.
        next: (N,) float32 log-probability of the next token of the text.
    """

    ids: IntArray
    logprobs: FloatArray
    next: FloatArray

    @classmethod
    def of(cls, records: Sequence[AnyRecord]) -> "Entries":
        """Put what a source says about several texts one after the other."""
        topk = [record.topk for record in records]
        if len({said.ids.shape[1] for said in topk}) > 1:
            topk = _one_width(topk)
        return cls(
            joined([said.ids for said in topk], np.int32),
            joined([said.logprobs for said in topk], np.float32),
            joined([said.token_logprobs for said in topk], np.float32),
        )


def _one_width(topk: Sequence[TopK]) -> list[TopK]:
    """Fill up with empty entries where some records hold fewer."""
    width = max(said.ids.shape[1] for said in topk)
    return [
        TopK(
            np.pad(said.ids, ((0, 0), (0, width - said.ids.shape[1])), constant_values=-1),
            np.pad(said.logprobs, ((0, 0), (0, width - said.ids.shape[1])), constant_values=-np.inf),
            said.token_logprobs,
        )
        for said in topk
    ]


def joined(arrays: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return arrays one after the other, in a kernel's form; a single one is not copied."""
    return as_array(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), dtype)


def starts_of(parts: Sequence[Any]) -> Starts:
    """Return (B + 1,) where each part begins, and where the last ends."""
    return _starts(np.array([*map(len, parts)], np.int64))


def places_of(starts: Starts, numbers: npt.NDArray[np.intp]) -> Starts:
    """Return the places, in flat arrays, of some parts one after the other."""
    parts = [np.arange(starts[b], starts[b + 1]) for b in numbers.tolist()]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _starts(lengths: Starts) -> Starts:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
