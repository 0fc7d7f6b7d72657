import copy
import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import reference
import tiny
from records import record_of
from tokenizers import AddedToken

from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import align_by_tokens, align_dtw, align_texts, align_tokens
from fusion_plugins.core.fusion.fuse import RULES
from fusion_plugins.core.fusion.pipeline import METRICS, FusionPlan, FusionSource, fuse_text, fuse_texts, warm_up
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.types import LazyRecord, VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize, tokenize_content
from fusion_plugins.errors import AlignmentError, ConfigError, MismatchError

NAMES = ("byte_level", "digit_splitting", "sentencepiece_bpe", "unigram")
TEXT = "The 120 apples cost 35 €, said Zoë:\n\tthe theory of 数学题 and 🎉 needs 1234 or 5 cafés."
TRUE = ProjectionOptions(renormalize=False, min_mass=0.0)


def load(name):
    tokenizer = getattr(tiny, name)()
    return tokenizer, TokenTable.from_tokenizer(tokenizer)


def plain(name, text=TEXT, **options):
    return tokenize(*load(name), text, **options)


def chat(name, messages=tiny.CHAT):
    tokenizer, table = load(name)
    return tokenize_content(tokenizer, table, messages)[0]


def knows(text, *, shift=0, id="text"):
    """A source that gives its next token a probability of its own at each row, and says nothing else."""
    n = len(text.input_ids)
    p = 0.3 + 0.5 * ((np.arange(n) + shift) * 0.37 % 1)
    return record_of(
        id, text, np.append(text.input_ids[1:], 0)[:, None], np.log(p[:, None]).astype(np.float32),
        np.log(p).astype(np.float32),
    ), p  # fmt: skip


def answers_of(text):
    """The text with the answers of a chat as its spans, without what the template writes around them."""
    return replace(text, spans=text.spans[1::3]) if len(text.spans) > 1 else text


def is_space(text, at, spaces):
    """Whether a token is a space alone, which is then written before the text, not in it."""
    return at > 0 and text.input_ids[at] in spaces and text.ends[at] - text.ends[at - 1] <= 1


def expected_labels(source, p, target, spaces=((), ())):
    """Row -> (label, probability of its bytes under the source), by the text alone, message by message.

    ``spaces``: ids of the tokens of a space alone, of the source and of the target.
    """
    rows = {}
    source, target = answers_of(source), answers_of(target)
    for (start, _), (t_start, t_stop) in zip(source.spans.tolist(), target.spans.tolist(), strict=True):
        first, t_first = (int(np.searchsorted(x.ends, s, "right")) for x, s in ((source, start), (target, t_start)))
        space, t_space = (
            is_space(x, at - 1, s) for x, at, s in zip((source, target), (first, t_first), spaces, strict=True)
        )
        if first == len(source.ends):
            continue
        if t_space and t_first > 1:  # the space before the answer is a label: all that the source says begins with it
            rows[t_first - 2] = int(target.input_ids[t_first - 1]), p[first - 2 if space else first - 1]
        for t in range(len(target.ends) - 1):
            a, b = target.ends[t] - t_start, target.ends[t + 1] - t_start
            heard = [u for u in range(len(source.ends)) if source.ends[u] - start == a]
            is_first = t + 1 == t_first and first > 0
            if not ((heard or is_first) and (is_first or a >= 0) and a < b and 0 < b <= t_stop - t_start):
                continue
            u = first if is_first else heard[-1] + 1
            probability = p[u - 1]
            if is_first and space and not t_space:
                probability *= p[u - 2]
            while u < len(source.ends) and source.ends[u] - start < b:
                u += 1
                probability *= p[u - 1]
            if u == len(source.ends):
                continue
            rows[t] = int(target.input_ids[t + 1]), probability
    return rows


def spaces_of(name):
    return [i for i, token in enumerate(load(name)[1].tokens) if token == b" "]


def by_tokens(aligner):
    return lambda projector: align_by_tokens(aligner, projector.source_bytes, projector.target_bytes)


def plan_of(
    target_name,
    *source_names,
    method="exact",
    projection=ProjectionOptions(),
    align=lambda projector: align_texts,
    rule="min_ce",
    **settings,
):
    _, target = load(target_name)
    sources = []
    for i, name in enumerate(source_names):
        _, table = load(name)
        projector = Projector.of(table, target, map_vocabulary(table, target, method=method), projection)
        sources.append(FusionSource(f"{name}-{i}", projector, align(projector)))
    return FusionPlan(tuple(sources), rule=RULES[rule], **settings)


def check_supervision(source_name, target_name, source, target):
    record, p = knows(source)
    fused, report = fuse_text(plan_of(target_name, source_name, width=1, projection=TRUE), target, [record])
    table = load(target_name)[1]
    expected = expected_labels(source, p, target, (spaces_of(source_name), spaces_of(target_name)))
    seen = 0
    for t in np.flatnonzero(fused.present).tolist():
        assert fused.ids[t, 0] == target.input_ids[t + 1]
        if table.role_of(int(target.input_ids[t + 1])) is None:
            label, probability = expected[t]
            assert fused.ids[t, 0] == label
            assert np.exp(fused.logprobs[t, 0]) == pytest.approx(probability, rel=1e-5)
            seen += 1
    found = report.sources[f"{source_name}-0"]
    assert seen == len(expected) - found.other_bytes - found.other_special
    return found


@pytest.mark.parametrize(("source", "target"), list(permutations(NAMES, 2)))
def test_row_t_teaches_token_t_plus_1(source, target):
    report = check_supervision(source, target, plain(source), plain(target))
    assert report.used > 20
    assert report.special == 1
    assert report.one_to_one > 5


def test_all_ways_of_splitting_occur_in_the_supervision_test():
    total = ProjectionReport()
    for source, target in permutations(NAMES, 2):
        total += check_supervision(source, target, plain(source), plain(target))
    assert min(total.one_to_one, total.one_to_many, total.many_to_one, total.crossing) > 3
    assert total.other_bytes > 0


@pytest.mark.parametrize(("source", "target"), list(permutations(("byte_level", "sentencepiece_bpe"), 2)))
def test_in_chats_of_two_templates_each_message_teaches_its_own_tokens(source, target):
    report = check_supervision(source, target, chat(source), chat(target))
    assert report.used > 10
    # Both messages end with a token that ends a turn, whatever it is called.
    assert report.special == 2


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn_is_taught_however_its_token_was_added(special):
    tokenizer = copy.deepcopy(tiny.byte_level())
    tokenizer.add_tokens([AddedToken("<turn>", special=special)], special_tokens=special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<turn>\n{% endfor %}"
    table, source_table = TokenTable.from_tokenizer(tokenizer), load("sentencepiece_bpe")[1]
    mapping = map_vocabulary(source_table, table, method="exact")
    source = FusionSource("a", Projector.of(source_table, table, mapping))
    target, _ = tokenize_content(tokenizer, table, tiny.CHAT)
    fused, report = fuse_text(FusionPlan((source,)), target, [knows(chat("sentencepiece_bpe"))[0]])
    assert report.sources["a"].special == 2
    end = tokenizer.convert_tokens_to_ids("<turn>")
    assert np.count_nonzero(fused.ids[:, 0] == end) == 2
    assert (target.input_ids[1:][fused.ids[:-1, 0] == end] == end).all()


def test_a_template_that_strips_a_message_keeps_the_rest_of_it_aligned():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n  12 + 30 = 42 apples \n"}]
    source, target = chat("sentencepiece_bpe", messages), chat("byte_level", messages)
    record, p = knows(source)
    fused, report = fuse_text(plan_of("byte_level", "sentencepiece_bpe", width=1, projection=TRUE), target, [record])
    lead = len("\n  ")
    start, stop = target.spans[1]
    inner = replace(target, spans=np.array([[start + lead, stop - len(" \n")]], np.int32))
    expected = expected_labels(source, p, inner, (spaces_of("sentencepiece_bpe"), spaces_of("byte_level")))
    rows = np.flatnonzero(fused.present).tolist()
    assert len(rows) > 5
    for t in rows:
        assert (int(fused.ids[t, 0]), pytest.approx(np.exp(fused.logprobs[t, 0]), rel=1e-5)) == expected[t]
    # The source ends its turn where the target's message goes on with white space.
    assert report.sources["sentencepiece_bpe-0"].other_special == 1


@pytest.mark.parametrize(("cut_source", "cut_target"), [(12, None), (None, 12)])
def test_a_text_that_was_cut_on_one_side_is_used_as_far_as_it_goes(cut_source, cut_target):
    source, target = plain("digit_splitting", max_length=cut_source), plain("byte_level", max_length=cut_target)
    report = check_supervision("digit_splitting", "byte_level", source, target)
    assert 3 < report.used < 13


def test_another_text_of_the_same_length_is_refused_with_the_place():
    record, _ = knows(plain("byte_level", TEXT.replace("120", "121")), id="row 7")
    with pytest.raises(AlignmentError, match=r"record 'row 7' is of another text .* at byte 6 of supervised span 0"):
        fuse_text(plan_of("sentencepiece_bpe", "byte_level"), plain("sentencepiece_bpe"), [record])


def test_a_longer_text_is_refused():
    record, _ = knows(plain("byte_level", TEXT + " And more."))
    with pytest.raises(AlignmentError, match="the source continues .* And more"):
        fuse_text(plan_of("sentencepiece_bpe", "byte_level"), plain("sentencepiece_bpe"), [record])


def test_a_chat_with_another_number_of_messages_is_refused():
    record, _ = knows(chat("byte_level", tiny.CHAT[:2]))
    with pytest.raises(AlignmentError, match="has 3 supervised spans, the target's text 6"):
        fuse_text(plan_of("sentencepiece_bpe", "byte_level"), chat("sentencepiece_bpe"), [record])


def test_records_that_do_not_belong_together_are_refused():
    plan = plan_of("byte_level", "byte_level", "digit_splitting")
    first, _ = knows(plain("byte_level"), id="a")
    other, _ = knows(plain("digit_splitting"), id="b")
    with pytest.raises(MismatchError, match="expected one record per source .* got 1"):
        fuse_text(plan, plain("byte_level"), [first])
    with pytest.raises(MismatchError, match="byte_level-0: 'a', digit_splitting-1: 'b'"):
        fuse_text(plan, plain("byte_level"), [first, other])


def noisy(name, seed, text=TEXT, k=6, strength=3.0):
    """A source that leans towards its next token, over its whole vocabulary."""
    tokens, (_, table) = plain(name, text), load(name)
    rng, n = np.random.default_rng(seed), len(tokens.input_ids)
    logits = rng.normal(size=(n, table.vocab_size)) * 2
    logits[np.arange(n - 1), tokens.input_ids[1:]] += strength
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, -1)[:, :k]
    gold = np.append(logprobs[np.arange(n - 1), tokens.input_ids[1:]], 0)
    return record_of(
        "text", tokens, best.astype(np.int32), np.take_along_axis(logprobs, best, -1).astype(np.float32),
        gold.astype(np.float32),
    )  # fmt: skip


SOURCES = ("sentencepiece_bpe", "digit_splitting", "byte_level")


@pytest.mark.parametrize("strength", [(1.0, 4.0, 0.0), (4.0, 1.0, 0.0), (0.0, 1.0, 4.0)])
def test_the_whole_way_equals_the_plain_reference(strength):
    """Without special tokens, which the reference does not know."""
    target = plain("byte_level", special_tokens=False, append_eos=False)
    records = [noisy(name, i, strength=s) for i, (name, s) in enumerate(zip(SOURCES, strength, strict=True))]
    plan = plan_of("byte_level", *SOURCES, method="min_edit", width=4)
    fused, report = fuse_text(plan, target, records)
    expected = reference.fuse_text(
        records, target.input_ids, target.ends,
        [(m.target_ids.tolist(), m.exact.tolist()) for m in (s.projector.mapping for s in plan.sources)],
        [load(name)[1].tokens for name in SOURCES], load("byte_level")[1].tokens, plan.width,
    )  # fmt: skip
    best = int(np.argmax(strength))
    assert report.chosen == {s.name: int(i == best) for i, s in enumerate(plan.sources)}
    for t, row in enumerate(expected):
        got = {int(i): float(np.exp(p)) for i, p in zip(fused.ids[t], fused.logprobs[t], strict=True) if i >= 0}
        if got:
            assert got == pytest.approx(row, rel=1e-4)
    assert fused.present.sum() >= sum(map(bool, expected)) - 2


def test_the_targets_own_rows_come_back_unchanged():
    record, target = noisy("byte_level", 0, k=10), plain("byte_level")
    ids = np.arange(load("byte_level")[1].vocab_size, dtype=np.int32)
    same = VocabularyMap(ids, np.zeros_like(ids), "identity")
    own = Projector.of(load("byte_level")[1], load("byte_level")[1], same, TRUE)
    plan = FusionPlan((FusionSource("own", own),))
    fused, report = fuse_text(plan, target, [record])
    # The first row of a text without a BOS predicts its second token; the last two predict nothing.
    assert fused.present.tolist() == [True] * (len(target.ends) - 1) + [False]
    has_label = (record.topk.ids[:-1] == target.input_ids[1:, None]).any(-1)
    np.testing.assert_array_equal(fused.ids[:-1][has_label], record.topk.ids[:-1][has_label])
    np.testing.assert_allclose(fused.logprobs[:-1][has_label], record.topk.logprobs[:-1][has_label], atol=1e-5)
    assert report.sources["own"].coverage == 1.0


@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "token_min_ce"])
def test_rows_have_the_planned_width_and_sum_to_one(rule):
    records = [noisy(name, i) for i, name in enumerate(SOURCES)]
    plan = plan_of("byte_level", *SOURCES, method="min_edit", rule=rule, width=5)
    fused, report = fuse_text(plan, plain("byte_level"), records)
    assert fused.ids.shape == fused.logprobs.shape == (len(fused.leftover), 5)
    sums = np.exp(fused.logprobs.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(sums[fused.present], 1.0, atol=1e-5)
    assert (sums[~fused.present] == 0).all()
    assert report.fused_positions == fused.present.sum() > 20
    assert report.positions >= report.fused_positions


def test_token_min_ce_takes_the_source_that_knows_the_label_best():
    one, p_one = knows(plain("byte_level"), shift=0)
    other, p_other = knows(plain("byte_level"), shift=1)
    plan = plan_of("byte_level", "byte_level", "byte_level", rule="token_min_ce", projection=TRUE)
    fused, _ = fuse_text(plan, plain("byte_level"), [one, other])
    best = np.maximum(p_one, p_other)[:-1]
    np.testing.assert_allclose(np.exp(fused.logprobs[:-1, 0]), best, rtol=1e-5)


@pytest.mark.parametrize("metric", ["byte", "token"])
def test_the_metric_decides_between_sources(metric):
    """One source is better per byte, the other per token, of which it has more."""
    fine, coarse = noisy("digit_splitting", 0), noisy("sentencepiece_bpe", 0)
    fine = replace(fine, ce_per_byte=1.1, ce_per_token=1.2)
    coarse = replace(coarse, ce_per_byte=1.0, ce_per_token=4.0)
    plan = plan_of("byte_level", "digit_splitting", "sentencepiece_bpe", metric=METRICS[metric])
    _, report = fuse_text(plan, plain("byte_level"), [fine, coarse])
    assert report.chosen == {"digit_splitting-0": int(metric == "token"), "sentencepiece_bpe-1": int(metric == "byte")}


def hard_at_the_end(tokens, easy):
    """A source for which the end of a text is hard, and the beginning ``easy`` nats a token."""
    n = len(tokens.input_ids)
    gold = np.where(np.arange(n) < 11, -easy, -6.0).astype(np.float32)
    return record_of("text", tokens, np.append(tokens.input_ids[1:], 0)[:, None], gold[:, None], gold)


@pytest.mark.parametrize("metric", ["byte", "token"])
@pytest.mark.parametrize("order", [1, -1])
def test_sources_are_compared_over_the_bytes_that_all_have_read(metric, order):
    """A source whose text was cut before its hard part is not the better one for it."""
    whole, cut = (
        hard_at_the_end(plain("digit_splitting"), 0.4),
        hard_at_the_end(plain("digit_splitting", max_length=9), 0.5),
    )
    assert cut.ce_per_byte < whole.ce_per_byte
    plan = plan_of("byte_level", *["digit_splitting"] * 2, metric=METRICS[metric])
    _, report = fuse_text(plan, plain("byte_level"), [whole, cut][::order])
    assert [report.chosen[source.name] for source in plan.sources][::order] == [1, 0]


def test_a_source_that_read_nothing_limits_no_other():
    whole, worse = hard_at_the_end(plain("digit_splitting"), 0.4), hard_at_the_end(plain("digit_splitting"), 0.5)
    nothing = hard_at_the_end(plain("digit_splitting", max_length=1), 0.5)
    plan = plan_of("byte_level", *["digit_splitting"] * 3)
    _, report = fuse_text(plan, plain("byte_level"), [nothing, worse, whole])
    assert list(report.chosen.values()) == [0, 0, 1]


@pytest.mark.parametrize("aligner", [align_dtw, align_tokens])
def test_aligners_of_tokens_work_message_by_message(aligner):
    source, target = chat("byte_level"), chat("sentencepiece_bpe")
    record, _ = knows(source)
    plans = [
        plan_of("sentencepiece_bpe", "byte_level", align=align, projection=TRUE)
        for align in (lambda projector: align_texts, by_tokens(aligner))
    ]
    (by_ends, _), (by_path, report) = (fuse_text(plan, target, [record]) for plan in plans)
    both = by_ends.present & by_path.present
    assert both.sum() > 10
    if aligner is align_dtw:
        # Time warping may put rows together that have read other bytes; it says so.
        assert report.sources["byte_level-0"].unchecked > 0
    else:
        np.testing.assert_array_equal(by_ends.ids, by_path.ids)


def test_an_aligner_of_tokens_gets_the_bytes_of_both_sides_and_nothing_else():
    seen = []

    def aligner(source, target):
        seen.append((b"".join(source), b"".join(target)))
        return align_tokens(source, target)

    fuse_text(
        plan_of("sentencepiece_bpe", "byte_level", align=by_tokens(aligner)),
        chat("sentencepiece_bpe"),
        [knows(chat("byte_level"))[0]],
    )
    contents = [m["content"].encode() for m in tiny.CHAT if m["role"] == "assistant"]
    assert [source for source, _ in seen] == contents
    # A message's first token may spell a space that the template wrote.
    assert [target.lstrip() for _, target in seen] == contents


def test_coverage_is_that_of_the_rows_that_could_match():
    """A prompt and a template cannot be aligned, whatever the aligner."""
    packed, text = load("byte_level")[1].packed, answers_of(chat("byte_level"))
    assert align_by_tokens(align_dtw, packed, packed)(text, text).coverage == 1.0


@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "token_min_ce"])
def test_the_fallback_stands_only_where_no_source_has_a_row(rule):
    """One source has a row everywhere; the other, better one, of a coarser tokenizer, does not."""
    target = plain("digit_splitting")
    records = [noisy("digit_splitting", 0, strength=1.0), noisy("sentencepiece_bpe", 1, strength=5.0)]
    settings = {"rule": rule, "rule_options": {"missing": "next_best"} if rule == "min_ce" else {}, "width": 9}
    names = ("digit_splitting", "sentencepiece_bpe")
    mask, label = (
        fuse_text(plan_of("digit_splitting", *names, label_fallback=fallback, **settings), target, records)
        for fallback in (False, True)
    )
    assert mask[1].sources["sentencepiece_bpe-1"].unaligned > 5
    np.testing.assert_array_equal(mask[0].ids, label[0].ids)
    np.testing.assert_array_equal(mask[0].logprobs, label[0].logprobs)
    alone, report = fuse_text(
        plan_of("digit_splitting", names[1], label_fallback=True, width=9),
        target,
        records[1:],
    )
    source = report.sources["sentencepiece_bpe-0"]
    assert alone.present[:-1].all()
    filled = np.flatnonzero((alone.logprobs[:, 0] == 0.0) & (alone.ids[:, 1] == -1))
    assert len(filled) == source.fallback
    assert alone.ids[filled, 0].tolist() == target.input_ids[filled + 1].tolist()
    assert (alone.leftover[filled] == 0.0).all()
    # The last position has no label.
    assert not alone.present[-1]
    assert source.fallback == source.positions - source.used > 5


def test_strict_offsets_use_only_rows_with_the_same_next_token():
    record, _ = knows(plain("digit_splitting"))
    target = plain("sentencepiece_bpe")
    reports = [
        fuse_text(plan_of("sentencepiece_bpe", "digit_splitting", align=align), target, [record])[1].sources[
            "digit_splitting-0"
        ]
        for align in (lambda _: align_texts, lambda _: partial(align_texts, strict=True))
    ]
    assert reports[0].one_to_one == reports[1].one_to_one > 10
    assert reports[0].one_to_many > 0 == reports[1].one_to_many == reports[1].many_to_one == reports[1].crossing


def test_wrong_plans_are_refused():
    with pytest.raises(ConfigError, match="at least one source"):
        FusionPlan(())
    with pytest.raises(ConfigError, match="width of at least 1 entry, got 0"):
        plan_of("byte_level", "byte_level", width=0)


def several_texts():
    """Targets and two sources' records of four texts: two plain ones, one that was cut, and a chat."""
    plains = [TEXT, TEXT[:40], TEXT[20:]]
    targets = [plain("byte_level", text) for text in plains] + [chat("byte_level")]
    records = [
        [noisy("sentencepiece_bpe", s, text, strength=s) for s, text in enumerate(plains)]
        + [knows(chat("sentencepiece_bpe"))[0]],
        [noisy("digit_splitting", 9 - s, text, strength=2) for s, text in enumerate(plains)]
        + [knows(chat("digit_splitting"), shift=1)[0]],
    ]
    records[1][1] = knows(plain("digit_splitting", plains[1], max_length=8))[0]
    return targets, records


def check_same_counts(left, right):
    assert dataclasses.replace(left, sources={}) == dataclasses.replace(right, sources={})
    for name, report in left.sources.items():
        assert dataclasses.asdict(report) == pytest.approx(dataclasses.asdict(right.sources[name]))


def check_text_by_text(plan, targets, records, trained=None):
    """All texts in one call give what they give one by one; returns what they give."""
    fused, total = fuse_texts(plan, targets, records, trained)
    reports = []
    for b, target in enumerate(targets):
        alone, report = fuse_text(plan, target, [own[b] for own in records], trained and trained[b])
        own = slice(*fused.offsets[b : b + 2])
        for name in ("ids", "logprobs", "leftover", "kept", "source"):
            np.testing.assert_array_equal(getattr(fused, name)[own], getattr(alone, name), err_msg=f"{name} {b}")
        assert report.chosen == {s.name: int(i == fused.best[b]) for i, s in enumerate(plan.sources)}
        reports.append(report)
    check_same_counts(sum(reports[1:], reports[0]), total)
    return fused, total


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "token_min_ce", "of another package"])
def test_many_texts_in_one_call_give_what_each_gives_alone(rule, trained, monkeypatch):
    """A rule of another package may look at a whole text, so it gets one at a time."""
    monkeypatch.setitem(RULES, "of another package", lambda distributions, costs: distributions[int(np.argmax(costs))])
    targets, records = several_texts()
    ranges = [None, np.array([[3, 20]], np.int32), np.array([[0, 9], [15, 30]], np.int32), None] if trained else None
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", rule=rule, width=5)
    fused, total = check_text_by_text(plan, targets, records, ranges)
    assert total.texts == 4
    assert total.fused_positions > 20
    assert len(fused.ids) == fused.offsets[-1] == sum(len(target.ends) for target in targets)
    assert fused.best.dtype == fused.source.dtype == np.int16


def lazily(record, read):
    """The record without its distributions; ``read`` notes that they were asked for."""
    return LazyRecord(
        record.id, record.text, record.ce_per_token, record.ce_per_byte, lambda: (read.append(record), record.topk)[1]
    )


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("rule", ["min_ce", "avg_ce", "token_min_ce"])
@pytest.mark.parametrize("counted", [(), (0, 3), (1,), (0, 1, 2, 3)], ids=str)
def test_texts_that_are_not_counted_are_fused_alike_and_what_is_not_needed_is_not_read(rule, counted, fallback):
    targets, records = several_texts()
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", rule=rule, width=5, label_fallback=fallback)
    whole, total = fuse_texts(plan, targets, records)
    read, flags = [], [b in counted for b in range(4)]
    lazy = [[lazily(record, read) for record in own] for own in records]
    fused, report = fuse_texts(plan, targets, lazy, counted=flags)
    for name in ("ids", "logprobs", "leftover", "kept", "source", "best"):
        np.testing.assert_array_equal(getattr(fused, name), getattr(whole, name), err_msg=name)
    by_text = rule == "min_ce"
    assert dataclasses.replace(report, sources=total.sources) == total
    assert set(report.sources) == set(total.sources)
    if not by_text:
        assert report == total
        return
    _, part = fuse_texts(plan, [targets[b] for b in counted], [[own[b] for b in counted] for own in records])
    assert {name: report.sources[name] for name in part.sources} == part.sources
    assert all(report.sources[name].positions == part.positions for name in report.sources)
    needed = {id(records[s][b].topk) for b in range(4) for s in range(2) if flags[b] or s == whole.best[b]}
    cut = {id(own[1].topk) for own in records}  # measured anew, over the part that both have read
    assert needed <= {id(record.topk) for record in read} <= needed | cut
    if 1 not in counted:
        assert len({id(record) for record in read}) < 8


def test_each_position_says_which_source_taught_it_and_how_much_of_it_was_kept():
    targets, records = several_texts()
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", rule="min_ce", width=4)
    fused, _ = fuse_texts(plan, targets, records)
    present, best = fused.ids[:, 0] >= 0, np.repeat(fused.best, np.diff(fused.offsets))
    np.testing.assert_array_equal(fused.source, np.where(present, best, -1))
    assert set(best.tolist()) == {0, 1}
    assert ((fused.kept > 0) == present).all()
    assert fused.kept.max() <= 1.0 + 1e-6
    # Without renormalisation the entries keep their true probabilities.
    true = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", rule="min_ce", width=4, projection=TRUE)
    whole, _ = fuse_texts(true, targets, records)
    sums = np.exp(whole.logprobs.astype(float)).sum(-1)
    np.testing.assert_allclose(whole.kept, sums, rtol=1e-5)
    np.testing.assert_allclose(fused.kept[present], sums[present], rtol=1e-5)
    mixed, _ = fuse_texts(dataclasses.replace(plan, rule=RULES["avg_ce"]), targets, records)
    assert set(mixed.source.tolist()) == {-1, 0, 1}
    filled, _ = fuse_texts(dataclasses.replace(plan, label_fallback=True), targets, records)
    labels = (filled.ids[:, 0] >= 0) & ~present
    assert labels.any()
    assert (filled.source[labels] == -1).all()
    assert (filled.kept[labels] == 0).all()


@pytest.mark.parametrize("rule", ["min_ce", "of another package"])
@pytest.mark.parametrize("align", [None, align_dtw])
def test_a_text_that_was_not_read_alike_is_named_and_left_out(rule, align, monkeypatch):
    monkeypatch.setitem(RULES, "of another package", lambda distributions, costs: distributions[0])
    targets, records = several_texts()
    records[1][2] = knows(plain("digit_splitting", TEXT.replace("1234", "1235")[20:]), id="text")[0]
    aligner = {"align": by_tokens(align)} if align else {}
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", rule=rule, width=5, **aligner)
    with pytest.raises(AlignmentError, match=r"source 'digit_splitting-1': record 'text' is of another text"):
        fuse_texts(plan, targets, records)
    fused, total = fuse_texts(plan, targets, records, on_unusable="skip")
    assert list(fused.unusable) == [2]
    assert "1235" in str(fused.unusable[2])
    out = slice(*fused.offsets[2:4])
    assert (fused.ids[out] == -1).all()
    assert (fused.source[out] == -1).all()
    assert fused.best[2] == -1
    kept = [0, 1, 3]
    others, report = fuse_texts(plan, [targets[b] for b in kept], [[own[b] for b in kept] for own in records])
    np.testing.assert_array_equal(np.delete(fused.ids, np.arange(out.start, out.stop), 0), others.ids)
    check_same_counts(total, report)
    assert total.texts == 3
    with pytest.raises(ConfigError, match="on_unusable: expected 'raise' or 'skip', got 'drop'"):
        fuse_texts(plan, targets, records, on_unusable="drop")


@pytest.mark.parametrize("wrong", [lambda n: n + 1, lambda n: n - 1])
def test_an_aligner_that_refuses_a_text_or_errs_about_it_leaves_that_text_out(wrong):
    """Positions outside the source's text would be read from another text."""

    def short_only(source, target):
        if len(target.ends) > 40:
            raise AlignmentError("too long")
        found = align_texts(source, target)
        if len(target.ends) < 25:
            return dataclasses.replace(found, source_positions=np.full(wrong(len(target.ends)), 0, np.int32))
        return found

    targets, records = several_texts()
    sizes = [len(target.ends) for target in targets]
    out = [b for b, size in enumerate(sizes) if size > 40 or size < 25]
    assert 1 < len(out) < len(sizes)
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", align=lambda projector: short_only)
    fused, total = fuse_texts(plan, targets, records, on_unusable="skip")
    assert sorted(fused.unusable) == out
    assert total.texts == len(sizes) - len(out)
    present = np.add.reduceat(fused.ids[:, 0] >= 0, fused.offsets[:-1])
    assert [b for b in range(len(sizes)) if not present[b]] == out
    with pytest.raises(AlignmentError, match=r"source 'sentencepiece_bpe-0': (too long|expected an alignment of)"):
        fuse_texts(plan, targets, records)


def test_no_texts_give_no_positions():
    fused, total = fuse_texts(plan_of("byte_level", "digit_splitting", width=7), [], [[]])
    assert fused.ids.shape == (0, 7)
    assert fused.offsets.tolist() == [0]
    assert total.texts == 0


def test_an_empty_text_between_others_changes_nothing():
    targets, records = several_texts()
    plan = plan_of("byte_level", "sentencepiece_bpe", "digit_splitting", width=5)
    names = "sentencepiece_bpe", "digit_splitting"
    options = {"special_tokens": False, "append_eos": False}
    targets.insert(1, plain("byte_level", "", **options))
    for own, name in zip(records, names, strict=True):
        tokens = plain(name, "", **options)
        nothing = np.zeros((len(tokens.ends), 6))
        own.insert(1, record_of("text", tokens, nothing.astype(np.int32), nothing, nothing[:, 0]))
    check_text_by_text(plan, targets, records)


def test_threads_do_not_change_the_result():
    records = [noisy(name, i) for i, name in enumerate(SOURCES)]
    plan = plan_of("byte_level", *SOURCES, method="min_edit", rule="avg_ce")
    target = plain("byte_level")
    alone, _ = fuse_text(plan, target, records)
    with ThreadPoolExecutor(4) as pool:
        for fused, _ in pool.map(lambda _: fuse_text(plan, target, records), range(40)):
            np.testing.assert_array_equal(fused.ids, alone.ids)
            np.testing.assert_array_equal(fused.logprobs, alone.logprobs)


def test_a_new_process_finds_the_kernels_compiled():
    warm_up()
    code = (
        "from fusion_plugins.core.fusion import answer_starts, dtw_kernels, pipeline, projection_kernel as kernels\n"
        "pipeline.warm_up()\n"
        "of_answers = answer_starts.span_beginnings, kernels.in_spans\n"
        "for kernel in (dtw_kernels.warp, kernels.project_texts, *of_answers):\n"
        "    assert sum(kernel.stats.cache_hits.values()) and not kernel.stats.cache_misses, kernel.stats\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
