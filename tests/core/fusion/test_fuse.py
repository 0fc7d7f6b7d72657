import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion.fuse import RULES, avg_ce_weights, fuse, min_ce_choice, truncate
from fusion_plugins.core.fusion.types import SparseDistributions
from fusion_plugins.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "fusion_loss.json").read_text(encoding="utf-8"))["cases"]


def rows(*entries):
    """One distribution per position from dicts id -> probability, by descending probability."""
    width = max((len(row) for row in entries), default=1) or 1
    ids = np.full((len(entries), width), -1, np.int32)
    logprobs = np.full((len(entries), width), -np.inf, np.float32)
    for t, row in enumerate(entries):
        for k, (token, p) in enumerate(sorted(row.items(), key=lambda item: (-item[1], item[0]))):
            ids[t, k], logprobs[t, k] = token, np.log(p)
    leftover = np.array([1 - sum(row.values()) for row in entries], np.float32)
    return SparseDistributions(ids, logprobs, leftover)


def as_dicts(distributions):
    return [
        {int(i): float(np.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0}
        for ids, logprobs in zip(distributions.ids, distributions.logprobs, strict=True)
    ]


A = rows({1: 0.5, 2: 0.3}, {3: 0.9}, {})
B = rows({2: 0.6, 4: 0.2, 5: 0.1}, {}, {})


def test_min_ce_takes_every_row_of_the_source_with_the_lowest_cross_entropy():
    fused = fuse([A, B], [1.5, 1.4])
    assert fused.ids.tolist() == B.ids.tolist()
    np.testing.assert_array_equal(fused.leftover, B.leftover)
    assert as_dicts(fuse([A, B], [1.4, 1.5])) == as_dicts(A)


def test_of_equal_cross_entropies_the_first_source_wins():
    assert as_dicts(fuse([A, B], [0.7, 0.7])) == as_dicts(A)
    assert min_ce_choice([[0.7, 0.2], [0.7, 0.1]]).tolist() == [0, 1]


def test_min_ce_can_fill_a_missing_row_from_the_next_best_source():
    assert as_dicts(fuse([A, B], [1.5, 1.4], missing="next_best"))[1] == as_dicts(A)[1]
    assert as_dicts(fuse([A, B], [1.5, 1.4]))[1] == {}


def test_min_ce_chooses_for_each_text_of_a_batch():
    batch = [SparseDistributions(*(np.stack([x, x]) for x in (d.ids, d.logprobs, d.leftover))) for d in (A, B)]
    fused = fuse(batch, [[1.0, 2.0], [2.0, 1.0]])
    assert fused.ids[0, :, :2].tolist() == A.ids.tolist()
    assert fused.ids[1].tolist() == B.ids.tolist()


def test_a_text_without_a_cross_entropy_is_never_preferred():
    assert as_dicts(fuse([A, B], [np.nan, 9.0])) == as_dicts(B)
    assert avg_ce_weights([np.nan, 1.0]).tolist() == [0.0, 1.0]
    assert avg_ce_weights([np.nan, np.nan]).tolist() == [0.5, 0.5]


def test_token_min_ce_chooses_per_position_among_the_sources_with_a_row():
    """Row 0: B has the lower value. Row 1: B's value is lower, but B has no row. Row 2: nobody has one."""
    fused = fuse([A, B], [[0.9, 0.8, 0.1], [0.5, 0.2, 0.1]], rule="token_min_ce")
    assert as_dicts(fused) == [as_dicts(B)[0], as_dicts(A)[1], {}]


def test_a_row_without_its_label_is_still_better_than_no_row():
    costs = [[np.inf, np.inf, np.inf], [np.inf, np.nan, np.inf]]
    assert as_dicts(fuse([B, A], costs, rule="token_min_ce")) == [as_dicts(B)[0], as_dicts(A)[1], {}]


def test_token_min_ce_refuses_one_number_per_text():
    with pytest.raises(ConfigError, match="an array of 2 axes; got 1 axes"):
        fuse([A, B], [1.0, 2.0], rule="token_min_ce")


def test_avg_ce_mixes_by_the_worked_numbers():
    """Cross-entropies 1 and 1 + ln 3 at temperature 1 weigh 3/4 and 1/4.

    Row 0: 1: .75 * .5 = .375; 2: .75 * .3 + .25 * .6 = .375; 4: .05; 5: .025; leftover .75 * .2 + .25 * .1 = .175.
    Row 1: only A has it, so A alone: 3: .9. Row 2: nobody.
    """
    fused = fuse([A, B], [1.0, 1.0 + np.log(3.0)], rule="avg_ce")
    expected = [{1: 0.375, 2: 0.375, 4: 0.05, 5: 0.025}, {3: 0.9}, {}]
    for found, wanted in zip(as_dicts(fused), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
    assert fused.leftover == pytest.approx([0.175, 0.1, 1.0], abs=1e-6)


def test_avg_ce_orders_entries_by_probability_then_by_id():
    fused = fuse([rows({9: 0.5, 2: 0.1}), rows({4: 0.5, 2: 0.2})], [1.0, 1.0], rule="avg_ce")
    assert fused.ids[0].tolist() == [4, 9, 2, -1]


def test_a_higher_temperature_makes_the_weights_more_even():
    sharp, soft = avg_ce_weights([1.0, 2.0], temperature=0.5), avg_ce_weights([1.0, 2.0], temperature=4.0)
    np.testing.assert_allclose(sharp, [0.880797, 0.119203], rtol=1e-5)
    np.testing.assert_allclose(soft, [0.562177, 0.437823], rtol=1e-5)


def test_the_published_weights_are_the_softmax_of_the_rewards():
    np.testing.assert_allclose(avg_ce_weights([1, 2, 3], compat="fusellm"), [0.3968, 0.3145, 0.2887], atol=5e-5)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"case-{c['case']}")
def test_choices_and_weights_are_the_published_ones(case):
    seen = 0
    for expected in case["expected"]:
        costs = np.array([case["sources"][name]["metric_ce"] for name in expected["sources"]])
        wanted = expected["float64"]["choice_or_weights"]
        if expected["rule"] == "MinCE":
            assert [expected["sources"][s] for s in min_ce_choice(costs)] == wanted
        else:
            np.testing.assert_allclose(avg_ce_weights(costs, compat="fusellm").T, wanted, rtol=1e-9)
        seen += 1
    assert seen


distribution = st.dictionaries(st.integers(0, 5), st.integers(1, 9), max_size=4).map(
    lambda row: {token: weight / 40 for token, weight in row.items()}
)


def test_the_most_probable_entries_are_kept_whatever_their_order():
    """The rule of another package need not sort."""
    unsorted = rows({1: 0.1, 2: 0.2, 3: 0.7})
    unsorted = SparseDistributions(unsorted.ids[:, ::-1], unsorted.logprobs[:, ::-1], unsorted.leftover)
    kept = truncate(unsorted, 2, renormalize=False)
    assert kept.ids.tolist() == [[3, 2]]
    assert np.exp(kept.logprobs[0]).tolist() == pytest.approx([0.7, 0.2])
    assert kept.leftover[0] == pytest.approx(0.1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(distribution, distribution, distribution), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
    st.sampled_from(sorted(RULES)),
)
def test_fused_rows_are_distributions_over_what_the_sources_hold(positions, costs, rule):
    sources = [rows(*column) for column in zip(*positions, strict=True)]
    per_token = getattr(RULES[rule], "per_token", False)
    per_row = np.repeat(np.array(costs)[:, None], len(positions), axis=1) if per_token else costs
    fused = fuse(sources, per_row, rule=rule)
    for t, row in enumerate(as_dicts(fused)):
        assert sum(row.values()) + fused.leftover[t] == pytest.approx(1.0, abs=1e-5)
        assert set(row) <= {token for source in positions[t] for token in source}
        entries = fused.ids[t][fused.ids[t] >= 0]
        assert len(set(entries.tolist())) == len(entries)
        assert (np.diff(fused.logprobs[t][: len(entries)]) <= 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(distribution, distribution), min_size=1, max_size=4), st.floats(0.1, 3), st.floats(0.1, 3))
def test_avg_ce_equals_the_weighted_sum(positions, first, second):
    sources = [rows(*column) for column in zip(*positions, strict=True)]
    weights = np.exp([-first, -second]) / np.exp([-first, -second]).sum()
    for found, (a, b) in zip(as_dicts(fuse(sources, [first, second], rule="avg_ce")), positions, strict=True):
        w = weights if a and b else [float(bool(a)), float(bool(b))]
        wanted = {i: w[0] * a.get(i, 0) + w[1] * b.get(i, 0) for i in {*a, *b}}
        assert found == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(distribution, distribution), min_size=1, max_size=4),
    st.sampled_from([0, 0.01, 1]),
    st.sampled_from([0.5, 1, 30]),
)
def test_fixed_weights_equal_the_weighted_sum_whatever_the_cross_entropies(positions, first, second):
    sources = [rows(*column) for column in zip(*positions, strict=True)]
    for costs in ([5.0, 0.1], [0.1, np.nan]):
        fused = fuse(sources, costs, rule="fixed_weights", weights=[first, second])
        for found, (a, b) in zip(as_dicts(fused), positions, strict=True):
            w = np.array([first * bool(a), second * bool(b)])
            w = w / w.sum() if w.sum() else w
            wanted = {i: w[0] * a.get(i, 0) + w[1] * b.get(i, 0) for i in {*a, *b}}
            wanted = {i: value for i, value in wanted.items() if value > 0}
            assert {i: value for i, value in found.items() if value > 0} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.1], [1.0, np.nan], [1.0, 1.0, 1.0]])
def test_weights_that_are_no_mixture_are_refused(weights):
    with pytest.raises(ConfigError, match="expected 2 weights, one per source, not negative and not all 0"):
        fuse([A, B], [1.0, 2.0], rule="fixed_weights", weights=weights)


def test_truncation_keeps_the_most_probable_entries():
    kept = truncate(A, 1, renormalize=False)
    assert as_dicts(kept) == [{1: pytest.approx(0.5)}, {3: pytest.approx(0.9)}, {}]
    assert kept.leftover == pytest.approx([0.5, 0.1, 1.0])
    scaled = truncate(A, 1, renormalize=True)
    assert as_dicts(scaled) == [{1: 1.0}, {3: 1.0}, {}]
    assert scaled.leftover.tolist() == [0.0, 0.0, 1.0]
    assert truncate(A, 4, renormalize=False).ids.shape == (3, 4)


def test_any_function_of_the_same_form_is_a_rule():
    assert fuse([A, B], [1.0, 2.0], rule=lambda sources, costs, pick: sources[pick], pick=1) is B


def test_wrong_input_is_refused_with_its_shape():
    with pytest.raises(ConfigError, match="expected one of avg_ce, fixed_weights, min_ce, token_min_ce"):
        fuse([A, B], [1.0, 2.0], rule="maxce")
    with pytest.raises(ConfigError, match=r"got \(3,\)"):
        fuse([A, B], [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="at least one source"):
        fuse([], [])
    with pytest.raises(ConfigError, match=r"got \(3, 2\) and \(1, 2\)"):
        fuse([A, rows({1: 1.0})], [1.0, 2.0])
    with pytest.raises(ConfigError, match="'mask' or 'next_best'"):
        fuse([A, B], [1.0, 2.0], missing="drop")
    with pytest.raises(ConfigError, match="temperature: expected a number above 0"):
        fuse([A, B], [1.0, 2.0], rule="avg_ce", temperature=0.0)
    with pytest.raises(ConfigError, match="compat: expected None or 'fusellm'"):
        fuse([A, B], [1.0, 2.0], rule="avg_ce", compat="fusechat")
