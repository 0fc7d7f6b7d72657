import json
from pathlib import Path

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_plugins.core.fusion.align import align_tokens
from fusion_plugins.core.fusion.dtw import dtw_path
from fusion_plugins.errors import AlignmentError

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "golden" / "token_alignment.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
# Source, target, source positions per target token, cost; two rows also in FuseChat's tie order.
WORKED = [
    (["x", "y"], ["p", "q", "r"], [[0], [0], [1]], 3),
    (["p", "q", "r"], ["x", "y"], [[0, 1], [2]], 3),
    (["ab", "cd"], ["ab", "c", "d"], [[0], [1], [1]], 2),
    (["a", "b", "cd"], ["ab", "c", "d"], [[0], [1], [2]], 3),
    (["Ġfox", "Ġjumps"], ["▁fo", "x", "▁j", "umps"], [[0], [0], [0], [1]], 7),
    (["12", "3"], ["1", "2", "3"], [[0], [0], [1]], 2),
    (["1", "2", "3"], ["12", "3"], [[0, 1], [2]], 2),
    (["a", "b", "a"], ["b", "a", "b"], [[0], [0], [1, 2]], 2),
    (["a", "ab", "a"], ["ab", "a", "ab"], [[0], [0], [1, 2]], 2),
]
# Texts cut in two ways: the letters repeat, so that time warping has ties.
cuts = st.lists(st.sampled_from(["a", "b", "ab", "ba", "é", "12", "1"]), min_size=1, max_size=12)


@pytest.mark.parametrize("record", GOLDEN, ids=lambda r: f"{r['family']}-{r['doc']}-{r['kind']}")
def test_dtw_walks_the_published_paths(record):
    found = align_tokens(record["source_tokens"], record["target_tokens"], method="dtw", tie_order=record["family"])
    assert found.target_to_source == record["target_to_source"]
    assert found.source_to_target == record["source_to_target"]
    assert found.cost == record["total_cost"]


@pytest.mark.parametrize(("source", "target", "expected", "cost"), WORKED)
def test_dtw_gives_the_worked_examples(source, target, expected, cost):
    found = align_tokens(source, target, method="dtw")
    assert (found.target_to_source, found.cost) == (expected, cost)


@pytest.mark.parametrize(("source", "target", "expected", "cost"), WORKED[-2:])
def test_the_other_tie_order_gives_another_path_of_the_same_cost(source, target, expected, cost):
    found = align_tokens(source, target, method="dtw", tie_order="fusechat")
    assert (found.target_to_source, found.cost) == ([[0, 1], [2], [2]], cost)


@settings(max_examples=150, deadline=None)
@given(cuts, cuts, st.sampled_from(["fusellm", "fusechat"]))
def test_dtw_equals_the_plain_reference(source, target, family):
    costs = [[reference.published_cost(a, b, "", "", family) for b in target] for a in source]
    path, cost = reference.dtw(costs, family)
    found, found_cost = dtw_path(source, target, tie_order=family)
    assert found.tolist() == [list(step) for step in path]
    assert found_cost == cost


def test_dtw_refuses_texts_that_would_not_fit_memory():
    tokens = [str(i % 7) for i in range(20_000)]
    with pytest.raises(AlignmentError, match="20000 x 20000 tokens needs more than 256 MB"):
        align_tokens(tokens, tokens, method="dtw")
