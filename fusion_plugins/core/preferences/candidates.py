"""The candidates of each prompt: rows -> :class:`Candidate`, evidence, cleaning, and the order of ties.

First step of core/preferences; :mod:`~fusion_plugins.core.preferences.pairs` chooses among what :func:`clean` returns.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from numbers import Real
from typing import Any

from fusion_plugins.core.preferences.verdict import as_verdict
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.finish_reason import is_cut
from fusion_plugins.core.text.messages import REASONING_KEYS, as_messages, as_tools, without_nulls
from fusion_plugins.errors import DataError

#: domains whose answers are always checked by a verifier
_VERIFIED_DOMAINS = frozenset({"math", "code"})

#: columns that belong to the answer beside its text
_REPLY = ("tool_calls", "reasoning_content")
_REQUIRED = ("prompt_id", "source", "prompt", "response")


def is_prompt(value: Any) -> bool:
    """Return whether a value is a text or a list of messages."""
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(part, Mapping) for part in value))


#: key of a row -> (whether a value has the right type, that type in words)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (is_prompt, "text or a list of messages"),
    "response": (lambda value: isinstance(value, str), "text"),
    "index": (lambda value: isinstance(value, Real) and float(value).is_integer(), "an integer"),
    "reward": (lambda value: _is_finite(value), "a finite number"),
    "correct": (lambda value: _is_verdict(value), "true or false, 1 or 0"),
    "domain": (lambda value: isinstance(value, str), "text"),
}
_FIELDS = frozenset({*_REQUIRED, *_TYPES})


@dataclass(frozen=True)
class Evidence:
    """What all responses of a source say about one of them.

    Repeated right answers are evidence; a single one may be luck. :func:`clean` counts before it leaves anything out.

    Attributes:
        repeats: responses of the source to this prompt with this text.
        right: its right responses to this prompt.
        judged: its responses to this prompt that have a verdict.
        accuracy: share of its judged responses to all prompts that are right, in [0, 1]; 0 where none is judged.
        always_solved: whether some source has at least two verdicts on this prompt and all of them are right.
    """

    repeats: int = 1
    right: int = 0
    judged: int = 0
    accuracy: float = 0.0
    always_solved: bool = False

    @property
    def chance(self) -> float:
        """How likely the source's next response to this prompt is right, in (0, 1), by Laplace's rule of succession.

        ``(right + 1) / (judged + 2)``: 1 of 1 may be luck and comes behind 8 of 10. For sources with equally many
        verdicts the order is that of the shares.
        """
        return (self.right + 1) / (self.judged + 2)


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
        extra: whatever else is known about the response; ``dataset`` is read by the split, ``finish_reason`` and
            ``tool_calls`` by :func:`clean`.
        evidence: what the other responses of the source say about this one; set by :func:`clean`.
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
    evidence: Evidence = field(default=Evidence(), compare=False, repr=False)


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


@dataclass(frozen=True)
class CandidateGroups:
    """The usable candidates of a run, grouped by prompt.

    Attributes:
        by_prompt: prompt id -> candidates, which may be none; both in an order that does not depend on the input order.
        dropped: reason -> responses left out: ``truncated``, ``empty_response``, ``reward_not_finite``,
            ``duplicate_response`` (equal text, same prompt and source).
    """

    by_prompt: Mapping[str, list[Candidate]]
    dropped: Mapping[str, int]


def as_candidate(row: Mapping[str, Any], number: int) -> Candidate:
    """Return the candidate that a row describes.

    Required: ``prompt_id``, ``source``, ``prompt`` and ``response``. Optional, with a default where the key is missing
    or its value is null: ``index`` (0), ``reward`` and ``correct`` (None), ``domain`` (instruction, also for an empty
    one). All other keys that have a value go into ``extra``; reasoning that is called ``reasoning`` or ``thinking`` is
    there as ``reasoning_content``.

    Args:
        row: the row.
        number: its position in the file or table, counted from 0; for the error message.

    Raises:
        DataError: a required value is missing, or a value has the wrong type.
    """
    known = {name: value for name, value in row.items() if value is not None}
    if known.get("tool_calls"):
        known.setdefault("response", "")  # a call without a word
    problems = [f"expected a value for {name}, got none" for name in _REQUIRED if name not in known]
    problems += [
        f"expected {expected} as {name}, got {known[name]!r:.80}"
        for name, (fits, expected) in _TYPES.items()
        if name in known and not fits(known[name])
    ]
    if problems:
        raise DataError(
            f"scored response in row {number} (prompt {known.get('prompt_id')!r}, source {known.get('source')!r}): "
            f"{'; '.join(problems)}. The row has the keys {', '.join(row)}. Correct it, or give the output of `fusion "
            "score`, whose rows have all that is needed."
        )
    prompt = known["prompt"]
    return Candidate(
        prompt_id=str(known["prompt_id"]),
        source=str(known["source"]),
        index=int(known.get("index", 0)),
        prompt=prompt if isinstance(prompt, str) else as_messages(prompt),
        response=known["response"],
        reward=known.get("reward"),
        correct=as_verdict(known.get("correct")),
        domain=known.get("domain") or "instruction",
        extra=_with_reasoning({name: value for name, value in known.items() if name not in _FIELDS}),
    )


def _with_reasoning(extra: dict[str, Any]) -> dict[str, Any]:
    """Return the other columns, with the reasoning under ``reasoning_content``, whatever the table calls it.

    The first of :data:`~fusion_plugins.core.text.messages.REASONING_KEYS` that holds a text counts; a column of one of
    these names that holds something else is no reasoning.
    """
    texts = {name: extra[name] for name in REASONING_KEYS if isinstance(extra.get(name), str)}
    reasoning = next((text for text in texts.values() if text.strip()), None)
    rest = {name: value for name, value in extra.items() if name not in texts}
    return rest if reasoning is None else rest | {"reasoning_content": reasoning}


def clean(candidates: Iterable[Candidate | Mapping[str, Any]], *, keep_truncated: bool = True) -> CandidateGroups:
    """Group candidates by prompt, count the evidence, and leave out empty, repeated and unusable responses.

    Args:
        candidates: candidates, or rows as :func:`as_candidate` takes them.
        keep_truncated: keep responses that were cut, by a length limit or an interruption (``finish_reason``); an end
            of turn after such a response would teach to stop in the middle. Their verdicts count in any case.

    Raises:
        DataError: a row is wrong, or candidates of one prompt disagree about its text or its domain.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for number, row in enumerate(candidates):
        candidate = row if isinstance(row, Candidate) else as_candidate(row, number)
        verdict = as_verdict(candidate.correct)
        # Without a change the object stays: most candidates have a plain verdict already.
        groups[candidate.prompt_id].append(
            candidate if verdict is candidate.correct else replace(candidate, correct=verdict)
        )
    accuracy = _accuracy(candidate for group in groups.values() for candidate in group)
    dropped: Counter[str] = Counter()
    by_prompt = {}
    for prompt_id, group in sorted(groups.items()):
        _check_one_prompt(group)
        by_prompt[prompt_id] = _usable(_with_evidence(group, accuracy), dropped, keep_truncated)
    return CandidateGroups(by_prompt, dict(dropped))


def is_own(candidate: Candidate, own_source: str | None = None) -> bool:
    """Return whether an answer is the target's own: of the source of that name, or marked with ``is_target``."""
    return candidate.source == own_source or candidate.extra.get("is_target") is True


def is_verified(candidates: Iterable[Candidate]) -> bool:
    """Return whether a verdict decides about the answers to this prompt."""
    return any(candidate.domain in _VERIFIED_DOMAINS or candidate.correct is not None for candidate in candidates)


def reward_of(candidate: Candidate) -> float:
    """Return the reward of a candidate that is known to have one."""
    assert candidate.reward is not None
    return candidate.reward


def best_first(candidate: Candidate) -> tuple[float, bytes]:
    """Return the sort key for: highest reward first, then the order of ties."""
    return -reward_of(candidate), tie_order(candidate)


def worst_first(candidate: Candidate) -> tuple[float, bytes]:
    """Return the sort key for: lowest reward first, then the order of ties."""
    return reward_of(candidate), tie_order(candidate)


def tie_order(candidate: Candidate) -> bytes:
    """Return the sort key for candidates that are otherwise equal.

    Ties are common (verdicts without rewards, coarse rewards). Sorting them by source name or input order would choose
    one source every time; a hash spreads them evenly. It is not Python's ``hash``, which differs between processes.
    """
    key = (candidate.prompt_id, candidate.source, candidate.index, candidate.response)
    # `repr` escapes lone surrogates, which models can produce and UTF-8 cannot encode.
    return blake2b(repr(key).encode(), digest_size=16).digest()


def answer_of(candidate: Candidate) -> str:
    """Return what an answer says, for comparison: its stripped text, and reasoning and calls that are given apart."""
    parts = [candidate.extra.get(key) for key in ("reasoning_content", "tool_calls")]
    text = candidate.response.strip()
    return text if not any(parts) else text + json.dumps(parts, sort_keys=True, default=str)


def reply_of(candidate: Candidate) -> str | dict[str, Any]:
    """Return an answer: its text, or, with the columns ``tool_calls`` and ``reasoning_content``, a message."""
    parts = {key: value for key in _REPLY if (value := candidate.extra.get(key))}
    if "tool_calls" in parts:  # the reasoning stays a text: "42" is the JSON of a number, but here a thought
        parts["tool_calls"] = _loaded(parts["tool_calls"])
    return {"content": candidate.response, **parts} if parts else candidate.response


def tools_of(candidate: Candidate) -> Any:
    """Return the schemas of the tools that the prompt offers, or None."""
    return _loaded(candidate.extra.get("tools"))


def chat_of(candidate: Candidate) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages of the prompt and of the answer, and the tools that they may call.

    Raises:
        DataError: the tools have another form.
    """
    reply = reply_of(candidate)
    message = {"content": reply} if isinstance(reply, str) else reply
    messages = [*as_messages(candidate.prompt), *as_messages([{**message, "role": "assistant"}])]
    return messages, as_tools(tools_of(candidate))


def answer_id(candidate: Candidate) -> str:
    """Return the id under which stores hold an answer to its prompt: the sha256 (hex) of the chat.

    Equal answers have equal ids, whoever gave them, and an answer that changed has another one.

    Raises:
        DataError: the tools have another form.
        UnicodeEncodeError: the chat holds a lone surrogate.
    """
    return content_id(*chat_of(candidate))


def steadiest_first(candidate: Candidate) -> tuple[float, int, float, int, bytes]:
    """Return the sort key for: the source that is right most often on this prompt first.

    In this order: its chance of being right on this prompt (4 of 4 before 8 of 10 before 1 of 1), the number of right
    responses, its accuracy over all prompts, how often it gave this very response, the order of ties.
    """
    found = candidate.evidence
    return -found.chance, -found.right, -found.accuracy, -found.repeats, tie_order(candidate)


def _loaded(value: Any) -> Any:
    """Return a value of a table that may be JSON text; messages that Arrow has written have all keys of all rows."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return without_nulls(value)


def _is_verdict(value: Any) -> bool:
    try:
        as_verdict(value)
    except DataError:
        return False
    return True


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _share(right: int, judged: int) -> float:
    return right / judged if judged else 0.0


def _accuracy(candidates: Iterable[Candidate]) -> dict[str, float]:
    """Return source -> share of its judged responses that are right."""
    right: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    for candidate in candidates:
        right[candidate.source] += candidate.evidence.repeats * (candidate.correct is True)
        judged[candidate.source] += candidate.evidence.repeats * (candidate.correct is not None)
    return {source: _share(right[source], total) for source, total in judged.items()}


def _with_evidence(group: Sequence[Candidate], accuracy: Mapping[str, float]) -> list[Candidate]:
    """Return the candidates of one prompt with what all of them say about each."""
    right: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    repeats: Counter[tuple[str, str]] = Counter()
    for candidate in group:
        # A candidate that was cleaned before stands for all responses that were equal to it.
        count = candidate.evidence.repeats
        right[candidate.source] += count * (candidate.correct is True)
        judged[candidate.source] += count * (candidate.correct is not None)
        repeats[candidate.source, answer_of(candidate)] += count
    solved = any(2 <= total == right[source] for source, total in judged.items())

    def evidence(candidate: Candidate) -> Evidence:
        source = candidate.source
        times = repeats[source, answer_of(candidate)]
        return Evidence(times, right[source], judged[source], accuracy[source], solved)

    return [replace(candidate, evidence=evidence(candidate)) for candidate in group]


def _check_one_prompt(group: Sequence[Candidate]) -> None:
    first = group[0]
    for candidate in group:
        if candidate.prompt != first.prompt or candidate.domain != first.domain:
            what = "text" if candidate.prompt != first.prompt else "domain"
            raise DataError(
                f"prompt {first.prompt_id!r}: expected one prompt per id, got a different prompt {what} for sample "
                f"{first.index} of {first.source!r} and sample {candidate.index} of {candidate.source!r}. Either "
                "responses were joined to the wrong prompt, or two prompt files use the same ids: make ids unique."
            )


def _usable(group: Iterable[Candidate], dropped: Counter[str], keep_truncated: bool) -> list[Candidate]:
    kept: dict[tuple[str, str], Candidate] = {}
    # The first of equal responses stays: one with a verdict before one without, then one with a reward, then the
    # lowest index. A verifier that failed once must not cost the response its verdict.
    group = sorted(group, key=lambda c: (c.source, c.correct is None, c.reward is None, c.index, tie_order(c)))
    for candidate in group:
        answer = answer_of(candidate)
        if is_cut(candidate.extra.get("finish_reason")) and not keep_truncated:
            dropped["truncated"] += 1
        elif not candidate.response.strip() and not candidate.extra.get("tool_calls"):
            dropped["empty_response"] += 1
        elif candidate.reward is not None and not math.isfinite(candidate.reward):
            dropped["reward_not_finite"] += 1
        elif (candidate.source, answer) in kept:
            dropped["duplicate_response"] += 1
        else:
            kept[candidate.source, answer] = candidate
    return list(kept.values())
