"""Minimal common chunks: where both tokenizations end a token, and how probable the sources find what is between."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
from records import record_of

from fusion_plugins.core.fusion.chunk_routing import cut_routed
from fusion_plugins.core.fusion.chunks import ChunkReport, ChunkSide, common_chunks
from fusion_plugins.core.fusion.flat import Texts
from fusion_plugins.core.fusion.fuse import RULES
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, chunk_texts
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.routing import Route
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize, tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError

NAMES = ("byte_level", "digit_splitting", "sentencepiece_bpe", "unigram")
TEXTS = (
    "The 120 apples cost 35 €, said Zoë:\n\tthe theory of 数学题 and 🎉 needs 1234 or 5 cafés.",
    " leading and trailing space ",
    "a",
    "1234567890" * 3,
    "naïve café\u0301 ﬁne",
    "\n\n  \n",
)
#: strings of a few letters have few tokenizations, so all of them can be tried
SMALL = [b"a", b"b", b"ab", b"ba", b"aba", b"abb", b"bb"]
END = b"<end>"


def load(name):
    tokenizer = getattr(tiny, name)()
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def pieces(tokens, *, end=True, ids=SMALL):
    """The tokenization of a small string, as a text with one span and the token that ends it."""
    found = [ids.index(token) for token in tokens]
    ends = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    n = int(ends[-1])
    ids = np.array([len(ids) + 1, *found, *([len(ids)] if end else [])], np.int32)
    ends = np.append(ends, [n] if end else []).astype(np.int32)
    return TokenizedText(ids, ends, np.array([[0, n]], np.int32), np.ones(len(ids), np.bool_))


def small_table(vocabulary):
    """The table of a small vocabulary, the end of the text and its beginning."""
    roles = [*[None] * len(vocabulary), Role.EOS, Role.BOS]
    ids = {Role.EOS: len(vocabulary), Role.BOS: len(vocabulary) + 1}
    return TokenTable([*vocabulary, END, b"<begin>"], roles, ids, False, "byte_level")


def tokenizations(string, vocabulary):
    if not string:
        return [[]]
    return [
        [token, *rest]
        for token in vocabulary
        if string.startswith(token)
        for rest in tokenizations(string[len(token) :], vocabulary)
    ]


class Model:
    """A tiny model: a distribution over the next token after any tokens, from random numbers."""

    def __init__(self, vocabulary, seed):
        self.vocabulary, self.seed = vocabulary, seed

    def logprob(self, before, token):
        # Small integers after the tokens so far: the same numbers whenever the same tokens are asked about.
        state = [self.seed, len(before), *(sum(one) + 7 * len(one) for one in before)]
        logits = np.random.default_rng(state).normal(size=len(self.vocabulary) + 1)
        place = len(self.vocabulary) if token == END else self.vocabulary.index(token)
        return logits[place] - np.log(np.exp(logits).sum())

    def following(self, tokens, *, end=True):
        said = [self.logprob(tokens[:at], token) for at, token in enumerate(tokens)]
        last = [self.logprob(tokens, END), np.nan] if end else [np.nan]
        return np.array([*said, *last], np.float32)


def cut(source, target, following, *, s_vocabulary=SMALL, t_vocabulary=SMALL, trained=None):
    tables = small_table(s_vocabulary).packed, small_table(t_vocabulary).packed
    side = ChunkSide(Texts.of([source]), Texts.of([target]), following, tables)
    if trained is None:
        trained = np.append(np.ones(len(target.input_ids) - 1, np.bool_), False)
    return common_chunks([side], [1.0], trained)


def listed(chunks):
    """[(first position, positions, log-probability)] of the chunks of one text."""
    starts = np.flatnonzero(chunks.place == 1)
    lengths = [int((chunks.place[at:] == np.arange(1, len(chunks.place) - at + 1)).argmin()) for at in starts]
    return [(int(at), n, float(chunks.logprobs[at])) for at, n in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("string", [b"abab", b"abba", b"babba"])
def test_every_pair_of_tokenizations_is_cut_at_its_common_ends_and_nowhere_else(string):
    """All tokenizations of a small string are tried on both sides, and compared with sets of byte ends."""
    model = Model(SMALL, 3)
    for own, other in itertools.product(tokenizations(string, SMALL), repeat=2):
        source, target = pieces(own), pieces(other)
        found = listed(cut(source, target, model.following(own))[0])
        ends = np.cumsum([len(token) for token in own]).tolist()
        common = sorted({0, *ends} & {0, *np.cumsum([len(token) for token in other]).tolist()})
        expected = []
        for start, stop in itertools.pairwise(common):
            inside = [at for at, end in enumerate(ends) if start < end <= stop]
            said = sum(model.logprob(own[:at], own[at]) for at in inside)
            first = [0, *np.cumsum([len(token) for token in other])].index(start)
            n = sum(start < end <= stop for end in np.cumsum([len(token) for token in other]))
            expected.append((first, n, said))
        expected.append((len(other), 1, model.logprob(own, END)))
        assert [one[:2] for one in found] == [one[:2] for one in expected]
        assert [one[2] for one in found] == pytest.approx([one[2] for one in expected], abs=1e-5)


def test_the_chunks_together_are_the_probability_of_the_sources_tokens_which_bounds_that_of_the_bytes():
    string, model = b"abbab", Model(SMALL, 5)
    all_of_them = {
        tuple(tokens): sum(model.logprob(tokens[:at], token) for at, token in enumerate(tokens))
        for tokens in tokenizations(string, SMALL)
    }
    of_bytes = np.logaddexp.reduce(list(all_of_them.values()))
    for own, expected in all_of_them.items():
        chunks, _ = cut(
            pieces(own, end=False), pieces([b"a", b"bb", b"ab"], end=False), model.following(own, end=False)
        )
        total = sum(said for _, _, said in listed(chunks))
        assert total == pytest.approx(expected, abs=1e-5)
        assert total <= of_bytes + 1e-6


def test_a_token_inside_a_longer_source_token_shares_its_chunk():
    """Source "aba" "b", target "a" "ba" "b": one chunk of two positions, then one of one, then the end."""
    chunks, report = cut(pieces([b"aba", b"b"]), pieces([b"a", b"ba", b"b"]), np.array([-2, -0.5, -0.25, np.nan]))
    assert listed(chunks) == [(0, 2, -2.0), (2, 1, -0.5), (3, 1, -0.25)]
    assert chunks.logprobs.tolist() == [-2, -2, -0.5, -0.25, 0]
    assert report == ChunkReport(1, positions=4, chunk_positions=4, chunks=3, single=2, bytes=4, chunk_bytes=4)
    assert report.shares()["tokens_per_chunk"] == pytest.approx(4 / 3)
    assert report.shares()["one_token_chunks"] == pytest.approx(2 / 4)


def test_a_token_that_the_source_splits_finer_has_its_own_exact_value():
    chunks, _ = cut(pieces([b"a", b"b", b"a"]), pieces([b"aba"]), np.array([-1, -0.5, -0.25, -0.125, np.nan]))
    assert listed(chunks) == [(0, 1, -1.75), (1, 1, -0.125)]


def test_an_answer_that_was_cut_has_no_end_and_its_rest_is_in_no_chunk():
    own, other = pieces([b"ab", b"ba"], end=False), pieces([b"ab", b"b"], end=False)
    own = replace(own, spans=np.array([[0, 3]], np.int32))
    chunks, report = cut(own, other, np.array([-1, -2, np.nan]))
    assert listed(chunks) == [(0, 1, -1.0)]
    assert report.shares()["bytes_without_common_end"] == pytest.approx(1 / 3)
    ended = pieces([b"ab", b"b"])
    assert listed(cut(pieces([b"ab", b"b"], end=False), ended, np.array([-1, -2, np.nan]))[0])[-1][0] == 1


@pytest.mark.parametrize("said", [np.nan, -np.inf])
def test_a_chunk_of_which_the_source_says_nothing_is_left_out_and_one_of_no_probability_is_not(said):
    chunks, _ = cut(pieces([b"a", b"b"]), pieces([b"a", b"b"]), np.array([said, -1, -2, np.nan]))
    expected = [] if np.isnan(said) else [(0, 1, said)]
    assert listed(chunks) == [*expected, (1, 1, -1.0), (2, 1, -2.0)]


def test_a_chunk_with_a_token_that_is_not_trained_on_is_left_out():
    trained = np.array([True, False, True, True, False])
    target = pieces([b"a", b"ba", b"b"])
    chunks, report = cut(pieces([b"aba", b"b"]), target, np.array([-2, -0.5, -0.25, np.nan]), trained=trained)
    assert listed(chunks) == [(2, 1, -0.5), (3, 1, -0.25)]
    assert report.positions == 3


SPACED = [b" a", b" ", *SMALL]


def spaced(tokens, *, in_text=False):
    """Tokens that begin with a space which is no part of the span: a tokenizer's own, or one of a template's text."""
    text = pieces(tokens, ids=SPACED)
    ends = text.ends if in_text else np.maximum(text.ends - 1, 0)
    return replace(text, ends=ends.astype(np.int32), spans=np.array([[int(in_text), ends[-1]]], np.int32))


@pytest.mark.parametrize("in_text", [False, True])
def test_the_first_chunk_begins_before_a_space_that_is_no_part_of_the_text(in_text):
    """It has the log-probability of the source's tokens with it; a space of its own is one of them."""
    plain, others = pieces([b"a", b"b"]), [spaced([b" a", b"b"]), spaced([b" ", b"ab"], in_text=True)]
    cases = [
        ([b" a", b"b"], plain, [(0, 1, -1.0), (1, 1, -2.0), (2, 1, -3.0)]),
        ([b" ", b"a", b"b"], plain, [(0, 1, -3.0), (1, 1, -3.0), (2, 1, -4.0)]),
        ([b" ", b"ab"], plain, [(0, 2, -3.0), (2, 1, -3.0)]),
        ([b" a", b"b"], others[0], [(0, 1, -1.0), (1, 1, -2.0), (2, 1, -3.0)]),
        ([b" a", b"b"], others[1], [(0, 2, -3.0), (2, 1, -3.0)]),
        # Both have read the space.
        ([b" ", b"a", b"b"], others[1], [(1, 1, -5.0), (2, 1, -4.0)]),
    ]
    for tokens, target, expected in cases:
        source = spaced(tokens, in_text=in_text)
        following = np.append(-np.arange(1.0, len(source.ends)), np.nan)
        chunks, _ = cut(
            source, target, following, s_vocabulary=SPACED, t_vocabulary=SMALL if target is plain else SPACED
        )
        assert listed(chunks) == expected, (tokens, target)


def test_the_first_chunk_of_a_target_that_writes_the_space_begins_before_it():
    source = pieces([b"a", b"b"])
    for tokens, expected in (([b" a", b"b"], [(0, 1, -1.0), (1, 1, -2.0)]), ([b" ", b"a", b"b"], [(0, 2, -1.0)])):
        target = spaced(tokens, in_text=True)
        chunks, _ = cut(source, target, np.array([-1, -2, -3, np.nan]), t_vocabulary=SPACED)
        assert listed(chunks)[: len(expected)] == expected
    # A space that is not trained on is no part of a chunk.
    trained = np.array([False, True, True, True, False])
    chunks, _ = cut(source, target, np.array([-1, -2, -3, np.nan]), t_vocabulary=SPACED, trained=trained)
    assert listed(chunks) == [(1, 1, -1.0), (2, 1, -2.0), (3, 1, -3.0)]


def test_other_bytes_and_unknown_tokens_are_in_no_chunk():
    """What a normaliser made of a letter is not that letter to the other side."""
    changed = [b"xa", *SMALL]
    source = pieces([b"xa", b"b"], ids=changed)
    source = replace(source, ends=source.ends - np.array([0, 1, 1, 1], np.int32), spans=np.array([[0, 2]], np.int32))
    chunks, _ = cut(source, pieces([b"a", b"b"]), np.array([-1, -2, -3, np.nan]), s_vocabulary=changed)
    assert listed(chunks) == [(1, 1, -2.0), (2, 1, -3.0)]
    beyond = replace(pieces([b"a", b"b"]), input_ids=np.array([8, 99, 1, 7], np.int32))
    assert listed(cut(beyond, pieces([b"a", b"b"]), np.array([-1, -2, -3, np.nan]))[0])[0][0] == 1


def has_space(text, table):
    return table.tokens[text.input_ids[1]] == b" " and text.ends[1] == 0


@pytest.mark.parametrize("names", list(itertools.product(NAMES, NAMES)), ids="-".join)
def test_real_tokenizers_are_cut_at_their_common_ends(names):
    """Against plain sets of byte ends; with one tokenizer every token is a chunk.

    A space that a tokenizer puts before a text is in the first chunk, unless both sides have it as a token.
    """
    (own, s_table), (other, t_table) = map(load, names)
    for text in TEXTS:
        source, target = tokenize(own, s_table, text), tokenize(other, t_table, text)
        following = -np.arange(1, len(source.input_ids) + 1, dtype=np.float32)
        side = ChunkSide(Texts.of([source]), Texts.of([target]), following, (s_table.packed, t_table.packed))
        found = listed(common_chunks([side], [1.0], np.arange(len(target.ends)) < len(target.ends) - 1)[0])
        if names[0] == names[1]:
            assert found == [(t, 1, float(said)) for t, said in enumerate(following[:-1])]
            continue
        common = set(source.ends[source.exact].tolist()) & set(target.ends[target.exact].tolist())
        for first, n, said in found[:-1]:
            start, stop = int(target.ends[first]), int(target.ends[first + n])
            assert {start, stop} <= common
            assert not [end for end in common if start < end < stop]
            inside = (source.ends > start) & (source.ends <= stop)
            inside[-1] = False  # the end of the text, a chunk of its own
            if start == 0 and not has_space(target, t_table):
                inside[1:] |= has_space(source, s_table) & (source.ends[1:] == 0)
            assert said == pytest.approx(float(following[np.flatnonzero(inside) - 1].sum()))
        assert found[-1][:2] == (len(target.ends) - 2, 1)


def plan_of(names, target):
    sources = []
    t_table = load(target)[1]
    for name in names:
        s_table = load(name)[1]
        projector = Projector.of(s_table, t_table, map_vocabulary(s_table, t_table, method="exact"))
        sources.append(FusionSource(name, projector))
    return FusionPlan(tuple(sources))


def chat(name, messages=tiny.CHAT):
    return tokenize_content(*load(name), messages)[0]


def record(text, scale=1.0):
    following = (-scale * (1 + np.arange(len(text.input_ids)) % 5)).astype(np.float32)
    ids = np.append(text.input_ids[1:], 0)[:, None]
    return record_of("text", text, ids, following[:, None], following)


def after(text):
    return np.append(np.ones(len(text.input_ids) - 1, np.bool_), False)


def test_chats_are_cut_in_what_was_generated_and_its_end_of_turn():
    target, source = chat("byte_level"), chat("digit_splitting")
    plan, own = plan_of(["digit_splitting"], "byte_level"), record(chat("digit_splitting"))
    chunks, report = chunk_texts(plan, [target], [[own]], [after(target)], weights=[1.0])
    table = load("byte_level")[1]
    ends = [at for at in range(len(target.input_ids) - 1) if table.packed.closing[target.input_ids[at + 1]]]
    in_spans = [at for at in ends if any(target.ends[at] == stop for _, stop in target.spans)]
    assert in_spans
    assert all(chunks.place[at] == 1 for at in in_spans)
    # The sum over the source's tokens that were generated is all there, once.
    total = sum(said for _, _, said in listed(chunks))
    inside = np.zeros(len(source.input_ids) - 1, np.bool_)
    for start, stop in source.spans:
        inside |= (source.ends[1:] > start) & (source.ends[1:] <= stop)
        inside |= (source.ends[:-1] == stop) & load("digit_splitting")[1].packed.closing[source.input_ids[1:]]
    assert total == pytest.approx(float(own.topk.token_logprobs[:-1][inside].sum()))
    assert report.texts == 1
    assert chunks.source[chunks.place > 0].tolist() == [0] * report.chunk_positions


def test_several_sources_are_mixed_over_the_chunks_that_all_have():
    names = ["digit_splitting", "sentencepiece_bpe", "byte_level"]
    target, plan = chat("byte_level"), plan_of(names, "byte_level")
    records = [record(chat(name), scale) for name, scale in zip(names, (1.0, 0.5, 0.25), strict=True)]
    weights = [0.5, 0.3, 0.2]
    mixed, _ = chunk_texts(plan, [target], [[one] for one in records], [after(target)], weights=weights)
    alone = [
        listed(chunk_texts(plan_of([name], "byte_level"), [target], [[one]], [after(target)], weights=[1.0])[0])
        for name, one in zip(names, records, strict=True)
    ]
    assert set(mixed.source.tolist()) == {-1}
    for first, n, said in listed(mixed):
        expected = -np.inf
        for weight, chunks in zip(weights, alone, strict=True):
            inside = [chunk for chunk in chunks if first <= chunk[0] < first + n]
            assert sum(chunk[1] for chunk in inside) == n
            expected = np.logaddexp(expected, np.log(weight) + sum(chunk[2] for chunk in inside))
        assert said == pytest.approx(expected, abs=1e-5)


def test_sources_that_read_different_parts_of_a_text_are_mixed_over_what_both_have():
    target, own = pieces([b"a", b"b", b"a", b"b"]), pieces([b"b", b"a", b"b"])
    said = np.array([-1, -2, -3, -4, -5, np.nan], np.float32), np.array([-6, -7, -8, -9, np.nan], np.float32)
    tables = (small_table(SMALL).packed,) * 2
    later = replace(target, spans=np.array([[1, 4]], np.int32))
    whole = ChunkSide(Texts.of([target]), Texts.of([target]), said[0], tables)
    part = ChunkSide(Texts.of([own]), Texts.of([later]), said[1], tables)
    trained = np.array([True] * 5 + [False])
    expected = np.logaddexp(said[0][1:5] + np.log(0.5), said[1][:4] + np.log(0.5))
    for sides in ([whole, part], [part, whole]):
        found = listed(common_chunks(sides, [0.5, 0.5], trained)[0])
        assert [(at, size) for at, size, _ in found] == [(1, 1), (2, 1), (3, 1), (4, 1)]
        assert [value for *_, value in found] == pytest.approx(expected, rel=1e-6)


def test_a_source_without_weight_neither_cuts_nor_teaches():
    names = ["sentencepiece_bpe", "byte_level"]
    target, plan = chat("byte_level"), plan_of(names, "byte_level")
    records = [[record(chat(name))] for name in names]
    for number, name in enumerate(names):
        weights = [float(place == number) for place in range(2)]
        found, report = chunk_texts(plan, [target], records, [after(target)], weights=weights)
        own = chunk_texts(plan_of([name], "byte_level"), [target], [records[number]], [after(target)], weights=[1.0])
        assert found.place.tolist() == own[0].place.tolist()
        assert found.logprobs.tolist() == own[0].logprobs.tolist()
        assert set(found.source.tolist()) == {-1, number}
        assert report == own[1]
        # Also where it is the only one that takes part in a text.
        silent = replace(plan.sources[number], weight=0.0)
        alone = replace(plan, sources=(silent,), rule=RULES["fixed_weights"])
        with pytest.raises(ConfigError, match="not all of them 0"):
            cut_routed(alone, [target], [records[number]], [after(target)], [None], [Route((0,))])


def test_a_text_of_another_store_is_an_error_or_is_left_out():
    target, plan = chat("byte_level"), plan_of(["digit_splitting"], "byte_level")
    other = [dict(message, content=message["content"].upper() + "!") for message in tiny.CHAT]
    records = [[record(chat("digit_splitting")), record(chat("digit_splitting", other))]]
    arguments = plan, [target, target], records, [after(target)] * 2
    with pytest.raises(AlignmentError, match="digit_splitting"):
        chunk_texts(*arguments, weights=[1.0])
    chunks, report = chunk_texts(*arguments, weights=[1.0], on_unusable="skip")
    assert list(chunks.unusable) == [1]
    assert not chunks.place[chunks.offsets[1] :].any()
    assert (report.texts, report.positions) == (1, int(after(target).sum()))


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_weights_that_cannot_be_are_refused(weights):
    side = ChunkSide(*[Texts.of([pieces([b"a"])])] * 2, np.zeros(3, np.float32), (small_table(SMALL).packed,) * 2)
    with pytest.raises(ConfigError, match="expected 2 weights"):
        common_chunks([side, side], weights, np.array([True, True, False]))
