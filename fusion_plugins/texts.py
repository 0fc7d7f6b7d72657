"""Rows as texts and prompts: what a row must hold, and what it becomes.

A row has ``text``, or ``messages`` and perhaps ``tools``, and usually an ``id``; without one, the sha256 of the content
is the id. Prompts may also have ``domain``, ``reference`` (gold answer) and ``tests`` (code). Other columns are not
read, so nothing in them can be in the way.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.messages import REASONING_KEYS, as_messages, as_tools
from fusion_plugins.core.text.sampled import SampledAnswer
from fusion_plugins.errors import DataError
from fusion_plugins.response_texts import ANSWER
from fusion_plugins.row_files import Row, said_columns

#: columns of texts and prompts
COLUMNS = ("id", "text", "messages", "tools", "domain", "reference", "tests")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_WEIGHED = ("content", "tool_calls", *REASONING_KEYS)


@dataclass(frozen=True)
class Text:
    """One text or chat.

    Attributes:
        id: unique within the set.
        content: the text, or the messages of a chat.
        content_id: sha256 (hex) of the content and the tools.
        tools: schemas of the tools that the chat may call, or None.
        where: file and row that it was read from.
        answer: how the last message of a chat was sampled, which alone is supervised then; None where every message of
            the assistant is.
        read_as: the messages that a source reads in place of the chat (see
            :mod:`fusion_plugins.sources.context`); None for the chat itself.
        domain: what the row says that it is about; None where it does not.
    """

    id: str
    content: str | list[dict[str, Any]]
    content_id: str
    tools: list[dict[str, Any]] | None = None
    where: str = field(default="", compare=False)
    answer: SampledAnswer | None = None
    read_as: list[dict[str, Any]] | None = None
    domain: str | None = field(default=None, compare=False)

    @property
    def turns(self) -> int:
        """How many turns of a chat are supervised, from the last one back."""
        return 1 if self.answer else sum(message["role"] == "assistant" for message in self.content)  # type: ignore[index]

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that decides what is captured of the text; the content's where that is all."""
        parts: list[Any] = []
        if self.answer and (self.answer.token_ids or not self.answer.finished):
            parts.append([self.answer.finished, self.answer.token_ids, self.answer.tokenizer])
        if self.read_as is not None:
            parts.append(content_id(self.read_as))
        if not parts:
            return self.content_id
        return hashlib.sha256(json.dumps([self.content_id, *parts]).encode()).hexdigest()

    @property
    def n_bytes(self) -> int:
        """Bytes of content, without what a chat template adds."""
        if isinstance(self.content, str):
            return len(self.content.encode())
        return sum(len(str(message.get(key) or "").encode()) for message in self.content for key in _WEIGHED)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: id and content; a chat ends with a message of the user.
        domain: instruction | math | code | chinese | any name.
        reference: the gold answer, or None.
        tests: what a code scorer runs, or None.
        kept: other columns that the responses get, as far as the row has them.
    """

    text: Text
    domain: str = "instruction"
    reference: str | None = None
    tests: Any = None
    kept: Row = field(default_factory=dict)


def prompt_digest(prompt: Prompt) -> str:
    """Return the sha256 (hex) of all that a prompt's responses and their scores follow from."""
    parts: list[Any] = [prompt.text.content_id, prompt.domain, prompt.reference, prompt.tests]
    if prompt.kept:
        parts.append(prompt.kept)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def as_text(where: str, row: Row) -> Text:
    """Return the text or chat of a row.

    Args:
        where: file and row, for messages.
        row: its columns.

    Raises:
        DataError: the row has neither a text nor messages, or both; or UTF-8 or JSON cannot write them.
    """
    text, messages = row.get("text"), row.get("messages")
    if (text is None) == (messages is None):
        got = said_columns({name: row[name] for name in sorted(row)}) or "an empty row"
        cure = "Drop the row, remove a column, or name others with `columns: {field: ..., field_messages: ...}`"
        raise DataError(f"{where}: expected either a column 'text' or a column 'messages', got {got}. {cure}.")
    content: str | list[dict[str, Any]]
    if messages is not None:
        content = _messages(messages, where)
    elif isinstance(text, str) and text:
        content = text
    else:
        raise DataError(f"{where}: expected a string that is not empty in 'text', got {text!r:.60}. Drop the row.")
    try:
        tools = as_tools(row.get("tools")) if messages is not None else None
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    try:
        digest = content_id(content, tools)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: expected text that UTF-8 can encode, got a lone surrogate: {error}. Remove it from the text."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected messages of values that JSON can write, got others: {error}. Correct the messages."
        ) from error
    given = _given(row, "id")
    name = digest if given is None else str(given)
    # The first test is fast and true for nearly all ids; it is false for all with surrogates.
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(
            f"{where}: expected an id that UTF-8 can encode, got one with a lone surrogate: {name!r:.80}. Rename it."
        )
    domain = _given(row, "domain")
    about = None if domain in (None, "") else str(domain)
    return Text(name, content, digest, tools, where, row.get(ANSWER), domain=about)


def as_prompt(where: str, row: Row, text: Text, keep: Sequence[str] = ()) -> Prompt:
    """Return the prompt of a row, of which :func:`as_text` has made a text, with some other columns.

    Raises:
        DataError: the chat ends with a message of the assistant, or the prompt asks nothing; the gold answer is a list
            or a mapping; or JSON and UTF-8 cannot write the other columns.
    """
    if not isinstance(text.content, str) and text.content[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: expected a prompt that ends with a message of the user, got one that ends with the "
            "assistant's. Drop the last message of each prompt."
        )
    last = {"role": "user", "content": text.content} if isinstance(text.content, str) else text.content[-1]
    asked = last.get("content")
    # The result of a tool may well be empty.
    if last["role"] == "user" and isinstance(asked, str) and not asked.strip():
        raise DataError(f"{where}: expected a prompt that asks something, got white space. Drop the row.")
    reference = _given(row, "reference")
    # A list would become its notation in Python, and every verdict against it wrong.
    if isinstance(reference, list | dict | bytes):
        raise DataError(
            f"{where}: expected a text or a number as the gold answer in 'reference', got {reference!r:.60}. Write one "
            "answer as a text."
        )
    prompt = Prompt(
        text=text,
        domain=str(_given(row, "domain") or "instruction"),
        reference=None if reference is None else str(reference),
        tests=_given(row, "tests"),
        kept={name: value for name in keep if (value := _given(row, name)) is not None},
    )
    try:
        json.dumps([prompt.domain, prompt.reference, prompt.tests, prompt.kept], ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected a domain, a reference, tests and columns to keep that JSON and UTF-8 can write, got "
            f"others: {error}. Correct the row."
        ) from error
    return prompt


def _given(row: Row, name: str) -> Any:
    """Return a value; None where there is none, also where another tool wrote that as a number that is no number."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise DataError(f"{where}: expected messages as a list or its JSON, got {error}. Correct it.") from error
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages that is not empty, got {messages!r:.60}. Drop the row.")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(
                f"{where}: expected messages with a role out of {', '.join(ROLES)}, got {message!r:.80}. Correct it."
            )
    try:
        chat = as_messages(messages)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    for message in chat:
        if not isinstance(message.get("content"), str) and not _says_without_content(message):
            raise DataError(
                f"{where}: expected text as a message's content (or tool_calls or reasoning beside it), got "
                f"{message.get('content')!r:.60}. Use a string."
            )
    return chat


def _says_without_content(message: dict[str, Any]) -> bool:
    """Whether an assistant's message without a content calls tools or reasons."""
    says = any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
    return message["role"] == "assistant" and message.get("content") is None and says
