"""Answers that a model has sampled, as texts: only the last turn counts, and its tokens are those that were drawn.

A sampler may draw other tokens than its tokenizer makes of the text afterwards (``ap`` + ``ples`` for ``apples``), and
may stop at a length limit or be interrupted, where nothing ends the turn.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.text.token_ends import spelled_ends
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import TURN_ENDS, tokenize, tokenize_chat
from fusion_plugins.core.text.turns import RenderedChat
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError

#: How an answer became tokens. ``sampled``: as they were drawn. ``same``, ``other``: the text was tokenized anew, and
#: the tokens (or, where the drawn ones are unknown, their number) are those that were drawn, or not. ``foreign``: of
#: another model, or it is not known how many were drawn.
How = Literal["sampled", "same", "other", "foreign"]


@dataclass(frozen=True)
class SampledAnswer:
    """How the last message of a chat was sampled.

    Attributes:
        finished: the model ended it; False where it was cut, by a length limit or an interruption.
        token_ids: the drawn tokens, with the one that ended the turn; None where the sampler did not keep them.
        tokenizer: fingerprint of the tokenizer that the ids belong to.
        model: name or folder of the model.
        n_tokens: number of drawn tokens; 0 where it is not known.
    """

    finished: bool = True
    token_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None
    model: str | None = None
    n_tokens: int = 0


@dataclass(frozen=True)
class AnswerCounts:
    """How many answers became tokens in which way; two counts add up.

    Attributes:
        sampled: the tokens are those that were drawn.
        same: tokenized anew, as many tokens as were drawn.
        other: tokenized anew, another number of tokens.
        foreign: the answers of other models, and those of which the number of drawn tokens is not known.
    """

    sampled: int = 0
    same: int = 0
    other: int = 0
    foreign: int = 0

    def __add__(self, more: "AnswerCounts") -> "AnswerCounts":
        parts = zip(self._numbers(), more._numbers(), strict=True)
        return AnswerCounts(*(left + right for left, right in parts))

    def _numbers(self) -> tuple[int, ...]:
        return self.sampled, self.same, self.other, self.foreign

    @classmethod
    def of(cls, how: How) -> "AnswerCounts":
        """Return the count of one answer."""
        return cls(**{how: 1})

    def described(self) -> str:
        """Return a sentence for a report; empty where there are no answers of this model."""
        anew = self.same + self.other
        parts = []
        if self.sampled:
            parts.append(f"{self.sampled} answers have the tokens that were sampled")
        if anew:
            parts.append(
                f"{anew} answers were tokenized anew, and {self.other} of them ({self.other / anew:.1%}) have another "
                "number of tokens than were sampled"
            )
        return "; ".join(parts)


def last_turns(chat: RenderedChat, count: int) -> RenderedChat:
    """Return a chat of which only the last turns count."""
    return replace(chat, turns=chat.turns[len(chat.turns) - count :])


def unfinished(chat: RenderedChat) -> RenderedChat:
    """Return a chat that stops where the last part of its last turn does: nothing ends the turn."""
    last = chat.turns[-1]
    stop = last.parts[-1].stop if last.parts else last.start
    text = chat.text.encode()[:stop].decode()
    return replace(chat, text=text, turns=(*chat.turns[:-1], replace(last, stop=stop)))


def tokenize_answer(
    tokenizer: Any,
    table: TokenTable,
    chat: RenderedChat,
    answer: SampledAnswer,
    *,
    own: bool = False,
    turn_ends: Collection[int] = (),
) -> tuple[TokenizedText, RenderedChat, How]:
    """Tokenize a rendered chat whose last turn was sampled.

    The drawn tokens are used where they are of this tokenizer and spell the turn as the template writes it. The model
    that has sampled them may know more tokens by now (a pad token), so that of its own tokens the spelling alone
    counts. What comes before and behind them is tokenized by itself, as it was for the sampler.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        table: its token table.
        chat: the chat; of an answer, only the last turn is supervised.
        answer: how it was sampled.
        own: the model whose tokenizer this is has sampled it.
        turn_ends: ids of tokens that end a turn besides those that the table knows.

    Returns:
        The tokens, the chat that their spans count in (cut where the answer is unfinished), and how they were made.
    """
    chat = last_turns(chat, 1)
    chat = chat if answer.finished else unfinished(chat)
    own = own or answer.tokenizer == table.fingerprint
    drawn = _without_end(table, answer, turn_ends) if own else ()
    if answer.token_ids and own:
        tokens = _with_drawn(tokenizer, table, chat, drawn)
        if tokens is not None:
            return tokenize_chat(tokenizer, table, chat, turn_ends, tokens=tokens), chat, "sampled"
    tokens = tokenize_chat(tokenizer, table, chat, turn_ends)
    if not answer.n_tokens or not own:
        return tokens, chat, "foreign"
    start, stop = chat.turns[-1].start, int(tokens.spans[-1, 1])
    ids = tokens.input_ids[(tokens.ends > start) & (tokens.ends <= stop)].tolist()
    if answer.token_ids is not None:
        return tokens, chat, "same" if ids == list(drawn) else "other"
    return tokens, chat, "same" if len(ids) == answer.n_tokens - answer.finished else "other"


def _without_end(table: TokenTable, answer: SampledAnswer, turn_ends: Collection[int]) -> tuple[int, ...]:
    """Return the drawn tokens without the one that ended the turn: the template may write another one."""
    ids = answer.token_ids or ()
    ended = answer.finished and bool(ids) and (ids[-1] in turn_ends or table.role_of(ids[-1]) in TURN_ENDS)
    return ids[:-1] if ended else ids


def _with_drawn(tokenizer: Any, table: TokenTable, chat: RenderedChat, ids: Sequence[int]) -> TokenizedText | None:
    """Return the tokens of the chat with the drawn ones in its last turn; None where they do not spell it."""
    if not ids or max(ids) >= table.vocab_size or any(table.role_of(token) is Role.UNK for token in ids):
        return None
    raw, turn = chat.text.encode(), chat.turns[-1]
    found = spelled_ends(table, ids, raw, turn.start, turn.parts[-1].stop if turn.parts else turn.stop)
    if found is None:
        return None
    head, tail = raw[: turn.start].decode(), raw[int(found[-1]) :].decode()
    before, behind = (tokenize(tokenizer, table, text, special_tokens=False, append_eos=False) for text in (head, tail))
    parts = [
        (before.input_ids, before.ends, before.exact),
        (np.array(ids, np.int32), found, np.ones(len(ids), np.bool_)),
        (behind.input_ids, behind.ends + found[-1], behind.exact),
    ]
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return TokenizedText(joined[0], joined[1].astype(np.int32), np.empty((0, 2), np.int32), joined[2])


def as_answer(row: Mapping[str, Any], finished: bool) -> SampledAnswer:
    """Return how the response of a row was sampled, as far as its columns say.

    Raises:
        DataError: ``token_ids`` are none.
    """
    ids, number = row.get("token_ids"), row.get("n_tokens")
    if ids is not None and not (isinstance(ids, list | tuple | np.ndarray) and all(map(_is_id, ids))):
        raise DataError(f"expected token_ids as a list of ids, got {ids!r:.80}. Correct them, or leave them out.")
    return SampledAnswer(
        finished,
        None if ids is None or not len(ids) else tuple(int(token) for token in ids),
        row.get("tokenizer"),
        row.get("model"),
        int(number) if isinstance(number, int) else 0,
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0
