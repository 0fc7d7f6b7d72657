from random import Random

import numpy as np
import pytest
from records import record_of

from fusion_plugins.core.fusion import projection_kernel as kernel
from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.flat import Entries, Texts
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.projection_kernel import (
    _add,
    _destination,
    _is_strict_prefix,
    _logarithm,
    _sort,
    _walk,
    _write,
    places,
    supervised_texts,
)
from fusion_plugins.core.fusion.types import Shares, VocabularyMap
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.types import TokenizedText


def packed(*tokens):
    return TokenTable([token.encode() for token in tokens], [None] * len(tokens), {}, False, "byte_level").packed


# The plain twin: the rules of core/fusion/project.py in Python, one position at a time, over bytes and dictionaries.


def plain_overlap(source, table, record, target, u, t):
    """How the next tokens overlap, and the probability that the source says the label's bytes: (kind, mass)."""
    ids, following = record.text.input_ids.tolist(), np.exp(record.topk.token_logprobs.astype(float))
    spellings, ends = [source.tokens[i] for i in ids], record.text.ends
    goal = int(target.ends[t + 1])
    inside = [v for v in range(u + 1, len(ids)) if ends[v] < goal and not source.special[ids[v]]]
    last = inside[-1] + 1 if inside else u + 1
    if last == len(ids):
        return "source_ends", 0
    before = float(np.prod([following[v - 1] for v in inside]))
    if ends[last] == goal:
        return "one_to_many" if inside else "one_to_one", before * following[last - 1]
    if not inside:
        return "many_to_one", following[last - 1]
    rest = table.tokens[target.input_ids[t + 1]][len(b"".join(spellings[v] for v in inside)) :]
    entries = {ids[last]: following[last - 1]} | plain_entries(record, last - 1)
    begin = [p for z, p in entries.items() if source.tokens[z].startswith(rest) and not source.special[z]]
    return "crossing", before * sum(begin)


def plain_position(world, record, target, u, t):
    """What one position becomes: (kind, {target id: mass})."""
    source, table, mapping, begins, chain = world
    label = int(target.input_ids[t + 1])
    if u + 1 == len(record.text.input_ids):
        return "source_ends", {}
    first, first_mass = int(record.text.input_ids[u + 1]), np.exp(float(record.topk.token_logprobs[u]))
    if source.special[first] or table.special[label]:
        kind, chained = "special" if mapping.target_ids[first] == label else "other_special", 0
    else:
        kind, chained = plain_overlap(source, table, record, target, u, t)
    if kind in ("other_special", "source_ends"):
        return kind, {}
    by_bytes, entries, held = chain and kind != "special", plain_entries(record, u), {}
    if chain:
        entries.setdefault(first, first_mass)
    if by_bytes:
        held[label], entries[first] = chained, max(first_mass - chained, 0)
    for z, p in entries.items():
        begins_label = table.tokens[label].startswith(source.tokens[z]) and source.tokens[z] != table.tokens[label]
        prefix = z == first or (kind in ("one_to_many", "crossing") and begins_label and not source.special[z])
        goal = plain_shares(mapping).get(z) or {int(mapping.target_ids[z]): 1}
        if by_bytes and prefix:
            goal = {to: w for to, w in plain_shares(mapping).get(z, {}).items() if to != label}
        elif (kind == "special" and z == first) or (by_bytes and not mapping.exact[z] and begins[z] == label):
            goal = {label: 1}
        for to, w in goal.items():
            held[to] = held.get(to, 0) + p * w / sum(goal.values())
    return kind, {to: p for to, p in held.items() if to >= 0 and p > 0}


def plain_entries(record, u):
    pairs = zip(record.topk.ids[u].tolist(), record.topk.logprobs[u].astype(float), strict=True)
    return {z: np.exp(p) for z, p in pairs if z >= 0}


def plain_shares(mapping):
    if mapping.shares is None:
        return {}
    starts, ids, weights = mapping.shares.starts, mapping.shares.target_ids.tolist(), mapping.shares.weights.tolist()
    return {
        z: dict(zip(ids[a:b], weights[a:b], strict=True))
        for z, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True))
        if b > a
    }


def plain_beginning(token, tokens):
    """The id of the longest target token that a token begins with, -1 for none."""
    found = [other for other in tokens if other and token.startswith(other)]
    return tokens.index(max(found, key=len)) if found else -1


def a_table(random, size):
    tokens = [b"a", b"b", *random.sample([b"aa", b"ab", b"ba", b"bb", b"aab", b"abb", b"bab", b"abab", b"bbaa"], size)]
    return TokenTable([*tokens, b"<end>"], [None] * len(tokens) + [Role.EOS], {Role.EOS: len(tokens)}, False, "x")


def a_text(random, table, text):
    """A random spelling of the text, with the special token behind it, or cut."""
    ids, at = [], 0
    while at < len(text):
        fits = [i for i, token in enumerate(table.tokens) if not table.special[i] and text.startswith(token, at)]
        ids.append(random.choice(fits))
        at += len(table.tokens[ids[-1]])
    ends = np.cumsum([len(table.tokens[i]) for i in ids]).tolist()
    size = len(ids) + 1 if random.random() < 0.8 else random.randint(1, len(ids))
    ids, ends = np.array([*ids, table.vocab_size - 1], np.int32)[:size], np.array([*ends, len(text)], np.int32)[:size]
    return TokenizedText(ids, ends, np.array([[0, ends[-1]]], np.int32), np.ones(size, np.bool_))


def a_record(random, table, text, k):
    rng = np.random.default_rng(random.random().as_integer_ratio()[0] % 2**32)
    n, w = len(text.input_ids), table.vocab_size
    p = rng.dirichlet(np.full(w, 0.4), n) + 1e-6
    ids = np.argsort(-p, axis=1)[:, :k].astype(np.int32)
    logprobs = np.log(np.take_along_axis(p, ids, 1)).astype(np.float32)
    gold = np.log(p[np.arange(n), np.append(text.input_ids[1:], 0)]).astype(np.float32)
    return record_of("text", text, ids, logprobs, gold)


def a_map(random, source, table, many):
    w, v = source.vocab_size, table.vocab_size
    ids = [table.tokens.index(t) if t in table.tokens else random.randint(-1, v - 2) for t in source.tokens]
    exact = [0 if t in table.tokens else random.choice([-1, 1]) for t in source.tokens]
    shares = None
    if many:
        parts = [sorted(random.sample(range(v - 1), random.choice([0, 0, 1, 2, 3]))) for _ in range(w - 1)] + [[]]
        weights = [random.random() + 0.1 for part in parts for _ in part]
        starts = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        shares = Shares(starts, np.array(sum(parts, []), np.int32), np.array(weights, np.float32))
    return VocabularyMap(np.array(ids, np.int32), np.array(exact, np.int32), "random", shares)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("chain", [False, True])
def test_the_kernel_equals_its_plain_twin(many, chain):
    """Random vocabularies, maps, spellings and distributions; three texts per call."""
    total, options = ProjectionReport(), ProjectionOptions(chain=chain, renormalize=False, min_mass=0.0)
    for seed in range(25):
        random = Random(seed)
        source, table = a_table(random, random.randint(2, 8)), a_table(random, random.randint(2, 8))
        mapping = a_map(random, source, table, many)
        begins = [plain_beginning(token, table.tokens[:-1]) for token in source.tokens]
        texts = ["".join(random.choice("ab") for _ in range(random.randint(6, 14))).encode() for _ in range(3)]
        targets = [a_text(random, table, text) for text in texts]
        records = [a_record(random, source, a_text(random, source, text), 3) for text in texts]
        matched = [align_texts(r.text, t).source_positions for r, t in zip(records, targets, strict=True)]
        projector = Projector.of(source, table, mapping, options)
        given = Texts.of([r.text for r in records]), Entries.of(records), np.concatenate(matched), Texts.of(targets)
        found = projector.project(*given)
        total += found.report
        world, at = (source, table, mapping, begins, chain), 0
        kinds = dict.fromkeys(ProjectionReport.__dataclass_fields__, 0)
        for record, target, positions in zip(records, targets, matched, strict=True):
            for t, u in enumerate(positions.tolist()[:-1]):
                if u >= 0:
                    kind, row = plain_position(world, record, target, u, t)
                    kind = kind if row or kind in ("source_ends", "other_special") else "low_mass"
                    kinds[kind] += 1
                    d = found.distributions
                    pairs = zip(d.ids[at + t].tolist(), np.exp(d.logprobs[at + t]).tolist(), strict=True)
                    got = {i: p for i, p in pairs if i >= 0}
                    assert got == pytest.approx(row, rel=1e-4, abs=1e-9), (seed, t, kind)
                    assert list(got) == sorted(got, key=lambda i: (-d.logprobs[at + t][d.ids[at + t] == i][0], i))
                    assert d.kept[at + t] == pytest.approx(sum(row.values()), rel=1e-4)
            at += len(target.ends)
        for name in ("one_to_one", "one_to_many", "many_to_one", "crossing", "special", "other_special", "source_ends"):
            assert getattr(found.report, name) == kinds[name], (seed, name)
    counts = total.one_to_one, total.one_to_many, total.many_to_one, total.crossing, total.special
    assert min(counts) > 5
    assert total.source_ends + total.other_special > 0
    assert (total.prefix_mass > 0) == chain
    shares = total.gold_mass + total.exact_mass + total.edited_mass
    assert shares + total.unmapped_mass + total.prefix_mass + total.outside_mass == pytest.approx(total.used, rel=1e-4)


def test_texts_of_one_call_do_not_touch_each_other():
    random = Random(3)
    source, table = a_table(random, 4), a_table(random, 3)
    projector = Projector.of(source, table, a_map(random, source, table, many=True))
    texts = b"abab", b"bbaab", b"a", b"abbab"
    targets = [a_text(random, table, text) for text in texts]
    records = [
        a_record(random, source, a_text(random, source, text), 3) for text in (b"abab", b"bbaab", b"a", b"abbab")
    ]
    matched = [align_texts(r.text, t).source_positions for r, t in zip(records, targets, strict=True)]
    flat = Texts.of(targets)
    together = projector.project(
        Texts.of([r.text for r in records]), Entries.of(records), np.concatenate(matched), flat
    )
    for b, (record, target) in enumerate(zip(records, targets, strict=True)):
        alone, own = projector(record, align_texts(record.text, target), target), slice(*flat.starts[b : b + 2])
        np.testing.assert_array_equal(together.distributions.ids[own], alone.distributions.ids)
        np.testing.assert_array_equal(together.distributions.logprobs[own], alone.distributions.logprobs)
        np.testing.assert_array_equal(together.label_logprobs[own], alone.label_logprobs)


def test_records_that_hold_fewer_entries_are_filled_up():
    text = a_text(Random(0), a_table(Random(0), 0), b"a")
    one, two = np.array([[7]], np.int32), np.array([[7, 8]], np.int32)
    n = len(text.ends)
    records = [record_of("a", text, ids.repeat(n, 0), -ids.repeat(n, 0), -text.ends) for ids in (one, two)]
    entries = Entries.of(records)
    assert entries.ids[0].tolist() == [7, -1]
    assert entries.logprobs[0].tolist() == [-7, -np.inf]
    assert entries.ids[n].tolist() == [7, 8]


def test_a_strict_prefix_has_bytes_and_leaves_some():
    tokens, special = packed("abc", "ab", "b", "", "abcd"), np.array([False, False, False, False, True])

    def is_prefix(z, label):
        return _is_strict_prefix(tokens.flat, tokens.starts, special, z, tokens.flat, tokens.starts, label)

    assert is_prefix(1, 0)
    assert is_prefix(0, 4)
    assert not is_prefix(0, 0)
    assert not is_prefix(2, 0)
    assert not is_prefix(0, 1)
    assert not is_prefix(3, 0), "nothing is the beginning of everything"
    assert not is_prefix(4, 4), "a special token spells nothing"


def test_the_walk_ends_in_the_token_that_holds_the_byte():
    """Tokens that end at 1, 2, 4, 4 (special), 6; from position 0."""
    ids, ends = np.array([0, 0, 0, 1, 0], np.int32), np.array([1, 2, 4, 4, 6], np.int32)
    logprobs, special = np.array([-1, -2, -4, -8, np.nan], np.float32), np.array([False, True])
    walk = [_walk(ids, ends, special, logprobs, 0, goal) for goal in (2, 3, 4, 5)]
    assert walk[0] == (kernel.ONE_TO_ONE, 1, 0.0)
    assert walk[1] == (kernel.CROSSING, 2, -1.0)
    assert walk[2] == (kernel.ONE_TO_MANY, 2, -1.0)
    assert walk[3][0] == kernel.OTHER_SPECIAL
    assert _walk(ids[:2], ends[:2], special, logprobs[:2], 0, 3)[0] == kernel.SOURCE_ENDS
    assert _walk(ids, ends, special, logprobs, 1, 3)[0] == kernel.MANY_TO_ONE


@pytest.mark.parametrize("seed", range(20))
def test_masses_add_up_per_token_whatever_the_collisions(seed):
    """As many tokens as there is room for, ids far apart and close together, some of them several times."""
    rng, width, n_target = np.random.default_rng(seed), 40, 200_000
    tokens = np.concatenate([rng.integers(0, n_target, 20), np.arange(20) + rng.integers(0, n_target - 20)])
    ids, mass, slots = np.empty(width, np.int32), np.empty(width), np.full(128, -1, np.int32)
    logs, size, expected, counts = np.empty(width, np.float32), 0, {}, {}
    for token in rng.choice(tokens, 150).tolist():
        own = float(rng.random())
        size = _add(ids, mass, logs, slots, size, token, own, np.float32(np.log(own)))
        expected[token] = expected.get(token, 0.0) + own
        counts[token] = counts.get(token, 0) + 1
    assert dict(zip(ids[:size].tolist(), mass[:size].tolist(), strict=True)) == expected
    assert sorted(slots[slots >= 0].tolist()) == list(range(size))
    alone = [counts[token] == 1 for token in ids[:size].tolist()]
    assert np.isnan(logs[:size]).tolist() == [not one for one in alone], "the logarithm of a sum is not known"
    np.testing.assert_allclose(logs[:size][alone], np.log(mass[:size][alone]), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 128, 129, 1000])
def test_entries_are_sorted_by_descending_mass_and_then_by_id(size):
    rng = np.random.default_rng(size)
    ids, mass = rng.permutation(size).astype(np.int32), rng.integers(0, 9, size).astype(np.float64)
    logs = rng.random(size).astype(np.float32)
    expected = sorted(
        zip(ids.tolist(), mass.tolist(), logs.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0])
    )
    _sort(ids, mass, logs, size)
    assert list(zip(ids.tolist(), mass.tolist(), logs.tolist(), strict=True)) == expected


def test_entries_are_written_as_logarithms_of_their_share():
    ids, mass = np.array([3, 4, 7, 0], np.int32), np.array([0.5, 0.3, 0.2, 9.0])
    out_ids, out = np.full((2, 6), -1, np.int32), np.full((2, 6), -np.inf, np.float32)
    unknown = np.full(4, np.nan, np.float32)
    label = _write(out_ids, out, 1, ids, mass, unknown, 3, 4, 2.0)
    assert out_ids.tolist() == [[-1] * 6, [3, 4, 7, -1, -1, -1]]
    np.testing.assert_allclose(np.exp(out[1]), [0.25, 0.15, 0.1, 0, 0, 0], rtol=1e-6)
    assert np.exp(label) == pytest.approx(0.3)
    assert _write(out_ids, out, 0, ids, mass, unknown, 3, 9, 1.0) == -np.inf
    # Where there is room for two, the label's probability is known all the same.
    narrow_ids, narrow = np.full((1, 2), -1, np.int32), np.full((1, 2), -np.inf, np.float32)
    assert np.exp(_write(narrow_ids, narrow, 0, ids, mass, unknown, 3, 7, 1.0)) == pytest.approx(0.2)
    assert narrow_ids.tolist() == [[3, 4]]


def test_the_logarithm_of_an_exponential_need_not_be_taken():
    """Bit by bit, also at the bounds; and outside of them it is taken."""
    rng = np.random.default_rng(0)
    logs = np.concatenate(
        [-np.exp(rng.uniform(-16, 7, 100_000)), -np.arange(1 << 15, dtype=np.uint16).view(np.float16)]
    )
    logs = np.append(logs[np.isfinite(logs)], [-1e-6, -600.0, -1e-9, 0.0, -740.0]).astype(np.float32)
    for log in logs:
        mass = np.exp(np.float64(log))
        if mass > 0:
            assert _logarithm(mass, log) == _logarithm(mass, np.float32(np.nan))
    assert np.isnan(_logarithm(np.nan, np.float32(np.nan)))


def test_a_prefix_and_the_same_special_token_come_before_the_map():
    label, other = np.int32(5), np.int32(6)
    cases = [(True, False), (False, True), (False, False)]
    found = [_destination(other, np.int32(kernel.IS_EXACT), label, prefix, same, True) for prefix, same in cases]
    assert found == [(-1, kernel.PREFIX_MASS, True), (5, kernel.EXACT_MASS, False), (6, kernel.EXACT_MASS, True)]
    begins = [
        _destination(np.int32(to), label, label, False, False, by_bytes) for to in (6, -1) for by_bytes in (True, False)
    ]
    gold = (5, kernel.GOLD_MASS, False)
    assert begins == [gold, (6, kernel.EDITED_MASS, True), gold, (-1, kernel.UNMAPPED_MASS, True)]


def test_places_are_counted_inside_each_span():
    place, left = places(np.array([2, 5, 9, 13, 20], np.int32), np.array([[5, 9], [20, 23]], np.int32))
    assert place.tolist() == [-1, 0, 4, -1, 1 << 32]
    assert left.tolist() == [-1, 4, 0, -1, 3]


def test_the_last_position_of_each_text_is_not_supervised():
    ends, none = np.array([1, 2, 4], np.int32), np.zeros(0, np.int32)
    text = TokenizedText(ends, ends, np.array([[1, 4]], np.int32), ends > 0)
    empty = TokenizedText(none, none, np.zeros((0, 2), np.int32), none > 0)
    assert supervised_texts(Texts.of([text, empty, text])).tolist() == [True, True, False] * 2
