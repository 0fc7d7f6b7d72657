"""Prompts and chats as messages, the form that chat templates and servers take."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fusion_plugins.errors import DataError

#: names under which datasets and templates give an assistant's reasoning
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_THINK = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)


def as_messages(prompt: str | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt as messages: a text becomes one message of the user, messages are copied without empty keys.

    Args:
        prompt: a text, or messages with ``role``, ``content`` and whatever else a template knows. Keys whose value is
            None are dropped, also inside tool calls. A content in parts that are all text becomes one text, the result
            of a tool that is not text becomes JSON, and calls that are JSON are read.

    Example:
        >>> as_messages("Hi?")
        [{'role': 'user', 'content': 'Hi?'}]
        >>> as_messages([{"role": "user", "content": "Hi?", "tool_calls": None}])
        [{'role': 'user', 'content': 'Hi?'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    # A Parquet column gives each message the keys of all messages, and each call the arguments of all calls. To a chat
    # template, "tool_calls" that is None is defined: some would render it.
    return [_plain(without_nulls(message)) for message in prompt]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message in the usual form."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        message = {**message, "content": "".join(part["text"] for part in content)}
    elif content is not None and not isinstance(content, str) and message.get("role") == "tool":
        message = {**message, "content": as_json(content)}
    if isinstance(calls, str):
        message = {**message, "tool_calls": _loaded(calls, "tool_calls")}
    return message


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def as_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the schemas of tools as a list, None where there are none.

    Args:
        tools: a list of dicts, or its JSON. Parameters that are JSON are read too.

    Raises:
        DataError: they have another form.

    Example:
        >>> as_tools('[{"type": "function", "function": {"name": "f", "parameters": "{}"}}]')
        [{'type': 'function', 'function': {'name': 'f', 'parameters': {}}}]
    """
    tools = _loaded(tools, "tools") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"expected tools as a list of schemas or its JSON, got {tools!r:.80}. Correct them.")
    return [_tool(without_nulls(tool)) for tool in tools]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("parameters"), str):
        return tool
    return {**tool, "function": {**function, "parameters": _loaded(function["parameters"], "parameters of a tool")}}


def _loaded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"expected {what} as JSON, got other text: {error}: {text!r:.80}. Correct it.") from None


def without_nulls(value: Any) -> Any:
    """Return a value without the keys, at any depth, whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def conversation_text(prompt: str | Iterable[Mapping[str, Any]]) -> str:
    r"""Return a prompt for a reader: a text as it is, the turns of a chat under their roles.

    Example:
        >>> conversation_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}])
        '[system]\nBe brief.\n\n[user]\nHi?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message.get('content') or ''}" for message in as_messages(prompt))


def text_of(message: Mapping[str, Any]) -> str | None:
    """Return the text of a message's content, or None where it has none."""
    content = message.get("content")
    return content if isinstance(content, str) else None


def split_reasoning(message: Mapping[str, Any]) -> tuple[str | None, str | None]:
    r"""Return the reasoning and the content of an assistant's message.

    Args:
        message: with the reasoning under one of :data:`REASONING_KEYS`, or between ``<think>`` and ``</think>`` at the
            start of the content.

    Example:
        >>> split_reasoning({"content": "<think>\nhm\n</think>\n\nfive"})
        ('hm', 'five')
        >>> split_reasoning({"content": "five", "thinking": "hm"})
        ('hm', 'five')
    """
    content = text_of(message)
    given = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str) and message[key]), None)
    found = _THINK.fullmatch(content) if content and message.get("role", "assistant") == "assistant" else None
    if given is not None or found is None or not found[1].strip():
        return given, content
    return found[1], found[2]


def call_of(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call as ``{"type": "function", "function": {"name", "arguments"}}`` with what else it has.

    Args:
        call: in this form, or with ``name`` and ``arguments`` on its own level. Arguments that are the JSON of a dict
            become the dict.

    Raises:
        DataError: it is not a tool call.

    Example:
        >>> call_of({"name": "f", "arguments": '{"a": 1}'})
        {'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}
    """
    outer = dict(call) if isinstance(call, Mapping) else {}
    inner = outer.pop("function", None)
    function = (
        dict(inner)
        if isinstance(inner, Mapping)
        else {key: outer.pop(key) for key in ("name", "arguments") if key in outer}
    )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(
            "expected a tool call as {'function': {'name': ..., 'arguments': ...}}, got "
            f"{call!r:.80}. Correct it, or leave the chat out."
        )
    return {"type": "function", **outer, "function": {**function, "arguments": _parsed(function.get("arguments", {}))}}


def _parsed(arguments: Any) -> Any:
    """Return arguments as a dict where they are the JSON of one."""
    try:
        loaded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return loaded if isinstance(loaded, dict) else arguments


def as_json(value: Any) -> str:
    """Return a value as JSON, a text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
