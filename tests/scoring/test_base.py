"""The interface of scorers, and what is registered under it."""

import dataclasses

import pytest

from fusion_plugins.plugins import get_registry
from fusion_plugins.scoring import SCORERS, Score
from fusion_plugins.scoring.code_scorer import CodeScorer
from fusion_plugins.scoring.math_scorer import MathScorer


def test_a_score_without_a_result_is_neither_right_nor_wrong():
    score = Score(reason="no gold answer")
    assert (score.reward, score.correct, score.reason, dict(score.details)) == (None, None, "no gold answer", {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.correct = False


def test_the_shipped_scorers_are_registered_under_their_names():
    assert set(SCORERS) == {"math", "code", "reward", "judge"}
    assert {name: get_registry("scorers")[name] for name in SCORERS} == SCORERS


@pytest.mark.parametrize(
    ("name", "options", "kind"), [("math", {"workers": 1}, MathScorer), ("code", {"workers": 1}, CodeScorer)]
)
def test_a_registered_name_makes_a_scorer_with_its_domain_and_facts(name, options, kind):
    scorer = SCORERS[name](**options)
    try:
        assert isinstance(scorer, kind)
        assert scorer.domains == {name}
        assert scorer.facts
        assert scorer.score([]) == []
    finally:
        scorer.close()
