"""What a server answers to a completions request -> a response, or the top-k of a prompt.

Answers come from outside: every shape ends in a result, in :class:`Trouble` (ask again), or in :class:`Refused` (asking
again would not help). Pure functions of decoded JSON.
"""

import math
from collections.abc import Sequence
from reprlib import Repr
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.finish_reason import ending
from fusion_plugins.core.text.reasoning import whole_characters, with_opening, with_reasoning
from fusion_plugins.errors import SourceError
from fusion_plugins.sources.backends.base import Response
from fusion_plugins.sources.backends.servers import Refused, Trouble
from fusion_plugins.sources.backends.topk import topk_of_entries

#: where servers put the reasoning; the first that has a text counts
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
#: the largest count that a row can hold
MOST_TOKENS = 2**63 - 1

_quote = Repr()
_quote.maxstring = _quote.maxother = 80


def quoted(value: object) -> str:
    """Return the start of any value that a server sent, for a message."""
    return _quote.repr(value)


def parse_response(answer: dict[str, Any]) -> Response:
    """Return the first choice of a chat completion or of a plain one, with its reasoning.

    Raises:
        Trouble: the answer is incomplete, as after an interruption.
        Refused: it is complete, but not a text: a tool call, a refusal, a filtered answer, an unknown end.
    """
    choice = _first_choice(answer)
    message = choice.get("message") if "message" in choice else {"content": choice.get("text")}
    if not isinstance(message, dict):
        raise Trouble(f"incomplete answer: expected a message, got {quoted(message)}")
    reason = _finish_reason(choice.get("finish_reason"), message)
    reasoning, text = _texts(message)
    if text is None and not reasoning.strip():
        refusal = message.get("refusal")
        said = f"a refusal: {quoted(refusal)}" if refusal else "neither a text nor reasoning"
        raise Refused(f"expected an answer in text, got {said}")
    raw = with_opening(with_reasoning(reasoning, text or ("" if reason == "stop" else None)))
    response = whole_characters(raw)
    usage = answer.get("usage")
    told = usage if isinstance(usage, dict) else {}
    n_tokens, n_prompt_tokens = _count(told.get("completion_tokens", 0)), _count(told.get("prompt_tokens", 0))
    repaired = response != raw or n_tokens is None or n_prompt_tokens is None
    return Response(response, reason, n_tokens or 0, n_prompt_tokens or 0, repaired)


def parse_topk(answer: dict[str, Any], input_ids: IntArray, top_k: int, vocab_size: int) -> TopK:
    """Return the top-k of a prompt that was sent as token ids.

    Args:
        answer: with vLLM's ``prompt_logprobs``.
        input_ids: (T,) ids of the prompt.
        top_k: entries to keep per position.
        vocab_size: ids that the tokenizer knows.

    Raises:
        Trouble: the answer is incomplete, or not made of ids and log-probabilities.
        SourceError: the server gives no log-probabilities of prompts.
    """
    positions = _positions(answer, len(input_ids))
    following = input_ids[1:].tolist()
    if any(token not in position for token, position in zip(following, positions, strict=True)):
        raise Trouble("incomplete answer: expected the prompt's own token at every position, got one without it")
    width = max((len(position) for position in positions), default=0)
    ids = np.full((len(positions), width), -1, np.int32)
    logprobs = np.full((len(positions), width), -np.inf, np.float32)
    for number, position in enumerate(positions):
        ids[number, : len(position)] = list(position)
        logprobs[number, : len(position)] = list(position.values())
    token_logprobs = [position[token] for token, position in zip(following, positions, strict=True)]
    return topk_of_entries(ids, logprobs, np.array(token_logprobs, np.float32), top_k, vocab_size)


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Trouble(f"incomplete answer: expected choices, got {quoted(answer)}")
    return choice


def _finish_reason(reason: Any, message: dict[str, Any]) -> str:
    """Return ``stop`` or ``length``; later steps know no other word for a complete answer and one that was cut."""
    found = ending(reason)
    if found == "interrupted":
        raise Trouble(f"incomplete answer: expected finish_reason stop or length, got {quoted(reason)}")
    calls = message.get("tool_calls") or message.get("function_call")
    if calls or found == "tools":
        raise Refused(f"expected an answer in text, got a call of a tool: {quoted(calls or reason)}")
    if found == "unknown":
        raise Refused(
            f"expected an answer that ends with stop or length, got the finish_reason {quoted(reason)}: it was "
            "withheld or cut"
        )
    return found


def _texts(message: dict[str, Any]) -> tuple[str, str | None]:
    """Return reasoning and text of a message; the text is None where there is none."""
    named = map(message.get, REASONING_KEYS)
    reasoning = next((text for text in named if isinstance(text, str) and text.strip()), "")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return reasoning, content
    # The other form: a list of parts, each a text or a piece of reasoning.
    texts, thoughts = [], []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict):
            raise Trouble(f"incomplete answer: expected a text, got {quoted(content)}")
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif "thinking" in part:
            thoughts += _thoughts(part["thinking"])
        else:
            raise Refused(f"expected an answer in text, got a part of another kind: {quoted(part)}")
    return reasoning or "".join(thoughts), "".join(texts) if texts else None


def _thoughts(thinking: Any) -> list[str]:
    if isinstance(thinking, str):
        return [thinking]
    parts = thinking if isinstance(thinking, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _count(value: Any) -> int | None:
    """Return a number of tokens; None for what cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS else None


def _positions(answer: dict[str, Any], n_tokens: int) -> Sequence[dict[int, float]]:
    """Return id -> log-probability at each position but the last, as the server gives them."""
    choice = _first_choice(answer)
    if "prompt_logprobs" not in choice:
        raise SourceError(
            "expected prompt_logprobs, but the server gives no prompt_logprobs: capture needs vLLM's server. Use it, "
            "or the `vllm` or `transformers` backend."
        )
    positions = choice["prompt_logprobs"]
    count = len(positions) if isinstance(positions, list) else 0
    if count != n_tokens:
        raise Trouble(f"incomplete answer: expected {n_tokens} positions, got {count}")
    try:
        # The server lists the distribution over token t at t, so the first is empty.
        found = [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in positions[1:]]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise Trouble(f"incomplete answer: expected a log-probability per id, got something else ({error})") from None
    for place in found:
        for token, logprob in place.items():
            # Rounding may put a probability of 1 a little above it.
            if not 0 <= token < 2**31 or math.isnan(logprob) or logprob > 1e-3:
                raise Trouble(
                    f"incomplete answer: expected ids and log-probabilities, got {logprob} for id {quoted(token)}"
                )
    return found
