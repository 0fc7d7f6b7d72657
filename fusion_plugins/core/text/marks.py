"""Marks in place of what the assistant wrote, so that the text around them is what the template adds."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusion_plugins.core.text.messages import REASONING_KEYS, split_reasoning, text_of
from fusion_plugins.core.text.rendering import Messages

_EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>\n*")


class Marks:
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
