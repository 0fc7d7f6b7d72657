import hashlib
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest
import reference
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from records import project_record, record_of

from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.project import ProjectionOptions, longest_beginnings, project_distributions
from fusion_plugins.core.fusion.types import Shares, VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError

TRUE = ProjectionOptions(renormalize=False, min_mass=0.0)


def table(tokens, **special):
    """A token table of plain tokens, with special tokens by role behind them."""
    names = [token.encode() for token in tokens]
    roles = [None] * len(names) + [Role(role) for role in special]
    role_ids = {Role(role): len(names) + i for i, role in enumerate(special)}
    return TokenTable(names + [name.encode() for name in special.values()], roles, role_ids, False, "byte_level")


def text_of(tokens, table, spans=None, extra=()):
    """Tokens by their text; those of `extra` are special tokens without bytes behind it."""
    ids = [table.tokens.index(token.encode()) for token in [*tokens, *extra]]
    ends = np.cumsum([len(token.encode()) for token in tokens] + [0] * len(extra)).astype(np.int32)
    spans = np.array([[0, ends[-1]]] if spans is None else spans, np.int32)
    return TokenizedText(np.array(ids, np.int32), ends, spans, np.ones(len(ids), np.bool_))


def model_of(size, seed):
    """A next-token distribution for every prefix, fixed by a hash of it."""

    @cache
    def model(prefix):
        state = int.from_bytes(hashlib.sha256(prefix + seed.to_bytes(4, "big")).digest()[:4], "big")
        return dict(enumerate(np.random.default_rng(state).dirichlet(np.full(size, 0.6)).tolist()))

    return model


def model_record(text, table, model, k=None):
    """The record of a source whose distributions depend on the bytes that it has read."""
    k = k or table.vocab_size
    n = len(text.input_ids)
    ids, logprobs, gold = np.empty((n, k), np.int32), np.empty((n, k), np.float32), np.full(n, np.nan, np.float32)
    prefix = b""
    for u, token in enumerate(text.input_ids.tolist()):
        prefix += table.tokens[token]
        row = model(prefix)
        best = sorted(row, key=lambda z: (-row[z], z))[:k]
        ids[u], logprobs[u] = best, np.log([max(row[z], 1e-30) for z in best])
        if u + 1 < n:
            gold[u] = np.log(row[int(text.input_ids[u + 1])])
    return record_of("text", text, ids, logprobs, gold)


def fixed(rows):
    """A model that gives the same distribution after any of the named prefixes."""
    return lambda prefix: rows[prefix.decode()]


def project(source_tokens, target_tokens, source_table, target_table, model, options=TRUE, method="exact", k=None):
    source, target = text_of(source_tokens, source_table), text_of(target_tokens, target_table)
    record = model_record(source, source_table, model, k)
    return project_record(
        record,
        align_texts(record.text, target),
        map_vocabulary(source_table, target_table, method=method),
        target,
        source_table=source_table,
        target_table=target_table,
        options=options,
    )


def as_dict(projection, row, table):
    d = projection.distributions
    pairs = zip(d.ids[row].tolist(), np.exp(d.logprobs[row]).tolist(), strict=True)
    return {table.tokens[i].decode(): pytest.approx(p, rel=1e-5) for i, p in pairs if p > 1e-9}


def test_the_source_splits_finer_by_the_worked_numbers():
    """Target "12" against source "1" "2": p(1) p(2 | 1) = .6 * .5 = .3 goes to "12".

    "1" is a prefix of "12" and loses its .6, of which the chain explains .3; "7" (.25) is a target token; "." (.1) too;
    the rest, .05, is outside the top 3. Mass: .3 + .25 + .1 kept, .3 prefix, .05 outside.
    """
    source, target = table(["x", "1", "2", "7", ".", "?"]), table(["x", "12", "1", "7", "."])
    model = fixed({"x": {1: 0.6, 3: 0.25, 4: 0.1, 5: 0.05}, "x1": {2: 0.5, 4: 0.5}, "x12": {4: 1.0}, "x12.": {4: 1.0}})
    found = project(["x", "1", "2", "."], ["x", "12", "."], source, target, _thick(model), k=3)
    assert as_dict(found, 0, target) == {"12": 0.3, "7": 0.25, ".": 0.1}
    assert found.distributions.leftover[0] == pytest.approx(0.35, abs=1e-6)
    assert np.exp(found.label_logprobs[0]) == pytest.approx(0.3, rel=1e-5)
    report = found.report
    assert (report.one_to_many, report.one_to_one, report.positions) == (1, 1, 2)
    assert report.prefix_mass == pytest.approx(0.3, rel=1e-5)


def test_a_one_to_many_map_shares_out_what_the_chain_does_not_explain():
    """Source "1" "2" (p .6 * .5) against targets "12", "13", "1": the rest of "1", .3, goes half to "13", half to "1".

    The counts are those of texts of this source, so the projected row is the true distribution of the target's next
    token: "12" .3, "13" .15, "1" .15; "a" .4 is no digit and stays where it is.
    """
    source, target = table(["x", "1", "2", "3", "a"]), table(["x", "12", "13", "1", "2", "3", "a"])
    model = fixed({"x": {1: 0.6, 4: 0.4}, "x1": {2: 0.5, 3: 0.25, 4: 0.25}, "x12": {4: 1.0}})
    texts = text_of(["x", "1", "2"], source), text_of(["x", "12"], target)
    record = model_record(texts[0], source, _thick(model), 4)
    counts = AlignmentCounts.from_pairs([1, 1, 1, 2, 3, 4], [1, 2, 3, 1, 2, 6], [50, 25, 25, 50, 25, 99])
    found = project_record(
        record,
        align_texts(record.text, texts[1]),
        map_vocabulary(source, target, method="one_to_many", counts=counts),
        texts[1],
        source_table=source,
        target_table=target,
        options=TRUE,
    )
    assert as_dict(found, 0, target) == {"12": 0.3, "13": 0.15, "1": 0.15, "a": 0.4}
    report = found.report
    assert report.gold_mass + report.exact_mass + report.edited_mass == pytest.approx(1.0, rel=1e-5)
    assert report.prefix_mass == pytest.approx(0.0, abs=1e-6)


def test_a_distractor_does_not_take_over_a_row_of_which_little_is_known():
    """The source says "the" (.97) and then almost surely not "re"; "there" is next, and "x" had .02."""
    source, target = table(["a", "the", "re", "x"]), table(["a", "there", "x"])
    model = fixed({"a": {1: 0.97, 3: 0.02, 0: 0.01}, "athe": {2: 0.001, 3: 0.999}, "athere": {3: 1.0}})
    row = ["a", "the", "re"], ["a", "there"], source, target, _thick(model)
    assert not project(*row, ProjectionOptions(), k=2).distributions.present[0]
    assert as_dict(project(*row, ProjectionOptions(min_mass=0), k=2), 0, target)["x"] == pytest.approx(0.954, abs=1e-3)


def _thick(model):
    """Fill up the candidates of a fixed model with negligible ones, so that every id has a probability."""
    return lambda prefix: dict.fromkeys(range(6), 1e-12) | model(prefix)


def test_the_sources_next_token_is_longer_by_the_worked_numbers():
    """Target "the" "re" against source "there": its .5 goes to "the".

    "them" (.2) begins with "the" and is no target token: to "the". "then" (.1) is one: it stays. "a" (.2) stays.
    """
    source, target = table(["x", "there", "them", "then", "a"]), table(["x", "the", "re", "then", "a"])
    model = fixed({"x": {1: 0.5, 2: 0.2, 3: 0.1, 4: 0.2}, "xthere": {4: 1.0}})
    found = project(["x", "there"], ["x", "the", "re"], source, target, _thick(model), k=4)
    assert as_dict(found, 0, target) == {"the": 0.7, "a": 0.2, "then": 0.1}
    assert found.report.many_to_one == 1
    assert found.report.unaligned == 1


def test_tokens_that_cross_by_the_worked_numbers():
    """Target "abc" "d" against source "ab" "cd": .5 * (.4 + .3), for "cd" and "ce" begin with what is left, "c"."""
    source, target = table(["x", "ab", "cd", "ce", "f"]), table(["x", "abc", "d", "f"])
    model = fixed({"x": {1: 0.5, 4: 0.5}, "xab": {2: 0.4, 3: 0.3, 4: 0.3}, "xabcd": {4: 1.0}})
    found = project(["x", "ab", "cd"], ["x", "abc", "d"], source, target, _thick(model), k=4)
    assert as_dict(found, 0, target) == {"f": 0.5, "abc": 0.35}
    assert found.report.crossing == 1
    assert found.report.prefix_mass == pytest.approx(0.15, rel=1e-4)


def test_one_to_one_the_label_keeps_its_probability_where_the_top_k_missed_it():
    source, target = table(["x", "a", "b", "c"]), table(["x", "a", "b", "c"])
    model = fixed({"x": {1: 0.6, 2: 0.3, 3: 0.1}, "xc": {1: 1.0}})
    found = project(["x", "c"], ["x", "c"], source, target, _thick(model), k=2)
    assert as_dict(found, 0, target) == {"a": 0.6, "b": 0.3, "c": 0.1}
    whole = project(["x", "c"], ["x", "c"], source, target, _thick(model), k=4)
    assert as_dict(whole, 0, target) == {"a": 0.6, "b": 0.3, "c": 0.1}


def test_candidates_that_meet_on_one_target_token_are_summed():
    """Minimum edit distance sends "zax" and "zay" to "za"."""
    source, target = table(["x", "zax", "zay", "b"]), table(["x", "za", "b"])
    model = fixed({"x": {1: 0.3, 2: 0.25, 3: 0.45}, "xb": {3: 1.0}})
    found = project(["x", "b"], ["x", "b"], source, target, _thick(model), method="min_edit", k=3)
    assert as_dict(found, 0, target) == {"za": 0.55, "b": 0.45}
    assert (found.report.edited, found.report.exact) == (2, 0)
    assert found.report.edited_mass == pytest.approx(0.55, rel=1e-5)


def test_without_the_chain_only_the_map_speaks():
    source, target = table(["x", "1", "2", "."]), table(["x", "12", "1", "."])
    model = fixed({"x": {1: 0.6, 3: 0.4}, "x1": {2: 0.5, 3: 0.5}, "x12": {3: 1.0}})
    options = ProjectionOptions(chain=False, renormalize=False)
    found = project(["x", "1", "2"], ["x", "12"], source, target, _thick(model), options, k=2)
    assert as_dict(found, 0, target) == {"1": 0.6, ".": 0.4}
    assert found.label_logprobs[0] == -np.inf


# Source vocabularies without a token that begins another: each text has one spelling, and the rule is exact.
ALPHABET = "ab"
PREFIX_FREE = [
    ["a", "b"],
    ["aa", "ab", "b"],
    ["aa", "ab", "ba", "bb"],
    ["a", "baa", "bab", "bb"],
    ["aaa", "aab", "ab", "ba", "bba", "bbb"],
    ["a", "ba", "bba", "bbba", "bbbb"],
]
prefix_free = st.sampled_from(PREFIX_FREE)
pieces = st.lists(st.text(ALPHABET, min_size=2, max_size=3), max_size=5, unique=True)


@settings(max_examples=120, deadline=None)
@given(prefix_free, pieces, st.randoms(use_true_random=False), st.integers(0, 99))
def test_the_labels_mass_is_the_brute_force_probability_of_its_bytes(source_tokens, longer, random, seed):
    """Over everything the source may say: P(next bytes begin with the label), less candidates that begin otherwise.

    The target takes the longest token it knows: a candidate "baa" goes to "ba" where there is a target token "ba", and
    not to the label "b".
    """
    source, target, model, (s_tokens, t_tokens) = _world(source_tokens, longer, random, seed)
    found = project(s_tokens, t_tokens, source, target, model)
    for t, wanted, _ in _used_labels(found, t_tokens):
        prefix = "".join(t_tokens[: t + 1]).encode()
        others = sum(
            p for z, p in model(prefix).items()
            if source.tokens[z].startswith(wanted)
            and reference.longest_beginning(source.tokens[z], target.tokens) != wanted
        )  # fmt: skip
        expected = reference.begins_with(model, source.tokens, prefix, wanted) - others
        assert np.exp(found.label_logprobs[t]) == pytest.approx(expected, rel=1e-4)


def test_the_random_worlds_hold_every_kind_of_row():
    total = ProjectionReport()
    for seed in range(60):
        random = Random(seed)
        longer = random.sample(["aa", "ab", "aab", "ba", "bb", "abb", "bab"], 3)
        source, target, model, tokens = _world(random.choice(PREFIX_FREE), longer, random, seed)
        total += project(*tokens, source, target, model).report
    assert min(total.one_to_one, total.one_to_many, total.many_to_one, total.crossing) > 5


@settings(max_examples=120, deadline=None)
@given(pieces, pieces, st.randoms(use_true_random=False), st.integers(0, 99))
def test_with_several_spellings_the_labels_mass_is_a_lower_bound(shorter, longer, random, seed):
    source, target, model, (s_tokens, t_tokens) = _world(["a", "b", *shorter], longer, random, seed)
    found = project(s_tokens, t_tokens, source, target, model)
    for t, wanted, _ in _used_labels(found, t_tokens):
        prefix = "".join(t_tokens[: t + 1]).encode()
        bound = reference.begins_with(model, source.tokens, prefix, wanted)
        assert np.exp(found.label_logprobs[t]) <= bound * (1 + 1e-4)


@settings(max_examples=120, deadline=None)
@given(
    pieces,
    pieces,
    st.randoms(use_true_random=False),
    st.integers(0, 99),
    st.sampled_from(["exact", "min_edit", "first_token"]),
)
def test_rows_equal_the_plain_reference(shorter, longer, random, seed, method):
    source, target, model, (s_tokens, t_tokens) = _world(["a", "b", *shorter], longer, random, seed)
    found = project(s_tokens, t_tokens, source, target, model, method=method)
    mapping = map_vocabulary(source, target, method=method)
    s_ends = np.cumsum([len(token) for token in s_tokens])
    for t, wanted, _ in _used_labels(found, t_tokens):
        start = sum(len(token) for token in t_tokens[: t + 1])
        prefix, gold = "".join(t_tokens[: t + 1]).encode(), []
        for v in range(int(np.searchsorted(s_ends, start)) + 1, len(s_tokens)):
            y = source.tokens.index(s_tokens[v].encode())
            gold.append((y, model(prefix)[y], model(prefix)))
            prefix += source.tokens[y]
            if s_ends[v] >= start + len(wanted):
                break
        expected = reference.project_row(
            gold[0][2], gold, target.tokens.index(wanted), source.tokens, target.tokens,
            mapping.target_ids.tolist(), (mapping.distances == 0).tolist(), first_token=method == "first_token",
        )  # fmt: skip
        d = found.distributions
        got = {int(i): float(np.exp(p)) for i, p in zip(d.ids[t], d.logprobs[t], strict=True) if i >= 0}
        assert got == pytest.approx({i: p for i, p in expected.items() if p > 0}, rel=1e-4, abs=1e-9)


@settings(max_examples=80, deadline=None)
@given(pieces, pieces, st.randoms(use_true_random=False), st.integers(0, 99), st.integers(1, 4))
def test_no_mass_appears_or_disappears_unreported(shorter, longer, random, seed, k):
    source, target, model, (s_tokens, t_tokens) = _world(["a", "b", *shorter], longer, random, seed)
    found = project(s_tokens, t_tokens, source, target, model, k=min(k, source.vocab_size))
    report = found.report
    shares = (
        report.gold_mass + report.exact_mass + report.edited_mass
        + report.unmapped_mass + report.prefix_mass + report.outside_mass
    )  # fmt: skip
    assert shares == pytest.approx(report.used, rel=1e-5)
    held = np.exp(found.distributions.logprobs.astype(np.float64)).sum(axis=1)
    assert held.sum() == pytest.approx(report.gold_mass + report.exact_mass + report.edited_mass, rel=1e-5)
    np.testing.assert_allclose(held + found.distributions.leftover, 1.0, atol=1e-5)
    unused = report.unaligned + report.other_bytes + report.reaches_out + report.other_special
    assert report.used + unused + report.source_ends + report.low_mass == report.positions == len(t_tokens) - 1


def _world(source_tokens, longer, random, seed):
    source_tokens = list(dict.fromkeys(source_tokens))
    source, target = table(source_tokens), table(list(dict.fromkeys(["a", "b", *longer])))
    s_tokens = [random.choice(source_tokens) for _ in range(6)]
    text, t_tokens = "".join(s_tokens), []
    while text:
        known = [token.decode() for token in target.tokens if text.startswith(token.decode())]
        t_tokens.append(max(known, key=len))
        text = text[len(t_tokens[-1]) :]
    return source, target, model_of(len(source_tokens), seed), (s_tokens, t_tokens)


def _used_labels(found, t_tokens):
    rows = np.flatnonzero(found.distributions.present).tolist()
    return [(t, t_tokens[t + 1].encode(), t_tokens[t]) for t in rows]


def test_renormalised_rows_sum_to_one_and_keep_the_ratios():
    source, target = table(["x", "a", "b", "q"]), table(["x", "a", "b"])
    model = fixed({"x": {1: 0.4, 2: 0.2, 3: 0.4}, "xa": {1: 1.0}})
    found = project(["x", "a"], ["x", "a"], source, target, _thick(model), ProjectionOptions(), k=3)
    assert as_dict(found, 0, target) == {"a": 2 / 3, "b": 1 / 3}
    assert found.distributions.leftover.tolist() == [0.0, 1.0]
    assert np.exp(found.label_logprobs[0]) == pytest.approx(0.4)
    assert found.report.mass_kept == pytest.approx(0.6)


@pytest.mark.parametrize(("min_mass", "used"), [(0.59, 1), (0.61, 0)])
def test_a_row_that_keeps_too_little_mass_is_left_out(min_mass, used):
    source, target = table(["x", "a", "b", "q"]), table(["x", "a", "b"])
    model = fixed({"x": {1: 0.4, 2: 0.2, 3: 0.4}, "xa": {1: 1.0}})
    options = ProjectionOptions(min_mass=min_mass)
    found = project(["x", "a"], ["x", "a"], source, target, _thick(model), options, k=3)
    assert (found.report.used, found.report.low_mass) == (used, 1 - used)
    assert found.distributions.present.tolist() == [bool(used), False]


def test_positions_that_cannot_be_used_are_empty():
    source, target = table(["ab", "c"]), table(["a", "b", "c"])
    model = model_of(2, 1)
    masked = project(["ab", "c"], ["a", "b", "c"], source, target, model)
    assert masked.distributions.present.tolist() == [False, True, False]


def special_text(row_tokens, table, content, template):
    """Content in one span, then template tokens that have bytes of the rendered text."""
    return text_of([*row_tokens, *template], table, spans=[[0, len(content)]])


def end_of_turn(source_template, target_template):
    source = table(["x", "a", "\n"], end_of_turn="<|im_end|>", eos="<|end|>")
    target = table(["x", "a", "b", "\n"], eos="</s>")
    vocabulary = map_vocabulary(source, target, method="exact")
    s_text = special_text(["x", "a"], source, "xa", source_template)
    record = model_record(s_text, source, model_of(source.vocab_size, 3))
    t_text = special_text(["x", "a"], target, "xa", target_template)
    return project_record(
        record,
        align_texts(record.text, t_text),
        vocabulary,
        t_text,
        source_table=source,
        target_table=target,
        options=TRUE,
    ), model_of(source.vocab_size, 3)(b"xa")


def test_the_end_of_turn_is_taught_by_role():
    found, row = end_of_turn(["<|im_end|>", "\n"], ["</s>"])
    assert found.report.special == 1
    # End of turn and end of text are one token in the target: their probabilities meet there.
    assert np.exp(found.label_logprobs[1]) == pytest.approx(row[3] + row[4], rel=1e-5)


def test_a_message_end_that_the_target_spells_otherwise_is_left_out():
    found, _ = end_of_turn(["<|im_end|>", "\n"], ["\n", "</s>"])
    assert found.report.other_special == 1
    assert not found.distributions.present[1]


def test_a_next_token_that_reaches_into_the_template_is_left_out():
    source, target = table(["x", "a", "!"]), table(["x", "a!"])
    s_text = text_of(["x", "a", "!"], source, spans=[[0, 2]])
    record = model_record(s_text, source, model_of(3, 0))
    t_text = text_of(["x", "a!"], target, spans=[[0, 2]])
    found = project_record(
        record, align_texts(record.text, t_text), map_vocabulary(source, target, method="exact"), t_text,
        source_table=source, target_table=target,
    )  # fmt: skip
    assert found.report.reaches_out == 1
    assert not found.distributions.present.any()


def test_a_dummy_prefix_on_one_side_is_put_before_what_the_other_says():
    """The target's " a" stands for "a": it gets the mass of the source's "a", which as a token is another."""
    source, target = table(["<", "a", " a", "b"]), table(["<", " a", "b"])
    s_text = TokenizedText(
        np.array([0, 1, 3], np.int32), np.array([0, 1, 2], np.int32), np.array([[0, 2]], np.int32), np.ones(3, np.bool_)
    )
    t_text = TokenizedText(
        np.array([0, 1, 2], np.int32), np.array([0, 1, 2], np.int32), np.array([[0, 2]], np.int32), np.ones(3, np.bool_)
    )
    record = model_record(s_text, source, model_of(4, 0))
    found = project_record(
        record, align_texts(record.text, t_text), map_vocabulary(source, target, method="exact"), t_text,
        source_table=source, target_table=target,
    )  # fmt: skip
    assert found.report.other_bytes == 0
    assert found.report.one_to_one == 2
    assert found.distributions.present.tolist() == [True, True, False]
    assert found.distributions.ids[0].tolist()[:2] == [1, -1]
    assert np.exp(found.label_logprobs[0]) == pytest.approx(model_of(4, 0)(b"<")[1], rel=1e-5)


def test_a_next_token_of_which_a_side_spells_other_bytes_leaves_the_row_out():
    """The target's normaliser made a token of two bytes of one of the text's: nobody knows what that stands for."""
    source, target = table(["<", "a", "b"]), table(["<", "xa", "b"])
    texts = [
        TokenizedText(
            np.array([0, 1, 2], np.int32), np.array([0, 1, 2], np.int32), np.array([[0, 2]], np.int32),
            np.ones(3, np.bool_),
        )
        for _ in range(2)
    ]  # fmt: skip
    record = model_record(texts[0], source, model_of(3, 0))
    found = project_record(
        record, align_texts(record.text, texts[1]), map_vocabulary(source, target, method="exact"), texts[1],
        source_table=source, target_table=target,
    )  # fmt: skip
    assert found.report.other_bytes == 1
    assert found.distributions.present.tolist() == [False, True, False]


def test_a_record_that_was_cut_inside_the_next_token_leaves_the_row_out():
    source, target = table(["x", "a", "b"]), table(["x", "ab"])
    s_text = text_of(["x", "a"], source)
    record = model_record(s_text, source, model_of(3, 0))
    t_text = text_of(["x", "ab"], target)
    found = project_record(
        record, align_texts(record.text, t_text), map_vocabulary(source, target, method="exact"), t_text,
        source_table=source, target_table=target,
    )  # fmt: skip
    assert found.report.source_ends == 1
    assert not found.distributions.present.any()


def test_source_ids_beyond_the_token_table_are_unmapped():
    """Padded output layers: the engine may rank an id that no token has."""
    source, target = table(["x", "a"]), table(["x", "a"])
    text = text_of(["x", "a"], source)
    ids = np.array([[1, 7], [-1, -1]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.25], [1, 1]], np.float32))
    record = record_of("padded", text, ids, logprobs, np.log(np.array([0.5, 1], np.float32)))
    arguments = record, align_texts(record.text, text), map_vocabulary(source, target, method="exact"), text
    found = project_record(*arguments, source_table=source, target_table=target, options=TRUE)
    assert as_dict(found, 0, target) == {"a": 0.5}
    assert found.report.unmapped_mass == pytest.approx(0.25)
    same = project_distributions(*arguments, source_table=source, target_table=target, options=TRUE)
    np.testing.assert_array_equal(same.ids, found.distributions.ids)


def test_wrong_options_are_refused_together():
    with pytest.raises(ConfigError, match=r"min_mass: expected a share in \[0, 1\], got 2.0"):
        ProjectionOptions(min_mass=2.0)


def test_an_alignment_of_other_texts_is_refused():
    source = table(["a", "b"])
    text, longer = text_of(["a", "b"], source), text_of(["a", "b", "a"], source)
    record = model_record(text, source, model_of(2, 0))
    with pytest.raises(AlignmentError, match="expected an alignment of 2 source and 3 target tokens"):
        project_record(
            record, align_texts(record.text, text), map_vocabulary(source, source, method="exact"), longer,
            source_table=source, target_table=source,
        )  # fmt: skip


def test_the_longest_beginning_is_an_ordinary_token_of_the_lowest_id():
    source = table(["theory", "the", "x"], other="the")
    target = table(["t", "the", "theo", "the"], other="theory")
    assert longest_beginnings(source, target).tolist() == [2, 1, -1, -1]


def test_a_byte_fallback_token_is_not_the_beginning_where_the_byte_has_a_token_of_its_own():
    source, target = (TokenTable.from_tokenizer(make()) for make in (tiny.byte_level, tiny.sentencepiece_bpe))
    found = longest_beginnings(source, target)[source.tokens.index(b"e")]
    assert found == tiny.sentencepiece_bpe().convert_tokens_to_ids("e")
    twins = TokenTable([b"a", b"a"], [None, None], {}, False, "sentencepiece")
    assert longest_beginnings(twins, twins).tolist() == [0, 0]
    assert longest_beginnings(twins, replace(twins, byte_fallback=frozenset({0}))).tolist() == [1, 1]


def test_a_position_holds_the_label_and_every_share_of_every_entry():
    """K = 1 with two shares each: the label, two shares of a next token that the top k missed, two of the entry."""
    source, target = table(["a", "b", "c"]), table(["ab", "a1", "a2", "c1", "c2", "x"])
    shares = Shares(np.array([0, 2, 2, 4], np.int32), np.array([1, 2, 3, 4], np.int32), np.full(4, 0.5, np.float32))
    vocabulary = VocabularyMap(np.array([0, -1, 3], np.int32), np.array([1, -1, 1], np.int32), "one_to_many", shares)
    texts = text_of(["a", "b", "a", "b"], source), text_of(["ab", "ab"], target)
    half = np.full((4, 1), np.log(0.5), np.float32)
    next_logprobs = np.log(np.array([0.9, 0.4, 0.5, 1.0], np.float32))
    record = record_of("text", texts[0], np.full((4, 1), 2, np.int32), half, next_logprobs)
    found = project_record(
        record, align_texts(*texts), vocabulary, texts[1], source_table=source, target_table=target, options=TRUE
    )
    # p(a) p(b | a) = .4 * .5 for "ab"; the other half of "a" (.4 - .2) and "c" (.5) are divided equally.
    assert as_dict(found, 0, target) == {"ab": 0.2, "a1": 0.1, "a2": 0.1, "c1": 0.25, "c2": 0.25}
