"""Texts and chats in the target's tokens, with labels: which tokens are supervised and which are only context."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusion_plugins.axolotl.supervision import DEFAULT, Supervision
from fusion_plugins.core.arrays import FloatArray, IntArray
from fusion_plugins.core.fusion.record import supervised_bytes
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.messages import as_messages
from fusion_plugins.core.text.rendering import Render
from fusion_plugins.core.text.sampled import How, SampledAnswer, tokenize_answer
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import TURN_ENDS, chat_renderer, generated_stop, tokenize, tokenize_chat
from fusion_plugins.core.text.turns import RenderedChat
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError

IGNORED = -100

Message = Mapping[str, Any]


@dataclass(frozen=True)
class EncodedText:
    """One text or chat as the target model reads it.

    Attributes:
        tokens: T tokens; the spans of a chat are those of all turns of the assistant.
        labels: (T,) int32 token ids, :data:`IGNORED` where nothing is supervised.
        trained: (R, 2) int32 byte ranges of the assistant's turns that are trained on; None for all spans.
        how: how a sampled answer became tokens; None for other texts.
        sampled: (T,) float32 log-probability that the sampler gave the next token, nats; NaN where that is unknown, and
            None where nothing is known.
    """

    tokens: TokenizedText
    labels: IntArray
    trained: IntArray | None = None
    how: How | None = None
    sampled: FloatArray | None = None

    @property
    def sampled_or_unknown(self) -> FloatArray:
        """(T,) float32 as in ``sampled``, NaN everywhere where nothing is known."""
        return np.full(len(self.labels), np.nan, np.float32) if self.sampled is None else self.sampled

    def with_sampled(self, ids: Sequence[int], logprobs: Sequence[float]) -> "EncodedText":
        """Return the text with the sampler's log-probabilities, if its tokens are those that were drawn.

        The token that ends the turn may be another one: the template decides about it.

        Args:
            ids: tokens that were drawn, those of the last turn.
            logprobs: their log-probabilities, nats.
        """
        places = np.flatnonzero(self.labels != IGNORED)
        if not places.size or places[0] == 0:
            return self
        first, size = int(places[0]), min(int(places[-1]) + 1 - int(places[0]), len(ids), len(logprobs))
        same = self.tokens.input_ids[first : first + size] == np.asarray(ids[:size])
        if not size or not same[:-1].all():
            return self
        sampled = np.full(len(self.labels), np.nan, np.float32)
        sampled[first - 1 : first - 1 + size] = np.where(same, np.asarray(logprobs[:size], np.float32), np.nan)
        return replace(self, sampled=sampled)


@dataclass(frozen=True)
class Answer:
    """A prompt and one answer to it as the target model reads them, up to the end of the answer's turn.

    Attributes:
        prompt_ids: P token ids before the answer.
        answer_ids: A token ids of the answer and of what ends its turn. A token that holds bytes of both is among them.
        prompt: the text before the answer, with all that the template writes.
        text: the text of the answer and of the end of its turn.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt: str
    text: str

    @property
    def input_ids(self) -> list[int]:
        """All P + A ids."""
        return self.prompt_ids + self.answer_ids

    @property
    def labels(self) -> list[int]:
        """P + A labels: :data:`IGNORED` for the prompt, the ids of the answer."""
        return [IGNORED] * len(self.prompt_ids) + self.answer_ids


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
        self,
        content: str | Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        supervision: Supervision = DEFAULT,
        answer: SampledAnswer | None = None,
        own: bool = False,
    ) -> EncodedText:
        """Tokenize a text or a chat.

        In a text (BOS + text + EOS, as far as the tokenizer has them) every token but the first is supervised. In a
        chat, rendered with the target's template, what the assistant generated and its ends of turn are, unless
        ``supervision`` says otherwise.

        Args:
            content: the text, or the messages.
            tools: schemas of the tools that a chat may call.
            supervision: which turns of a chat are trained on.
            answer: how the last message was sampled; no other one is trained on then.
            own: the model that is trained has sampled it.

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
        chat = generated_spans(self.renderer(tools), content, roles=supervision.roles_to_find(content))
        answers = replace(chat, turns=tuple(turn for turn in chat.turns if turn.role == "assistant"))
        how: How | None = None
        if answer is None:
            tokens = tokenize_chat(self.tokenizer, self.table, answers, supervision.eot_ids)
        else:
            tokens, answers, how = tokenize_answer(
                self.tokenizer, self.table, answers, answer, own=own, turn_ends=supervision.eot_ids
            )
            chat = answers
        labels, ranges = self._chat_labels(tokens, chat, content, supervision)
        trained = [ranges[turn.message] for turn in answers.turns if supervision.trains(content[turn.message])]
        whole = len(trained) == len(answers.turns)
        return EncodedText(tokens, labels, None if whole else np.array(trained, np.int32).reshape(-1, 2), how)

    def _chat_labels(
        self, tokens: TokenizedText, chat: RenderedChat, messages: Sequence[Message], supervision: Supervision
    ) -> tuple[IntArray, dict[int, tuple[int, int]]]:
        """Return the labels, and the byte range of each turn without its end, by the index of its message."""
        ids, keep = tokens.input_ids, np.zeros(len(tokens.input_ids), np.bool_)
        ranges, ends = {}, {}
        for turn in chat.turns:
            stop = turn.stop
            if turn.role == "assistant":
                stop = generated_stop(self.table, tokens, chat, turn, supervision.eot_ids)
            ranges[turn.message], trains = (turn.start, stop), supervision.trains(messages[turn.message])
            if trains:
                spoken = supervised_bytes(replace(tokens, spans=np.array([[turn.start, stop]], np.int32))) > 0
                # Between its first and its last token all of a turn was generated, also a token without bytes, such as
                # the space that SentencePiece puts behind a special token.
                keep |= np.logical_or.accumulate(spoken) & np.logical_or.accumulate(spoken[::-1])[::-1]
            first = int(np.searchsorted(tokens.ends, stop)) + 1
            after = self._turn_end(ids, first, supervision.eot_ids)
            if after > first:
                is_eos = self.table.role_of(int(ids[after - 1])) is Role.EOS
                which = supervision.eos if is_eos else supervision.eot
                keep[first : after - 1] |= trains
                keep[after - 1] |= which == "all" or (which == "turn" and trains)
                ends[is_eos, which] = after - 1
        for (_, which), place in ends.items():
            keep[place] |= which == "last"
        return np.where(keep, ids, IGNORED).astype(np.int32), ranges

    def renderer(self, tools: Sequence[Message] | None = None) -> Render:
        """Return what renders messages with the target's template and its options."""
        return chat_renderer(self.tokenizer, tools, self.template_options)

    def answer(
        self, prompt: str | Sequence[Message], reply: str | Message, *, tools: Sequence[Message] | None = None
    ) -> Answer:
        """Tokenize a prompt and one answer to it as one text, and cut it before the answer and after its turn.

        Args:
            prompt: a text, or messages.
            reply: the answer's text, or an assistant message with content, tool calls and reasoning.
            tools: schemas of the tools that may be called.

        Raises:
            DataError: the chat cannot be rendered, the prompt is empty, or no token of the answer is left.
        """
        message = {"role": "assistant", "content": reply} if isinstance(reply, str) else {**reply, "role": "assistant"}
        if self.tokenizer.chat_template is None:
            head, text = _plain(prompt), _plain(prompt) + _plain(reply)
            tokens = tokenize(self.tokenizer, self.table, text, spans=[(len(head.encode()), len(text.encode()))])
        else:
            chat = generated_spans(self.renderer(tools), [*as_messages(prompt), *as_messages([message])])
            chat, text = replace(chat, turns=chat.turns[-1:]), chat.text
            tokens = tokenize_chat(self.tokenizer, self.table, chat)
        return self._cut(tokens, text.encode())

    def _cut(self, tokens: TokenizedText, raw: bytes) -> Answer:
        ids, start = tokens.input_ids.tolist(), int(tokens.spans[0, 0])
        # Nothing predicts the first token, so it can be no answer.
        supervised = np.flatnonzero(self._labels(tokens)[1:] != IGNORED) + 1
        bos = self.table.id_of_role(Role.BOS)
        if not start or not supervised.size:
            expected = "an answer of at least one token" if start else "a prompt that is not empty"
            raise DataError(f"expected {expected}, got the text {raw.decode()!r:.200}. Leave the conversation out.")
        if bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"expected one BOS token at the start of the conversation, got two: {raw.decode()!r:.80}. The chat "
                "template writes both; correct it with `chat_template:` in the axolotl configuration."
            )
        first, stop = int(supervised[0]), int(supervised[-1]) + 1
        end = max(int(tokens.ends[stop - 1]), start)
        return Answer(ids[:first], ids[first:stop], raw[:start].decode(), raw[start:end].decode(errors="replace"))

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

    def _turn_end(self, ids: IntArray, first: int, turn_ends: Collection[int] = ()) -> int:
        """Return the position after the token that ends the turn; ``first`` where other text is before it."""
        for position in range(first, len(ids)):
            role = self.table.role_of(int(ids[position]))
            if role in TURN_ENDS or int(ids[position]) in turn_ends:
                return position + 1
            if role is not None or self.table.bytes_of(int(ids[position])).strip():
                break
        return first


def _plain(content: str | Message | Sequence[Message]) -> str:
    if isinstance(content, str):
        return content
    raise DataError(
        "a prompt or an answer consists of messages, but the target's tokenizer has no chat template. Set "
        "`chat_template:` in the axolotl configuration."
    )
