"""Ids of texts that have none, and the fingerprint of a set of texts.

Stores and datasets are joined by these ids, so they depend on the content alone: not on the file format, the order of
the keys, or columns that a Parquet file fills with nulls.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusion_plugins.core.text.messages import as_messages

Message = Mapping[str, Any]


def content_id(content: str | Sequence[Message], tools: Sequence[Message] | None = None) -> str:
    """Return the sha256 (hex) of a plain text, or of a chat in canonical form.

    Args:
        content: the text, or the messages; keys whose value is None do not count.
        tools: schemas of the tools that a chat may call.

    Example:
        >>> content_id("a")[:8]
        'ca978112'
        >>> content_id([{"role": "user", "content": "a"}]) == content_id([{"content": "a", "role": "user", "x": None}])
        True
    """
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    chat: Any = {"messages": as_messages(content), "tools": tools} if tools else as_messages(content)
    text = json.dumps(chat, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def texts_fingerprint(contents: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 (hex) of a set of (id, content id) pairs, whatever their order.

    Example:
        >>> texts_fingerprint([("a", "1"), ("b", "2")]) == texts_fingerprint([("b", "2"), ("a", "1")])
        True
    """
    return sorted_fingerprint(sorted(contents))


def sorted_fingerprint(contents: Iterable[tuple[str, str]]) -> str:
    """Return what :func:`texts_fingerprint` returns, of pairs that are in ascending order already."""
    digest = hashlib.sha256()
    for pair in contents:
        digest.update(json.dumps(pair, ensure_ascii=False).encode())
    return digest.hexdigest()
