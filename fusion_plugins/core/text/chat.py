"""Render a chat with a model's own template and find the bytes of each assistant message in it.

A template is a program, so it is not parsed. The chat is rendered a second time with a marker in place of each
assistant message; the text around the markers is what the template adds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.errors import DataError

Messages = list[dict[str, Any]]


def render_chat(render: Callable[[Messages], str], messages: Sequence[Mapping[str, Any]]) -> tuple[str, IntArray, bool]:
    """Render a chat and find its assistant messages.

    Args:
        render: turns messages into text, such as ``lambda m: tokenizer.apply_chat_template(m, tokenize=False)``.
        messages: dicts with ``role`` and ``content``.

    Returns:
        The text; (M, 2) int32 byte ranges of the contents of the M assistant messages; and whether the text has each of
        them unchanged. False: the template strips white space around them, and the ranges are those of the stripped
        contents.

    Raises:
        DataError: there is no assistant message, one has no text, or the template changes one beyond stripping it.
    """
    chat = [dict(message) for message in messages]
    places = [index for index, message in enumerate(chat) if message.get("role") == "assistant"]
    contents = [chat[index].get("content") for index in places]
    if not places or any(not isinstance(content, str) for content in contents):
        raise DataError(
            "expected a chat with at least one assistant message and text in each of them, got roles "
            f"{[message.get('role') for message in chat]} with assistant contents of types "
            f"{[type(content).__name__ for content in contents]}. Leave the chat out."
        )
    originals = [str(content) for content in contents]
    text = render(chat)
    pieces = _pieces(render, chat, places)
    rendered = _rendered(text, pieces, originals)
    if rendered is not None:
        return text, _spans(pieces, rendered), rendered == originals
    raise DataError(
        "expected the chat template to leave assistant messages unchanged or to strip white space, but it changes the "
        f"text of at least one of the {len(places)} messages (the rendered chat begins {text[:80]!r}). Give the "
        "contents in the form that the template produces, or leave the chat out."
    )


def _pieces(render: Callable[[Messages], str], chat: Messages, places: Sequence[int]) -> list[str]:
    """Return the M + 1 pieces of text that the template puts around the assistant messages."""
    marker = "FUSIONMARK"
    while any(marker in str(message) for message in chat):
        marker += "X"
    marked = [dict(message) for message in chat]
    for number, index in enumerate(places):
        marked[index]["content"] = f"{marker}{number}E"
    rest = render(marked)
    pieces = []
    for number, index in enumerate(places):
        before, found, rest = rest.partition(f"{marker}{number}E")
        if not found:
            raise DataError(
                f"expected the chat template to render every assistant message, but message {index} is not in the "
                "text. Use a template that keeps all turns, or leave the chat out."
            )
        pieces.append(before)
    return [*pieces, rest]


def _rendered(text: str, pieces: Sequence[str], contents: Sequence[str]) -> list[str] | None:
    """Return the contents as they are in the text, ``None`` where one is neither there unchanged nor stripped."""
    before, position, found = pieces[0], len(pieces[0]), []
    if not text.startswith(before):
        return None
    for content, after in zip(contents, pieces[1:], strict=True):
        fitting = (form for form in _forms(content) if text.startswith(form + after, position))
        form = next(fitting, None)
        if form is None:
            return None
        found.append(form)
        position += len(form) + len(after)
    return found if position == len(text) else None


def _forms(content: str) -> list[str]:
    """Return a content unchanged and in the forms that templates strip it to, the longest first."""
    forms = {cut(content, letters) for letters in ("\n", None) for cut in (str.rstrip, str.lstrip, str.strip)}
    return [content, *sorted(forms, key=lambda form: (-len(form), form))]


def _spans(pieces: Sequence[str], contents: Sequence[str]) -> IntArray:
    widths = [len(part.encode()) for pair in zip(pieces[:-1], contents, strict=True) for part in pair]
    return np.cumsum(widths).astype(np.int32).reshape(-1, 2)
