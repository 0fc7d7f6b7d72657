"""The process in which math-verify runs: one JSON request per line on stdin, one JSON reply per line on stdout.

sympy can hang or take all memory inside one call, where neither an exception nor a signal handler is run;
:mod:`fusion_plugins.scoring.pool` then kills this process.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from math import gcd
from typing import Any

from fusion_plugins.scoring.answers import Found, find_answer, find_letter, gold_answer
from fusion_plugins.scoring.intervals import as_interval
from fusion_plugins.scoring.named import WORDS, find_name, kind_of_name, roman_numerals, without_article
from fusion_plugins.scoring.quantities import LIST, Quantity, as_formula, read, same
from fusion_plugins.scoring.signs import plain_signs

#: address space: a tower of powers ends with a MemoryError, not with a machine out of memory
MEMORY_BYTES = 4 << 30


def judge(reference: str, response: str, *, marked_only: bool = False, broken_off: bool = False) -> dict[str, Any]:
    """Return the verdict on a response: whether its answer equals the gold one.

    Args:
        reference: gold answer, in any of the forms of :func:`~fusion_plugins.scoring.answers.gold_answer`.
        response: of the model, in full.
        marked_only: whether an answer counts only in a box or after ``####``.
        broken_off: whether the response was cut off.

    Returns:
        ``correct`` (None where no verdict is possible), ``reason``, ``gold``, ``answer``, ``found`` (how the answer is
        marked: boxed, hashes, phrase, bold, formula, number, name or letter) and ``rule`` (what compared the two: text,
        number, choice, range, time, date, weekday, month, ratio, interval or math-verify).
    """
    gold = gold_answer(plain_signs(reference))
    reply: dict[str, Any] = {
        "correct": None, "reason": None, "gold": gold, "answer": None, "found": None, "rule": None
    }  # fmt: skip
    if not read(gold).kind and not WORDS.fullmatch(gold) and not _readable(_parse(gold)):
        return reply | {"reason": "the gold answer cannot be read"}
    found = find_answer(response, marked_only=marked_only, broken_off=broken_off)
    if read(gold).kind == "choice" and not marked_only and not (found and found.how in ("boxed", "hashes")):
        texts = found.texts if found else ()
        letter = None if any(read(text).kind == "choice" for text in texts) else find_letter(response)
        found = Found((letter, *texts), found.how if found else "letter") if letter else found
    if not marked_only:
        found = find_name(response, gold, found, broken_off=broken_off)
    if found is None:
        return reply | {"correct": False, "reason": "the response has no answer"}
    verdicts: list[dict[str, Any]] = []
    for text in found.texts:
        verdicts.append(_compare(gold, text))
        if verdicts[-1]["correct"]:
            break
    if found.how == "number" and _restates(found.texts[-1], gold):
        verdicts = [{"correct": False, "reason": "the answer is not worked out", "rule": "number"}]
    # Of several ways to read it one that is right, else one that can be read.
    order = [verdict["correct"] for verdict in verdicts]
    best = next((order.index(wanted) for wanted in (True, False) if wanted in order), 0)
    return reply | {"answer": found.texts[best][:200], "found": found.how} | verdicts[best]


def _restates(answer: str, gold: str) -> bool:
    """Return whether a number without a mark is a division that the question asks for: 290/4 where gold is 72.5."""
    fraction = re.fullmatch(r"-?(\d+)\s*/\s*(\d+)", answer)
    return bool(fraction and gcd(int(fraction[1]), int(fraction[2])) > 1 and not re.search(r"/|frac", gold))


def _compare(gold: str, answer: str) -> dict[str, Any]:
    """Return ``correct``, ``reason`` and ``rule`` for two answers."""
    ours, theirs = _assignments(gold), _assignments(answer)
    return _compare_one(gold, answer) if not (ours and theirs) else _compare_all(ours, theirs)


def _compare_all(gold: dict[str, str], answer: dict[str, str]) -> dict[str, Any]:
    """Compare by name; math-verify compares the values alone, but x=3, y=4 is not x=4, y=3."""
    if gold.keys() != answer.keys():
        return {"correct": False, "rule": "math-verify"}
    verdicts = [_compare_one(gold[name], answer[name]) for name in gold]
    return next((verdict for verdict in verdicts if not verdict["correct"]), verdicts[0])


def _compare_one(gold: str, answer: str) -> dict[str, Any]:
    one, other = read(gold), read(answer)
    if _plain(gold) == _plain(answer):
        return {"correct": True, "rule": "text"}
    if kind_of_name(gold) == "roman" and len(numerals := roman_numerals(answer)) == 1:
        return {"correct": numerals == [gold], "rule": "text"}
    if one.kind == "choice":
        equal = same(one, other) or (
            one.content and other.kind != "choice" and _compare(one.content, answer)["correct"]
        )
        return {"correct": bool(equal), "rule": "choice"}
    if "interval" in (one.kind, other.kind) and (both := _as_intervals(gold, answer)):
        return {"correct": both[0] == both[1] or _equal(_parse(both[0]), _parse(both[1])), "rule": "interval"}
    if "ratio" in (one.kind, other.kind) and {one.kind, other.kind} <= {"ratio", "number", "range"}:
        return {"correct": same(one, other), "rule": "ratio"}
    return _compare_values(gold, answer, one, other)


def _compare_values(gold: str, answer: str, one: Quantity, other: Quantity) -> dict[str, Any]:
    """Compare two answers that are not the same text: quantities of one kind as such, and all else by math-verify."""
    if not other.worked_out:
        return {"correct": False, "reason": "the answer is not worked out", "rule": "number"}
    if one.kind and one.kind == other.kind:
        equal = same(one, other)
        # Without "a.m." 15:20 may be a ratio.
        if equal or one.kind != "time":
            return {"correct": equal, "rule": one.kind}
    if other.kind == "choice" and other.content:
        return _compare(gold, other.content)
    if WORDS.fullmatch(gold) and WORDS.fullmatch(answer.rstrip(".。")) and len(gold) > 1:
        return {"correct": False, "rule": "text"}
    golds, answers = _parse(gold), _parse(answer)
    if _equal(golds, answers):
        return {"correct": True, "rule": "math-verify"}
    if not _readable(answers) and not other.kind:
        return {"correct": None, "reason": "the response's answer cannot be read", "rule": "math-verify"}
    return {"correct": False, "rule": "math-verify"}


def _as_intervals(gold: str, answer: str) -> tuple[str, str] | None:
    """Return two answers as intervals; None where one of them is none, or they are of different variables."""
    ours, theirs = as_interval(gold), as_interval(answer)
    if ours is None or theirs is None or (ours[1] and theirs[1] and ours[1] != theirs[1]):
        return None
    return ours[0], theirs[0]


def _assignments(text: str) -> dict[str, str]:
    """Return name -> value of "x = 3, y = 4"; empty for anything else, also for several values of one name."""
    parts = [re.fullmatch(r"\s*([A-Za-z])\s*=([^=]+)", part) for part in LIST.split(re.sub(r"[$]|\\text", "", text))]
    found = {part[1]: part[2] for part in parts if part}
    return found if len(found) == len(parts) > 1 else {}


def _plain(text: str) -> str:
    """Return a text without what does not change an answer in words: marks, spaces and capitals.

    In a formula they mean something: 12.5 is not 125, and 3 1/2 is not 31/2.
    """
    words = re.sub(
        r"\\(?:text|textbf|mathrm|mbox|left|right|[,!; ])|[\s${}*.。]|\\[()\[\]]", "", without_article(text)
    ).lower()
    if not re.search(r"[\d\\^_/]", words):
        return words
    return " ".join(text.split()).rstrip(".。").lower() if re.search(r"[A-Za-z]{2}", words) else text.strip()


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(rf"\boxed{{{as_formula(text)}}}", parsing_timeout=None, raise_on_error=True))  # type: ignore[arg-type]


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
