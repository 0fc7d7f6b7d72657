"""What a source reads before an answer and the target does not: another system prompt, the gold solution, examples.

The chat of a text stays what it is; only the messages before the answers are others for this one source. Templates name
columns of the row as ``{{ reference }}``, so that braces of LaTeX and JSON mean nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from fusion_plugins.config import Settings
from fusion_plugins.core.text.messages import text_of
from fusion_plugins.errors import DataError

Message = dict[str, Any]
_NAMES = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
#: name of the last message of the user in the template of that message
QUESTION = "question"


class ContextSettings(Settings):
    """What is put before the answers that a source is asked about."""

    system: str | None = Field(
        None, description="system prompt in place of the text's own; an empty one leaves that out; may name columns"
    )
    examples: list[Message] = Field(
        default_factory=list,
        description="messages that are put between the system prompt and the chat, for example solved problems",
    )
    question: str | None = Field(
        None,
        description="what takes the place of the last message of the user: {{ question }} is that message, and "
        "{{ reference }} or the name of another column what the row has there",
    )

    @field_validator("examples")
    @classmethod
    def _check_examples(cls, examples: list[Message]) -> list[Message]:
        for message in examples:
            if message.keys() != {"role", "content"} or not all(isinstance(part, str) for part in message.values()):
                raise ValueError(f"expected messages with role and content as text, got {message!r:.80}")
        return examples

    @model_validator(mode="after")
    def _check_words(self) -> "ContextSettings":
        if self.system is None and not self.examples and self.question is None:
            raise ValueError("expected a system prompt, examples or a question, got none; give one, or remove context")
        if self.question is not None and QUESTION not in _NAMES.findall(self.question):
            raise ValueError(
                "question: expected a template with {{ question }}, which is the message of the user, got none: the "
                "source would not know what was asked"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the rows that the templates name."""
        found = _NAMES.findall((self.system or "") + (self.question or ""))
        return tuple(dict.fromkeys(name for name in found if name != QUESTION))

    def applied(self, messages: Sequence[Message], row: Mapping[str, Any]) -> list[Message]:
        """Return the messages of a chat as the source reads them.

        Raises:
            DataError: a column that a template names is not in the row, or no message is the user's.
        """
        chat = list(messages)
        system = chat[:1] if chat[0].get("role") == "system" else []
        rest = chat[len(system) :]
        if self.system is not None:
            system = [{"role": "system", "content": _filled(self.system, row)}] if self.system else []
        if self.question is not None:
            asked = [place for place, message in enumerate(rest) if message.get("role") == "user"]
            if not asked or text_of(rest[asked[-1]]) is None:
                raise DataError("context.question: expected a message of the user with a text, got none. Leave it out.")
            place = asked[-1]
            content = _filled(self.question, {**row, QUESTION: text_of(rest[place])})
            rest[place] = {**rest[place], "content": content}
        return [*system, *self.examples, *rest]


def _filled(template: str, row: Mapping[str, Any]) -> str:
    def value(match: re.Match[str]) -> str:
        found = row.get(match[1])
        if found is None or found != found:  # NaN is how tables write that there is none
            raise DataError(
                f"context: expected a value in column {match[1]!r}, which the template names, got none. Add it, or "
                "leave such rows out with `where:` or `on_unusable: skip`."
            )
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _NAMES.sub(value, template)
