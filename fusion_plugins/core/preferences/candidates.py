"""The candidates of one prompt: what makes them comparable, the order of ties, what is left out before any rule."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any

from fusion_plugins.errors import DataError

__all__ = [
    "VERIFIED_DOMAINS",
    "Candidate",
    "Pair",
    "best_first",
    "clean",
    "is_verified",
    "reward_of",
    "tie_order",
    "worst_first",
]

VERIFIED_DOMAINS = frozenset({"math", "code"})


@dataclass(frozen=True)
class Candidate:
    """One scored response of one source model to one prompt.

    Attributes:
        prompt_id: the prompt.
        source: name of the source model.
        index: sample index within the source.
        prompt: the user's text or the messages before the response.
        response: the model's text.
        reward: score of the reward model, on its own scale; None where it was not scored.
        correct: verdict of a verifier; None where there is none (also when the verifier itself failed).
        domain: instruction | math | code | chinese | any other name.
        extra: whatever else a scorer recorded.
    """

    prompt_id: str
    source: str
    index: int
    prompt: str | list[dict[str, str]]
    response: str
    reward: float | None = None
    correct: bool | None = None
    domain: str = "instruction"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A preference pair.

    Attributes:
        chosen: the better candidate.
        rejected: the worse candidate.
        gap: reward of chosen minus reward of rejected; None where either was not scored.
    """

    chosen: Candidate
    rejected: Candidate
    gap: float | None


def is_verified(candidates: Sequence[Candidate]) -> bool:
    """Whether a verdict decides about the answers to this prompt."""
    return any(candidate.domain in VERIFIED_DOMAINS or candidate.correct is not None for candidate in candidates)


def clean(candidates: Iterable[Candidate | Mapping[str, Any]]) -> tuple[dict[str, list[Candidate]], dict[str, int]]:
    """Group candidates by prompt and leave out empty, repeated and unusable responses.

    Args:
        candidates: candidates, or rows with their attributes as keys (other keys go into ``extra``).

    Returns:
        Prompt id -> candidates, both in an order that does not depend on the order given; and reason -> responses left
        out: ``empty_response``, ``reward_not_finite``, ``duplicate_response`` (equal text, same prompt and source).

    Raises:
        DataError: candidates of one prompt disagree about its text or its domain, or a row lacks a key.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in map(_as_candidate, candidates):
        groups[candidate.prompt_id].append(candidate)
    dropped: Counter[str] = Counter()
    for prompt_id, group in groups.items():
        _check_one_prompt(group)
        groups[prompt_id] = _usable(group, dropped)
    return dict(sorted(groups.items())), dict(dropped)


def _as_candidate(row: Candidate | Mapping[str, Any]) -> Candidate:
    if isinstance(row, Candidate):
        return row
    names = [field.name for field in fields(Candidate) if field.name != "extra"]
    known = {name: row[name] for name in names if row.get(name) is not None}
    try:
        return Candidate(**known, extra={key: value for key, value in row.items() if key not in names})
    except TypeError as error:
        needed = "prompt_id, source, index, prompt, response"
        raise DataError(f"expected candidates, or rows with {needed}; came the keys {', '.join(row)}") from error


def _usable(group: Iterable[Candidate], dropped: Counter[str]) -> list[Candidate]:
    kept: dict[tuple[str, str], Candidate] = {}
    # Of equal responses of one source the one that knows more stays, then the lowest index.
    for candidate in sorted(group, key=_most_known_first):
        text = candidate.response.strip()
        if not text:
            dropped["empty_response"] += 1
        elif candidate.reward is not None and not math.isfinite(candidate.reward):
            dropped["reward_not_finite"] += 1
        elif (candidate.source, text) in kept:
            dropped["duplicate_response"] += 1
        else:
            kept[candidate.source, text] = candidate
    return list(kept.values())


def _most_known_first(candidate: Candidate) -> tuple[str, bool, bool, int, bytes]:
    unknown = candidate.correct is None, candidate.reward is None
    return candidate.source, *unknown, candidate.index, tie_order(candidate)


def _check_one_prompt(group: Sequence[Candidate]) -> None:
    first = group[0]
    for candidate in group:
        if candidate.prompt != first.prompt or candidate.domain != first.domain:
            what = "text" if candidate.prompt != first.prompt else "domain"
            raise DataError(
                f"prompt {first.prompt_id!r}: sample {first.index} of {first.source!r} and sample {candidate.index} of "
                f"{candidate.source!r} have a different prompt {what}. One prompt id must mean one prompt: responses "
                "were joined to the wrong prompt, or two prompt files use the same ids."
            )


def reward_of(candidate: Candidate) -> float:
    """Return the reward of a candidate that is known to have one."""
    assert candidate.reward is not None
    return candidate.reward


def best_first(candidate: Candidate) -> tuple[float, bytes]:
    """Sort key: highest reward first, then the order of ties."""
    return -reward_of(candidate), tie_order(candidate)


def worst_first(candidate: Candidate) -> tuple[float, bytes]:
    """Sort key: lowest reward first, then the order of ties."""
    return reward_of(candidate), tie_order(candidate)


def tie_order(candidate: Candidate) -> bytes:
    """Sort key of equals: fixed, the same everywhere, and without a liking for any source."""
    key = (candidate.prompt_id, candidate.source, candidate.index, candidate.response)
    return blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=16).digest()
