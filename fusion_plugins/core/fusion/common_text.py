"""The part of a text that two tokenizations have in common, checked byte by byte.

Chat templates may strip white space around a message, and a text may have been cut to a maximum length. Both leave a
part of each span that is the same on both sides; alignment needs exactly that part. Any other difference means that the
two were not made from the same text, and that is an error.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import IntArray, as_array
from fusion_plugins.core.fusion.record import cross_entropy
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError

_UNKNOWN = -1
_CONTEXT = 24
Spelling = npt.NDArray[np.int16]


def common_text(
    record: Record, target: TokenizedText, source_bytes: TokenBytes, target_bytes: TokenBytes
) -> tuple[Record, TokenizedText]:
    """Narrow the spans of both sides to the text that they have in common.

    The bytes of tokens whose length a normaliser changed are unknown and not compared. Characters that differ only by
    Unicode normalisation (NFKC), by case or by the kind of white space count as the same.

    Args:
        record: what a source said about a text.
        target: the target's tokens of the text.
        source_bytes: the source's vocabulary.
        target_bytes: the target's vocabulary.

    Returns:
        Both sides, with narrower spans where white space was stripped or a text was cut; unchanged otherwise.

    Raises:
        AlignmentError: the spans do not hold the same text; the message says where.
    """
    source = record.text
    if len(source.spans) != len(target.spans):
        raise AlignmentError(
            f"record {record.id!r} has {len(source.spans)} supervised spans, the target's text {len(target.spans)}: "
            "they are not the same chat. Capture the store again from the texts that you train on."
        )
    left, right = _spell(source, source_bytes), _spell(target, target_bytes)
    source_spans, target_spans = source.spans.copy(), target.spans.copy()
    narrowed = False
    for m, ((start, stop), (t_start, t_stop)) in enumerate(
        zip(source.spans.tolist(), target.spans.tolist(), strict=True)
    ):
        same_size = stop - start == t_stop - t_start
        if same_size and _first_difference(left[start:stop], right[t_start:t_stop]) < 0:
            continue
        narrowed = True
        shift, t_shift, size = _common_part(
            record.id,
            m,
            left[start:stop],
            right[t_start:t_stop],
            _is_cut(source, source_bytes, stop) or _is_cut(target, target_bytes, t_stop),
        )
        source_spans[m] = start + shift, start + shift + size
        target_spans[m] = t_start + t_shift, t_start + t_shift + size
    if not narrowed:
        return record, target
    return replace(record, text=replace(source, spans=source_spans)), replace(target, spans=target_spans)


def comparable(records: Sequence[Record], common: Sequence[tuple[Record, TokenizedText]]) -> list[Record]:
    """Measure the cross-entropies of several sources over the same bytes.

    A source whose record was cut has a cross-entropy over fewer bytes, and comparing it with a full one would be
    unfair. Sources without a supervised token have no cross-entropy, and do not limit the others.

    Args:
        records: what S sources said about one text.
        common: what :func:`common_text` made of each of them and the target.

    Returns:
        The records, with new cross-entropies where a source has read supervised bytes that another has not.
    """
    if all(own is record for record, (own, _) in zip(records, common, strict=True)):
        return list(records)
    read = [text.spans for record, (_, text) in zip(records, common, strict=True) if not np.isnan(record.ce_per_byte)]
    if not read:
        return list(records)
    start, stop = np.max(read, axis=0)[:, 0], np.min(read, axis=0)[:, 1]
    return [_measured(record, *sides, start, stop) for record, sides in zip(records, common, strict=True)]


def _measured(record: Record, own: Record, target: TokenizedText, start: IntArray, stop: IntArray) -> Record:
    """Measure one source over the bytes from ``start`` to ``stop`` of the target's text, both (M,)."""
    shift = own.text.spans[:, 0] - target.spans[:, 0]
    spans = np.stack([start + shift, np.maximum(start, stop) + shift], axis=1).astype(np.int32)
    if np.array_equal(spans, record.text.spans):
        return record
    ce_per_token, ce_per_byte = cross_entropy(replace(record.text, spans=spans), record.topk.token_logprobs)
    return replace(record, ce_per_token=ce_per_token, ce_per_byte=ce_per_byte)


def _spell(text: TokenizedText, tokens: TokenBytes) -> Spelling:
    """Return the text's bytes as far as the tokens tell them, int16, -1 where they do not."""
    arrays = as_array(text.input_ids, np.int32), as_array(text.ends, np.int32), as_array(text.exact, np.bool_)
    size = max(int(text.ends[-1]) if len(text.ends) else 0, int(text.spans.max(initial=0)))
    return _fill(*arrays, tokens, np.full(size, _UNKNOWN, np.int16))


@compiled
def _fill(ids, ends, exact, tokens, out):  # type: ignore[no-untyped-def]
    for t in range(len(ids)):
        begin = ends[t - 1] if t else 0
        if ids[t] + 1 >= len(tokens.starts) or not exact[t] or (t > 0 and not exact[t - 1]):
            continue
        start, stop = tokens.starts[ids[t]], tokens.starts[ids[t] + 1]
        if stop - start == ends[t] - begin:
            for k in range(stop - start):
                out[begin + k] = tokens.flat[start + k]
    return out


@compiled
def _first_difference(left, right):  # type: ignore[no-untyped-def]
    for at in range(min(len(left), len(right))):
        if left[at] != right[at] and left[at] >= 0 and right[at] >= 0:
            return at
    return -1


def _is_cut(text: TokenizedText, tokens: TokenBytes, stop: int) -> bool:
    """Whether the text ends at ``stop`` without a special token that says so."""
    if not len(text.ends) or stop < int(text.ends[-1]):
        return False
    last = int(text.input_ids[-1])
    return not (last < len(tokens.special) and tokens.special[last])


def _common_part(id: str, m: int, left: Spelling, right: Spelling, cut: bool) -> tuple[int, int, int]:
    """Return how many bytes to skip on each side, and the length of what follows on both."""
    shift, t_shift = _leading_space(left), _leading_space(right)
    if left[:shift].tolist() == right[:t_shift].tolist():
        shift = t_shift = 0
    left, right = left[shift:], right[t_shift:]
    size = min(len(left), len(right))
    at = int(_first_difference(left, right))
    if at >= 0 and _folded(left[:size], right[:size]) != _folded(right[:size], left[:size]):
        raise AlignmentError(_message(id, m, at, left, right))
    rest = _text(left[size:]) + _text(right[size:])
    if rest.strip() and not cut:
        raise AlignmentError(_message(id, m, size, left, right))
    return shift, t_shift, size


def _leading_space(spelling: Spelling) -> int:
    text = _text(spelling)
    return len(text[: len(text) - len(text.lstrip())].encode())


def _folded(spelling: Spelling, other: Spelling) -> str:
    known = np.where((spelling >= 0) & (other >= 0), spelling, ord("?"))
    text = "".join(" " if character.isspace() else character for character in _text(known))
    return unicodedata.normalize("NFKC", text).casefold()


def _text(spelling: Spelling) -> str:
    return np.where(spelling >= 0, spelling, ord("?")).astype(np.uint8).tobytes().decode("utf-8", "replace")


def _message(id: str, m: int, at: int, left: Spelling, right: Spelling) -> str:
    window = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return (
        f"record {id!r} is of another text than the target's: at byte {at} of supervised span {m} the source continues "
        f"{_text(left[window])!r}, the target {_text(right[window])!r}. Capture the store again from the texts "
        "that you train on."
    )
