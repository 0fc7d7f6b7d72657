"""Texts and chats in the target's tokens, with labels: which tokens are supervised and which are only context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.core.text.chat import Render, generated_spans
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import TURN_ENDS, chat_renderer, tokenize, tokenize_chat
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError

IGNORED = -100

Message = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedText:
    """One text or chat as the target model reads it.

    Attributes:
        tokens: T tokens.
        labels: (T,) int32 token ids, :data:`IGNORED` where nothing is supervised.
    """

    tokens: TokenizedText
    labels: IntArray


@dataclass(frozen=True)
class TargetTokenizer:
    """The tokenizer of the model that is trained, with its token table and its way of writing chats.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        table: its token table.
        template_options: what the chat template takes besides the messages.
    """

    tokenizer: Any
    table: TokenTable
    template_options: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: Any, cfg: Any) -> "TargetTokenizer":
        """Wrap the tokenizer that axolotl loaded (which has the configured chat template)."""
        options = cfg.get("chat_template_kwargs") or {}
        return cls(tokenizer, TokenTable.from_tokenizer(tokenizer), dict(options))

    def encode(
        self, content: str | Sequence[Message], *, tools: Sequence[Message] | None = None, last_only: bool = False
    ) -> EncodedText:
        """Tokenize a text or a chat.

        In a text (BOS + text + EOS, as far as the tokenizer has them) every token but the first is supervised. In a
        chat, rendered with the target's template, what the assistant generated and its ends of turn are.

        Args:
            content: the text, or the messages.
            tools: schemas of the tools that a chat may call.
            last_only: supervise only the last assistant message of a chat.

        Raises:
            DataError: there is no template, or the chat cannot be rendered; see :func:`generated_spans`.
        """
        if isinstance(content, str):
            tokens = tokenize(self.tokenizer, self.table, content)
            labels = tokens.input_ids.copy()
            # Nothing predicts the first token. In a packed sequence the document before it would.
            labels[:1] = IGNORED
            return EncodedText(tokens, labels)
        self._require_template()
        chat = generated_spans(self.renderer(tools), content)
        chat = replace(chat, turns=chat.turns[-1:]) if last_only else chat
        tokens = tokenize_chat(self.tokenizer, self.table, chat)
        return EncodedText(tokens, self._labels(tokens))

    def renderer(self, tools: Sequence[Message] | None = None) -> Render:
        """Return what renders messages with the target's template and its options."""
        return chat_renderer(self.tokenizer, tools, self.template_options)

    def answer(self, prompt: str | Sequence[Message], response: str) -> EncodedText:
        """Tokenize a prompt and one response to it; the response and its end of turn are supervised."""
        if self.tokenizer.chat_template is not None:
            return self.encode([*as_messages(prompt), {"role": "assistant", "content": response}], last_only=True)
        head, text = _plain(prompt), _plain(prompt) + response
        tokens = tokenize(self.tokenizer, self.table, text, spans=[(len(head.encode()), len(text.encode()))])
        return EncodedText(tokens, self._labels(tokens))

    def prompt_and_completion(self, prompt: str | Sequence[Message], response: str) -> tuple[str, str]:
        """Return the two parts of a conversation as text, the completion with its end of turn.

        The prompt is the template's text with ``add_generation_prompt``, if the rendered conversation begins with it;
        otherwise everything before the answer.
        """
        if self.tokenizer.chat_template is None:
            return _plain(prompt), response.rstrip() + (self.tokenizer.eos_token or "")
        answer = {"role": "assistant", "content": response.rstrip()}
        chat = generated_spans(self.renderer(), [*as_messages(prompt), answer])
        raw, turn = chat.text.encode(), chat.turns[-1]
        stop = turn.parts[-1].stop
        completion = raw[turn.start : stop].decode()
        return raw[: turn.start].decode(), completion + self._end_of_turn(raw[stop:].decode())

    def _require_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the dataset holds chats, but the target's tokenizer has no chat template. Set `chat_template:` in "
                "the axolotl configuration, or use plain texts."
            )

    def _labels(self, tokens: TokenizedText) -> IntArray:
        keep = supervised_bytes(tokens) > 0
        for stop in tokens.spans[:, 1]:
            first = int(np.searchsorted(tokens.ends, stop)) + 1
            keep[first : self._turn_end(tokens.input_ids, first)] = True
        return np.where(keep, tokens.input_ids, IGNORED).astype(np.int32)

    def _turn_end(self, ids: IntArray, first: int) -> int:
        """Return the position after the token that ends the turn; ``first`` where other text is before it."""
        for position in range(first, len(ids)):
            role = self.table.role_of(int(ids[position]))
            if role in TURN_ENDS:
                return position + 1
            if role is not None or self.table.bytes_of(int(ids[position])).strip():
                break
        return first

    def _end_of_turn(self, tail: str) -> str:
        """The part of the text after an answer that ends the turn; the EOS token where there is none."""
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        end = self._turn_end(np.asarray(ids, np.int32), 0)
        surface = self.table.bytes_of(ids[end - 1]).decode() if end else ""
        if not end or surface not in tail:
            return self.tokenizer.eos_token or ""
        return tail[: tail.index(surface) + len(surface)]


def _plain(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    raise DataError(
        "a prompt is a chat, but the target's tokenizer has no chat template. Set `chat_template:` in the axolotl "
        "configuration."
    )
