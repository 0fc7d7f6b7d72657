"""The compiled part of the projection; :mod:`fusion_plugins.core.fusion.project` says what it does and why."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes, is_prefix

__all__ = ["COUNTS", "MASSES", "ROW_KINDS", "Mapping", "Sides", "SourceRows", "TargetRows", "places", "project_rows"]

# What becomes of a row that has a source row: up to UNCHECKED it is used, the others are masked.
ONE_TO_ONE, ONE_TO_MANY, MANY_TO_ONE, CROSSING, SPECIAL, UNCHECKED = range(6)
OTHER_BYTES, REACHES_OUT, OTHER_SPECIAL, SOURCE_ENDS, LOW_MASS = range(6, 11)
# What becomes of a candidate, in the order of the masses below.
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
    """Source id -> target id (W,), whether that is exact (W,), and the longest target token at its beginning (W,).

    ``starts`` (W + 1,), ``share_ids`` (E,) and ``weights`` (E,) are
    :class:`~fusion_plugins.core.fusion.types.Shares`, empty for a one-to-one map; ``most`` is the largest number of
    entries of a source token, at least 1.
    """

    target_ids: IntArray
    exact: BoolArray
    begins: IntArray
    starts: IntArray
    share_ids: IntArray
    weights: FloatArray
    most: int


class Sides(NamedTuple):
    """Everything about one source and one target that the kernel reads."""

    source: SourceRows
    target: TargetRows
    mapping: Mapping
    s_tokens: TokenBytes
    t_tokens: TokenBytes
    chain: bool


class Row(NamedTuple):
    """One usable row.

    ``u`` is the source row, ``label`` the target's next token; ``kind`` says how the next tokens lie to each other,
    ``last`` is the source token in which the label ends, ``logp`` the log-probability of the source tokens before it.
    """

    u: Any
    label: Any
    kind: int
    last: Any
    logp: float


class Out(NamedTuple):
    """What a row is added up in.

    held (V,) mass of each target token, ids (L,) those that have any, counts and masses: of the outcomes.
    """

    held: npt.NDArray[np.float64]
    ids: IntArray
    counts: npt.NDArray[np.int64]
    masses: npt.NDArray[np.float64]


@compiled
def project_rows(rows, sides, min_mass):  # type: ignore[no-untyped-def]
    """Project every usable row.

    Returns:
        ids (T, L), logprobs (T, L), kept mass (T,), log-probability of the label (T,), counts, masses. L is K + 1 times
        the number of entries that a source token has at most.
    """
    n, width = len(sides.target.ids), (sides.source.topk_ids.shape[1] + 1) * sides.mapping.most
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    kept, gold = np.zeros(n), np.full(n, -np.inf, np.float32)
    counts, masses = np.zeros(len(COUNTS), np.int64), np.zeros(len(MASSES))
    held = np.zeros(len(sides.t_tokens.special))
    out = Out(held, np.empty(width, np.int32), counts, np.zeros(len(MASSES)))
    for t in range(n - 1):
        if rows[t] < 0:
            continue
        row = _row(sides, rows[t], t)
        kind = row.kind
        if kind <= UNCHECKED:
            out.masses[:] = 0.0
            size = _candidates(sides, row, out)
            total = _write(out.ids[:size], held, ids[t], logprobs[t])
            if total > 0.0 and total >= min_mass * (1.0 - out.masses[OUTSIDE_MASS]):
                kept[t] = total
                if row.label < len(held) and held[row.label] > 0.0:
                    gold[t] = np.log(held[row.label])
                masses += out.masses
            else:
                kind = LOW_MASS
                ids[t], logprobs[t] = -1, -np.inf
            held[out.ids[:size]] = 0.0
        counts[kind] += 1
    return ids, logprobs, kept, gold, counts, masses


@compiled
def _row(sides, u, t):  # type: ignore[no-untyped-def]
    """How the next tokens after source row ``u`` and target row ``t`` lie to each other."""
    source, target, label = sides.source, sides.target, np.int64(sides.target.ids[t + 1])
    u = np.int64(u)
    if u + 1 >= len(source.ids):
        return Row(u, label, SOURCE_ENDS, u, 0.0)
    if _ordinary(sides.t_tokens, label) and _ordinary(sides.s_tokens, source.ids[u + 1]) and target.left[t] != 0:
        if source.place[u] != target.place[t]:
            return Row(u, label, UNCHECKED, u + 1, 0.0)
        return _row_by_bytes(sides, u, t, label)
    same = _same_special(sides, source.ids[u + 1], label, target.left[t])
    return Row(u, label, SPECIAL if same else OTHER_SPECIAL, u + 1, 0.0)


@compiled
def _same_special(sides, first, label, left):  # type: ignore[no-untyped-def]
    if first >= len(sides.mapping.target_ids) or label >= len(sides.t_tokens.closing):
        return False
    # One model's end of turn may be what another uses as the end of the text.
    closing = left == 0 and sides.s_tokens.closing[first] and sides.t_tokens.closing[label]
    return closing or sides.mapping.target_ids[first] == label


@compiled
def _row_by_bytes(sides, u, t, label):  # type: ignore[no-untyped-def]
    source, target = sides.source, sides.target
    width, source_width = target.ends[t + 1] - target.ends[t], source.ends[u + 1] - source.ends[u]
    if width > target.left[t]:
        return Row(u, label, REACHES_OUT, u + 1, 0.0)
    added = _length(sides.t_tokens, label) - width
    if width <= 0 or added != _length(sides.s_tokens, source.ids[u + 1]) - source_width:
        return Row(u, label, OTHER_BYTES, u + 1, 0.0)
    goal, v, logp = source.ends[u] + width, u + 1, 0.0
    while v < len(source.ids) and source.ends[v] < goal:
        logp += source.gold[v - 1]
        v += 1
        if v < len(source.ids) and not _ordinary(sides.s_tokens, source.ids[v]):
            return Row(u, label, OTHER_SPECIAL, v, logp)
    if v == len(source.ids):
        return Row(u, label, SOURCE_ENDS, v, logp)
    if source.ends[v] == goal:
        return Row(u, label, ONE_TO_ONE if v == u + 1 else ONE_TO_MANY, v, logp)
    return Row(u, label, MANY_TO_ONE if v == u + 1 else CROSSING, v, logp)


@compiled
def _candidates(sides, row, out):  # type: ignore[no-untyped-def]
    """Add the mass of every candidate of the row to the target tokens, and return how many of them there are."""
    # Taken apart here, once per row: each look into one of the tuples costs as much as a candidate.
    source, mapping, s_tokens, t_tokens = sides.source, sides.mapping, sides.s_tokens, sides.t_tokens
    held, ids, counts, masses = out.held, out.ids, out.counts, out.masses
    first, label, many = source.ids[row.u + 1], row.label, len(mapping.starts) > 1
    first_mass = np.exp(np.float64(source.gold[row.u]))
    by_bytes = sides.chain and row.kind < SPECIAL and not np.isnan(first_mass + row.logp)
    size, inside = 0, 0.0
    if by_bytes:
        mass = _label_mass(sides, row)
        masses[GOLD_MASS] += mass
        size, share = _unexplained(
            held, ids, _add(held, ids, size, label, mass), mapping, first, first_mass - mass, label
        )
        masses[share] += max(first_mass - mass, 0.0)
        inside = first_mass
    # A prefix of the label is what the chain, or what comes after it, has explained.
    splits = by_bytes and (row.kind == ONE_TO_MANY or row.kind == CROSSING)
    n, seen = source.topk_ids.shape[1], by_bytes
    for k in range(n + 1):
        z, p = (source.topk_ids[row.u, k], source.topk_logprobs[row.u, k]) if k < n else (first, source.gold[row.u])
        # In the last turn, a special token that the top k missed: its probability is stored all the same.
        if z < 0 or (z == first and by_bytes) or (k == n and (seen or not sides.chain or np.isnan(p))):
            continue
        mass = np.exp(np.float64(p))
        seen |= z == first
        inside += mass
        if splits and _ordinary(s_tokens, z) and _strict(s_tokens, z, t_tokens, label):
            size, share = _unexplained(held, ids, size, mapping, z, mass, label)
        elif row.kind == SPECIAL and z == first:
            size, share = _add(held, ids, size, label, mass), EXACT_MASS
        else:
            to, share = _destination(mapping, z, label, by_bytes)
            shared = False
            if many and share != GOLD_MASS:
                size, shared = _share_out(held, ids, size, mapping, z, mass, -1)
            if not shared:
                size = _add(held, ids, size, to, mass)
        masses[share] += mass
        if EXACT_MASS <= share <= UNMAPPED_MASS:
            counts[EXACT + share - EXACT_MASS] += 1
    masses[OUTSIDE_MASS] += max(1.0 - inside, 0.0)
    return size


@compiled
def _unexplained(held, ids, size, mapping, z, mass, label):  # type: ignore[no-untyped-def]
    """A prefix of the label, without what the chain explains: a one-to-many map shares it out, else it is lost."""
    size, shared = _share_out(held, ids, size, mapping, z, mass, label)
    return size, EDITED_MASS if shared else PREFIX_MASS


@compiled
def _share_out(held, ids, size, mapping, z, mass, label):  # type: ignore[no-untyped-def]
    """Share the mass of a candidate out among its entries other than the label; False where it has none."""
    total = 0.0
    if z + 1 < len(mapping.starts):
        for entry in range(mapping.starts[z], mapping.starts[z + 1]):
            if mapping.share_ids[entry] != label:
                total += mapping.weights[entry]
    if total == 0.0:
        return size, False
    for entry in range(mapping.starts[z], mapping.starts[z + 1]):
        to = np.int64(mapping.share_ids[entry])
        if to != label:
            size = _add(held, ids, size, to, mass * mapping.weights[entry] / total)
    return size, True


@compiled
def _destination(mapping, z, label, by_bytes):  # type: ignore[no-untyped-def]
    """The target token of a candidate, -1 for none, and which share of the mass it counts to."""
    to = np.int64(mapping.target_ids[z]) if z < len(mapping.target_ids) else np.int64(-1)
    if to >= 0 and mapping.exact[z]:
        return to, EXACT_MASS
    if by_bytes and z < len(mapping.begins) and mapping.begins[z] == label:
        return label, GOLD_MASS
    return to, EDITED_MASS if to >= 0 else UNMAPPED_MASS


@compiled
def _label_mass(sides, row):  # type: ignore[no-untyped-def]
    """Probability that the source goes on with the bytes of the label, along the text's own tokens."""
    source, before = sides.source, row.last - 1
    if row.kind != CROSSING:
        return np.exp(row.logp + source.gold[before])
    # What is left of the label after the source tokens inside it may begin any token of the last row.
    added = _length(sides.s_tokens, source.ids[row.u + 1]) - (source.ends[row.u + 1] - source.ends[row.u])
    used = source.ends[before] - source.ends[row.u] + added
    total, seen = 0.0, False
    for k in range(source.topk_ids.shape[1]):
        z = source.topk_ids[before, k]
        if z >= 0 and _ordinary(sides.s_tokens, z):
            seen |= z == source.ids[row.last]
            if is_prefix(sides.t_tokens, row.label, sides.s_tokens, z, used):
                total += np.exp(np.float64(source.topk_logprobs[before, k]))
    if not seen:
        total += np.exp(np.float64(source.gold[before]))
    return np.exp(row.logp) * total


@compiled
def _ordinary(tokens, token):  # type: ignore[no-untyped-def]
    return token < len(tokens.special) and not tokens.special[token]


@compiled
def _strict(short, short_id, long, long_id):  # type: ignore[no-untyped-def]
    return _length(short, short_id) < _length(long, long_id) and is_prefix(short, short_id, long, long_id, 0)


@compiled
def _length(tokens, token):  # type: ignore[no-untyped-def]
    return tokens.starts[token + 1] - tokens.starts[token]


@compiled
def _add(held, ids, size, token, mass):  # type: ignore[no-untyped-def]
    """Sum the mass of a target token; note its id when it is new in this row."""
    if mass <= 0.0 or not 0 <= token < len(held):
        return size
    if held[token] == 0.0:
        ids[size] = token
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
