"""What every scorer offers, and what it says about one response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Row", "Score", "Scorer"]

#: A response with at least ``prompt``, ``response`` and ``domain``; ``reference`` and ``tests`` may be None.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """What one scorer says about one response.

    Attributes:
        reward: on the reward model's own scale; None from a verifier.
        correct: verdict; None from a reward model, and None (never False) where the verifier itself failed.
        reason: why there is no verdict or reward, or why the verdict is False; None where there is nothing to say.
        details: whatever else is worth keeping; must be JSON.
    """

    reward: float | None = None
    correct: bool | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores responses in batches. What is registered under a name is a function from options to such an object.

    Attributes:
        domains: domains it scores unless the settings say otherwise; None for all.
        facts: what its scores depend on (versions, model, limits); goes into the manifest, and a run with other facts
            refuses to add to the same folder.
    """

    domains: frozenset[str] | None
    facts: dict[str, Any]

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one score per row, in order. A score depends on its row alone, not on the others of the batch."""
        ...

    def close(self) -> None:
        """Give back memory and processes."""
        ...
