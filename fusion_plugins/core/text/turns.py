"""Finds the turns of a rendered chat: where each begins and ends, and the parts that it is made of.

What the marks stand for is found in the text by what stands around them. Where a turn begins is what the prompt alone,
rendered with ``add_generation_prompt``, ends with; where it ends is what the template writes behind a last turn.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.text.marks import Marks
from fusion_plugins.core.text.messages import as_json, text_of
from fusion_plugins.core.text.rendering import Messages, Render
from fusion_plugins.errors import DataError


@dataclass(frozen=True)
class Part:
    """One thing that the assistant wrote, as bytes of the rendered text.

    Attributes:
        kind: reasoning | content | name (of a called tool) | arguments (of the call) | result (of a tool).
        start: its first byte.
        stop: the byte after its last; equal to ``start`` where the template leaves the part out, or writes arguments
            in a syntax of its own.
    """

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Turn:
    """One turn, as bytes of the rendered text.

    Attributes:
        message: index of the message.
        role: its role.
        start: the first byte that was generated; what is before it is the prompt.
        stop: the byte after the last one that belongs to the turn, its end of turn included.
        parts: what the turn is made of, in order, inside ``start`` .. ``stop``. Which parts there are depends on the
            message alone, so it is the same for every template.
    """

    message: int
    role: str
    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class RenderedChat:
    """A chat as a template renders it.

    Attributes:
        text: the whole text.
        turns: the turns of the roles that were asked for, in order.
        unchanged: whether the text has every reasoning and answer as it was given; else the template strips white space
            around one, or leaves one out.
    """

    text: str
    turns: tuple[Turn, ...]
    unchanged: bool

    @property
    def spans(self) -> IntArray:
        """(M, 2) int32 byte ranges that tile every turn: syntax, part, syntax, part, ..., syntax.

        A turn of n parts has 2 n + 1 spans, empty ones included, so the spans of two renderings of one chat correspond
        by their number.
        """
        return np.array([span for turn in self.turns for span in tiles(turn)], np.int32).reshape(-1, 2)


def tiles(turn: Turn) -> Iterator[tuple[int, int]]:
    """Yield the 2 n + 1 byte ranges of a turn of n parts; see :attr:`RenderedChat.spans`."""
    position = turn.start
    for part in turn.parts:
        yield position, part.start
        yield part.start, part.stop
        position = part.stop
    yield position, turn.stop


@dataclass(frozen=True)
class Layout:
    """Where the marks are in the text, in characters.

    Attributes:
        text: the rendered chat.
        pieces: (mark, text after it) of the marked rendering.
        starts: the character at which what the mark of each piece stands for begins; 0 for the first piece.
        values: what the marks stand for in the text; "" for the first piece.
        first: mark -> its first piece.
        unchanged: see :class:`RenderedChat`.
    """

    text: str
    pieces: list[tuple[int, str]]
    starts: list[int]
    values: list[str]
    first: dict[int, int]
    unchanged: bool

    def stop(self, piece: int) -> int:
        """Return the character after what the mark of a piece stands for."""
        return self.starts[piece] + len(self.values[piece])


def find_parts(text: str, pieces: list[tuple[int, str]], marks: Marks) -> Layout:
    """Find the pieces of the marked rendering in the text."""
    problem = DataError(
        "expected the chat template to leave the messages unchanged or to strip white space, but it changes "
        f"the text of at least one message (the rendered chat begins {text[:80]!r}). Give the contents in the form "
        "that the template produces, or leave the chat out."
    )
    starts, values, position = [0], [""], len(pieces[0][1])
    if not text.startswith(pieces[0][1]):
        raise problem
    for mark, after in pieces[1:]:
        if mark >= len(marks.parts):
            raise problem
        forms = _forms(marks.parts[mark][2])
        if marks.parts[mark][1] == "result":
            forms.append(json.dumps(marks.parts[mark][2], ensure_ascii=False)[1:-1])
        value = next((form for form in forms if text.startswith(form + after, position)), None)
        if value is None:
            raise problem
        starts.append(position)
        values.append(value)
        position += len(value) + len(after)
    if position != len(text):
        raise problem
    first: dict[int, int] = {}
    for place, (mark, _) in enumerate(pieces):
        first.setdefault(mark, place)
    _check_present(marks, first)
    unchanged = len(first) == len(marks.parts) + 1 and all(
        values[first[number]] == value for number, (_, _, value) in enumerate(marks.parts)
    )
    return Layout(text, pieces, starts, values, first, unchanged)


def _check_present(marks: Marks, first: Mapping[int, int]) -> None:
    """Refuse a chat of which the template leaves out a whole turn or a call."""
    for index in marks.turns:
        numbers = marks.of_turn(index)
        found = [first.get(number) for number in numbers]
        lost = [
            marks.parts[number][2] for number in numbers if number not in first and marks.parts[number][1] == "name"
        ]
        places = [place for place in found if place is not None]
        if lost:
            raise DataError(
                f"expected the chat template to render every tool call, but the call of {', '.join(lost)} in message "
                f"{index} is not in the text. Use a template with tool calls (some take one call per message), or "
                "leave the chat out."
            )
        if not places or places != sorted(places):
            raise DataError(
                f"expected the chat template to render every assistant message, in order, but message {index} is not "
                "in the text. Use a template that keeps all turns, or leave the chat out."
            )


def find_turn(render: Render, marks: Marks, layout: Layout, chat: Messages, index: int) -> Turn:
    """Return one turn, in characters."""
    numbers = marks.of_turn(index)
    places = [layout.first[number] for number in numbers if number in layout.first]
    role = str(chat[index]["role"])
    start, stop = layout.starts[places[0]], layout.stop(places[-1])
    if role == "assistant":
        gap = layout.pieces[places[0] - 1][1]
        length = _prompt_length(render, marks, chat, index, gap)
        if _holds_question(chat, index, gap[length:]):
            length = _length_behind_question(render, marks, chat, index, gap)
        start -= len(gap) - length
        stop += _tail_length(render, marks, layout, chat, index, places[-1])
    parts, position = [], start
    for number in numbers:
        _, kind, _ = marks.parts[number]
        place = layout.first.get(number)
        part = Part(kind, position, position)
        if place is not None:
            part = Part(kind, layout.starts[place], layout.stop(place))
        parts.append(part)
        position = part.stop
        if kind == "name":
            calls = [other for other in numbers if marks.parts[other][1] == "name"]
            call = chat[index]["tool_calls"][calls.index(number)]
            end = stop if place is None or place == places[-1] else layout.starts[place + 1]
            parts.append(_arguments(layout.text, call, position, end))
            position = parts[-1].stop
    return Turn(index, role, start, stop, tuple(parts))


def _arguments(text: str, call: Mapping[str, Any], start: int, stop: int) -> Part:
    """Find the arguments of a call where they are written as JSON."""
    written = as_json(call["function"]["arguments"])
    place = text.find(written, start, stop)
    return Part("arguments", place, place + len(written)) if place >= 0 else Part("arguments", start, start)


def _prompt_length(render: Render, marks: Marks, chat: Messages, index: int, gap: str) -> int:
    """Return how much of the text before a turn's first mark is prompt, in characters.

    Args:
        render: renders messages.
        marks: the marks.
        chat: all messages.
        index: of the turn.
        gap: the text between the last mark before the turn and its first one.
    """
    before = marks.marked(chat)[:index]
    opening = None if before else _opening_length(render, marks, gap)
    if opening is not None:
        return opening
    try:
        prompt = marks.split(render(before, True))[-1][1]
        common = _common(prompt, gap)
        if common == len(gap):
            return common
        without = marks.split(render(before, False))[-1][1]
        if prompt == without:
            # The template ignores add_generation_prompt: what it writes before a plain answer is the prompt, but white
            # space alone is not.
            plain = marks.split(render([*before, {"role": "assistant", "content": marks.spare}], False))[-2][1]
            return _agreed(plain, gap) if plain[common:].strip() else common
    except DataError:  # nothing can be asked of the template before its first message, or between two answers
        return len(gap)
    header = _common(prompt, without)
    if common >= header:
        # Where only a part agrees, the prompt ends in what this turn does not begin with: an opened reasoning block.
        return max(header, _agreed(prompt, gap))
    # The template writes the earlier messages differently where they are the last ones: only the end can be compared.
    place = gap.rfind(prompt[header:])
    return place + len(prompt) - header if place >= 0 else len(gap)


def _opening_length(render: Render, marks: Marks, gap: str) -> int | None:
    """Return how much of the text before the first mark is prompt, for a turn that begins the chat; None if unknown.

    Templates render no messages in ways of their own or not at all, so the prompt is taken from behind a question.
    """
    question = _question(marks)
    try:
        prompt, without = (marks.split(render(question, add))[-1][1] for add in (True, False))
        header = prompt[_common(prompt, without) :]
        # Where only a part agrees, the prompt ends in what this turn does not begin with: an opened reasoning block.
        for length in range(len(header), 0, -1):
            if length == len(header) or header[length - 1] in ">]}" or header[length - 1].isspace():
                place = gap.rfind(header[:length]) if header[:length].strip() else -1
                if place >= 0:
                    return place + length
        # The template ignores add_generation_prompt, or writes another prompt at the start of a chat.
        plain = marks.split(render([{"role": "assistant", "content": marks.spare}], False))[-2][1]
    except DataError:
        return None
    return _agreed(plain, gap) if plain.strip() else None


def _holds_question(chat: Messages, index: int, generated: str) -> bool:
    """Whether what seems generated holds the message before the turn: the template writes the chat's end differently.

    Some templates write the tools before the last question, wherever that is.
    """
    asked = (text_of(chat[index - 1]) or "").strip() if index else ""
    return bool(asked) and chat[index - 1].get("role") != "assistant" and asked in generated


def _length_behind_question(render: Render, marks: Marks, chat: Messages, index: int, gap: str) -> int:
    """Return what :func:`_prompt_length` does, by what the template writes behind the message before the turn."""
    marked = marks.marked(chat)
    marked[index - 1] = {**marked[index - 1], "content": marks.spare}
    first, spare = marks.of_turn(index)[0], len(marks.parts)
    try:
        pieces = marks.split(render(marked, False))
        behind = next((text for (mark, text), (after, _) in pairwise(pieces) if mark == spare and after == first), None)
        mark, prompt = marks.split(render(marked[:index], True))[-1]
    except DataError:
        return len(gap)
    if behind is None or mark != spare or not gap.endswith(behind):
        return len(gap)
    return len(gap) - len(behind) + _agreed(prompt, behind)


def _question(marks: Marks) -> Messages:
    return [{"role": "user", "content": marks.spare}]


def _tail_length(render: Render, marks: Marks, layout: Layout, chat: Messages, index: int, place: int) -> int:
    """Return how much of the text after a turn's last mark belongs to the turn, in characters."""
    after = layout.pieces[place][1]
    if index == len(chat) - 1:
        return len(after)
    until = marks.marked(chat)[: index + 1]
    # Some templates take no chat without a question.
    for messages in (until, [*_question(marks), *until]):
        try:
            return _agreed(marks.split(render(messages, False))[-1][1], after)
        except DataError:
            continue
    return 0  # the template does not take the turn as the last one


def _common(left: str, right: str) -> int:
    """Return the length of the common beginning."""
    size = min(len(left), len(right))
    if left[:size] == right[:size]:
        return size
    return next(at for at in range(size) if left[at] != right[at])


def _agreed(left: str, right: str) -> int:
    """Return the length of the common beginning; where both go on differently, it does not end in a tag or a word."""
    limit = _common(left, right)
    if limit == min(len(left), len(right)):
        return limit
    return next((at for at in range(limit, 0, -1) if left[at - 1] in ">]}" or left[at - 1].isspace()), 0)


def _forms(content: str) -> list[str]:
    """Return a content unchanged and in the forms that templates strip it to, the longest first."""
    forms = {cut(content, letters) for letters in ("\n", None) for cut in (str.rstrip, str.lstrip, str.strip)}
    return [content, *sorted(forms, key=lambda form: (-len(form), form))]


def in_bytes(text: str, turns: Sequence[Turn], unchanged: bool) -> RenderedChat:
    """Turn places in characters into places in UTF-8."""
    places = sorted({place for turn in turns for start, stop in tiles(turn) for place in (start, stop)})
    try:
        widths = [len(text[start:stop].encode()) for start, stop in zip([0, *places], places, strict=False)]
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected text that UTF-8 can encode, got a lone surrogate in the chat ({error.reason}). Repair the text, "
            "for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error
    bytes_at = dict(zip(places, accumulate(widths), strict=True))
    found = [
        replace(
            turn,
            start=bytes_at[turn.start],
            stop=bytes_at[turn.stop],
            parts=tuple(Part(part.kind, bytes_at[part.start], bytes_at[part.stop]) for part in turn.parts),
        )
        for turn in turns
    ]
    return RenderedChat(text, tuple(found), unchanged)
