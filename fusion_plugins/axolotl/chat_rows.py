"""The texts and chats of a dataset's rows, read with the keys of its entry as axolotl's own ``chat_template`` does."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_plugins.column_names import ColumnNames
from fusion_plugins.core.text.content_id import content_id
from fusion_plugins.core.text.messages import as_messages, as_tools, text_of
from fusion_plugins.core.text.sampled import SampledAnswer
from fusion_plugins.errors import DataError
from fusion_plugins.response_texts import answer_text, is_response, json_columns, refuse_unread_response
from fusion_plugins.row_files import said_columns

Row = Mapping[str, Any]
#: reasoning that `split_thinking` of axolotl splits and that a store holds as it is written
_OTHER_TAGS = ("<reasoning>", "<|begin_of_thought|>")


@dataclass(frozen=True)
class Content:
    """What one row holds.

    Attributes:
        id: the row's own, or that of its content.
        text: a plain text; None for a chat.
        messages: of a chat.
        tools: schemas of the tools that the chat may call.
        answer: how the last message was sampled, where the row is a response.
        empty: it is a response that says nothing.
    """

    id: str
    text: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    answer: SampledAnswer | None = None
    empty: bool = False


@dataclass(frozen=True)
class RowReader:
    """Reads rows.

    Attributes:
        names: columns of texts, chats and tools, keys of messages, and roles.
        drop_system: leave the system message out.
        split_thinking: reasoning is between tags in the content.
        json_columns: columns that hold JSON, as the folders of `fusion sample` and `fusion score` have them.
    """

    names: ColumnNames
    drop_system: bool
    split_thinking: bool
    json_columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Any) -> "RowReader":
        """Read the keys of the entry of a dataset."""
        return cls(
            names=ColumnNames.of(entry),
            drop_system=bool(entry.get("drop_system_message")),
            split_thinking=bool(entry.get("split_thinking")),
            json_columns=json_columns(str(entry.get("path"))),
        )

    def content(self, row: Row) -> Content:
        """Return what a row holds.

        Raises:
            DataError: it holds no text and no chat, both, or messages of another form.
        """
        text, messages = row.get(self.names.field), row.get(self.names.field_messages)
        if text is None and messages is None and is_response(row):
            return self._answer(row)
        if isinstance(text, str) and text and messages is None:
            return Content(_id(row, content_id(text)), text, [], None)
        if not messages or text is not None:
            raise DataError(
                f"expected a row with a text in {self.names.field!r} or a chat in {self.names.field_messages!r}, and "
                f"not both; the row's columns are {said_columns(row)}. Drop the row, or name other columns with "
                "`field:` or `field_messages:` in the entry."
            )
        chat, tools = as_messages(self._mapped(messages)), as_tools(row.get(self.names.field_tools))
        refuse_unread_response(row, chat)
        identity = _id(row, content_id(chat, tools))
        if self.drop_system and chat[0].get("role") == "system":
            chat = chat[1:]
        if self.split_thinking and any((text_of(message) or "").lstrip().startswith(_OTHER_TAGS) for message in chat):
            raise DataError(
                f"split_thinking: expected reasoning between <think> and </think>, got {' or '.join(_OTHER_TAGS)}. "
                "Rewrite it before `fusion capture`, so that sources and target read the same."
            )
        return Content(identity, None, chat, tools)

    def value(self, column: str, value: Any) -> Any:
        """Return what a row holds in a column; that of a folder of responses may be JSON."""
        return json.loads(value) if column in self.json_columns and value is not None else value

    def _answer(self, row: Row) -> Content:
        found = answer_text({name: self.value(name, value) for name, value in row.items()}, 0)
        return Content(found.id, None, found.messages, found.tools, found.answer, found.empty)

    def _mapped(self, messages: Any) -> list[dict[str, Any]]:
        if isinstance(messages, str):
            try:
                messages = json.loads(messages)
            except ValueError as error:
                raise DataError(
                    f"expected messages as a list or as JSON, got other text: {error}. Correct it."
                ) from None
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(f"expected a list of messages, got {messages!r:.80}. Correct the row.")
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        found = self.names.message(message)
        if not isinstance(found.get("role"), str):
            raise DataError(f"expected a message with a role, got {dict(message)!r:.80}. Correct the row.")
        return found


def _id(row: Row, digest: str) -> str:
    return str(row["id"]) if row.get("id") is not None else digest
