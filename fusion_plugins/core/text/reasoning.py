"""Reasoning in the text of a response: one form, whatever a server or a tokenizer makes of it.

The form is the one that most models write themselves: ``<think>``, the reasoning, ``</think>``, and the answer.
"""

import re
from dataclasses import dataclass

OPEN, CLOSE = "<think>", "</think>"
CHANNEL = "<|channel|>"
#: special tokens around the messages of a model that writes in channels
CHANNEL_TAGS = (CHANNEL, "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")

#: the end of reasoning, and not a tag that a text speaks of
_CLOSING = re.compile(r"</think>[ \t]*(?=\n|\Z)")
#: one message of a model that writes in channels (gpt-oss): its header, its text
_CHANNEL = re.compile(
    r"<\|channel\|>(?P<header>.*?)<\|message\|>(?P<text>.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL
)


def with_reasoning(reasoning: str, answer: str | None) -> str:
    r"""Return a response that was given as reasoning and answer.

    Without an answer (None: the reasoning was too long) the reasoning stays open.

    Example:
        >>> with_reasoning("6 * 7", "42")
        '<think>\n6 * 7\n</think>\n\n42'
        >>> with_reasoning("6 * 7 is", None)
        '<think>\n6 * 7 is'
        >>> with_reasoning("", "42")
        '42'
    """
    # Some servers give the reasoning a second time, inside the answer.
    if not reasoning.strip() or (answer or "").lstrip().startswith(OPEN):
        return answer or ""
    opened = f"{OPEN}\n{reasoning.strip()}"
    return opened if answer is None else f"{opened}\n{CLOSE}\n\n{answer.lstrip()}"


def with_opening(response: str) -> str:
    r"""Return a response with the ``<think>`` that the prompt ended with, if there is one.

    Many chat templates put ``<think>`` in front of the response, so that the model's own text begins behind it.

    Example:
        >>> with_opening("6 * 7\n</think>\n\n42")
        '<think>\n6 * 7\n</think>\n\n42'
        >>> with_opening("<think>6 * 7</think>\n42"), with_opening("It ends with </think> itself.")
        ('<think>6 * 7</think>\n42', 'It ends with </think> itself.')
    """
    closing = _CLOSING.search(response)
    opened = closing is not None and OPEN not in response[: closing.start()]
    return f"{OPEN}\n{response.lstrip()}" if opened else response


def final_answer(response: str) -> str | None:
    r"""Return what a response says behind its reasoning; None where it never got there.

    Example:
        >>> final_answer("<think>\nhm\n</think>\n\nfive"), final_answer("<think>\nhm"), final_answer("five")
        ('five', None, 'five')
    """
    _, closed, answer = response.rpartition(CLOSE)
    if not closed and response.lstrip().startswith(OPEN):
        return None
    return answer.strip() or None


@dataclass(frozen=True)
class Channels:
    """What a response in channels says.

    Attributes:
        reasoning: text of the channel ``analysis``.
        answer: text of the other channels that are for the user; None if it never began.
        calls: a tool is called.
    """

    reasoning: str
    answer: str | None
    calls: bool


def channels(text: str) -> Channels | None:
    """Read a response that still has its special tokens; None if it has no channels.

    Example:
        >>> channels("<|channel|>analysis<|message|>6 * 7<|end|><|start|>assistant<|channel|>final<|message|>42")
        Channels(reasoning='6 * 7', answer='42', calls=False)
    """
    found = [(match["header"].strip(), match["text"]) for match in _CHANNEL.finditer(text)]
    if not found:
        return None
    answers = [text for header, text in found if header.split()[:1] in (["final"], ["commentary"])]
    return Channels(
        reasoning="\n".join(text for header, text in found if header == "analysis"),
        answer="\n\n".join(answers) if answers else None,
        calls=any(" to=" in header for header, _ in found),
    )


def whole_characters(text: str) -> str:
    r"""Return a text with U+FFFD for each half of a surrogate pair that lacks the other half; UTF-8 can write it.

    Example:
        >>> whole_characters("cut \ud83d") == "cut \ufffd", whole_characters("\ud83d\ude00") == "\U0001f600"
        (True, True)
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
