"""Why a response ended, in one spelling: servers and tools have many, and later steps know two."""

from typing import Any, Literal

#: other words for a complete answer, for one that was too long, for a call of a tool, and for an interruption
COMPLETE = frozenset(
    "stop stop_sequence stop_token stop_str eos eos_token eos_token_id end_turn end eot complete completed finish "
    "finished".split()
)
TOO_LONG = frozenset(
    "length max_tokens max_length max_new_tokens max_output_tokens max_completion_tokens model_length token_limit "
    "model_context_window_exceeded".split()
)
TOOLS = frozenset("tool_calls tool_call tool_use function_call".split())
INTERRUPTED = frozenset("abort aborted error cancel cancelled canceled timeout failed incomplete".split())

Ending = Literal["stop", "length", "tools", "interrupted", "unknown"]


def ending(reason: Any) -> Ending:
    """Return how a response ended.

    Returns:
        ``stop`` (complete), ``length`` (too long), ``tools`` (it is a call, not a text), ``interrupted`` (also without
        any reason), or ``unknown`` (filtered, or a word that we do not know).

    Example:
        >>> ending("end_turn"), ending("MAX_TOKENS"), ending(None), ending("content_filter")
        ('stop', 'length', 'interrupted', 'unknown')
    """
    if reason is None or reason == "":
        return "interrupted"
    word = reason.lower() if isinstance(reason, str) else ""
    if word in COMPLETE:
        return "stop"
    if word in TOO_LONG:
        return "length"
    if word in TOOLS:
        return "tools"
    return "interrupted" if word in INTERRUPTED else "unknown"


def is_cut(reason: Any) -> bool:
    """Whether a response stopped before its end: it was too long, or was interrupted.

    Nothing ends its turn, so nothing there can be learnt. One without any reason is taken as complete: files of other
    tools need not give one.

    Example:
        >>> [is_cut(reason) for reason in ("length", "abort", "stop", "content_filter", None)]
        [True, True, False, False, False]
    """
    return reason not in (None, "") and ending(reason) in ("length", "interrupted")
