"""The process in which math-verify runs: one JSON request per line on stdin, one JSON reply per line on stdout.

sympy can hang or take all memory inside one call, where neither an exception nor a signal handler is run;
:mod:`fusion_plugins.scoring.pool` then kills this process.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from fusion_plugins.scoring.answers import gold_answer, last_number, marked_answer, write_out_exponents

#: address space: a tower of powers ends with a MemoryError, not with a machine out of memory
MEMORY_BYTES = 4 << 30


def judge(reference: str, response: str, *, marked_only: bool = False) -> dict[str, Any]:
    """Return the verdict on a response: whether its answer equals the gold one.

    Args:
        reference: gold answer, in any of the forms of :func:`~fusion_plugins.scoring.answers.gold_answer`.
        response: of the model, in full.
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
    # Equal strings are equal answers, also in forms that sympy cannot compare.
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
    # math-verify appends the bare string to the forms that it parsed, and returns it alone where it parsed none.
    return any(not isinstance(form, str) for form in parsed)


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))


def main() -> None:
    """Serve until stdin ends. Argument: seconds for a request after which the process ends itself if it still runs."""
    limit = int(sys.argv[1])
    # Replies go to a copy of standard output, and what libraries print to stderr: antlr prints warnings to standard
    # output, which would be taken for a reply.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    # The first call imports sympy and compiles grammars for seconds, which must not count as the time of a request.
    judge("1", "1")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.alarm(limit)
        try:
            reply = judge(**request)
        except Exception as error:
            reply = {"correct": None, "reason": f"the verifier failed: {type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
