"""Texts and chats in the target's tokens, with labels: which tokens are supervised and which are only context."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.core.text.chat import render_chat
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize, tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError

IGNORED = -100
_ENDS_TURN = (Role.EOS, Role.END_OF_TURN)

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

    def encode(self, content: str | Sequence[Message], *, last_only: bool = False) -> EncodedText:
        """Tokenize a text or a chat.

        In a text (BOS + text + EOS, as far as the tokenizer has them) every token but the first is supervised. In a
        chat, rendered with the target's template, the assistant's contents and their ends of turn are.

        Args:
            content: the text, or role and content of each turn.
            last_only: supervise only the last assistant message of a chat.

        Raises:
            DataError: there is no template, or the chat cannot be rendered; see :func:`render_chat`.
        """
        if not isinstance(content, str):
            self._require_template()
        tokens, _ = tokenize_content(self.tokenizer, self.table, content, template_options=self.template_options)
        if not isinstance(content, str):
            tokens = replace(tokens, spans=tokens.spans[-1:]) if last_only else tokens
            return EncodedText(tokens, self._labels(tokens))
        labels = tokens.input_ids.copy()
        # Nothing predicts the first token. In a packed sequence the document before it would.
        labels[:1] = IGNORED
        return EncodedText(tokens, labels)

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
        messages = as_messages(prompt)
        render = self._renderer()
        text, spans, _ = render_chat(render, [*messages, {"role": "assistant", "content": response.rstrip()}])
        raw = text.encode()
        start, stop = (int(byte) for byte in spans[-1])
        head = self._renderer(add_generation_prompt=True)(messages)
        if not text.startswith(head) or len(head.encode()) > start:
            head = raw[:start].decode()
        completion = raw[len(head.encode()) : stop].decode()
        return head, completion + self._end_of_turn(raw[stop:].decode())

    def _require_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the dataset holds chats, but the target's tokenizer has no chat template. Set `chat_template:` in "
                "the axolotl configuration, or use plain texts."
            )

    def _renderer(self, **options: Any) -> Callable[[list[dict[str, Any]]], str]:
        def render(messages: list[dict[str, Any]]) -> str:
            settings = {**self.template_options, **options, "tokenize": False}
            return str(self.tokenizer.apply_chat_template(messages, **settings))

        return render

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
            if role in _ENDS_TURN:
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
