"""Rows that hold no distributions: which text they are, and the fusion of that text while the model trains.

With ``fusion.prepared: stores`` a prepared row has the plain columns and one more, about a byte per token: the id of
its text, and where the target's tokens end in it. The loader's workers read the records of the stores by that id and
fuse them when a batch is made. Another rule, map or width then needs no new preparation.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import Fused
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.target_tokenizer import IGNORED, EncodedText, TargetTokenizer
from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.fuse import min_ce_choice
from fusion_plugins.core.fusion.pipeline import FusionPlan, fuse_texts, warm_up
from fusion_plugins.core.fusion.types import AnyRecord, Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, MismatchError
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.packed import warm_up as warm_up_store

#: most tokens of texts that are fused together, unless one alone has more
GROUP_TOKENS = 4096
#: bytes of the id, spans, trained ranges and one (0: all spans are), bytes per width
_HEADER = struct.Struct("<IIIB")


def pack_text(id: str, text: EncodedText) -> npt.NDArray[np.uint8]:
    """Return what a row needs besides its tokens, as bytes.

    Example:
        >>> arrays = np.arange(3, dtype=np.int32), np.array([1, 3, 300], np.int32), np.array([[0, 300]], np.int32)
        >>> tokens = TokenizedText(*arrays, np.array([True, False, True]))
        >>> packed = pack_text("a", EncodedText(tokens, tokens.input_ids))
        >>> id, text = unpack_text(packed, tokens.input_ids, tokens.input_ids)
        >>> id, text.tokens.ends.tolist(), text.tokens.spans.tolist(), text.tokens.exact.tolist(), text.trained
        ('a', [1, 3, 300], [[0, 300]], [True, False, True], None)
    """
    tokens, name = text.tokens, id.encode()
    widths = np.diff(tokens.ends, prepend=np.int32(0))
    widths = widths.astype(np.min_scalar_type(int(widths.max(initial=0))))
    trained = np.empty((0, 2), np.int32) if text.trained is None else text.trained
    header = _HEADER.pack(
        len(name), len(tokens.spans), 0 if text.trained is None else 1 + len(trained), widths.itemsize
    )
    parts = (tokens.spans.astype("<i4"), trained.astype("<i4"), widths, np.packbits(tokens.exact))
    return np.frombuffer(b"".join([header, name, *(part.tobytes() for part in parts)]), np.uint8)


def unpack_text(packed: npt.ArrayLike, input_ids: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[str, EncodedText]:
    """Return the id of a text and the text as the target reads it; the inverse of :func:`pack_text`."""
    data = np.asarray(packed, np.uint8).tobytes()
    ids = np.asarray(input_ids, np.int32)
    n_name, n_spans, n_trained, width = _HEADER.unpack_from(data)
    place = _HEADER.size + n_name
    name = data[_HEADER.size : place].decode()

    def take(count: int, dtype: str) -> npt.NDArray[Any]:
        nonlocal place
        found = np.frombuffer(data, dtype, count, place)
        place += found.nbytes
        return found

    spans = take(2 * n_spans, "<i4").reshape(-1, 2)
    trained = take(2 * (n_trained - 1), "<i4").reshape(-1, 2) if n_trained else None
    ends = np.cumsum(take(len(ids), f"<u{width}"), dtype=np.int32)
    exact = np.unpackbits(take((len(ids) + 7) // 8, "u1"), count=len(ids)).astype(np.bool_)
    return name, EncodedText(TokenizedText(ids, ends, spans, exact), np.asarray(labels, np.int32), trained)


@dataclass(frozen=True)
class TextFuser:
    """Fuses texts by their ids; can be pickled and forked.

    Attributes:
        plan: core's plan.
        stores: one per source, in the order of the plan.
    """

    plan: FusionPlan
    stores: Sequence[Store]

    def fuse(
        self,
        ids: Sequence[str],
        texts: Sequence[EncodedText],
        *,
        counted: Sequence[bool] | None = None,
        on_unusable: str = "raise",
        types: tuple[npt.DTypeLike, npt.DTypeLike] = (np.int32, np.float32),
    ) -> tuple[list[Fused], dict[int, AlignmentError], FusionReport]:
        """Fuse texts.

        Args:
            ids: of the texts, in the stores.
            texts: as the target reads them.
            counted: texts of which all sources are counted in the report; all by default. Of the others, only what is
                needed is read and projected.
            on_unusable: ``raise``, or ``skip`` a text that a store was captured from another version of.
            types: of the ids and the log-probabilities that are returned.

        Returns:
            The distributions, empty where nothing is trained on; number of a skipped text -> why; and the counters.

        Raises:
            AlignmentError: a store was captured from another text.
        """
        count = [True] * len(ids) if counted is None else list(counted)
        fused: list[Fused] = []
        unusable: dict[int, AlignmentError] = {}
        report = FusionReport()
        for first, stop in _groups([len(text.labels) for text in texts]):
            own = slice(first, stop)
            found, part = fuse_texts(
                self.plan,
                [text.tokens for text in texts[own]],
                list(zip(*map(self._records, ids[own], count[own]), strict=True)),
                [text.trained for text in texts[own]],
                counted=count[own],
                on_unusable=on_unusable,
            )
            # A label that is not trained on (a masked end of turn) has no distribution either.
            empty = ~np.concatenate(
                [np.append(text.labels[1:] != IGNORED, [False])[: len(text.labels)] for text in texts[own]]
            )
            found.ids[empty], found.logprobs[empty] = -1, -np.inf
            numbers = found.ids.astype(types[0], copy=False), found.logprobs.astype(types[1], copy=False)
            columns = (*numbers, found.kept.astype(np.float16), found.source)
            fused += [Fused(*each) for each in zip(*(np.split(c, found.offsets[1:-1]) for c in columns), strict=True)]
            unusable |= {first + number: error for number, error in found.unusable.items()}
            report = report + part
        return fused, unusable, report

    def _records(self, id: str, counted: bool) -> list[AnyRecord]:
        """Return what each source says about a text; of those that will not be chosen, if that is known, their text."""
        if counted or not self.plan.chooses_by_text or len(self.stores) == 1:
            return [store[id] for store in self.stores]
        # Where sources have read different parts of the text they are measured anew, and another one may be chosen.
        best = min_ce_choice([self.plan.metric(store.cross_entropies(id)) for store in self.stores])
        return [store[id] if s == best else store.lazy(id) for s, store in enumerate(self.stores)]

    def compare(self, id: str, text: EncodedText) -> None:
        """Compare a text with what the stores were captured from.

        Raises:
            AlignmentError: one was captured from another text.
        """
        for source, store in zip(self.plan.sources, self.stores, strict=True):
            try:
                common_text(
                    _without_entries(id, store.text(id)),
                    text.tokens,
                    source.projector.source_bytes,
                    source.projector.target_bytes,
                )
            except AlignmentError as error:
                raise AlignmentError(f"source {source.name!r}: {error}") from error

    def __call__(self, rows: Sequence[Mapping[str, Any]], packed: Sequence[npt.ArrayLike]) -> list[Fused]:
        """Return the distributions of prepared rows.

        Raises:
            MismatchError: a store has changed since the rows were prepared.
        """
        named = [unpack_text(data, row["input_ids"], row["labels"]) for row, data in zip(rows, packed, strict=True)]
        try:
            ids, texts = [id for id, _ in named], [text for _, text in named]
            return self.fuse(ids, texts, counted=[False] * len(ids))[0]
        except (AlignmentError, KeyError) as error:
            raise MismatchError(
                f"{error}. The rows were prepared from other stores than these: prepare the dataset again."
            ) from error


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut texts into groups of some thousand tokens, so that their arrays stay in the processor's cache."""
    first, tokens = 0, 0
    for number, length in enumerate(lengths):
        if tokens and tokens + length > GROUP_TOKENS:
            yield first, number
            first, tokens = number, 0
        tokens += length
    if first < len(lengths):
        yield first, len(lengths)


def _without_entries(id: str, text: TokenizedText) -> Record:
    """Return the record of a text of which only the text is known."""
    none = np.empty((len(text.input_ids), 0))
    unknown = np.full(len(text.input_ids), np.nan, np.float32)
    topk = TopK(none.astype(np.int32), none.astype(np.float32), unknown)
    return Record(id, text, topk, unknown, float("nan"), float("nan"))


def text_fuser(tokenizer: Any, block: FusionBlock) -> TextFuser:
    """Return what fuses the rows of a run; made once per tokenizer and block.

    Raises:
        StoreError: a store is missing or damaged.
    """
    return _text_fuser(tokenizer, block.model_dump_json())


@lru_cache(maxsize=1)
def _text_fuser(tokenizer: Any, block_json: str) -> TextFuser:
    block = FusionBlock.model_validate_json(block_json)
    stores = [open_store(source.store) for source in block.sources]
    warm_up()
    warm_up_store()
    return TextFuser(make_plan(block, stores, TargetTokenizer.of(tokenizer, {}), _no_counts), stores)


def _no_counts(stores: list[Store]) -> list[AlignmentCounts]:
    raise AssertionError("maps that go by counts are refused with fusion.prepared: stores")
