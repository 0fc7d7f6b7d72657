"""Tokenize what a row of a text set holds, a plain text or a chat, the way every model is asked.

A plain text gets the tokenizer's own BOS and an EOS; a chat is rendered with the model's own template, which puts the
special tokens in itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_plugins.core.chat import render_chat
from fusion_plugins.core.token_table import TokenTable
from fusion_plugins.core.tokens import tokenize
from fusion_plugins.core.types import TokenizedText

__all__ = ["tokenize_content"]


def tokenize_content(
    tokenizer: Any, table: TokenTable, content: str | Sequence[Mapping[str, Any]]
) -> tuple[TokenizedText, str]:
    """Tokenize a text or a chat.

    Args:
        tokenizer: a fast Hugging Face tokenizer; with a chat template where ``content`` is a chat.
        table: its token table.
        content: the text, or messages with ``role`` and ``content``.

    Returns:
        The tokens, and the text that their ends and spans count the bytes of.

    Raises:
        DataError: the chat cannot be rendered so that its messages are found again, or the text is not UTF-8.
        TokenizerError: the tokenizer does not fit its table.
    """
    if isinstance(content, str):
        return tokenize(tokenizer, table, content), content
    text, spans, _ = render_chat(lambda messages: tokenizer.apply_chat_template(messages, tokenize=False), content)
    return tokenize(tokenizer, table, text, spans=spans, special_tokens=False, append_eos=False), text
