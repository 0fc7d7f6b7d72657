"""Tokenize a text and know, for every token, the exact byte of the text at which it ends.

A tokenizer reports character offsets. They are too coarse (several byte tokens share one character) and sometimes point
into a text that its normaliser changed. The bytes of the tokens are exact: where they spell the text, the ends are
their running sums. Offsets are used only around the pieces that the normaliser changed.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.text.chat import generated_spans
from fusion_plugins.core.text.rendering import Messages, Render
from fusion_plugins.core.text.token_ends import ends_by_bytes, token_ends
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.turns import RenderedChat, Turn, tiles
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import DataError, TokenizerError

# Text put before a piece, so that the tokenizer does not put a space of its own there (see encoder).
_ANCHORS = ("\n", "|", ".", "0")
#: roles of the tokens that end a turn
TURN_ENDS = (Role.EOS, Role.END_OF_TURN)


def tokenize(
    tokenizer: Any,
    table: TokenTable,
    text: str,
    *,
    spans: IntArray | Sequence[tuple[int, int]] | None = None,
    special_tokens: bool = True,
    append_eos: bool = True,
    max_length: int | None = None,
) -> TokenizedText:
    """Tokenize one text and find the byte at which each token ends.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        table: its token table.
        text: a plain text, or a chat as a template rendered it.
        spans: (M, 2) supervised byte ranges; the whole text by default.
        special_tokens: whether the tokenizer adds its own special tokens. If so the text is plain: a special token's
            name inside it is ordinary text. If not the text is a rendered chat and such names are special tokens.
        append_eos: add the EOS token at the end, unless it is there or the vocabulary has none.
        max_length: keep at most this many tokens; the spans shrink to what is kept.

    Returns:
        The ids, ends, exactness and spans. Text that the tokenizer drops belongs to the token before it.

    Raises:
        DataError: the text holds lone surrogates, or a span lies outside the text.
        TokenizerError: the tokenizer gives no offsets.
    """
    raw = _encode_utf8(text)
    (found,) = _encodings(tokenizer, text, special_tokens)
    ids, ends, exact = _tokens(table, found, text, raw, append_eos)
    return _finish(ids, ends, exact, _check_spans(spans, len(raw)), max_length)


def tokenize_many(tokenizer: Any, table: TokenTable, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize plain texts as :func:`tokenize` does one by one, with all cores of the machine.

    Raises:
        DataError, TokenizerError: as for :func:`tokenize`, about any of the texts.
    """
    raws = [_encode_utf8(text) for text in texts]
    if not texts:
        return []
    encodings = _encodings(tokenizer, list(texts), True)
    found = []
    for text, raw, own in zip(texts, raws, encodings, strict=True):
        ids, ends, exact = _tokens(table, own, text, raw, append_eos=True)
        found.append(_finish(ids, ends, exact, _check_spans(None, len(raw)), None))
    return found


def _encodings(tokenizer: Any, texts: str | list[str], special_tokens: bool) -> Sequence[Any]:
    """Return what the compiled tokenizer says about each text."""
    found: Sequence[Any] | None = tokenizer(
        texts,
        add_special_tokens=special_tokens,
        split_special_tokens=special_tokens,
        return_attention_mask=False,
        verbose=False,
    ).encodings
    if found is None:
        raise TokenizerError(f"expected a fast tokenizer, which gives offsets, got {type(tokenizer).__name__}.")
    return found


def _tokens(
    table: TokenTable, encoding: Any, text: str, raw: bytes, append_eos: bool
) -> tuple[IntArray, IntArray, BoolArray]:
    """Return ids, ends and exactness of one encoding."""
    ids = np.array(encoding.ids, np.int32)
    if ids.size and int(ids.max()) >= table.vocab_size:
        raise TokenizerError(
            f"expected ids up to {table.vocab_size - 1}, the last of the token table; the tokenizer gave "
            f"{int(ids.max())}: tokens were added after the table was made. Make the table again."
        )
    # Python objects for all offsets cost as much as the rest here, and most texts do not need them.
    found = ends_by_bytes(table, ids, raw)
    if found is None:
        found = token_ends(table, ids, np.array(encoding.offsets, np.int64).reshape(-1, 2), text, raw)
    ends, exact = found
    eos = table.id_of_role(Role.EOS) if append_eos else None
    if eos is not None and (not ids.size or ids[-1] != eos):
        ids, ends, exact = np.append(ids, np.int32(eos)), np.append(ends, len(raw)), np.append(exact, True)
    return ids, ends, exact


def encoder(tokenizer: Any, table: TokenTable) -> Callable[[bytes], list[int]]:
    """Return a function from bytes to the ids that the tokenizer uses for them inside a text.

    The piece is encoded after an anchor, because a tokenizer may put a space of its own before the start of a text.
    Bytes that are not UTF-8 (a fragment of a character), and pieces that merge with every anchor, give ``[]``. A
    special token's name inside a piece is ordinary text. Padding and truncation that are set in the tokenizer are
    ignored.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True

    def encode(piece: bytes) -> list[int]:
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            return []
        for anchor in _ANCHORS if table.prefix_space else ("", *_ANCHORS):
            ids = _tail(table, backend.encode(anchor + text, add_special_tokens=False).ids, piece)
            if ids:
                return ids
        return []

    return encode


def _tail(table: TokenTable, ids: list[int], piece: bytes) -> list[int]:
    """Return the last ids that spell the piece, or ``[]`` where no token starts with it."""
    start, missing = len(ids), len(piece)
    while missing > 0 and start > 0:
        start -= 1
        missing -= len(table.tokens[ids[start]])
    return ids[start:] if b"".join(table.tokens[index] for index in ids[start:]) == piece else []


def _encode_utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"expected text that UTF-8 can encode, got a lone surrogate at character {error.start}. Repair the text, "
            "for example with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from error


def _check_spans(spans: IntArray | Sequence[tuple[int, int]] | None, size: int) -> IntArray:
    if spans is None:
        return np.array([[0, size]], np.int32)
    array = np.asarray(spans, np.int32).reshape(-1, 2)
    if array.size and (array.min() < 0 or array.max() > size or (array[:, 0] > array[:, 1]).any()):
        raise DataError(
            f"expected spans inside the text's {size} bytes, got {array.tolist()}. Give byte offsets, not characters."
        )
    return array


def _finish(ids: IntArray, ends: IntArray, exact: BoolArray, spans: IntArray, max_length: int | None) -> TokenizedText:
    if max_length is not None and len(ids) > max_length:
        ids, ends, exact = ids[:max_length], ends[:max_length], exact[:max_length]
        cut = int(ends[-1]) if len(ends) else 0
        # A span beyond the cut becomes empty where it was, so that no kept token touches it.
        spans = np.stack([spans[:, 0], np.maximum(spans[:, 0], np.minimum(spans[:, 1], cut))], axis=1)
    return TokenizedText(ids.astype(np.int32), ends.astype(np.int32), spans.astype(np.int32), exact)


def tokenize_content(
    tokenizer: Any,
    table: TokenTable,
    content: str | Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[TokenizedText, str]:
    """Tokenize a text or a chat, as sources and target do alike.

    A plain text gets the tokenizer's own BOS and an EOS. A chat is rendered with the model's own template, which adds
    the special tokens itself.

    Args:
        tokenizer: a fast Hugging Face tokenizer; with a chat template where ``content`` is a chat.
        table: its token table.
        content: the text, or messages with ``role`` and ``content``.
        tools: schemas of the tools that a chat may call.
        template_options: arguments of the chat template besides messages and tools.

    Returns:
        The tokens, and the text that their ends and spans count the bytes of.

    Raises:
        DataError: the chat cannot be rendered so that its messages are found again, or the text is not UTF-8.
        TokenizerError: the tokenizer does not fit its table.
    """
    if isinstance(content, str):
        return tokenize(tokenizer, table, content), content
    chat = generated_spans(chat_renderer(tokenizer, tools, template_options), content)
    return tokenize_chat(tokenizer, table, chat), chat.text


def chat_renderer(
    tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None, options: Mapping[str, Any] | None = None
) -> Render:
    """Return what renders messages with a tokenizer's own chat template.

    Args:
        tokenizer: with a chat template.
        tools: schemas of the tools.
        options: arguments of the template, such as ``enable_thinking``.
    """
    settings = {**(options or {}), "tools": list(tools) if tools else None, "tokenize": False}

    def render(messages: Messages, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, **{**settings, "add_generation_prompt": prompt}))

    return render


def tokenize_chat(
    tokenizer: Any,
    table: TokenTable,
    chat: RenderedChat,
    turn_ends: Collection[int] = (),
    *,
    tokens: TokenizedText | None = None,
) -> TokenizedText:
    """Tokenize a rendered chat; its spans are the tiles of its turns, without the tokens that end a turn.

    Those are not in the spans because they are matched by their role, not by their spelling: the position at the end of
    a turn's last span predicts one.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        table: its token table.
        chat: the chat.
        turn_ends: ids of tokens that end a turn besides those that the table knows.
        tokens: of the text of the chat, where they are known already; their spans do not count.

    Raises:
        TokenizerError: the tokenizer does not fit its table.
    """
    if tokens is None:
        tokens = tokenize(tokenizer, table, chat.text, special_tokens=False, append_eos=False)
    spans = []
    for turn in chat.turns:
        *inner, (start, _) = tiles(turn)
        spans += [*inner, (start, generated_stop(table, tokens, chat, turn, turn_ends))]
    return replace(tokens, spans=np.array(spans, np.int32).reshape(-1, 2))


def generated_stop(
    table: TokenTable, tokens: TokenizedText, chat: RenderedChat, turn: Turn, turn_ends: Collection[int] = ()
) -> int:
    """Return the byte where the token that ends a turn begins; where there is none, where white space at its end does.

    Args:
        table: the token table.
        tokens: the tokens of the chat.
        chat: the chat.
        turn: one of its turns.
        turn_ends: as for :func:`tokenize_chat`.
    """
    *_, (start, stop) = tiles(turn)
    first, last = np.searchsorted(tokens.ends, [start, stop], side="right")
    for at in range(int(first), int(last)):
        token = int(tokens.input_ids[at])
        if token in turn_ends or table.role_of(token) in TURN_ENDS:
            return max(start, int(tokens.ends[at - 1]) if at else 0)
    return start + len(chat.text.encode()[start:stop].rstrip())
