"""Scores for responses: verdicts of verifiers (mathematics, code), rewards of a reward model or of a judge.

Data flow: ``fusion sample`` -> responses -> ``fusion score`` -> scored responses -> pairs. Importing this package loads
neither torch nor a verifier.

Reading order: base, responses, score; then one scorer: numerals, intervals, quantities, answers, math_worker, pool,
math_scorer (mathematics); names, programs, code_tests, trust (what a program is, and how it is tested),
sandbox_launcher, sandbox_runner, sandbox_checks, sandbox_values, sandbox_link (inside of the sandbox), sandbox_limits,
sandbox_worker, sandbox_modes, sandbox, code_scorer (code); known_answers, reward_presets, reward_backends, reward
(reward model); or judge (a language model).
"""

from typing import Any

from fusion_plugins.install import missing_package_error
from fusion_plugins.scoring.base import Score, Scorer

__all__ = ["SCORERS", "Score", "Scorer"]


def _math(**options: Any) -> Scorer:
    from fusion_plugins.scoring.math_scorer import MathScorer

    return MathScorer(**options)


def _code(**options: Any) -> Scorer:
    from fusion_plugins.scoring.code_scorer import CodeScorer

    return CodeScorer(**options)


def _reward(**options: Any) -> Scorer:
    try:
        from fusion_plugins.scoring.reward import RewardScorer
    except ModuleNotFoundError as error:
        raise missing_package_error(error, "the scorer reward") from error
    return RewardScorer(**options)


def _judge(**options: Any) -> Scorer:
    from fusion_plugins.scoring.judge import JudgeScorer

    return JudgeScorer(**options)


#: name -> function from options to a scorer; :mod:`fusion_plugins.plugins` registers them.
SCORERS = {"math": _math, "code": _code, "reward": _reward, "judge": _judge}
