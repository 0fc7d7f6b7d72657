"""Where the text or chat of a row stands, in the words of axolotl's dataset entries.

So `fusion capture` reads the same files as the training, and both see the same texts.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field

from fusion_plugins.config import Settings

#: roles of other datasets, which axolotl's templates know too
ROLES = {"human": "user", "gpt": "assistant"}
#: of the key `columns`
ABOUT = (
    "where the text or chat of a row stands, in keys of axolotl's dataset entries: field, field_messages, field_tools, "
    "field_thinking, template_thinking_key, message_property_mappings, roles"
)
ABOUT_PROMPTS = f"{ABOUT}; of prompts also reference, tests, domain and id"


class ColumnNames(Settings):
    """Names of columns, of keys of messages and of roles."""

    field: str = Field(default="text", description="column of plain texts")
    field_messages: str = Field(default="messages", description="column of chats")
    field_tools: str = Field(default="tools", description="column of the tools that a chat may call")
    field_thinking: str | None = Field(default=None, description="key of a message that holds its reasoning")
    template_thinking_key: str = Field(default="reasoning_content", description="what the chat template calls it")
    message_property_mappings: dict[str, str] = Field(
        default_factory=dict,
        description="what the chat template calls a key of a message: what the dataset calls it, such as "
        "{role: from, content: value}",
    )
    roles: dict[str, list[str]] = Field(
        default_factory=dict,
        description="role in the chat template: what the dataset calls it; default: user is also human, assistant gpt",
    )

    @classmethod
    def of(cls, entry: Any) -> "ColumnNames":
        """Return the names that a dataset entry gives."""
        return cls(**{key: entry.get(key) for key in cls.model_fields if entry.get(key)})

    @cached_property
    def role_names(self) -> dict[str, str]:
        """Role in the dataset -> role in the template."""
        return {name: role for role, names in self.roles.items() for name in names} if self.roles else ROLES

    @cached_property
    def properties(self) -> dict[str, str]:
        """Key of a message that the template knows -> key of the dataset's messages."""
        thinking = self.template_thinking_key
        own = {"role": "role", "content": "content", thinking: self.field_thinking or thinking}
        return own | self.message_property_mappings

    @property
    def renames(self) -> dict[str, str]:
        """Name here -> column of the files."""
        return {"text": self.field, "messages": self.field_messages, "tools": self.field_tools}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return tuple(self.renames.values())

    @property
    def given(self) -> dict[str, str]:
        """Key -> column, of those that were named and that a row can do without."""
        optional = self.model_fields_set & {"field_tools", "reference", "tests", "domain", "id"}
        return {key: getattr(self, key) for key in sorted(optional)}

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with the keys and the role that the template knows."""
        properties = self.properties
        taken = set(properties.values())
        found = {key: value for key, value in message.items() if key not in taken}
        found |= {key: message[name] for key, name in properties.items() if message.get(name) is not None}
        role = found.get("role")
        if isinstance(role, str):
            found["role"] = self.role_names.get(role, role)
        return found

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with what is read under its name here, and the other columns as they are.

        Another column of such a name is left out. What is no list of messages stays as it is.

        Example:
            >>> keys = {"role": "from", "content": "value"}
            >>> names = ColumnNames(field_messages="turns", message_property_mappings=keys)
            >>> names.renamed({"turns": [{"from": "human", "value": "Hi"}]})["messages"]
            [{'role': 'user', 'content': 'Hi'}]
        """
        renames = self.renames
        found = {name: value for name, value in row.items() if name not in renames}
        for name, own in renames.items():
            if own in row:
                found[name] = self._messages(row[own]) if name == "messages" else row[own]
        return found

    def _messages(self, messages: Any) -> Any:
        try:
            read = json.loads(messages) if isinstance(messages, str) else messages
        except (ValueError, RecursionError):
            return messages
        if not isinstance(read, list) or not all(isinstance(message, Mapping) for message in read):
            return messages
        return [self.message(message) for message in read]


class PromptColumns(ColumnNames):
    """The same of prompts."""

    reference: str = Field(default="reference", description="column of the gold answers")
    tests: str = Field(default="tests", description="column of the tests of code")
    domain: str = Field(default="domain", description="column of the subjects")
    id: str = Field(default="id", description="column of the keys")

    @property
    def renames(self) -> dict[str, str]:
        """Name here -> column of the files."""
        own = {"reference": self.reference, "tests": self.tests, "domain": self.domain, "id": self.id}
        return super().renames | own
