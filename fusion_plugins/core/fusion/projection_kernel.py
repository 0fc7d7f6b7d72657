"""The compiled part of the projection: flat arrays, one pass over the entries.

:mod:`fusion_plugins.core.fusion.project` says what is computed and why; here is how. Three steps per text:

1. :func:`places` says where in the supervised spans each position lies, on both sides.
2. :func:`_overlaps` compares the next tokens of both sides at each position of the target: a *kind*, and the mass that
   the chain gives the label.
3. :func:`_project` goes once through the entries of each position, sums their masses per target token, sorts the sums
   and writes the logarithms of the largest.

The functions that are called for each entry use each of their arrays on one path, from beginning to end. For an array
that one branch uses last and another does not, numba counts references, atomically, which costs more than an entry.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.jit import compiled

# What happens to a position that has a source position: up to UNCHECKED it is used, the others are masked.
ONE_TO_ONE, ONE_TO_MANY, MANY_TO_ONE, CROSSING, SPECIAL, UNCHECKED = range(6)
OTHER_BYTES, REACHES_OUT, OTHER_SPECIAL, SOURCE_ENDS, LOW_MASS = range(6, 11)
# What happens to an entry, in the order of the masses below; then the supervised positions of all kinds.
EXACT, EDITED, UNMAPPED, SUPERVISED = range(11, 15)
COUNTS = (
    "one_to_one", "one_to_many", "many_to_one", "crossing", "special", "unchecked", "other_bytes", "reaches_out",
    "other_special", "source_ends", "low_mass", "exact", "edited", "unmapped", "positions",
)  # fmt: skip
POSITION_KINDS = COUNTS[:EXACT]
GOLD_MASS, EXACT_MASS, EDITED_MASS, UNMAPPED_MASS, PREFIX_MASS, OUTSIDE_MASS = range(6)
MASSES = ("gold_mass", "exact_mass", "edited_mass", "unmapped_mass", "prefix_mass", "outside_mass")

#: in the second column of ``mapped``: the source token is a token of the target
IS_EXACT = -2
# Up to this size the entries are nearly sorted when they come to be sorted.
_NEARLY_SORTED = 128


class Tables(NamedTuple):
    """What the kernel reads of one source's vocabulary of W tokens, and of the target's of V; made once per plan.

    mapped (W, 2): the target token of each source token, -1 for none; then IS_EXACT where both are the same, else the
    longest target token at its beginning, -1 for none. Source token ``z`` is divided among ``share_ids[e]`` by
    ``share_weights[e]``, ``share_starts[z] <= e < share_starts[z + 1]``; a one-to-one map has none.
    ``s_bytes[s_starts[z] : s_starts[z + 1]]`` are a source token's bytes, ``s_special`` (W,) and ``s_closing`` (W,)
    say whether it is a special token, and one that ends a turn or a text; ``t_`` the same of the target. ``most`` is
    the largest number of target tokens that one source token gives mass to.
    """

    mapped: IntArray
    share_starts: IntArray
    share_ids: IntArray
    share_weights: FloatArray
    s_bytes: npt.NDArray[np.uint8]
    s_starts: npt.NDArray[np.int64]
    s_special: BoolArray
    s_closing: BoolArray
    t_bytes: npt.NDArray[np.uint8]
    t_starts: npt.NDArray[np.int64]
    t_special: BoolArray
    t_closing: BoolArray
    most: int


@compiled
def project_texts(matched, source, entries, target, tables, chain, renormalize, min_mass, most):  # type: ignore[no-untyped-def]
    """Project every position of B texts that has a source position.

    Args:
        matched: (N,) int32 source position, inside its text, of each position of the target; -1 for none.
        source: the source's :class:`Texts`.
        entries: its :class:`Entries`.
        target: the target's :class:`Texts`.
        tables: both vocabularies, :class:`Tables`.
        chain: whether the text decides where both split it differently.
        renormalize: whether entries are scaled to sum to 1.
        min_mass: least share of the stored probability that a position must keep.
        most: entries per position that are written, the most probable ones.

    Returns:
        ids (N, L), logprobs (N, L), leftover (N,), kept mass (N,), log-probability of the label (N,), counts, masses.
        L is ``most``, but never more than a position can have: K + 1; for a one-to-many map K + 1 times the number of
        shares that a source token has at most, and 1 for the label.
    """
    n, many = len(target.ids), len(tables.share_ids) > 0
    width = (entries.ids.shape[1] + 1) * tables.most + many
    n_out = min(width, most)
    ids, logprobs = np.full((n, n_out), -1, np.int32), np.full((n, n_out), -np.inf, np.float32)
    leftover, kept = np.ones(n, np.float32), np.zeros(n, np.float32)
    gold = np.full(n, -np.inf, np.float32)
    counts, masses = np.zeros(len(COUNTS), np.int64), np.zeros(len(MASSES))
    n_slots = 4
    while n_slots < 2 * width:  # a power of two, at most half full, so that probing ends soon
        n_slots *= 2
    n_given = entries.ids.shape[1] + 2
    scratch = (
        np.empty(n_given, np.int32), np.empty(n_given), np.empty(n_given, np.float32),
        np.empty(width, np.int32), np.empty(width), np.empty(width, np.float32),
        np.empty(n_slots, np.int32), np.empty(len(MASSES)),
    )  # fmt: skip
    for b in range(len(target.starts) - 1):
        own = slice(source.starts[b], source.starts[b + 1])
        other = slice(target.starts[b], target.starts[b + 1])
        s_spans = source.spans[source.span_starts[b] : source.span_starts[b + 1]]
        t_spans = target.spans[target.span_starts[b] : target.span_starts[b + 1]]
        s_place, _ = places(source.ends[own], s_spans)
        t_place, t_left = places(target.ends[other], t_spans)
        counts[SUPERVISED] += (t_left[:-1] >= 0).sum()
        said = entries.ids[own], entries.logprobs[own], entries.next[own]
        kinds, chain_masses = _overlaps(
            matched[other],
            (source.ids[own], source.ends[own], s_place),
            said,
            (target.ids[other], target.ends[other], t_place, t_left),
            tables,
            chain,
        )
        _project(
            (matched[other], kinds, chain_masses),
            source.ids[own],
            said,
            target.ids[other],
            tables,
            (chain, renormalize, min_mass),
            scratch,
            (ids[other], logprobs[other], leftover[other], kept[other], gold[other], counts, masses),
        )
    return ids, logprobs, leftover, kept, gold, counts, masses


@compiled
def supervised_texts(texts):  # type: ignore[no-untyped-def]
    """Return (N,) bool: the positions in a span of their text, or before the first token of one, that have a label."""
    found = in_spans(texts)
    for b in range(len(texts.starts) - 1):
        own = slice(texts.starts[b], texts.starts[b + 1])
        ends, spans = texts.ends[own], texts.spans[texts.span_starts[b] : texts.span_starts[b + 1]]
        for m in range(len(spans)):
            first = np.searchsorted(ends, spans[m, 0], side="right")
            if spans[m, 0] < spans[m, 1] and 0 < first < len(ends):
                found[own][first - 1] = True
    return found


@compiled
def in_spans(texts):  # type: ignore[no-untyped-def]
    """Return (N,) bool: the positions in a span of their text that have a label."""
    found = np.zeros(len(texts.ends), np.bool_)
    for b in range(len(texts.starts) - 1):
        own = slice(texts.starts[b], texts.starts[b + 1])
        _, left = places(texts.ends[own], texts.spans[texts.span_starts[b] : texts.span_starts[b + 1]])
        found[own] = left >= 0
        found[own][-1:] = False
    return found


@compiled
def _overlaps(matched, source, said, target, tables, chain):  # type: ignore[no-untyped-def]
    """Compare the next tokens of both sides, at each position of one text.

    Returns:
        The kind of each position, (T,) int8, of use where it is matched; and the probability that the source goes on
        with the label's bytes, along the text's own tokens, (T,) float64: NaN where the text does not decide, because
        that is not wanted, the tokens are special, or the source does not say what it gives the text.
    """
    s_ids, s_ends, s_place = source
    topk_ids, topk_logprobs, following = said
    t_ids, t_ends, t_place, t_left = target
    mapped, s_bytes, s_starts, s_special = tables.mapped, tables.s_bytes, tables.s_starts, tables.s_special
    t_bytes, t_starts, t_special = tables.t_bytes, tables.t_starts, tables.t_special
    n_source, n_target = len(s_special), len(t_special)
    kinds, masses = np.zeros(len(t_ids), np.int8), np.full(len(t_ids), np.nan)
    for t in range(len(t_ids) - 1):
        u, label = np.int64(matched[t]), np.int64(t_ids[t + 1])
        if u < 0:
            continue
        if u + 1 >= len(s_ids):
            kinds[t] = SOURCE_ENDS
            continue
        first = np.int64(s_ids[u + 1])
        ordinary = first < n_source and not s_special[first] and label < n_target and not t_special[label]
        if not ordinary or t_left[t] == 0:
            kinds[t] = _kind_of_special(mapped, tables.s_closing, tables.t_closing, first, label, t_left[t] == 0)
            continue
        width = t_ends[t + 1] - t_ends[t]
        # Bytes of a token that are not in the text (a dummy prefix) must be the same on both sides.
        added = t_starts[label + 1] - t_starts[label] - width
        s_added = s_starts[first + 1] - s_starts[first] - (s_ends[u + 1] - s_ends[u])
        if s_place[u] != t_place[t]:
            kinds[t] = UNCHECKED
        elif width > t_left[t]:
            kinds[t] = REACHES_OUT
        elif width <= 0 or added != s_added:
            kinds[t] = OTHER_BYTES
        else:
            kinds[t], v, logp = _walk(s_ids, s_ends, s_special, following, u, s_ends[u] + width)
            if kinds[t] <= CROSSING and chain and not np.isnan(following[u] + logp):
                if kinds[t] != CROSSING:
                    masses[t] = np.exp(logp + following[v - 1])
                    continue
                # What is left of the label after the source tokens inside it may begin any token at the last position.
                rest = t_starts[label] + s_ends[v - 1] - s_ends[u] + added
                masses[t] = np.exp(logp) * _begin_with(
                    topk_ids[v - 1], topk_logprobs[v - 1], s_ids[v], following[v - 1], s_bytes, s_starts, s_special,
                    t_bytes[rest : t_starts[label + 1]],
                )  # fmt: skip
    return kinds, masses


@compiled
def _kind_of_special(mapped, s_closing, t_closing, first, label, at_end):  # type: ignore[no-untyped-def]
    """Whether two special tokens are the same by the map, or both end what ends here.

    The token that ends a turn in one model may be the one that ends a text in another.
    """
    kind = OTHER_SPECIAL
    if first < len(mapped) and label < len(t_closing):
        if mapped[first, 0] == label or (at_end and s_closing[first] and t_closing[label]):
            kind = SPECIAL
    return kind


@compiled
def _walk(s_ids, s_ends, s_special, following, u, goal):  # type: ignore[no-untyped-def]
    """Go on from a position to the token in which the bytes before ``goal`` end.

    Returns:
        The kind, that token, and the log-probability of the tokens before it.
    """
    v, logp, ordinary = u + 1, 0.0, True
    while ordinary and v < len(s_ids) and s_ends[v] < goal:
        logp += following[v - 1]
        v += 1
        ordinary = v == len(s_ids) or (s_ids[v] < len(s_special) and not s_special[s_ids[v]])
    if v == len(s_ids):
        kind = SOURCE_ENDS
    elif not ordinary:
        kind = OTHER_SPECIAL
    elif s_ends[v] == goal:
        kind = ONE_TO_ONE if v == u + 1 else ONE_TO_MANY
    else:
        kind = MANY_TO_ONE if v == u + 1 else CROSSING
    return kind, v, logp


@compiled
def _begin_with(ids, logprobs, next_id, next_logprob, s_bytes, s_starts, s_special, rest):  # type: ignore[no-untyped-def]
    """Probability of the entries of one position, and of the text's next token, that begin with some bytes."""
    total, seen = 0.0, False
    for k in range(len(ids)):
        z = ids[k]
        if z < 0 or z >= len(s_special) or s_special[z]:
            continue
        seen |= z == next_id
        same = 0
        if len(rest) <= s_starts[z + 1] - s_starts[z]:
            while same < len(rest) and s_bytes[s_starts[z] + same] == rest[same]:
                same += 1
        if 0 < len(rest) == same:
            total += np.exp(np.float64(logprobs[k]))
    return total if seen else total + np.exp(np.float64(next_logprob))


@compiled
def _project(positions, s_ids, said, t_ids, tables, options, scratch, out):  # type: ignore[no-untyped-def] # noqa: C901
    """Write the distributions of one text: the one pass, with every case in its place."""
    matched, kinds, chain_masses = positions
    topk_ids, topk_logprobs, following = said
    mapped, s_bytes, s_starts, s_special = tables.mapped, tables.s_bytes, tables.s_starts, tables.s_special
    share_starts, share_ids, share_weights = tables.share_starts, tables.share_ids, tables.share_weights
    t_bytes, t_starts, n_source, many = tables.t_bytes, tables.t_starts, len(mapped), len(share_ids) > 0
    chain, renormalize, min_mass = options
    given_ids, given, given_logs, held_ids, held, held_logs, slots, sums = scratch
    unknown = np.float32(np.nan)
    out_ids, out_logprobs, out_leftover, out_kept, out_gold, counts, masses = out
    for t in range(len(t_ids) - 1):
        u, label, kind, chained = np.int64(matched[t]), t_ids[t + 1], kinds[t], chain_masses[t]
        if u < 0:
            continue
        if kind > UNCHECKED:
            counts[kind] += 1
            continue
        first, by_bytes = s_ids[u + 1], not np.isnan(chained)
        splits = by_bytes and (kind == ONE_TO_MANY or kind == CROSSING)
        # 1. What the source says.
        n_given, outside = _gather(
            (given_ids, given, given_logs),
            topk_ids,
            topk_logprobs,
            u,
            first,
            following[u],
            chain,
            by_bytes,
            chained,
        )
        # 2. What that is for the target.
        slots[:] = -1
        sums[:] = 0.0
        size = 0
        if by_bytes:
            sums[GOLD_MASS] = chained
            if chained > 0.0:
                size = _add(held_ids, held, held_logs, slots, size, label, chained, unknown)
        for n in range(n_given):
            z, mass = given_ids[n], given[n]
            rest = by_bytes and z == first
            prefix = rest or (
                splits and z < n_source and _is_strict_prefix(s_bytes, s_starts, s_special, z, t_bytes, t_starts, label)
            )
            to, begins = (mapped[z, 0], mapped[z, 1]) if z < n_source else (np.int32(-1), np.int32(-1))
            to, share, divided = _destination(to, begins, label, prefix, kind == SPECIAL and z == first, by_bytes)
            left_out, weight = label if prefix else np.int32(-1), 0.0
            if many and divided and z < n_source:
                weight = _weight(share_starts, share_ids, share_weights, z, left_out)
            if weight > 0.0:
                for e in range(share_starts[z], share_starts[z + 1]):
                    if share_ids[e] != left_out:
                        part = mass * share_weights[e] / weight
                        if part > 0.0:
                            size = _add(held_ids, held, held_logs, slots, size, share_ids[e], part, unknown)
                if prefix:
                    share = EDITED_MASS
            elif to >= 0 and mass > 0.0:
                size = _add(held_ids, held, held_logs, slots, size, to, mass, given_logs[n])
            sums[share] += mass
            if EXACT_MASS <= share <= UNMAPPED_MASS and not rest:
                counts[EXACT + share - EXACT_MASS] += 1
        # 3. Whether that is enough.
        total = 0.0
        for n in range(size):
            total += held[n]
        if not (total > 0.0 and total >= min_mass * (1.0 - outside)):
            counts[LOW_MASS] += 1
            continue
        counts[kind] += 1
        sums[OUTSIDE_MASS] = outside
        masses += sums
        # 4. Write the largest.
        _sort(held_ids, held, held_logs, size)
        if size > out_ids.shape[1]:
            total = 0.0
            for n in range(out_ids.shape[1]):
                total += held[n]
        divisor = total if renormalize else 1.0
        out_gold[t] = _write(out_ids, out_logprobs, t, held_ids, held, held_logs, size, label, divisor)
        out_kept[t], out_leftover[t] = total, 0.0 if renormalize else max(1.0 - total, 0.0)


@compiled
def _gather(given, topk_ids, topk_logprobs, u, first, first_logprob, chain, by_bytes, chained):  # type: ignore[no-untyped-def]
    """Collect the source tokens that have mass at a position: their number, and the mass that none of them has.

    Where the text decides, the next token of the text comes first, with the mass that the chain leaves of it; the
    logarithm of that is not known.
    """
    ids, masses, logs = given
    first_mass, seen = np.exp(np.float64(first_logprob)), by_bytes
    n, inside = (1, first_mass) if by_bytes else (0, 0.0)
    ids[0], masses[0], logs[0] = first, max(first_mass - chained, 0.0), np.nan
    for k in range(topk_ids.shape[1]):
        z = topk_ids[u, k]
        if z >= 0 and not (by_bytes and z == first):
            seen |= z == first
            ids[n], masses[n], logs[n] = z, np.exp(np.float64(topk_logprobs[u, k])), topk_logprobs[u, k]
            inside += masses[n]
            n += 1
    # A next token that the top k missed: its probability is stored all the same.
    missed = chain and not seen and not np.isnan(first_mass)
    ids[n], masses[n], logs[n] = first, first_mass if missed else 0.0, first_logprob
    return n + missed, max(1.0 - (inside + masses[n]), 0.0)


@compiled
def _is_strict_prefix(s_bytes, s_starts, s_special, z, t_bytes, t_starts, label):  # type: ignore[no-untyped-def]
    """Whether a source token spells the beginning, but not all, of the label."""
    start, length = s_starts[z], s_starts[z + 1] - s_starts[z]
    goal, same = t_starts[label], 0
    room = t_starts[label + 1] - goal
    while same < length and length < room and s_bytes[start + same] == t_bytes[goal + same]:
        same += 1
    return 0 < length == same and not s_special[z]


@compiled
def _destination(to, begins, label, prefix, same_special, by_bytes):  # type: ignore[no-untyped-def]
    """Where the mass of a source token goes.

    Args:
        to: its target token in the map, -1 for none.
        begins: the longest target token at its beginning; IS_EXACT where it is a token of the target.
        label: the target's next token.
        prefix: whether it spells the beginning of the label, and the chain has its part.
        same_special: whether it is the label, by its role.
        by_bytes: whether the text decides.

    Returns:
        One target token, -1 for none; the sum that the mass counts to; and whether a one-to-many map divides it.
    """
    if prefix:
        # The rest belongs to other continuations: at most a one-to-many map knows them.
        return np.int32(-1), PREFIX_MASS, True
    if same_special:
        return label, EXACT_MASS, False
    if begins == IS_EXACT:
        return to, EXACT_MASS, True
    if by_bytes and begins == label:
        # No token of the target, which would begin it with the label.
        return label, GOLD_MASS, False
    return to, EDITED_MASS if to >= 0 else UNMAPPED_MASS, True


@compiled
def _weight(share_starts, share_ids, share_weights, z, left_out):  # type: ignore[no-untyped-def]
    """Sum of the weights of a source token's shares other than ``left_out``."""
    weight = 0.0
    for e in range(share_starts[z], share_starts[z + 1]):
        if share_ids[e] != left_out:
            weight += share_weights[e]
    return weight


@compiled
def _add(held_ids, held, held_logs, slots, size, token, mass, log):  # type: ignore[no-untyped-def]
    """Add mass, of which perhaps the logarithm is known, to a target token; return how many tokens have any.

    ``held_ids``, ``held`` and ``held_logs`` have the tokens, their masses and the logarithms of these, NaN where they
    are not known, in order of arrival. ``slots`` finds a token among them
    by open addressing, -1 for none: unlike an array over the vocabulary it stays in the first-level cache, and it is
    cleared in no time.
    """
    last = len(slots) - 1
    # Fibonacci hashing: neighbouring ids, which are common in a top k, are spread over the slots.
    slot = ((np.int64(token) * 2654435769) >> 7) & last
    while slots[slot] >= 0 and held_ids[slots[slot]] != token:
        slot = (slot + 1) & last
    is_new = slots[slot] < 0
    at = size if is_new else np.int64(slots[slot])
    slots[slot], held_ids[at], held[at] = at, token, mass + (0.0 if is_new else held[at])
    held_logs[at] = log if is_new else np.nan
    return size + is_new


@compiled
def _sort(ids, mass, logs, size):  # type: ignore[no-untyped-def]
    """Sort by descending mass, equal masses by id.

    Insertion sort: the entries of a source are sorted, so what is made of them nearly is. Many shares are not: for them
    the distance between neighbours begins wide (Shell's sort).
    """
    step = 1
    while size > _NEARLY_SORTED and 9 * step < size:
        step = 3 * step + 1
    while step > 0:
        for n in range(step, size):
            token, own, log, k = ids[n], mass[n], logs[n], n
            while k >= step and (mass[k - step] < own or (mass[k - step] == own and ids[k - step] > token)):
                ids[k], mass[k], logs[k] = ids[k - step], mass[k - step], logs[k - step]
                k -= step
            ids[k], mass[k], logs[k] = token, own, log
        step //= 3


@compiled
def _write(out_ids, out_logprobs, t, ids, mass, logs, size, label, total):  # type: ignore[no-untyped-def]
    """Write the logarithms of the masses that have room, divided by a total; return that of the label's mass."""
    log_total, label_logprob, room = np.float32(np.log(total)), np.float32(-np.inf), out_ids.shape[1]
    for n in range(min(size, room)):
        logprob = _logarithm(mass[n], logs[n])
        out_ids[t, n], out_logprobs[t, n] = ids[n], logprob - log_total
        if ids[n] == label:
            label_logprob = logprob
    for n in range(room, size):
        if ids[n] == label:
            label_logprob = _logarithm(mass[n], logs[n])
    return label_logprob


@compiled
def _logarithm(mass, log):  # type: ignore[no-untyped-def]
    """Logarithm of a mass, float32; ``log`` is what the mass is the exponential of, or NaN.

    Most masses are one entry's alone. Between the bounds, the logarithm of the exponential is again the number itself:
    both are right to about 1e-16 of 1, much less than half of a float32's last digit.
    """
    return log if -600.0 < log < -1e-6 else np.float32(np.log(mass))


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
