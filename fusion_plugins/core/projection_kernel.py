"""The compiled part of the projection; :mod:`fusion_plugins.core.project` says what it does and why."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.jit import compiled
from fusion_plugins.core.token_bytes import is_prefix
from fusion_plugins.core.types import BoolArray, FloatArray, IntArray

__all__ = ["COUNTS", "MASSES", "ROW_KINDS", "Mapping", "SourceRows", "TargetRows", "places", "project_rows"]

# What becomes of a row that has a source row: up to UNCHECKED it is used, the others are masked.
ONE_TO_ONE, ONE_TO_MANY, MANY_TO_ONE, CROSSING, SPECIAL, UNCHECKED = range(6)
OTHER_BYTES, REACHES_OUT, OTHER_SPECIAL, SOURCE_ENDS, LOW_MASS = range(6, 11)
# What becomes of a candidate.
EXACT, EDITED, UNMAPPED = range(11, 14)
COUNTS = (
    "one_to_one", "one_to_many", "many_to_one", "crossing", "special", "unchecked", "other_bytes", "reaches_out",
    "other_special", "source_ends", "low_mass", "exact", "edited", "unmapped",
)  # fmt: skip
ROW_KINDS = COUNTS[:EXACT]
GOLD_MASS, EXACT_MASS, EDITED_MASS, UNMAPPED_MASS, PREFIX_MASS, OUTSIDE_MASS = range(6)
MASSES = ("gold_mass", "exact_mass", "edited_mass", "unmapped_mass", "prefix_mass", "outside_mass")


class SourceRows(NamedTuple):
    """A record's arrays.

    ids (U,), ends (U,), place (U,) of each row (:func:`places`), topk_ids (U, K), topk_logprobs (U, K), gold (U,)
    log-probabilities of the next tokens.
    """

    ids: IntArray
    ends: IntArray
    place: npt.NDArray[np.int64]
    topk_ids: IntArray
    topk_logprobs: FloatArray
    gold: FloatArray


class TargetRows(NamedTuple):
    """The target's arrays: ids (T,), ends (T,), place (T,) and left (T,) of each row (:func:`places`)."""

    ids: IntArray
    ends: IntArray
    place: npt.NDArray[np.int64]
    left: IntArray


class Mapping(NamedTuple):
    """Source id -> target id (W,), whether that is exact (W,), and the longest target token at its beginning (W,)."""

    target_ids: IntArray
    exact: BoolArray
    begins: IntArray


@compiled
def project_rows(rows, source, target, mapping, s_tokens, t_tokens, chain, min_mass):  # type: ignore[no-untyped-def]
    """Project every usable row.

    Returns:
        ids (T, K + 1), logprobs (T, K + 1), kept mass (T,), log-probability of the label (T,), counts, masses.
    """
    n, width = len(target.ids), source.topk_ids.shape[1] + 1
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    kept, gold = np.zeros(n), np.full(n, -np.inf, np.float32)
    counts, masses = np.zeros(len(COUNTS), np.int64), np.zeros(len(MASSES))
    held = np.zeros(len(t_tokens.special))
    row_ids, row_masses = np.empty(width, np.int32), np.zeros(len(MASSES))
    for t in range(n - 1):
        u = rows[t]
        if u < 0:
            continue
        kind, last, logp = _kind(source, u, target, t, mapping, s_tokens, t_tokens)
        if kind <= UNCHECKED:
            row_masses[:] = 0.0
            size = _candidates(
                source, u, target.ids[t + 1], kind, last, logp, mapping, s_tokens, t_tokens, chain, held, row_ids,
                counts, row_masses,
            )  # fmt: skip
            total = _write(row_ids[:size], held, ids[t], logprobs[t])
            if total > 0.0 and total >= min_mass:
                kept[t] = total
                if target.ids[t + 1] < len(held) and held[target.ids[t + 1]] > 0.0:
                    gold[t] = np.log(held[target.ids[t + 1]])
                masses += row_masses
            else:
                kind = LOW_MASS
                ids[t], logprobs[t] = -1, -np.inf
            held[row_ids[:size]] = 0.0
        counts[kind] += 1
    return ids, logprobs, kept, gold, counts, masses


@compiled
def _kind(source, u, target, t, mapping, s_tokens, t_tokens):  # type: ignore[no-untyped-def]
    """How the next tokens lie to each other.

    Returns:
        The kind; the source token in which the label ends; the log-probability of the source tokens before that one.
    """
    if u + 1 >= len(source.ids):
        return SOURCE_ENDS, u, 0.0
    label, first = target.ids[t + 1], source.ids[u + 1]
    known = label < len(t_tokens.special) and first < min(len(s_tokens.special), len(mapping.target_ids))
    if not known or target.left[t] == 0 or t_tokens.special[label] or s_tokens.special[first]:
        same = known and mapping.target_ids[first] == label
        # One model's end of turn may be what another uses as the end of the text.
        same |= known and target.left[t] == 0 and s_tokens.closing[first] and t_tokens.closing[label]
        return (SPECIAL if same else OTHER_SPECIAL), u + 1, 0.0
    if source.place[u] != target.place[t]:
        return UNCHECKED, u + 1, 0.0
    width = target.ends[t + 1] - target.ends[t]
    if width > target.left[t]:
        return REACHES_OUT, u + 1, 0.0
    source_width = source.ends[u + 1] - source.ends[u]
    if _length(t_tokens, label) - width != _length(s_tokens, first) - source_width or width <= 0:
        return OTHER_BYTES, u + 1, 0.0
    goal, v, logp = source.ends[u] + width, u + 1, 0.0
    while v < len(source.ids) and source.ends[v] < goal:
        logp += source.gold[v - 1]
        v += 1
        if v < len(source.ids) and (source.ids[v] >= len(s_tokens.special) or s_tokens.special[source.ids[v]]):
            return OTHER_SPECIAL, v, logp
    if v == len(source.ids):
        return SOURCE_ENDS, v, logp
    if source.ends[v] == goal:
        return (ONE_TO_ONE if v == u + 1 else ONE_TO_MANY), v, logp
    return (MANY_TO_ONE if v == u + 1 else CROSSING), v, logp


@compiled
def _candidates(  # type: ignore[no-untyped-def]
    source, u, label, kind, last, logp, mapping, s_tokens, t_tokens, chain, held, row_ids, counts, masses
):
    """Add the mass of every candidate of row ``u`` to the target tokens, and return how many of them there are."""
    size, inside, first = 0, 0.0, source.ids[u + 1]
    by_bytes = chain and kind < SPECIAL and not np.isnan(source.gold[u]) and not np.isnan(logp)
    splits = kind == ONE_TO_MANY or kind == CROSSING
    first_mass = np.exp(np.float64(source.gold[u]))
    if by_bytes:
        mass = _gold_mass(source, u, label, last, logp, kind, s_tokens, t_tokens)
        size = _add(held, row_ids, size, label, mass)
        masses[GOLD_MASS] += mass
        masses[PREFIX_MASS] += max(first_mass - mass, 0.0)
        inside += first_mass
    seen = by_bytes
    for k in range(source.topk_ids.shape[1] + 1):
        if k == source.topk_ids.shape[1]:
            # A special token that the top k missed: its probability is stored all the same.
            if seen or not chain or np.isnan(first_mass):
                break
            z, p = first, first_mass
        else:
            z, p = source.topk_ids[u, k], np.exp(np.float64(source.topk_logprobs[u, k]))
            if z < 0 or (z == first and by_bytes):
                continue
        seen |= z == first
        inside += p
        if by_bytes and splits and z < len(s_tokens.special) and _strict(s_tokens, z, t_tokens, label):
            masses[PREFIX_MASS] += p
            continue
        to = mapping.target_ids[z] if z < len(mapping.target_ids) else -1
        if kind == SPECIAL and z == first:
            to = label
        exact = to >= 0 and mapping.exact[z]
        if by_bytes and not exact and z < len(mapping.begins) and mapping.begins[z] == label:
            size = _add(held, row_ids, size, label, p)
            masses[GOLD_MASS] += p
        elif to < 0:
            counts[UNMAPPED] += 1
            masses[UNMAPPED_MASS] += p
        else:
            size = _add(held, row_ids, size, to, p)
            counts[EXACT if exact else EDITED] += 1
            masses[EXACT_MASS if exact else EDITED_MASS] += p
    masses[OUTSIDE_MASS] += max(1.0 - inside, 0.0)
    return size


@compiled
def _gold_mass(source, u, label, last, logp, kind, s_tokens, t_tokens):  # type: ignore[no-untyped-def]
    """Probability that the source goes on with the bytes of the label, along the text's own tokens."""
    row = last - 1
    if kind != CROSSING:
        return np.exp(logp + source.gold[row])
    # What is left of the label after the source tokens inside it may begin any token of the last row.
    used = source.ends[row] - source.ends[u] + _length(s_tokens, source.ids[u + 1])
    used -= source.ends[u + 1] - source.ends[u]
    total, seen = 0.0, False
    for k in range(source.topk_ids.shape[1]):
        z = source.topk_ids[row, k]
        if 0 <= z < len(s_tokens.special) and not s_tokens.special[z]:
            seen |= z == source.ids[last]
            if is_prefix(t_tokens, label, s_tokens, z, used):
                total += np.exp(np.float64(source.topk_logprobs[row, k]))
    if not seen:
        total += np.exp(np.float64(source.gold[row]))
    return np.exp(logp) * total


@compiled
def _strict(short, short_id, long, long_id):  # type: ignore[no-untyped-def]
    return _length(short, short_id) < _length(long, long_id) and is_prefix(short, short_id, long, long_id, 0)


@compiled
def _length(tokens, token):  # type: ignore[no-untyped-def]
    return tokens.starts[token + 1] - tokens.starts[token]


@compiled
def _add(held, row_ids, size, token, mass):  # type: ignore[no-untyped-def]
    """Sum the mass of a target token; note its id when it is new in this row."""
    if mass <= 0.0 or token >= len(held):
        return size
    if held[token] == 0.0:
        row_ids[size] = token
        size += 1
    held[token] += mass
    return size


@compiled
def _write(row_ids, held, ids, logprobs):  # type: ignore[no-untyped-def]
    """Write a row by descending mass, equal masses by id, and return its mass. The candidates come nearly sorted."""
    total = 0.0
    for n in range(len(row_ids)):
        token, mass = row_ids[n], held[row_ids[n]]
        total += mass
        k = n
        while k > 0 and (held[ids[k - 1]] < mass or (held[ids[k - 1]] == mass and ids[k - 1] > token)):
            ids[k] = ids[k - 1]
            k -= 1
        ids[k] = token
    for n in range(len(row_ids)):
        logprobs[n] = np.log(held[ids[n]])
    return total


@compiled
def places(ends, spans):  # type: ignore[no-untyped-def]
    """Return where each row stands, (T,) int64, equal for rows that correspond, and the bytes left of its span.

    Both are -1 outside the spans. A row between two touching spans stands at the start of the later one.
    """
    place, left = np.full(len(ends), -1, np.int64), np.full(len(ends), -1, np.int32)
    for m in range(len(spans)):
        start, stop = spans[m]
        t = np.searchsorted(ends, start)
        while t < len(ends) and ends[t] <= stop:
            place[t], left[t] = (m << 32) + ends[t] - start, stop - ends[t]
            t += 1
    return place, left
