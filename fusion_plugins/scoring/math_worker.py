"""The process in which math-verify runs: one JSON request per line on stdin, one JSON reply per line on stdout.

It is a process of its own because sympy can hang or eat memory inside a single call, where neither an exception nor a
signal handler gets through; :mod:`fusion_plugins.scoring.pool` then kills it.
"""

import json
import logging
import resource
import signal
import sys
from typing import Any

from fusion_plugins.scoring.answers import gold_answer, last_number, marked_answer, write_out_exponents

__all__ = ["judge", "main"]

MEMORY_BYTES = 4 << 30


def judge(reference: str, response: str, *, marked_only: bool = False) -> dict[str, Any]:
    """Compare a response's answer with the gold one.

    Args:
        reference: gold answer, in any of the forms of :func:`~fusion_plugins.scoring.answers.gold_answer`.
        response: what the model wrote.
        marked_only: whether an answer counts only in a box or after ``####``.

    Returns:
        ``correct`` (None where no verdict is possible), ``reason``, ``gold``, ``answer`` and ``found``: boxed, hashes,
        expression or number.
    """
    gold_text, response = gold_answer(write_out_exponents(reference)), write_out_exponents(response)
    reply: dict[str, Any] = {"correct": None, "reason": None, "gold": gold_text, "answer": None, "found": None}
    gold = _parse(rf"\boxed{{{gold_text}}}")
    if not _readable(gold):
        return reply | {"reason": "the gold answer cannot be read"}
    answer_text, found, answer = _find(response, marked_only)
    if found is None:
        return reply | {"correct": False, "reason": "the response has no answer"}
    reply |= {"answer": answer_text, "found": found}
    if answer_text == gold_text or _equal(gold, answer):
        return reply | {"correct": True}
    if not _readable(answer):
        return reply | {"reason": "the response's answer cannot be read"}
    return reply | {"correct": False}


def _find(response: str, marked_only: bool) -> tuple[str | None, str | None, list[Any]]:
    marked = marked_answer(response)
    if marked is not None:
        return *marked, _parse(rf"\boxed{{{marked[0]}}}")
    if marked_only:
        return None, None, []
    parsed = _parse(response)
    if parsed:
        return str(parsed[-1])[:200], "expression", parsed
    number = last_number(response)
    return (None, None, []) if number is None else (number, "number", _parse(rf"\boxed{{{number}}}"))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=None, raise_on_error=True))  # type: ignore[arg-type]


def _readable(parsed: list[Any]) -> bool:
    # math-verify adds the bare string to what it could parse, and gives it alone where it could not.
    return any(not isinstance(form, str) for form in parsed)


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


def main() -> None:
    """Serve until stdin ends. Argument: seconds after which the process kills itself, should nobody else do it."""
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    # The first call compiles grammars and patterns: let that not count as somebody's time.
    judge("1", "1")
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(limit)
        try:
            reply = judge(**request)
        except (Exception, RecursionError) as error:
            reply = {"correct": None, "reason": f"the verifier failed: {type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps(reply), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
