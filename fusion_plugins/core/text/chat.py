"""Render a chat with a model's own template and find the bytes of what the assistant generated in it.

A template is a program, so it is not parsed. The chat is rendered a second time with marks in place of the assistant's
reasoning, answers and names of called tools; the text around the marks is what the template adds. Where a turn begins
is what the prompt alone, rendered with ``add_generation_prompt``, ends with: everything after it was generated, the
reasoning's tags and the syntax of calls included. Tool results, tool schemas and other roles never are.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.text.messages import REASONING_KEYS, as_json, call_of, split_reasoning, text_of
from fusion_plugins.core.text.time_limit import time_limit
from fusion_plugins.errors import DataError, FusionError

Messages = list[dict[str, Any]]
#: messages, and whether to add the generation prompt -> text; the tools and options of the template are bound in it
Render = Callable[[Messages, bool], str]
Shape = Callable[[dict[str, Any]], dict[str, Any]]
#: longest time of one rendering; real ones take milliseconds
RENDER_SECONDS = 5.0
_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>\n*")


class _EndlessError(DataError):
    """A template does not end; another form of the messages would not help."""


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


def generated_spans(
    render: Render, messages: Sequence[Mapping[str, Any]], *, roles: Sequence[str] = ("assistant",)
) -> RenderedChat:
    """Render a chat and find what the assistant generated.

    Reasoning may be given as ``<think> ... </think>`` at the start of the content, or under one of the keys
    ``reasoning_content``, ``reasoning`` and ``thinking``; the template gets the form that it knows. The arguments of
    tool calls may be given as a dict or as JSON; the template gets what it can render.

    Args:
        render: (messages, add_generation_prompt) -> text, such as ``lambda m, prompt:
            tokenizer.apply_chat_template(m, tools=tools, tokenize=False, add_generation_prompt=prompt)``.
        messages: dicts with ``role``, and ``content`` or ``tool_calls``.
        roles: whose turns to find. Of other roles than the assistant a turn is its content alone.

    Raises:
        DataError: there is no such turn, the template refuses the chat, does not render a turn or a call, or changes a
            text beyond stripping it.

    Example:
        >>> def render(messages, prompt):
        ...     turns = [f"<{m['role']}>{m['content']}<end>" for m in messages]
        ...     return "".join(turns) + "<assistant>" * prompt
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        >>> found = generated_spans(render, chat)
        >>> [found.text.encode()[turn.start:turn.stop] for turn in found.turns]
        [b'Ho<end>']
    """
    chat = [_with_calls(message) for message in messages]
    if not any(message.get("role") in roles for message in chat):
        raise DataError(
            f"expected a chat with at least one {' or '.join(roles)} message, got the roles "
            f"{[message.get('role') for message in chat]}. Leave the chat out."
        )
    problem: DataError | None = None
    for shape in _shapes(chat):
        shaped = _shaped(render, shape)
        try:
            return _found(shaped, _in_known_form(shaped, chat), roles)
        except _EndlessError:
            raise
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _found(render: Render, chat: Messages, roles: Sequence[str]) -> RenderedChat:
    text = render(chat, False)
    # A template that writes arguments as they are writes a dict as Python does, not as JSON.
    if any(str(arguments) in text for arguments in _dicts(chat)):
        raise DataError("expected the chat template to write arguments as JSON. Give them as JSON text.")
    marks = _Marks(chat, roles)
    layout = _layout(text, marks.split(render(marks.marked(chat), False)), marks)
    return _in_bytes(text, [_turn(render, marks, layout, chat, index) for index in marks.turns], layout.unchanged)


def _in_known_form(render: Render, chat: Messages) -> Messages:
    """Take reasoning out of the contents where the template has a key for it, and give it under every usual key."""
    reasons = any(split_reasoning(message)[0] for message in chat)
    if not reasons or not _knows_reasoning(render):
        return chat
    result = []
    for message in chat:
        reasoning, content = split_reasoning(message)
        if message.get("role") == "assistant" and reasoning:
            message = {**message, **dict.fromkeys(REASONING_KEYS, reasoning)}
            if content is not None:
                message["content"] = content
        result.append(message)
    return result


def _knows_reasoning(render: Render) -> bool:
    """Whether the template renders reasoning that is given under a key."""
    mark = "FUSIONMARK"
    answer = {"role": "assistant", "content": "!", **dict.fromkeys(REASONING_KEYS, mark)}
    try:
        return mark in render([{"role": "user", "content": "?"}, answer], False)
    except DataError:
        return False


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its tool calls in one form, and a content beside them."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [call_of(call) for call in message["tool_calls"]]
    return {**message, "content": text_of(message) or "", "tool_calls": calls}


def _shapes(chat: Messages) -> Iterator[Shape]:
    """Yield the forms of messages that templates take, the most common first."""
    yield lambda message: message
    if any(message.get("tool_calls") for message in chat):
        yield _without_content
        yield _with_json_arguments
        yield lambda message: _without_content(_with_json_arguments(message))
    yield _in_text_parts


def _without_content(message: dict[str, Any]) -> dict[str, Any]:
    return message if message.get("content") or not message.get("tool_calls") else {**message, "content": None}


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": as_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _in_text_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _shaped(render: Render, shape: Shape) -> Render:
    """Return a renderer of messages in one form; an error of the template becomes a DataError."""

    def rendered(messages: Messages, prompt: bool) -> str:
        try:
            with time_limit(RENDER_SECONDS):
                text = render([shape(message) for message in messages], prompt)
        except FusionError:
            raise
        except TimeoutError as error:
            raise _EndlessError(
                f"expected the chat template to render a chat, but {error}. Use another chat template."
            ) from error
        except Exception as error:  # templates raise errors of any type, not only Jinja's own
            reason = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
            raise DataError(
                f"the chat template refuses the chat: {reason}. Change the messages (some templates take no system "
                "message, or only roles that alternate, or one tool call per message), use another chat template, or "
                "leave the chat out."
            ) from error
        if shape is _in_text_parts and "{'type': 'text'" in text:
            raise DataError("the chat template takes texts and not lists of parts: it writes a list as Python does.")
        return text

    return rendered


def _dicts(chat: Messages) -> Iterator[dict[str, Any]]:
    for message in chat:
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments")
            # The Python form of an empty dict, or of one of numbers, may be that of JSON.
            if isinstance(arguments, dict) and str(arguments) != as_json(arguments):
                yield arguments


class _Marks:
    """Marks for the parts of a chat: a text that the chat does not have, with the number of the part.

    Attributes:
        turns: indices of the messages whose turns are wanted.
        parts: number -> (index of the message, kind, the text that the mark stands for).
    """

    def __init__(self, chat: Messages, roles: Sequence[str]) -> None:
        self._name = "FUSIONMARK"
        everything = json.dumps(chat, default=str)
        while self._name in everything:
            self._name += "X"
        self.turns = [index for index, message in enumerate(chat) if message.get("role") in roles]
        self.parts: list[tuple[int, str, str]] = []
        for index in self.turns:
            self.parts += [(index, kind, value) for kind, value in _parts(chat[index])]

    def of_turn(self, index: int) -> list[int]:
        """Return the numbers of the marks of a message."""
        return [number for number, (message, _, _) in enumerate(self.parts) if message == index]

    def marked(self, chat: Messages) -> Messages:
        """Return the messages with marks."""
        marked = list(chat)
        for index in self.turns:
            marked[index] = self._message(chat[index], iter(self.of_turn(index)))
        return marked

    def _message(self, message: dict[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
        result, kinds = dict(message), dict(_texts(message))
        inside = "reasoning" in kinds and not any(message.get(key) for key in REASONING_KEYS)
        names = {kind: self._mark(next(numbers)) for kind in kinds}
        if "reasoning" in kinds and not inside:
            result.update({key: names["reasoning"] for key in REASONING_KEYS if message.get(key)})
        if inside:
            result["content"] = _within_tags(str(text_of(message)), kinds, names)
        elif {"content", "result"} & {*kinds}:
            block = "" if "reasoning" in kinds or "result" in kinds else _empty_block(text_of(message) or "")
            result["content"] = block + (names.get("content") or names["result"])
        if message.get("tool_calls"):
            result["tool_calls"] = [
                {**call, "function": {**call["function"], "name": self._mark(next(numbers))}}
                for call in message["tool_calls"]
            ]
        return result

    def _mark(self, number: int) -> str:
        return f"{self._name}{number}E"

    @property
    def spare(self) -> str:
        """A mark that stands for nothing in the chat."""
        return self._mark(len(self.parts))

    def split(self, text: str) -> list[tuple[int, str]]:
        """Cut a marked text into (mark, text after it); the first piece, before any mark, has mark -1."""
        pieces = re.split(rf"{self._name}(\d+)E", text)
        return [(-1, pieces[0]), *zip(map(int, pieces[1::2]), pieces[2::2], strict=True)]


def _parts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield kind and text of what gets a mark in a message."""
    yield from _texts(message)
    for call in message.get("tool_calls") or ():
        yield "name", str(call["function"]["name"])


def _texts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    calls = bool(message.get("tool_calls"))
    if message.get("role") != "assistant":
        yield "result" if message.get("role") == "tool" else "content", text_of(message) or ""
        return
    reasoning, content = split_reasoning(message)
    if reasoning:
        yield "reasoning", reasoning
    elif content:
        content = content[len(_empty_block(content)) :]
    if content or not (reasoning or calls):
        yield "content", content or ""


def _empty_block(content: str) -> str:
    """Return the reasoning block without reasoning at the start of a content: what models write that do not think."""
    found = _EMPTY_BLOCK.match(content)
    return found[0] if found else ""


def _within_tags(content: str, kinds: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Put marks into a content that has its reasoning between tags; the tags and the space around them stay."""
    before, _, rest = content.partition(kinds["reasoning"])
    tags, answer = rest, kinds.get("content")
    if answer:
        tags = rest[: rest.rindex(answer)]
    return before + names["reasoning"] + tags + names.get("content", "")


@dataclass(frozen=True)
class _Layout:
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


def _layout(text: str, pieces: list[tuple[int, str]], marks: _Marks) -> _Layout:
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
    return _Layout(text, pieces, starts, values, first, unchanged)


def _check_present(marks: _Marks, first: Mapping[int, int]) -> None:
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


def _turn(render: Render, marks: _Marks, layout: _Layout, chat: Messages, index: int) -> Turn:
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


def _prompt_length(render: Render, marks: _Marks, chat: Messages, index: int, gap: str) -> int:
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


def _opening_length(render: Render, marks: _Marks, gap: str) -> int | None:
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


def _length_behind_question(render: Render, marks: _Marks, chat: Messages, index: int, gap: str) -> int:
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


def _question(marks: _Marks) -> Messages:
    return [{"role": "user", "content": marks.spare}]


def _tail_length(render: Render, marks: _Marks, layout: _Layout, chat: Messages, index: int, place: int) -> int:
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


def _in_bytes(text: str, turns: Sequence[Turn], unchanged: bool) -> RenderedChat:
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
