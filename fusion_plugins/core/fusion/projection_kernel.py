"""The compiled part of the projection: flat arrays, one pass over the entries.

:mod:`fusion_plugins.core.fusion.project` says what is computed and why; here is how. Three steps per text:

1. :func:`places` says where in the supervised spans each position lies, on both sides.
2. :func:`_overlaps` compares the next tokens of both sides at each position of the target: a *kind*, and the mass that
   the chain gives the label.
3. :func:`_project` goes once through the entries of each position, sums their masses per target token, sorts the sums
   and writes their logarithms.

A loop over entries calls no function that takes an array: numba counts a reference, atomically, for each array that it
passes, and that costs more than an entry.
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
    ``share_weights[e]``, ``share_starts[z] <= e < share_starts[z + 1]``; all three are empty for a one-to-one map.
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
def project_texts(matched, source, entries, target, tables, chain, renormalize, min_mass):  # type: ignore[no-untyped-def]
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

    Returns:
        ids (N, L), logprobs (N, L), leftover (N,), kept mass (N,), log-probability of the label (N,), counts, masses.
        L is K + 1; for a one-to-many map K + 1 times the number of shares that a source token has at most, and 1 for
        the label.
    """
    n, many = len(target.ids), len(tables.share_starts) > 1
    width = (entries.ids.shape[1] + 1) * tables.most + many
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    leftover, kept = np.ones(n, np.float32), np.zeros(n, np.float32)
    gold = np.full(n, -np.inf, np.float32)
    counts, masses = np.zeros(len(COUNTS), np.int64), np.zeros(len(MASSES))
    n_slots = 4
    while n_slots < 2 * width:  # a power of two, at most half full, so that probing ends soon
        n_slots *= 2
    scratch = np.empty(width, np.int32), np.empty(width), np.empty(n_slots, np.int32)
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
    """Return (N,) bool: the positions that lie in a span of their text and have a label."""
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
    s_closing, t_closing = tables.s_closing, tables.t_closing
    t_bytes, t_starts, t_special = tables.t_bytes, tables.t_starts, tables.t_special
    n_source, n_target = len(s_special), len(t_special)
    kinds, masses = np.zeros(len(t_ids), np.int8), np.full(len(t_ids), np.nan)
    for t in range(len(t_ids) - 1):
        u = np.int64(matched[t])
        if u < 0:
            continue
        if u + 1 >= len(s_ids):
            kinds[t] = SOURCE_ENDS
            continue
        first, label = np.int64(s_ids[u + 1]), np.int64(t_ids[t + 1])
        ordinary = first < n_source and not s_special[first] and label < n_target and not t_special[label]
        if not ordinary or t_left[t] == 0:
            # The token that ends a turn in one model may be the one that ends a text in another.
            known = first < len(mapped) and label < n_target
            closing = known and t_left[t] == 0 and s_closing[first] and t_closing[label]
            kinds[t] = SPECIAL if closing or (known and mapped[first, 0] == label) else OTHER_SPECIAL
            continue
        if s_place[u] != t_place[t]:
            kinds[t] = UNCHECKED
            continue
        begin, width = s_ends[u], t_ends[t + 1] - t_ends[t]
        if width > t_left[t]:
            kinds[t] = REACHES_OUT
            continue
        # Bytes of a token that are not in the text (a dummy prefix) must be the same on both sides.
        added = t_starts[label + 1] - t_starts[label] - width
        if width <= 0 or added != s_starts[first + 1] - s_starts[first] - (s_ends[u + 1] - begin):
            kinds[t] = OTHER_BYTES
            continue
        # Go on to the source token in which the label ends.
        v, logp = u + 1, 0.0
        while v < len(s_ids) and s_ends[v] < begin + width:
            logp += following[v - 1]
            v += 1
            if v < len(s_ids) and (s_ids[v] >= n_source or s_special[s_ids[v]]):
                break
        if v == len(s_ids):
            kinds[t] = SOURCE_ENDS
            continue
        if s_ids[v] >= n_source or s_special[s_ids[v]]:
            kinds[t] = OTHER_SPECIAL
            continue
        if s_ends[v] == begin + width:
            kinds[t] = ONE_TO_ONE if v == u + 1 else ONE_TO_MANY
        else:
            kinds[t] = MANY_TO_ONE if v == u + 1 else CROSSING
        if not chain or np.isnan(following[u]) or np.isnan(logp):
            continue
        if kinds[t] != CROSSING:
            masses[t] = np.exp(logp + following[v - 1])
            continue
        # What is left of the label after the source tokens inside it may begin any token at the last position.
        rest = t_starts[label] + s_ends[v - 1] - begin + added
        length, total, seen = t_starts[label + 1] - rest, 0.0, False
        for k in range(topk_ids.shape[1]):
            z = topk_ids[v - 1, k]
            if z < 0 or z >= n_source or s_special[z]:
                continue
            seen |= z == s_ids[v]
            same = 0
            if 0 < length <= s_starts[z + 1] - s_starts[z]:
                while same < length and s_bytes[s_starts[z] + same] == t_bytes[rest + same]:
                    same += 1
            if 0 < length == same:
                total += np.exp(np.float64(topk_logprobs[v - 1, k]))
        if not seen:
            total += np.exp(np.float64(following[v - 1]))
        masses[t] = np.exp(logp) * total
    return kinds, masses


@compiled
def _project(positions, s_ids, said, t_ids, tables, options, scratch, out):  # type: ignore[no-untyped-def]
    """Write the distributions of one text."""
    matched, kinds, chain_masses = positions
    topk_ids, topk_logprobs, following = said
    mapped, s_bytes, s_starts, s_special = tables.mapped, tables.s_bytes, tables.s_starts, tables.s_special
    share_starts, share_ids, share_weights = tables.share_starts, tables.share_ids, tables.share_weights
    t_bytes, t_starts = tables.t_bytes, tables.t_starts
    chain, renormalize, min_mass = options
    # Target tokens that have mass, and their masses, in order of arrival. `slots` finds a token among them by open
    # addressing, -1 for none: unlike an array over the vocabulary it stays in the first-level cache and is cleared in no
    # time.
    held_ids, held, slots = scratch
    out_ids, out_logprobs, out_leftover, out_kept, out_gold, counts, masses = out
    n_entries, n_target, last_slot = topk_ids.shape[1], len(tables.t_special), len(slots) - 1
    for t in range(len(t_ids) - 1):
        u, kind = np.int64(matched[t]), kinds[t]
        if u < 0:
            continue
        if kind > UNCHECKED:
            counts[kind] += 1
            continue
        first, label = s_ids[u + 1], t_ids[t + 1]
        size, inside, seen = 0, 0.0, False
        gold_mass, exact_mass, edited_mass, unmapped_mass, prefix_mass = 0.0, 0.0, 0.0, 0.0, 0.0
        n_exact, n_edited, n_unmapped = 0, 0, 0
        slots[:] = -1
        # 1. The label gets what the chain says; its first token is done with.
        first_mass, by_bytes = np.exp(np.float64(following[u])), not np.isnan(chain_masses[t])
        if by_bytes:
            gold_mass, inside, seen = chain_masses[t], first_mass, True
            if gold_mass > 0.0:
                slots[_hash(label) & last_slot], held_ids[0], held[0], size = 0, label, gold_mass, 1
        # Part of the mass of a prefix of the label is in the chain product.
        splits, label_length = (
            by_bytes and (kind == ONE_TO_MANY or kind == CROSSING),
            t_starts[label + 1] - t_starts[label],
        )
        # 2. The entries.
        for k in range(-1, n_entries + 1):
            # 2a. A source token and its mass, and whether it is a prefix of the label.
            if k < 0:
                # Before the first: what the chain leaves of its first token.
                if not by_bytes:
                    continue
                z, mass, prefix = first, max(first_mass - gold_mass, 0.0), True
            else:
                if k < n_entries:
                    z, p = topk_ids[u, k], topk_logprobs[u, k]
                    if z < 0 or (by_bytes and z == first):
                        continue
                else:
                    # After the last: a next token that the top k missed. Its probability is stored all the same.
                    z, p = first, following[u]
                    if seen or not chain or np.isnan(p):
                        continue
                mass, prefix = np.exp(np.float64(p)), False
                inside += mass
                seen |= z == first
                if splits and z < len(s_special) and not s_special[z]:
                    start, length = s_starts[z], s_starts[z + 1] - s_starts[z]
                    if 0 < length < label_length:
                        same = 0
                        while same < length and s_bytes[start + same] == t_bytes[t_starts[label] + same]:
                            same += 1
                        prefix = same == length
            # 2b. Where it goes: to one target token (-1 for none), or to those among which the map divides it.
            to, begins, weight = np.int32(-1), np.int32(-1), 0.0
            if z < len(mapped):
                to, begins = mapped[z, 0], mapped[z, 1]
            to_label = False
            if prefix:
                to = np.int32(-1)
            elif kind == SPECIAL and z == first:
                # The same special token on both sides, whatever its names.
                to, begins, to_label = label, np.int32(IS_EXACT), True
            elif by_bytes and begins == label:
                # No token of the target, which would begin it with the label.
                to, to_label = label, True
            entry, stop = 0, 1
            if not to_label and z + 1 < len(share_starts):
                entry, stop = share_starts[z], share_starts[z + 1]
                for e in range(entry, stop):
                    if not (prefix and share_ids[e] == label):
                        weight += share_weights[e]
                if weight == 0.0:
                    entry, stop = 0, 1
            # 2c. Add its mass there.
            for e in range(entry, stop):
                token, part = to, mass
                if weight > 0.0:
                    token, part = share_ids[e], mass * share_weights[e] / weight
                    if prefix and token == label:
                        continue
                if part <= 0.0 or not 0 <= token < n_target:
                    continue
                slot = _hash(token) & last_slot
                while slots[slot] >= 0 and held_ids[slots[slot]] != token:
                    slot = (slot + 1) & last_slot
                if slots[slot] >= 0:
                    held[slots[slot]] += part
                else:
                    slots[slot], held_ids[size], held[size] = size, token, part
                    size += 1
            # 2d. Account for it.
            if prefix and weight == 0.0:
                prefix_mass += mass
            elif prefix:
                edited_mass += mass
                n_edited += k >= 0
            elif begins == IS_EXACT:
                exact_mass += mass
                n_exact += 1
            elif to_label:
                gold_mass += mass
            elif to >= 0:
                edited_mass += mass
                n_edited += 1
            else:
                unmapped_mass += mass
                n_unmapped += 1
        counts[EXACT] += n_exact
        counts[EDITED] += n_edited
        counts[UNMAPPED] += n_unmapped
        # 3. Is it enough?
        outside, total = max(1.0 - inside, 0.0), 0.0
        for k in range(size):
            total += held[k]
        if not (total > 0.0 and total >= min_mass * (1.0 - outside)):
            counts[LOW_MASS] += 1
            continue
        counts[kind] += 1
        masses[GOLD_MASS] += gold_mass
        masses[EXACT_MASS] += exact_mass
        masses[EDITED_MASS] += edited_mass
        masses[UNMAPPED_MASS] += unmapped_mass
        masses[PREFIX_MASS] += prefix_mass
        masses[OUTSIDE_MASS] += outside
        # 4. Sort by descending mass, equal masses by id. Insertion sort: the entries of a source are sorted, so what is
        # made of them nearly is. Many shares are not: for them the step begins wide (Shell's sort).
        step = 1
        while size > _NEARLY_SORTED and 9 * step < size:
            step = 3 * step + 1
        while step > 0:
            for n in range(step, size):
                token, part, k = held_ids[n], held[n], n
                while k >= step and (held[k - step] < part or (held[k - step] == part and held_ids[k - step] > token)):
                    held_ids[k], held[k] = held_ids[k - step], held[k - step]
                    k -= step
                held_ids[k], held[k] = token, part
            step //= 3
        # 5. Write.
        log_total = np.float32(np.log(total)) if renormalize else np.float32(0.0)
        for k in range(size):
            logp = np.float32(np.log(held[k]))
            if held_ids[k] == label:
                out_gold[t] = logp
            out_ids[t, k], out_logprobs[t, k] = held_ids[k], logp - log_total
        out_kept[t], out_leftover[t] = total, 0.0 if renormalize else max(1.0 - total, 0.0)


@compiled
def _hash(token):  # type: ignore[no-untyped-def]
    """Fibonacci hashing: neighbouring ids, which are common in a top k, are spread over the slots."""
    return (np.int64(token) * 2654435769) >> 7


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
