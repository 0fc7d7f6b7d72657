"""The part of a text that two tokenizations have in common, checked byte by byte.

Chat templates may write the syntax around reasoning, answers and tool calls in different ways, leave an earlier
reasoning out or strip white space, and a text may have been cut to a maximum length. All leave parts that are the same
on both sides; alignment needs exactly those. Any other difference means that the two were not made from the same text,
and that is an error.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import IntArray, as_array
from fusion_plugins.core.fusion.flat import Texts, joined, starts_of
from fusion_plugins.core.fusion.record import cross_entropy
from fusion_plugins.core.fusion.types import AnyRecord
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError

_UNKNOWN, _SPACE = -1, ord(" ")
_CONTEXT = 24
Spelling = npt.NDArray[np.int16]
R = TypeVar("R", bound=AnyRecord)


def common_text(
    record: R, target: TokenizedText, source_bytes: TokenBytes, target_bytes: TokenBytes
) -> tuple[R, TokenizedText]:
    """Narrow the spans of both sides to the text that they have in common.

    The spans of a turn are syntax, part, syntax, part, ..., syntax. Syntax that differs is left out on both sides, and
    so is a part that only one side has. Spans that touch on both sides become one.

    The bytes of tokens whose length a normaliser changed are unknown and not compared. Characters that differ only by
    Unicode normalisation (NFKC), by case or by the kind of white space count as the same.

    Args:
        record: what a source said about a text.
        target: the target's tokens of the text.
        source_bytes: the source's vocabulary.
        target_bytes: the target's vocabulary.

    Returns:
        Both sides with (P, 2) spans that correspond by their number; unchanged where they are the same text.

    Raises:
        AlignmentError: the spans do not hold the same text; the message says where.
    """
    source = record.text
    source_spans, target_spans = _corresponding(record, target)
    left, right = _spell(source, source_bytes), _spell(target, target_bytes)
    kept: list[tuple[int, int, int, int]] = []
    spans = zip(source_spans.tolist(), target_spans.tolist(), _is_syntax(source_spans, target_spans), strict=True)
    for m, ((start, stop), (t_start, t_stop), syntax) in enumerate(spans):
        own, other = left[start:stop], right[t_start:t_stop]
        if syntax and not len(own):
            continue
        if len(own) != len(other) or _first_difference(own, other) >= 0:
            if syntax or _has_text(own) != _has_text(other):
                continue
            cut = _is_cut(source, source_bytes, stop) or _is_cut(target, target_bytes, t_stop)
            shift, t_shift, size = _common_part(record.id, m, own, other, cut)
            start, t_start = start + shift, t_start + t_shift
            stop, t_stop = start + size, t_start + size
        if kept and (start, t_start) == (kept[-1][1], kept[-1][3]):
            start, t_start = kept[-1][0], kept[-1][2]
            kept.pop()
        kept.append((start, stop, t_start, t_stop))
    pairs = np.array(kept, np.int32).reshape(-1, 4)
    if len(source.spans) == len(target.spans) and np.array_equal(
        pairs, np.concatenate([source.spans, target.spans], axis=1)
    ):
        return record, target
    return (
        replace(record, text=replace(source, spans=pairs[:, :2].copy())),
        replace(target, spans=pairs[:, 2:].copy()),
    )


def common_texts(
    source: Texts,
    target: Texts,
    records: Sequence[AnyRecord],
    targets: Sequence[TokenizedText],
    tokens: tuple[TokenBytes, TokenBytes],
) -> tuple[Texts, Texts, dict[int, AlignmentError]]:
    """Narrow the spans of B texts as :func:`common_text` does; texts whose parts are plainly the same take no Python.

    Args:
        source: the texts in the source's tokens.
        target: the texts in the target's tokens.
        records: the source's records of the same texts.
        targets: the target's tokens of the same texts.
        tokens: the source's and the target's vocabulary.

    Returns:
        Both sides with spans that correspond by their number, and number of a text -> why it is not the same on both
        sides. Such a text has no spans.
    """
    same, pairs, starts = _same_texts(source, target, *tokens)
    errors: dict[int, AlignmentError] = {}
    if not same.all():
        parts = [pairs[starts[b] : starts[b + 1]] for b in range(len(same))]
        for b in np.flatnonzero(~same).tolist():
            try:
                record, text = common_text(records[b], targets[b], *tokens)
            except AlignmentError as error:
                errors[b] = error
            else:
                parts[b] = np.concatenate([record.text.spans, text.spans], axis=1)
        pairs, starts = joined(parts, np.int32), starts_of(parts)
    return (
        source.with_spans(as_array(pairs[:, :2], np.int32), starts),
        target.with_spans(as_array(pairs[:, 2:], np.int32), starts),
        errors,
    )


def _corresponding(record: AnyRecord, target: TokenizedText) -> tuple[IntArray, IntArray]:
    """Return the spans of both sides that have the same numbers."""
    source_spans, target_spans = record.text.spans, target.spans
    if len(source_spans) == len(target_spans):
        return source_spans, target_spans
    # Stores of earlier versions have the answers alone: one span per turn, where there are three now.
    if 3 * len(source_spans) == len(target_spans) and _is_syntax(target_spans) == [True, False, True] * len(
        source_spans
    ):
        return source_spans, target_spans[1::3]
    raise AlignmentError(
        f"record {record.id!r} has {len(source_spans)} supervised spans, the target's text {len(target_spans)}: "
        "they are not the same chat. Capture the store again from the texts that you train on."
    )


def _is_syntax(*sides: IntArray) -> list[bool]:
    """Whether each span is what a template writes around the parts of a turn. A span that touches no other is not."""
    size = len(sides[0])
    first = [m for m in range(size) if not m or any(spans[m, 0] != spans[m - 1, 1] for spans in sides)]
    lengths = np.diff([*first, size])
    return [length > 1 and at % 2 == 0 for length in lengths.tolist() for at in range(length)]


def _has_text(spelling: Spelling) -> bool:
    return bool(_text(spelling).strip())


def comparable(records: Sequence[AnyRecord], common: Sequence[tuple[AnyRecord, TokenizedText]]) -> list[AnyRecord]:
    """Measure the cross-entropies of several sources over the same bytes.

    A source whose record was cut, or whose template leaves a part out, has a cross-entropy over other bytes, and
    comparing it with a full one would be unfair. Sources without a supervised token have no cross-entropy, and do not
    limit the others.

    Args:
        records: what S sources said about one text.
        common: what :func:`common_text` made of each of them and the target.

    Returns:
        The records, with new cross-entropies where a source has supervised bytes that another, or the target, has not.
    """
    covered = [
        text.spans for record, (_, text) in zip(records, common, strict=True) if not np.isnan(record.ce_per_byte)
    ]
    if not covered:
        return list(records)
    shared = reduce(intersection, covered)
    return [_measured(record, *sides, shared) for record, sides in zip(records, common, strict=True)]


def intersection(left: IntArray, right: IntArray) -> IntArray:
    """Return the ranges, (N, 2) int32, that two lists of ranges have in common; a range without bytes is one too."""
    pairs = [
        (max(a, c), min(b, d))
        for a, b in left.tolist()
        for c, d in right.tolist()
        if max(a, c) < min(b, d) or (max(a, c) == min(b, d) and (a == b or c == d))
    ]
    return np.array(pairs, np.int32).reshape(-1, 2)


def narrowed(source: Texts, target: Texts, ranges: Sequence[IntArray | None]) -> tuple[Texts, Texts]:
    """Narrow the spans of B texts as :func:`within` does, to (R, 2) ranges per text; None leaves a text as it is."""
    everything = np.array([[0, np.iinfo(np.int32).max]], np.int32)
    given = [everything if own is None else own for own in ranges]
    spans, t_spans, starts = _narrow(
        source.spans, target.spans, target.span_starts, joined(given, np.int32), starts_of(given)
    )
    return source.with_spans(spans, starts), target.with_spans(t_spans, starts)


def within(record: R, target: TokenizedText, ranges: IntArray) -> tuple[R, TokenizedText]:
    """Narrow spans that correspond by their number to some ranges of bytes of the target's text, (R, 2)."""
    own, other = [], []
    for span, t_span in zip(record.text.spans, target.spans, strict=True):
        inner = intersection(t_span[None], ranges)
        other.append(inner)
        own.append(inner + (span[0] - t_span[0]))
    empty = np.empty((0, 2), np.int32)
    text = replace(record.text, spans=np.concatenate([empty, *own]).astype(np.int32))
    return replace(record, text=text), replace(target, spans=np.concatenate([empty, *other]).astype(np.int32))


def _measured(record: AnyRecord, own: AnyRecord, target: TokenizedText, shared: IntArray) -> AnyRecord:
    """Measure one source over some ranges of bytes of the target's text."""
    text = within(own, target, shared)[0].text
    if np.diff(text.spans).sum() == np.diff(record.text.spans).sum():
        return record
    ce_per_token, ce_per_byte = cross_entropy(text, record.topk.token_logprobs)
    return replace(record, ce_per_token=ce_per_token, ce_per_byte=ce_per_byte)


def _spell(text: TokenizedText, tokens: TokenBytes) -> Spelling:
    """Return the text's bytes as far as the tokens tell them, int16, -1 where they do not."""
    arrays = as_array(text.input_ids, np.int32), as_array(text.ends, np.int32), as_array(text.exact, np.bool_)
    size = max(int(text.ends[-1]) if len(text.ends) else 0, int(text.spans.max(initial=0)))
    return _fill(*arrays, tokens, np.full(size, _UNKNOWN, np.int16))


@compiled
def _fill(ids, ends, exact, tokens, out):  # type: ignore[no-untyped-def]
    flat, starts, special = tokens.flat, tokens.starts, tokens.special
    for t in range(len(ids)):
        begin = ends[t - 1] if t else 0
        if ids[t] >= len(special) or not exact[t] or (t > 0 and not exact[t - 1]):
            continue
        if special[ids[t]]:  # an unknown character, or text that was dropped, is not spelled by a name
            continue
        start, stop = starts[ids[t]], starts[ids[t] + 1]
        # One byte more than the text has is a space that the tokenizer put before it.
        if stop - start == ends[t] - begin + 1 and flat[start] == _SPACE:
            start += 1
        if stop - start == ends[t] - begin:
            for k in range(stop - start):
                out[begin + k] = flat[start + k]
    return out


@compiled
def _first_difference(left, right):  # type: ignore[no-untyped-def]
    for at in range(min(len(left), len(right))):
        if left[at] != right[at] and left[at] >= 0 and right[at] >= 0:
            return at
    return -1


@compiled
def _narrow(spans, t_spans, span_starts, ranges, range_starts):  # type: ignore[no-untyped-def]
    """Intersect the target's spans of each text with its ranges, and cut the source's by as much."""
    n, most = 0, 0
    for b in range(len(span_starts) - 1):
        most += (span_starts[b + 1] - span_starts[b]) * (range_starts[b + 1] - range_starts[b])
    out, t_out = np.empty((most, 2), np.int32), np.empty((most, 2), np.int32)
    starts = np.zeros(len(span_starts), np.int64)
    for b in range(len(span_starts) - 1):
        for m in range(span_starts[b], span_starts[b + 1]):
            for r in range(range_starts[b], range_starts[b + 1]):
                begin, end = max(t_spans[m, 0], ranges[r, 0]), min(t_spans[m, 1], ranges[r, 1])
                empty = t_spans[m, 0] == t_spans[m, 1] or ranges[r, 0] == ranges[r, 1]
                if begin < end or (begin == end and empty):
                    t_out[n] = begin, end
                    out[n] = begin + spans[m, 0] - t_spans[m, 0], end + spans[m, 0] - t_spans[m, 0]
                    n += 1
        starts[b + 1] = n
    return out[:n], t_out[:n], starts


@compiled
def _same_texts(source, target, s_tokens, t_tokens):  # type: ignore[no-untyped-def]
    """Compare the spans of each text byte by byte, leave out syntax that differs, join spans that touch on both sides.

    Returns:
        (B,) bool, whether all parts are the same as they are; the spans of these texts, (M, 4) int32, of both sides;
        and where those of each text begin, (B + 1,).
    """
    n_texts = len(source.starts) - 1
    same, starts = np.ones(n_texts, np.bool_), np.zeros(n_texts + 1, np.int64)
    pairs, n = np.empty((len(target.spans), 4), np.int32), 0
    for b in range(n_texts):
        s_spans = source.spans[source.span_starts[b] : source.span_starts[b + 1]]
        t_spans = target.spans[target.span_starts[b] : target.span_starts[b + 1]]
        own, other = slice(source.starts[b], source.starts[b + 1]), slice(target.starts[b], target.starts[b + 1])
        first = n
        same[b] = len(s_spans) == len(t_spans)
        if same[b]:
            left = _spelled(source.ids[own], source.ends[own], source.exact[own], s_spans, s_tokens)
            right = _spelled(target.ids[other], target.ends[other], target.exact[other], t_spans, t_tokens)
            at = 0
            for m in range(len(s_spans)):
                (start, stop), (t_start, t_stop) = s_spans[m], t_spans[m]
                at = at + 1 if _touch(s_spans, t_spans, m) else 0
                syntax = at % 2 == 0 and (at > 0 or _touch(s_spans, t_spans, m + 1))  # as in `_is_syntax`
                if syntax and stop == start:
                    continue
                if stop - start != t_stop - t_start or _differ(left[start:stop], right[t_start:t_stop]):
                    if syntax:
                        continue
                    same[b] = False
                    n = first
                    break
                if n > first and pairs[n - 1, 1] == start and pairs[n - 1, 3] == t_start:
                    n -= 1
                    start, t_start = pairs[n, 0], pairs[n, 2]
                pairs[n] = start, stop, t_start, t_stop
                n += 1
        starts[b + 1] = n
    return same, pairs[:n], starts


@compiled
def _touch(spans, t_spans, m):  # type: ignore[no-untyped-def]
    """Whether span ``m`` begins where the one before it ends, on both sides."""
    if not 0 < m < len(spans):
        return False
    return spans[m, 0] == spans[m - 1, 1] and t_spans[m, 0] == t_spans[m - 1, 1]


@compiled
def _spelled(ids, ends, exact, spans, tokens):  # type: ignore[no-untyped-def]
    size = ends[-1] if len(ends) else np.int32(0)
    for m in range(len(spans)):
        size = max(size, spans[m, 1])
    return _fill(ids, ends, exact, tokens, np.full(size, np.int16(_UNKNOWN), np.int16))


@compiled
def _differ(left, right):  # type: ignore[no-untyped-def]
    return _first_difference(left, right) >= 0


def _is_cut(text: TokenizedText, tokens: TokenBytes, stop: int) -> bool:
    """Whether the text ends at ``stop`` without a special token that says so."""
    if not len(text.ends) or stop < int(text.ends[-1]):
        return False
    last = int(text.input_ids[-1])
    return not (last < len(tokens.special) and tokens.special[last])


def _common_part(id: str, m: int, left: Spelling, right: Spelling, cut: bool) -> tuple[int, int, int]:
    """Return how many bytes to skip on each side, and the length of what follows on both."""
    shifts = _shifts(left, right)
    for shift, t_shift in shifts:
        own, other = left[shift:], right[t_shift:]
        size = min(len(own), len(other))
        if _same(own[:size], other[:size]) and (cut or _is_blank(own[size:]) and _is_blank(other[size:])):
            return shift, t_shift, size
    shift, t_shift = shifts[-1]
    own, other = left[shift:], right[t_shift:]
    at = int(_first_difference(own, other))
    raise AlignmentError(_message(id, m, at if at >= 0 else min(len(own), len(other)), own, other))


def _shifts(left: Spelling, right: Spelling) -> list[tuple[int, int]]:
    """Return how many bytes each side may have to skip, so that white space that a template stripped is left out."""
    spaces = _leading_space(left), _leading_space(right)
    if left[: spaces[0]].tolist() == right[: spaces[1]].tolist():
        spaces = 0, 0
    longer = len(left) - len(right)
    if not longer:
        return [(0, 0), spaces]
    # Bytes at the start that no token spells may be white space that a normaliser dropped.
    unknown = max(longer, 0), max(-longer, 0)
    dropped = _is_blank(left[: unknown[0]]) and _is_blank(right[: unknown[1]])
    return [spaces, *([unknown] if dropped and spaces == (0, 0) else []), spaces]


def _same(left: Spelling, right: Spelling) -> bool:
    return int(_first_difference(left, right)) < 0 or _folded(left, right) == _folded(right, left)


def _is_blank(spelling: Spelling) -> bool:
    """Whether there is nothing but white space, as far as it is known."""
    return not _text(spelling[spelling >= 0]).strip()


def _leading_space(spelling: Spelling) -> int:
    text = _text(spelling)
    return len(text[: len(text) - len(text.lstrip())].encode())


def _folded(spelling: Spelling, other: Spelling) -> str:
    """Return the letters that are known on both sides, in one form; normalisers change and drop the rest."""
    known = np.where((spelling >= 0) & (other >= 0), spelling, ord("?"))
    text = unicodedata.normalize("NFKC", _text(known)).casefold()
    return "".join(letter for letter in text if unicodedata.category(letter)[0] not in "ZC")


def _text(spelling: Spelling) -> str:
    return np.where(spelling >= 0, spelling, ord("?")).astype(np.uint8).tobytes().decode("utf-8", "replace")


def _message(id: str, m: int, at: int, left: Spelling, right: Spelling) -> str:
    window = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return (
        f"record {id!r} is of another text than the target's: at byte {at} of supervised span {m} the source continues "
        f"{_text(left[window])!r}, the target {_text(right[window])!r}. Capture the store again from the texts "
        "that you train on."
    )
