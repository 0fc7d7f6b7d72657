"""Prompts and chats as messages, the form that chat templates and servers take."""

from collections.abc import Iterable, Mapping
from typing import Any


def as_messages(prompt: str | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt as messages: a text becomes one message of the user, messages are copied without empty keys.

    Args:
        prompt: a text, or messages with ``role``, ``content`` and whatever else a template knows. Keys whose value is
            None are dropped.

    Example:
        >>> as_messages("Hi?")
        [{'role': 'user', 'content': 'Hi?'}]
        >>> as_messages([{"role": "user", "content": "Hi?", "tool_calls": None}])
        [{'role': 'user', 'content': 'Hi?'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    # A Parquet column gives each message the keys of all messages. To a chat template, "tool_calls" that is None is
    # defined: some would render it.
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
