"""The first token of an answer behind white space that is not part of it, held against a plain twin and brute force."""

import hashlib
import pickle
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import reference
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from records import record_of

from fusion_plugins.core.fusion.align import align_by_tokens, align_dtw, align_texts
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, fuse_text
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.record import supervised_positions
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.core.text.types import TokenizedText

TRUE = ProjectionOptions(renormalize=False, min_mass=0.0)
CONTEXT, SPACE = b"<", b" "
#: where the white space before an answer is from: nowhere, the tokenizer, the template
NONE, TOKENIZER, TEMPLATE = "none", "tokenizer", "template"
WHERE = st.sampled_from([NONE, TOKENIZER, TEMPLATE])
# Vocabularies in which no token begins another: with a space before some of them, each text has one spelling.
PREFIX_FREE = [
    ["a", "b"],
    ["aa", "ab", "b"],
    ["aa", "ab", "ba", "bb"],
    ["a", "baa", "bab", "bb"],
    ["a", "ba", "bba", "bbb"],
]


@dataclass
class Side:
    """One side of a made-up world.

    ``first``: place of the first token with bytes of the answer; ``space``: whether a space alone is before it.
    """

    table: TokenTable
    text: TokenizedText
    first: int
    space: bool
    prefix: bytes


def a_table(tokens):
    names = [CONTEXT, SPACE, *dict.fromkeys(token.encode() for token in tokens)]
    return TokenTable(names, [None] * len(names), {}, False, "byte_level")


def greedy(text, tokens):
    found = []
    while text:
        found.append(reference.longest_beginning(text, tokens))
        text = text[len(found[-1]) :]
    return found


def a_side(table, answer, where):
    """The answer in the longest tokens, behind a token of context, and behind a space from somewhere."""
    prefix = b"" if where == NONE else SPACE
    tokens = greedy(prefix + answer, set(table.tokens) - {CONTEXT})
    # The context of a template has a byte of the text, a BOS has none.
    start = len(CONTEXT + prefix) if where == TEMPLATE else 0
    ends = np.cumsum([len(CONTEXT), *map(len, tokens)]) - (0 if where == TEMPLATE else len(CONTEXT + prefix))
    ids = [table.tokens.index(token) for token in (CONTEXT, *tokens)]
    text = TokenizedText(
        np.array(ids, np.int32), np.maximum(ends, 0).astype(np.int32),
        np.array([[start, start + len(answer)]], np.int32), np.ones(len(ids), np.bool_),
    )  # fmt: skip
    space = bool(prefix) and tokens[0] == SPACE
    return Side(table, text, 1 + space, space, prefix)


def a_model(table, seed):
    """A distribution after any bytes. It never goes on after a space alone with a token that exists with the space."""
    tokens = table.tokens

    @cache
    def model(read):
        state = int.from_bytes(hashlib.sha256(read + bytes([seed])).digest()[:4], "big")
        p = np.random.default_rng(state).dirichlet(np.full(len(tokens), 0.7))
        if read.endswith(SPACE):
            p[[token.startswith(SPACE) or SPACE + token in tokens for token in tokens]] = 0
        p[0] = 0
        p = p + 1e-6 * (p > 0)
        return dict(enumerate((p / max(p.sum(), 1e-300)).tolist()))

    return model


def a_record(side, model, k=None):
    ids, read, rows, gold = side.text.input_ids.tolist(), b"", [], []
    for u, z in enumerate(ids):
        read += side.table.tokens[z]
        row = model(read)
        rows.append(sorted(row, key=lambda y: (-row[y], y))[:k])
        gold.append((row, row[ids[u + 1]] if u + 1 < len(ids) else 1.0))
    logprobs = np.log(np.array([[max(row[z], 1e-30) for z in best] for best, (row, _) in zip(rows, gold, strict=True)]))
    # The template's space is written by the source, so that a store has the position before it too.
    whole = replace(side.text, spans=np.array([[side.text.ends[0], side.text.ends[-1]]], np.int32))
    found = record_of(
        "r", whole, np.array(rows, np.int32), logprobs.astype(np.float32),
        np.log([max(p, 1e-30) for _, p in gold]).astype(np.float32),
    )  # fmt: skip
    return replace(found, text=side.text)


def first_positions(source, target):
    """(position of the target, the label's prefix, what the target has read of the prefix) of each first position."""
    if target.space:
        yield target.first - 2, target.prefix, b""
        if not source.space:
            yield target.first - 1, b"", target.prefix
    elif source.prefix or target.prefix:
        yield target.first - 1, target.prefix, b""


def plain_row(source, target, record, t, put, read):
    """The mass of each target token at one first position, by the rules as they are written down."""
    label = int(target.text.input_ids[t + 1])
    joined = source.space and not (target.space and put)
    u = source.first - 2 if source.space else source.first - 1
    names, names_of_target = source.table.tokens, target.table.tokens
    known = set(names_of_target)

    def said(at):
        return dict(reference.candidates(record, at))

    # A space that both write is no prefix to either.
    same = put == source.prefix and not joined
    taken_off, put = (b"", b"") if same else (source.prefix, put)
    strings = {}
    for z, p in said(u).items():
        if not names[z].startswith(taken_off) or (joined and names[z] == SPACE):
            continue
        strings[put + names[z][len(taken_off) :]] = p
    following = np.exp(record.topk.token_logprobs.astype(float))
    path = source.text.input_ids.tolist()
    first, first_mass = put + names[path[u + 1]][len(taken_off) :], following[u]
    at = u + 1
    if joined:
        for z, p in said(u + 1).items():
            strings[put + names[z]] = strings.get(put + names[z], 0) + following[u] * p
        first, first_mass, at = put + names[path[u + 2]], following[u] * following[u + 1], u + 2
    strings.pop(b"", None)
    strings.setdefault(first, first_mass)

    def goes_elsewhere(string):
        return read and reference.longest_beginning(read + string, known) != read

    # The strings are tokens of a vocabulary of their own; behind them come the source's.
    vocabulary = [*strings, *names]
    gold = [(list(strings).index(first), first_mass, dict(enumerate(strings.values())))]
    spelled = len(first)
    while spelled < len(names_of_target[label]):
        row = {len(strings) + z: p for z, p in said(at).items()}
        gold.append((len(strings) + path[at + 1], following[at], row))
        at += 1
        spelled += len(names[path[at]])
    target_ids = [names_of_target.index(name) if name in known else -1 for name in vocabulary]
    exact = [name in known for name in vocabulary]
    candidates = {i: p for i, (name, p) in enumerate(strings.items()) if i == gold[0][0] or not goes_elsewhere(name)}
    return reference.project_row(candidates, gold, label, vocabulary, names_of_target, target_ids, exact)


def a_world(base, spaced, longer, t_spaced, wheres, answer, seed):
    source = a_side(a_table([*base, *(SPACE.decode() + token for token in base if token in spaced)]), answer, wheres[0])
    target = a_side(a_table(["a", "b", *longer, *(SPACE.decode() + token for token in t_spaced)]), answer, wheres[1])
    return source, target, a_model(source.table, seed)


def project(source, target, record, options=TRUE, **how):
    projector = Projector.of(
        source.table, target.table, map_vocabulary(source.table, target.table, method="exact"), options
    )
    return projector(record, align_texts(record.text, target.text, **how), target.text)


def row_of(found, t):
    d = found.distributions
    return {int(i): float(np.exp(p)) for i, p in zip(d.ids[t], d.logprobs[t], strict=True) if i >= 0}


WORLDS = (
    st.sampled_from(PREFIX_FREE),
    st.sets(st.sampled_from(["a", "b", "aa", "ab", "ba", "bb", "baa", "bba"])),
    st.sets(st.sampled_from(["aa", "ab", "ba", "aab", "bba"])),
    st.sets(st.sampled_from(["a", "b", "aa", "ab", "bab"])),
    st.tuples(WHERE, WHERE),
    st.lists(st.integers(0, 9), min_size=3, max_size=5),
    st.integers(0, 99),
)


def answer_of(base, numbers):
    return "".join(base[number % len(base)] for number in numbers).encode()


@settings(max_examples=300, deadline=None)
@given(*WORLDS, st.sampled_from([None, 2, 4]))
def test_first_positions_equal_the_plain_twin(base, spaced, longer, t_spaced, wheres, numbers, seed, k):
    source, target, model = a_world(base, spaced, longer, t_spaced, wheres, answer_of(base, numbers), seed)
    record = a_record(source, model, k)
    found = project(source, target, record)
    for t, put, read in first_positions(source, target):
        expected = {to: p for to, p in plain_row(source, target, record, t, put, read).items() if p > 1e-12}
        got = {to: p for to, p in row_of(found, t).items() if p > 1e-12}
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(*WORLDS)
def test_the_labels_mass_is_the_brute_force_probability_of_its_bytes(
    base, spaced, longer, t_spaced, wheres, numbers, seed
):
    """Over all that the source may say from before its space on: P(its space, then the rest of the label)."""
    source, target, model = a_world(base, spaced, longer, t_spaced, wheres, answer_of(base, numbers), seed)
    found = project(source, target, a_record(source, model))
    names, known = source.table.tokens, set(target.table.tokens)
    for t, put, read in first_positions(source, target):
        label = target.table.tokens[target.text.input_ids[t + 1]]
        if read or (put and label == SPACE):
            continue
        wanted = source.prefix + label[len(put) :]

        def said(read_bytes):  # what goes on after a space that is not the text's own is not known
            row = model(read_bytes)
            dropped = read_bytes == CONTEXT and source.prefix and not source.space
            return {z: p for z, p in row.items() if not (dropped and names[z] == SPACE)}

        elsewhere = [
            (row, z, before)
            for before, row in ((b"", said(CONTEXT)), (SPACE, said(CONTEXT + SPACE) if source.space else {}))
            for z in row
            if (before + names[z]).startswith(wanted)
            and reference.longest_beginning(put + (before + names[z])[len(source.prefix) :], known) != label
        ]
        own = {z: p for z, p in said(CONTEXT).items() if names[z] == SPACE}
        lost = sum(row[z] * (sum(own.values()) if before else 1.0) for row, z, before in elsewhere)
        expected = reference.begins_with(said, names, CONTEXT, wanted) - lost
        assert np.exp(found.label_logprobs[t]) == pytest.approx(expected, rel=1e-3, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(*WORLDS, st.sampled_from([None, 2]))
def test_the_mass_of_every_position_is_accounted_for(base, spaced, longer, t_spaced, wheres, numbers, seed, k):
    source, target, model = a_world(base, spaced, longer, t_spaced, wheres, answer_of(base, numbers), seed)
    report = project(source, target, a_record(source, model, k)).report
    masses = report.gold_mass, report.exact_mass, report.edited_mass
    lost = report.unmapped_mass, report.prefix_mass, report.outside_mass
    assert sum(masses) + sum(lost) == pytest.approx(report.used, rel=1e-4)
    unused = report.unaligned + report.other_bytes + report.reaches_out + report.other_special + report.source_ends
    assert report.used + unused + report.low_mass == report.positions
    assert report.other_bytes == 0


CHATS = [
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": then},
    ]
    for first, then in (("The apples", "12 + 30"), ("12", "the theory"), ("Zoë said 数学", "42 apples"))
]


@cache
def load(name):
    tokenizer = getattr(tiny, name)()
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def certain(text):
    """A source that is certain of its own tokens."""
    following = np.append(text.input_ids[1:], 0)[:, None]
    return record_of(
        "r", text, following, np.zeros((len(following), 1), np.float32), np.zeros(len(following), np.float32)
    )


@pytest.mark.parametrize("method", ["exact", "first_token", "min_edit"])
@pytest.mark.parametrize("how", ["offsets", "offsets_strict", "dtw"])
@pytest.mark.parametrize("names", [("sentencepiece_bpe", "byte_level"), ("byte_level", "sentencepiece_bpe")])
def test_a_certain_source_teaches_the_first_token_of_every_answer(names, how, method):
    (own, table), (other, target_table) = map(load, names)
    projector = Projector.of(table, target_table, map_vocabulary(table, target_table, method=method))
    align = {
        "offsets": align_texts,
        "offsets_strict": partial(align_texts, strict=True),
        "dtw": align_by_tokens(align_dtw, table.packed, target_table.packed),
    }[how]
    for content in (*CHATS, "The 12 apples", "12 apples", " the", "四"):
        record, target = (
            certain(tokenize_content(own, table, content)[0]),
            tokenize_content(other, target_table, content)[0],
        )
        fused, report = fuse_text(FusionPlan((FusionSource("a", projector, align),)), target, [record])
        assert report.fused_positions <= report.positions
        for start, _ in target.spans[1::3].tolist() if isinstance(content, list) else target.spans.tolist():
            first = int(np.searchsorted(target.ends, start, side="right"))
            first_of_source = int(np.searchsorted(record.text.ends, start, side="right"))
            if not (first and first_of_source):  # nothing is read before the text
                assert isinstance(content, str)
                continue
            if how != "offsets_strict":
                assert fused.ids[first - 1, 0] == target.input_ids[first]
            if fused.present[first - 1]:
                assert (fused.ids[first - 1, 0], fused.logprobs[first - 1, 0]) == (target.input_ids[first], 0)


def test_strict_takes_only_first_tokens_that_end_together():
    source = a_side(a_table(["a", " a", "b"]), b"ab", TEMPLATE)
    model = a_model(source.table, 0)
    for tokens, taught in ((["a", "b"], True), (["ab"], False)):
        target = a_side(a_table(tokens), b"ab", NONE)
        assert project(source, target, a_record(source, model), strict=True).distributions.present[0] == taught
        assert project(source, target, a_record(source, model)).distributions.present[0]


def test_a_token_beyond_the_vocabulary_is_none():
    """As of a padded output layer. The label ends inside the second token, which the source goes on with."""
    source = a_side(a_table([" a", "bc", " bx"]), b"abc", TEMPLATE)
    target = a_side(a_table(["ab", "c"]), b"abc", NONE)
    size = source.table.vocab_size
    record = a_record(source, a_model(source.table, 0))
    found = []
    for spare in (-1, size, size + source.table.tokens.index(b" bx")):
        record.topk.ids[1, -1], record.topk.logprobs[1, -1] = spare, -1.0
        found.append(project(source, target, record).label_logprobs[0])
    assert np.isfinite(found[0])
    assert found == [found[0]] * 3


def test_a_prefix_that_is_no_white_space_is_left_out():
    table = TokenTable([b"<", b'"a', b"b", b"a"], [None] * 4, {}, False, "byte_level")
    quoted, plain = (
        TokenizedText(
            np.array(ids, np.int32), np.array(ends, np.int32), np.array([span], np.int32), np.ones(3, np.bool_)
        )
        for ids, ends, span in (([0, 1, 2], [1, 3, 4], (2, 4)), ([0, 3, 2], [1, 2, 3], (1, 3)))
    )
    for own, other in ((quoted, plain), (plain, quoted)):
        found = Projector.of(table, table, map_vocabulary(table, table, method="exact"))(
            certain(own), align_texts(own, other), other
        )
        assert found.distributions.present.tolist() == [False, True, False]


def test_a_store_keeps_the_position_before_a_first_token_that_begins_before_its_span():
    side = a_side(a_table(["a", " a", "b"]), b"ab", TEMPLATE)
    assert supervised_positions(side.text).tolist() == [True, True, False]
    assert certain(side.text).topk.ids[0, 0] == side.text.input_ids[1]


def test_a_position_of_which_the_store_has_no_entries_is_as_without_a_prefix():
    """Stores of earlier versions: nothing behind a space in the token, the ordinary distribution behind a token."""
    for spaced, taught in ((["a", " a", "b"], False), (["a", "b"], True)):
        source, target = a_side(a_table(spaced), b"ab", TEMPLATE), a_side(a_table(["a", "b"]), b"ab", NONE)
        record = a_record(source, a_model(source.table, 0))
        record.topk.ids[0] = -1
        found = project(source, target, record)
        assert found.distributions.present[0] == taught
        assert found.report.used == 1 + taught


def test_the_tables_of_prefixes_are_made_once_and_stay_at_home():
    source, target = a_side(a_table(["a", " a", "b"]), b"ab", TEMPLATE), a_side(a_table(["a", "b"]), b"ab", NONE)
    mapping = map_vocabulary(source.table, target.table, method="exact")
    projector, record = Projector.of(source.table, target.table, mapping), certain(source.text)
    before = pickle.dumps(projector)
    for _ in range(2):
        projector(record, align_texts(record.text, target.text), target.text)
    assert len(projector.prefixed.made) == 1
    assert pickle.dumps(projector) == before
    again = pickle.loads(before)(record, align_texts(record.text, target.text), target.text)
    assert again.distributions.present.tolist() == [True, True, False]
