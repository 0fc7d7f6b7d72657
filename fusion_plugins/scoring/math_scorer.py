"""Mathematics: is the response's answer equal to the gold one? math-verify decides; the time limit is ours.

A verdict is True or False only where math-verify could read both answers and compared them. Everything else (timeout,
crash, an answer or a gold answer that cannot be read) is None with a reason.
"""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from fusion_plugins.core.text.finish_reason import is_cut
from fusion_plugins.errors import ConfigError, ScoringError
from fusion_plugins.install import install_command
from fusion_plugins.scoring.base import Row, Score
from fusion_plugins.scoring.pool import Failure, Reply, WorkerPool


class MathScorer:
    r"""Compares answers with math-verify in processes of its own.

    Args:
        timeout: seconds per response.
        workers: number of processes; one per CPU core by default.
        marked_only: whether an answer counts only in ``\boxed{}`` or after ``####``; otherwise what the response calls
            the answer, bold, and at last the last formula or number count too.

    Raises:
        ConfigError: the timeout is not above 0.
        ScoringError: math-verify is not installed.
    """

    domains: frozenset[str] | None = frozenset({"math"})

    def __init__(self, *, timeout: float = 10.0, workers: int | None = None, marked_only: bool = False) -> None:
        if timeout <= 0:
            raise ConfigError(f"scorers.math: expected a timeout above 0 s, got {timeout}; the default is 10")
        try:
            installed = version("math-verify")
        except PackageNotFoundError as error:
            raise ScoringError(
                f"scorers.math: expected the package math-verify, got none; {install_command('score')}"
            ) from error
        # The rules change where the same response may get another verdict than before.
        self.facts = {"math_verify": installed, "timeout": timeout, "marked_only": marked_only, "rules": 6}
        self._marked_only = marked_only
        self._pool = WorkerPool(
            "fusion_plugins.scoring.math_worker", workers=workers or os.cpu_count() or 1, timeout=timeout
        )

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one verdict per row; ``reference`` is the gold answer."""
        scores = [Score(reason="no gold answer")] * len(rows)
        places = [place for place, row in enumerate(rows) if row.get("reference")]
        replies = self._pool.map(
            [
                {
                    "reference": row["reference"],
                    "response": row["response"],
                    "marked_only": self._marked_only,
                    "broken_off": is_cut(row.get("finish_reason")),
                }
                for row in (rows[place] for place in places)
            ]
        )
        for place, reply in zip(places, replies, strict=True):
            scores[place] = _as_score(reply)
        return scores

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


def _as_score(reply: Reply | Failure) -> Score:
    if isinstance(reply, Failure):
        return Score(reason=str(reply))
    details = {key: value for key, value in reply.items() if key not in ("correct", "reason")}
    return Score(correct=reply["correct"], reason=reply["reason"], details=details)
