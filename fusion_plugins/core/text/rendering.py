"""Renders chats in the form of messages that a template takes.

Templates differ in where they look for reasoning, in how they want tool calls, and in whether a content is text or a
list of parts. A chat is tried in the usual forms, the most common first.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusion_plugins.core.text.messages import REASONING_KEYS, as_json, call_of, split_reasoning, text_of
from fusion_plugins.core.text.time_limit import time_limit
from fusion_plugins.errors import DataError, FusionError

Messages = list[dict[str, Any]]
#: messages, and whether to add the generation prompt -> text; the tools and options of the template are bound in it
Render = Callable[[Messages, bool], str]
Shape = Callable[[dict[str, Any]], dict[str, Any]]
#: longest time of one rendering; real ones take milliseconds
RENDER_SECONDS = 5.0


class EndlessTemplateError(DataError):
    """A template does not end; another form of the messages would not help."""


def in_known_form(render: Render, chat: Messages) -> Messages:
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


def with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its tool calls in one form, and a content beside them."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [call_of(call) for call in message["tool_calls"]]
    return {**message, "content": text_of(message) or "", "tool_calls": calls}


def shapes(chat: Messages) -> Iterator[Shape]:
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


def shaped(render: Render, shape: Shape) -> Render:
    """Return a renderer of messages in one form; an error of the template becomes a DataError."""

    def rendered(messages: Messages, prompt: bool) -> str:
        try:
            with time_limit(RENDER_SECONDS):
                text = render([shape(message) for message in messages], prompt)
        except FusionError:
            raise
        except TimeoutError as error:
            raise EndlessTemplateError(
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


def dict_arguments(chat: Messages) -> Iterator[dict[str, Any]]:
    """Yield the arguments of calls that are written differently in Python and in JSON."""
    for message in chat:
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments")
            # The Python form of an empty dict, or of one of numbers, may be that of JSON.
            if isinstance(arguments, dict) and str(arguments) != as_json(arguments):
                yield arguments
