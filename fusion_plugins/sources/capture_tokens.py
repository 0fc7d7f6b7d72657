"""Texts as a source's tokens, and why a source cannot take a text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.sampled import AnswerCounts, How, last_turns, tokenize_answer
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import chat_renderer, tokenize_chat, tokenize_many
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError, TokenizerError
from fusion_plugins.model_names import is_same_model
from fusion_plugins.sources.asked import Asked
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.texts import Text

Tokenize = Callable[[Sequence[Text]], list[TokenizedText]]
Beyond = Callable[[list[int]], str | None]


class CaptureTokenizer:
    """Turns texts into the source's tokens.

    Attributes:
        answers: how the answers that were captured became tokens.
    """

    def __init__(self, config: CaptureConfig, tokenizer: Any, table: TokenTable, asked: Asked | None) -> None:
        self._config, self._tokenizer, self._table, self._asked = config, tokenizer, table, asked
        self.answers = AnswerCounts()

    def __call__(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Return the tokens of texts and chats.

        Raises:
            DataError, TokenizerError: one of them cannot be tokenized.
        """
        return [tokens for tokens, _ in self._made(texts)]

    def counted(self, texts: Sequence[Text]) -> list[TokenizedText]:
        """Return the same, of texts that are captured now, with the ids that are asked for."""
        made = list(self._made(texts))
        for _, how in made:
            if how is not None:
                self.answers += AnswerCounts.of(how)
        tokenized = [tokens for tokens, _ in made]
        return tokenized if self._asked is None else self._asked.of_texts(texts, tokenized)

    def _made(self, texts: Sequence[Text]) -> Iterator[tuple[TokenizedText, How | None]]:
        plain = [text.content for text in texts if isinstance(text.content, str)]
        of_plain = iter(tokenize_many(self._tokenizer, self._table, plain))
        for text in texts:
            yield (next(of_plain), None) if isinstance(text.content, str) else self._chat(text)

    def _chat(self, text: Text) -> tuple[TokenizedText, How | None]:
        messages: Any = text.content if text.read_as is None else text.read_as
        chat = generated_spans(chat_renderer(self._tokenizer, text.tools, self._config.chat_template_kwargs), messages)
        if text.answer is None:
            return tokenize_chat(self._tokenizer, self._table, last_turns(chat, text.turns)), None
        own = is_same_model(text.answer.model, self._config.model)
        tokens, _, how = tokenize_answer(self._tokenizer, self._table, chat, text.answer, own=own)
        return tokens, how


def problems_of_texts(
    config: CaptureConfig, texts: Sequence[Text], tokenize: Tokenize, limit: int | None, beyond: Beyond | None
) -> Iterator[str | None]:
    """Yield why the source cannot take each of the texts, None for one that it can take."""
    try:
        tokenized = tokenize(texts)
    except (DataError, TokenizerError) as error:
        if len(texts) == 1:
            yield str(error)
            return
        for text in texts:
            yield from problems_of_texts(config, [text], tokenize, limit, beyond)
        return
    for tokens in tokenized:
        ids = tokens.input_ids
        if limit is not None and len(ids) > limit:
            yield f"expected at most {limit} tokens of source {config.source_name!r}, got {len(ids)}."
            continue
        problem = beyond(ids.tolist()) if beyond else None
        yield problem and f"source {config.source_name!r}: {problem}."
