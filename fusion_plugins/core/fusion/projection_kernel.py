"""The compiled part of the projection; :mod:`fusion_plugins.core.fusion.project` says what it does and why."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes

# What happens to a position that has a source position: up to UNCHECKED it is used, the others are masked.
ONE_TO_ONE, ONE_TO_MANY, MANY_TO_ONE, CROSSING, SPECIAL, UNCHECKED = range(6)
OTHER_BYTES, REACHES_OUT, OTHER_SPECIAL, SOURCE_ENDS, LOW_MASS = range(6, 11)
# What happens to an entry, in the order of the masses below.
EXACT, EDITED, UNMAPPED = range(11, 14)
COUNTS = (
    "one_to_one", "one_to_many", "many_to_one", "crossing", "special", "unchecked", "other_bytes", "reaches_out",
    "other_special", "source_ends", "low_mass", "exact", "edited", "unmapped",
)  # fmt: skip
POSITION_KINDS = COUNTS[:EXACT]
GOLD_MASS, EXACT_MASS, EDITED_MASS, UNMAPPED_MASS, PREFIX_MASS, OUTSIDE_MASS = range(6)
MASSES = ("gold_mass", "exact_mass", "edited_mass", "unmapped_mass", "prefix_mass", "outside_mass")


class SourceArrays(NamedTuple):
    """A record's arrays.

    ids (U,), ends (U,), place (U,) of each position (:func:`places`), topk_ids (U, K), topk_logprobs (U, K), gold (U,)
    log-probabilities of the next tokens.
    """

    ids: IntArray
    ends: IntArray
    place: npt.NDArray[np.int64]
    topk_ids: IntArray
    topk_logprobs: FloatArray
    gold: FloatArray


class TargetArrays(NamedTuple):
    """The target's arrays: ids (T,), ends (T,), place (T,) and left (T,) of each position (:func:`places`)."""

    ids: IntArray
    ends: IntArray
    place: npt.NDArray[np.int64]
    left: IntArray


class Mapping(NamedTuple):
    """Source id -> target id (W,), whether that is exact (W,), and the longest target token at its beginning (W,).

    ``starts`` (W + 1,), ``share_ids`` (E,) and ``weights`` (E,) are :class:`~fusion_plugins.core.fusion.types.Shares`,
    empty for a one-to-one map; ``most`` is the largest number of entries of a source token, at least 1.
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

    source: SourceArrays
    target: TargetArrays
    mapping: Mapping
    s_tokens: TokenBytes
    t_tokens: TokenBytes
    chain: bool


class Position(NamedTuple):
    """One target position with its source position.

    ``u`` is the source position and ``label`` the target's next token. ``kind`` says how the next tokens of both sides
    overlap, ``last`` is the source token in which the label ends, ``logp`` the log-probability of the source tokens
    before it.
    """

    u: Any
    label: Any
    kind: int
    last: Any
    logp: float


class Held(NamedTuple):
    """Target tokens that have some mass at one position.

    ids (L,) and mass (L,) of the tokens; slots (S,) finds a token's index among them by open addressing, -1 for none;
    ``n_target`` is the size of the target's vocabulary.

    One array over the whole vocabulary would be simpler, but it costs a cache miss per entry, and clearing it for each
    text costs as much as the projection of a short one. The slots stay in the first-level cache.
    """

    ids: IntArray
    mass: npt.NDArray[np.float64]
    slots: IntArray
    n_target: int


@compiled
def project_positions(source_positions, sides, min_mass):  # type: ignore[no-untyped-def]
    """Project every position that has a source position.

    Returns:
        ids (T, L), logprobs (T, L), kept mass (T,), log-probability of the label (T,), counts, masses. L is K + 1; for
        a one-to-many map K + 1 times the number of shares that a source token has at most, and 1 for the label.
    """
    n, width = len(sides.target.ids), (sides.source.topk_ids.shape[1] + 1) * sides.mapping.most
    width += len(sides.mapping.starts) > 1
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    kept, gold = np.zeros(n), np.full(n, -np.inf, np.float32)
    counts, masses = np.zeros(len(COUNTS), np.int64), np.zeros(len(MASSES))
    n_slots = 4
    while n_slots < 2 * width:  # a power of two, at most half full, so that probing ends soon
        n_slots *= 2
    held = Held(np.empty(width, np.int32), np.empty(width), np.empty(n_slots, np.int32), len(sides.t_tokens.special))
    position_masses = np.zeros(len(MASSES))
    for t in range(n - 1):
        if source_positions[t] < 0:
            continue
        position = _position(sides, source_positions[t], t)
        kind = position.kind
        if kind <= UNCHECKED:
            position_masses[:] = 0.0
            held.slots[:] = -1
            size = _entries(sides, position, held, counts, position_masses)
            total = held.mass[:size].sum()
            if total > 0.0 and total >= min_mass * (1.0 - position_masses[OUTSIDE_MASS]):
                kept[t] = total
                at = held.slots[_slot(held.ids, held.slots, position.label)]
                if at >= 0:
                    gold[t] = np.log(held.mass[at])
                _write(held.ids[:size], held.mass[:size], ids[t], logprobs[t])
                masses += position_masses
            else:
                kind = LOW_MASS
        counts[kind] += 1
    return ids, logprobs, kept, gold, counts, masses


@compiled
def _position(sides, u, t):  # type: ignore[no-untyped-def]
    """How the next tokens after source position ``u`` and target position ``t`` overlap."""
    source, target, label = sides.source, sides.target, np.int64(sides.target.ids[t + 1])
    u = np.int64(u)
    if u + 1 >= len(source.ids):
        return Position(u, label, SOURCE_ENDS, u, 0.0)
    if _ordinary(sides.t_tokens, label) and _ordinary(sides.s_tokens, source.ids[u + 1]) and target.left[t] != 0:
        if source.place[u] != target.place[t]:
            return Position(u, label, UNCHECKED, u + 1, 0.0)
        return _position_by_bytes(sides, u, t, label)
    same = _same_special(sides, source.ids[u + 1], label, target.left[t])
    return Position(u, label, SPECIAL if same else OTHER_SPECIAL, u + 1, 0.0)


@compiled
def _same_special(sides, first, label, left):  # type: ignore[no-untyped-def]
    if first >= len(sides.mapping.target_ids) or label >= len(sides.t_tokens.closing):
        return False
    # The token that ends a turn in one model may be the one that ends a text in another.
    closing = left == 0 and sides.s_tokens.closing[first] and sides.t_tokens.closing[label]
    return closing or sides.mapping.target_ids[first] == label


@compiled
def _position_by_bytes(sides, u, t, label):  # type: ignore[no-untyped-def]
    source, target = sides.source, sides.target
    width, source_width = target.ends[t + 1] - target.ends[t], source.ends[u + 1] - source.ends[u]
    if width > target.left[t]:
        return Position(u, label, REACHES_OUT, u + 1, 0.0)
    added = _length(sides.t_tokens, label) - width
    if width <= 0 or added != _length(sides.s_tokens, source.ids[u + 1]) - source_width:
        return Position(u, label, OTHER_BYTES, u + 1, 0.0)
    goal, v, logp = source.ends[u] + width, u + 1, 0.0
    while v < len(source.ids) and source.ends[v] < goal:
        logp += source.gold[v - 1]
        v += 1
        if v < len(source.ids) and not _ordinary(sides.s_tokens, source.ids[v]):
            return Position(u, label, OTHER_SPECIAL, v, logp)
    if v == len(source.ids):
        return Position(u, label, SOURCE_ENDS, v, logp)
    if source.ends[v] == goal:
        return Position(u, label, ONE_TO_ONE if v == u + 1 else ONE_TO_MANY, v, logp)
    return Position(u, label, MANY_TO_ONE if v == u + 1 else CROSSING, v, logp)


@compiled
def _entries(sides, position, held, counts, masses):  # type: ignore[no-untyped-def]
    """Add the mass of every entry of the position to target tokens; return how many target tokens have any."""
    # Unpacked once per position: in compiled code each access to a field of a nested tuple costs as much as an entry.
    source, mapping, s_tokens, t_tokens = sides.source, sides.mapping, sides.s_tokens, sides.t_tokens
    u = position.u
    first, label, many = source.ids[u + 1], position.label, len(mapping.starts) > 1
    first_mass = np.exp(np.float64(source.gold[u]))
    by_bytes = sides.chain and position.kind < SPECIAL and not np.isnan(first_mass + position.logp)
    size, inside = 0, 0.0
    if by_bytes:
        mass = _label_mass(sides, position)
        masses[GOLD_MASS] += mass
        size = _add(held, size, label, mass)
        size, share = _unexplained(held, size, mapping, first, first_mass - mass, label)
        masses[share] += max(first_mass - mass, 0.0)
        inside = first_mass
    # Part of a prefix's mass is in the chain product already.
    splits = by_bytes and (position.kind == ONE_TO_MANY or position.kind == CROSSING)
    n, seen = source.topk_ids.shape[1], by_bytes
    for k in range(n + 1):
        z, p = (source.topk_ids[u, k], source.topk_logprobs[u, k]) if k < n else (first, source.gold[u])
        # The last turn of the loop: a next token that the top k missed. Its probability is stored all the same.
        if z < 0 or (z == first and by_bytes) or (k == n and (seen or not sides.chain or np.isnan(p))):
            continue
        mass = np.exp(np.float64(p))
        seen |= z == first
        inside += mass
        if splits and _ordinary(s_tokens, z) and _strict(s_tokens, z, t_tokens, label):
            size, share = _unexplained(held, size, mapping, z, mass, label)
        elif position.kind == SPECIAL and z == first:
            size, share = _add(held, size, label, mass), EXACT_MASS
        else:
            to, share = _destination(mapping, z, label, by_bytes)
            shared = False
            if many and share != GOLD_MASS:
                size, shared = _share_out(held, size, mapping, z, mass, -1)
            if not shared:
                size = _add(held, size, to, mass)
        masses[share] += mass
        if EXACT_MASS <= share <= UNMAPPED_MASS:
            counts[EXACT + share - EXACT_MASS] += 1
    masses[OUTSIDE_MASS] += max(1.0 - inside, 0.0)
    return size


@compiled
def _unexplained(held, size, mapping, z, mass, label):  # type: ignore[no-untyped-def]
    """Place the mass of a prefix of the label that the chain leaves: by a one-to-many map, else it is lost."""
    size, shared = _share_out(held, size, mapping, z, mass, label)
    return size, EDITED_MASS if shared else PREFIX_MASS


@compiled
def _share_out(held, size, mapping, z, mass, label):  # type: ignore[no-untyped-def]
    """Divide the mass of an entry among its shares other than the label; False where it has none."""
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
            size = _add(held, size, to, mass * mapping.weights[entry] / total)
    return size, True


@compiled
def _destination(mapping, z, label, by_bytes):  # type: ignore[no-untyped-def]
    """The target token of an entry, -1 for none, and which sum its mass counts to."""
    to = np.int64(mapping.target_ids[z]) if z < len(mapping.target_ids) else np.int64(-1)
    if to >= 0 and mapping.exact[z]:
        return to, EXACT_MASS
    if by_bytes and z < len(mapping.begins) and mapping.begins[z] == label:
        return label, GOLD_MASS
    return to, EDITED_MASS if to >= 0 else UNMAPPED_MASS


@compiled
def _label_mass(sides, position):  # type: ignore[no-untyped-def]
    """Probability that the source continues with the bytes of the label, along the text's own tokens."""
    source, before = sides.source, position.last - 1
    if position.kind != CROSSING:
        return np.exp(position.logp + source.gold[before])
    # What is left of the label after the source tokens inside it may begin any token at the last position.
    added = _length(sides.s_tokens, source.ids[position.u + 1]) - (
        source.ends[position.u + 1] - source.ends[position.u]
    )
    used = source.ends[before] - source.ends[position.u] + added
    total, seen = 0.0, False
    for k in range(source.topk_ids.shape[1]):
        z = source.topk_ids[before, k]
        if z >= 0 and _ordinary(sides.s_tokens, z):
            seen |= z == source.ids[position.last]
            if _is_prefix(sides.t_tokens, position.label, sides.s_tokens, z, used):
                total += np.exp(np.float64(source.topk_logprobs[before, k]))
    if not seen:
        total += np.exp(np.float64(source.gold[before]))
    return np.exp(position.logp) * total


@compiled
def _ordinary(tokens, token):  # type: ignore[no-untyped-def]
    return token < len(tokens.special) and not tokens.special[token]


@compiled
def _strict(short, short_id, long, long_id):  # type: ignore[no-untyped-def]
    return _length(short, short_id) < _length(long, long_id) and _is_prefix(short, short_id, long, long_id, 0)


@compiled
def _length(tokens, token):  # type: ignore[no-untyped-def]
    return tokens.starts[token + 1] - tokens.starts[token]


@compiled
def _add(held, size, token, mass):  # type: ignore[no-untyped-def]
    """Add mass to a target token; return how many tokens have any."""
    if mass <= 0.0 or not 0 <= token < held.n_target:
        return size
    slot = _slot(held.ids, held.slots, token)
    at = held.slots[slot]
    if at >= 0:
        held.mass[at] += mass
        return size
    held.slots[slot], held.ids[size], held.mass[size] = size, token, mass
    return size + 1


@compiled
def _slot(ids, slots, token):  # type: ignore[no-untyped-def]
    """Return the slot of a token, or the free slot where it belongs."""
    last = len(slots) - 1
    # Fibonacci hashing: neighbouring ids, which are common in a top k, are spread over the slots.
    slot = ((np.int64(token) * 2654435769) >> 7) & last
    while slots[slot] >= 0 and ids[slots[slot]] != token:
        slot = (slot + 1) & last
    return slot


@compiled
def _write(held_ids, mass, ids, logprobs):  # type: ignore[no-untyped-def]
    """Write the entries by descending mass, equal masses by id. Insertion sort: the entries are nearly sorted."""
    for n in range(len(held_ids)):
        token, own = held_ids[n], mass[n]
        k = n
        while k > 0 and (mass[k - 1] < own or (mass[k - 1] == own and ids[k - 1] > token)):
            ids[k], mass[k] = ids[k - 1], mass[k - 1]
            k -= 1
        ids[k], mass[k] = token, own
    for n in range(len(held_ids)):
        logprobs[n] = np.log(mass[n])


@compiled
def _is_prefix(short, short_id, long, long_id, skipped):  # type: ignore[no-untyped-def]
    """Whether a token's bytes, after the first ``skipped``, are not empty and begin another token's bytes."""
    start = short.starts[short_id] + skipped
    length = short.starts[short_id + 1] - start
    other = long.starts[long_id]
    if length <= 0 or length > long.starts[long_id + 1] - other:
        return False
    for i in range(length):
        if short.flat[start + i] != long.flat[other + i]:
            return False
    return True


@compiled
def places(ends, spans):  # type: ignore[no-untyped-def]
    """Return a key per position and the bytes that remain to the end of its span, (T,) int64 and (T,) int32.

    The key is equal on both sides where the number of the span and the byte offset in it are equal. Both results are -1
    outside the spans. A position between two touching spans is at the start of the later one.
    """
    place, left = np.full(len(ends), -1, np.int64), np.full(len(ends), -1, np.int32)
    for m in range(len(spans)):
        start, stop = spans[m]
        t = np.searchsorted(ends, start)
        while t < len(ends) and ends[t] <= stop:
            place[t], left[t] = (m << 32) + ends[t] - start, stop - ends[t]
            t += 1
    return place, left
