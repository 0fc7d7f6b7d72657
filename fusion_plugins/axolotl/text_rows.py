"""Rows that hold no distributions: which text they are, and the fusion of that text while the model trains.

With ``fusion.prepared: stores`` a prepared row has the plain columns and one more, about a byte per token: the id of
its text, which sources teach it, and where the target's tokens end in it. The loader's workers read the records of the
stores by that id and fuse them when a batch is made. Another rule, map or width then needs no new preparation.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import SAMPLED_LOGPROB, Fused, TokenChunks
from fusion_plugins.axolotl.fusion_losses import cuts_chunks
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.target_tokenizer import IGNORED, EncodedText, TargetTokenizer
from fusion_plugins.core.arrays import BoolArray, FloatArray
from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.chunk_routing import as_taught, cut_routed
from fusion_plugins.core.fusion.common_text import common_text
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.fuse import min_ce_choice
from fusion_plugins.core.fusion.pipeline import FusionPlan, warm_up
from fusion_plugins.core.fusion.routing import Route, fuse_routed, routed_plan, taught_positions
from fusion_plugins.core.fusion.types import AnyRecord, FusedTexts, Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, MismatchError
from fusion_plugins.store import Store, open_store
from fusion_plugins.store.packed import warm_up as warm_up_store

#: most tokens of texts that are fused together, unless one alone has more
GROUP_TOKENS = 1 << 14
#: bytes of the id, spans, trained ranges and one (0: all spans are), bytes per width, bytes of the domain, sources
_HEADER = struct.Struct("<IIIBHH")


def pack_text(id: str, text: EncodedText, route: Route) -> npt.NDArray[np.uint8]:
    """Return what a row needs besides its tokens, as bytes.

    Example:
        >>> arrays = np.arange(3, dtype=np.int32), np.array([1, 3, 300], np.int32), np.array([[0, 300]], np.int32)
        >>> tokens = TokenizedText(*arrays, np.array([True, False, True]))
        >>> packed = pack_text("a", EncodedText(tokens, tokens.input_ids), Route((0, 2), "math"))
        >>> id, text, route = unpack_text(packed, tokens.input_ids, tokens.input_ids)
        >>> id, text.tokens.ends.tolist(), text.tokens.spans.tolist(), text.tokens.exact.tolist(), text.trained
        ('a', [1, 3, 300], [[0, 300]], [True, False, True], None)
        >>> route
        Route(sources=(0, 2), domain='math')
    """
    tokens, name, domain = text.tokens, id.encode(), route.domain.encode()
    widths = np.diff(tokens.ends, prepend=np.int32(0))
    widths = widths.astype(np.min_scalar_type(int(widths.max(initial=0))))
    trained = np.empty((0, 2), np.int32) if text.trained is None else text.trained
    header = _HEADER.pack(
        *(len(name), len(tokens.spans), 0 if text.trained is None else 1 + len(trained), widths.itemsize),
        *(len(domain), len(route.sources)),
    )
    numbers = np.array(route.sources, "<u2")
    parts = (numbers, tokens.spans.astype("<i4"), trained.astype("<i4"), widths, np.packbits(tokens.exact))
    return np.frombuffer(b"".join([header, name, domain, *(part.tobytes() for part in parts)]), np.uint8)


def unpack_text(
    packed: npt.ArrayLike, input_ids: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[str, EncodedText, Route]:
    """Return the id of a text, the text as the target reads it, and its route; the inverse of :func:`pack_text`."""
    data = np.asarray(packed, np.uint8).tobytes()
    ids = np.asarray(input_ids, np.int32)
    n_name, n_spans, n_trained, width, n_domain, n_sources = _HEADER.unpack_from(data)
    place = _HEADER.size + n_name
    name = data[_HEADER.size : place].decode()
    domain, place = data[place : place + n_domain].decode(), place + n_domain

    def take(count: int, dtype: str) -> npt.NDArray[Any]:
        nonlocal place
        found = np.frombuffer(data, dtype, count, place)
        place += found.nbytes
        return found

    route = Route(tuple(take(n_sources, "<u2").tolist()), domain)
    spans = take(2 * n_spans, "<i4").reshape(-1, 2)
    trained = take(2 * (n_trained - 1), "<i4").reshape(-1, 2) if n_trained else None
    ends = np.cumsum(take(len(ids), f"<u{width}"), dtype=np.int32)
    exact = np.unpackbits(take((len(ids) + 7) // 8, "u1"), count=len(ids)).astype(np.bool_)
    return name, EncodedText(TokenizedText(ids, ends, spans, exact), np.asarray(labels, np.int32), trained), route


@dataclass(frozen=True)
class TextFuser:
    """Fuses texts by their ids; can be pickled and forked.

    Attributes:
        plan: core's plan.
        stores: one per source, in the order of the plan.
        chunks: the loss is one of chunks: texts are cut into them, and nothing is fused.
    """

    plan: FusionPlan
    stores: Sequence[Store]
    chunks: bool = False

    def fuse(
        self,
        ids: Sequence[str],
        texts: Sequence[EncodedText],
        routes: Sequence[Route],
        *,
        counted: Sequence[bool] | None = None,
        on_unusable: str = "raise",
        types: tuple[npt.DTypeLike, npt.DTypeLike] = (np.int32, np.float32),
    ) -> tuple[list[Fused] | list[TokenChunks], dict[int, AlignmentError], FusionReport]:
        """Fuse texts, or cut them into chunks.

        Args:
            ids: of the texts, in the stores.
            texts: as the target reads them.
            routes: which sources teach each of them; only their stores are read.
            counted: texts of which all sources are counted in the report; all by default. Of the others, only what is
                needed is read and projected.
            on_unusable: ``raise``, or ``skip`` a text that a store was captured from another version of.
            types: of the ids and the log-probabilities that are returned.

        Returns:
            The distributions or chunks, empty where nothing is trained on; number of a skipped text -> why; and the
            counters.

        Raises:
            AlignmentError: a store was captured from another text.
        """
        count = [True] * len(ids) if counted is None else list(counted)
        made: list[Any] = []
        unusable: dict[int, AlignmentError] = {}
        report = FusionReport()
        for own in _groups([len(text.labels) for text in texts]):
            parts, errors, counters = self._fuse(ids[own], texts[own], routes[own], count[own], on_unusable, types)
            unusable |= {len(made) + number: error for number, error in errors.items()}
            made += parts
            report = report + counters
        return made, unusable, report

    def _fuse(
        self,
        ids: Sequence[str],
        texts: Sequence[EncodedText],
        routes: Sequence[Route],
        counted: Sequence[bool],
        on_unusable: str,
        types: tuple[npt.DTypeLike, npt.DTypeLike],
    ) -> tuple[list[Fused] | list[TokenChunks], dict[int, AlignmentError], FusionReport]:
        records = list(zip(*map(self._records, ids, routes, counted), strict=True))
        # A label that is not trained on (a masked end of turn) has no distribution either.
        trained = [np.append(text.labels[1:] != IGNORED, False)[: len(text.labels)] for text in texts]
        if self.chunks:
            return self._cut(texts, records, trained, routes, on_unusable)
        found, report = fuse_routed(
            self.plan,
            [text.tokens for text in texts],
            records,
            [text.trained for text in texts],
            routes,
            counted=counted,
            on_unusable=on_unusable,
        )
        supervised = np.concatenate(trained)
        found.ids[~supervised], found.logprobs[~supervised] = -1, -np.inf
        report = replace(report, taught=self._taught(found, supervised, routes))
        numbers = found.ids.astype(types[0], copy=False), _of_type(found.logprobs, types[1])
        columns = (*numbers, found.kept.astype(np.float16), found.source)
        parts = zip(*(np.split(column, found.offsets[1:-1]) for column in columns), strict=True)
        return [Fused(*part) for part in parts], dict(found.unusable), report

    def _records(self, id: str, route: Route, counted: bool) -> list[AnyRecord | None]:
        """Return what each source of a route says about a text; of those that will not be taken, only its text."""
        stores = {number: self.stores[number] for number in route.sources}
        taken: int | None = None
        if len(stores) > 1 and not (counted or self.chunks) and routed_plan(self.plan, route).chooses_by_text:
            # Where sources have read different parts of the text they are measured anew, and another one may be taken.
            costs = [self.plan.metric(store.cross_entropies(id)) for store in stores.values()]
            taken = route.sources[int(min_ce_choice(costs))]
        found: list[AnyRecord | None] = [None] * len(self.stores)
        for number, store in stores.items():
            found[number] = store[id] if taken in (None, number) else store.lazy(id)
        return found

    def _taught(self, found: FusedTexts, supervised: BoolArray, routes: Sequence[Route]) -> dict[str, dict[str, int]]:
        names = [source.name for source in self.plan.sources]
        # Of a text that is left out no position is trained on.
        used = np.repeat([b not in found.unusable for b in range(len(routes))], np.diff(found.offsets))
        return taught_positions(found, supervised & used, names, [route.domain for route in routes])

    def _cut(
        self,
        texts: Sequence[EncodedText],
        records: Sequence[Sequence[Any]],
        labelled: Sequence[BoolArray],
        routes: Sequence[Route],
        on_unusable: str,
    ) -> tuple[list[TokenChunks], dict[int, AlignmentError], FusionReport]:
        found, counted = cut_routed(
            self.plan,
            [text.tokens for text in texts],
            records,
            labelled,
            [text.trained for text in texts],
            routes,
            on_unusable=on_unusable,
        )
        sampled = [text.sampled_or_unknown for text in texts]
        known = int((np.isfinite(np.concatenate(sampled)) & (found.place > 0)).sum())
        counted = replace(counted, sampled=known)
        report = FusionReport(
            texts=counted.texts,
            positions=counted.positions,
            fused_positions=counted.chunk_positions,
            taught=self._taught(as_taught(found), np.concatenate(labelled), routes),
            untaught=sum(not route.sources for route in routes),
            chunks=counted,
        )
        columns = (np.split(column, found.offsets[1:-1]) for column in (found.place, found.logprobs, found.source))
        rows = zip(*columns, strict=True)
        made = [TokenChunks(place, said, own, by) for (place, said, by), own in zip(rows, sampled, strict=True)]
        return made, dict(found.unusable), report

    def compare(self, id: str, text: EncodedText, route: Route) -> None:
        """Compare a text with what the stores of its route were captured from.

        Raises:
            AlignmentError: one was captured from another text.
        """
        for number in route.sources:
            source, store = self.plan.sources[number], self.stores[number]
            try:
                common_text(
                    _without_entries(id, store.text(id)),
                    text.tokens,
                    source.projector.source_bytes,
                    source.projector.target_bytes,
                )
            except AlignmentError as error:
                raise AlignmentError(f"source {source.name!r}: {error}") from error

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], packed: Sequence[npt.ArrayLike]
    ) -> list[Fused] | list[TokenChunks]:
        """Return the distributions or chunks of prepared rows.

        Raises:
            MismatchError: a store has changed since the rows were prepared.
        """
        named = [unpack_text(data, row["input_ids"], row["labels"]) for row, data in zip(rows, packed, strict=True)]
        try:
            ids, texts, routes = zip(*named, strict=True)
            if self.chunks:
                texts = tuple(map(_with_sampled, texts, rows))
            return self.fuse(ids, texts, routes, counted=[False] * len(ids))[0]
        except (AlignmentError, KeyError) as error:
            raise MismatchError(
                f"{error}. The rows were prepared from other stores than these: prepare the dataset again."
            ) from error


def _of_type(values: FloatArray, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return fractions in another type, with the bits that numpy gives them: torch takes a twentieth of the time."""
    found: npt.NDArray[Any] = torch.from_numpy(values).to(getattr(torch, np.dtype(dtype).name)).numpy()
    return found


def _groups(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut texts into groups, so that a call for each costs nothing beside its tokens, and its arrays little memory."""
    first, tokens = 0, 0
    for number, length in enumerate(lengths):
        if tokens and tokens + length > GROUP_TOKENS:
            yield slice(first, number)
            first, tokens = number, 0
        tokens += length
    if first < len(lengths):
        yield slice(first, len(lengths))


def _with_sampled(text: EncodedText, row: Mapping[str, Any]) -> EncodedText:
    return replace(text, sampled=np.asarray(row[SAMPLED_LOGPROB], np.float32))


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
    plan = make_plan(block, stores, TargetTokenizer.of(tokenizer, {}), _no_counts)
    return TextFuser(plan, stores, cuts_chunks(block))


def _no_counts(stores: list[Store]) -> list[AlignmentCounts]:
    raise AssertionError("maps that go by counts are refused with fusion.prepared: stores")
