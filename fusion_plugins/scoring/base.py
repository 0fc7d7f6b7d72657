"""The interface of a scorer, and its result for one response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: One response: at least ``prompt`` (text or messages), ``response`` and ``domain``; ``reference`` and ``tests`` may be
#: missing or None.
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """Result of one scorer for one response.

    Attributes:
        reward: on the reward model's own scale; None from a verifier.
        correct: verdict; None from a reward model, and None (never False) where the verifier itself failed.
        reason: why there is no verdict or reward, or why the verdict is False; None otherwise.
        details: other results to keep, such as the answers found; values that JSON can write.
    """

    reward: float | None = None
    correct: bool | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores responses in batches. A plugin registers a function from options to such an object.

    Attributes:
        domains: domains it scores unless the settings name others; None for all.
        facts: what its scores depend on (versions, model, limits). They go into the manifest; a run with other facts
            may not add to the same folder.

    A scorer that compares the answers to a prompt with each other has an attribute ``by_prompt`` that is true: then the
    rows of a prompt that it takes are scored together, again where one of them is new or has changed.
    """

    domains: frozenset[str] | None
    facts: dict[str, Any]

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return one score per row, in order. A score depends on its row alone, not on the rest of the batch.

        With ``by_prompt`` it depends on the rows of its prompt, all of which are in the batch.
        """
        ...

    def close(self) -> None:
        """Free memory and end processes."""
        ...
