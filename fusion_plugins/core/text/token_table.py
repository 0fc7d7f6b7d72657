"""What each token id means: its bytes and, for a special token, its role.

Everything else compares these bytes, never the surface that a tokenizer prints (``▁the``, ``Ġthe``, ``<0x0A>``).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.text.round_trip import require_text
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.tokenizer_json import Kind, adds_prefix_space, byte_token, decoder, kind_of, model_vocab
from fusion_plugins.errors import TokenizerError

# Names of end-of-turn tokens, for tokenizers without a chat template that shows which one is meant.
_END_OF_TURN_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
)
_SENTINEL = "fusionprobe"


class Role(StrEnum):
    """What a special token is for."""

    BOS = "bos"
    EOS = "eos"
    PAD = "pad"
    UNK = "unk"
    END_OF_TURN = "end_of_turn"
    OTHER = "other"


# An id with several roles counts as the first of these.
_PRIORITY = (Role.EOS, Role.BOS, Role.END_OF_TURN, Role.UNK, Role.PAD, Role.OTHER)
# Padding and the end of a turn are settings of a run (a pad token added for training, another chat template), so the
# fingerprint treats them like any other special token.
_FINGERPRINT_ROLE = {Role.PAD: Role.OTHER, Role.END_OF_TURN: Role.OTHER}


@dataclass(frozen=True)
class TokenTable:
    """The bytes and roles of a vocabulary, by token id.

    Attributes:
        tokens: (W,) the bytes of each id; for a special token the bytes of its name; empty where the id has no token.
        roles: (W,) the role of each special token, ``None`` for an ordinary one.
        role_ids: role -> id. One id may serve several roles.
        prefix_space: whether the tokenizer puts a space of its own before a text.
        kind: ``byte_level`` or ``sentencepiece``.
        byte_fallback: ids of the tokens for single bytes, used for text without a token of its own (``<0x41>``).
        plain_turn_end: whether the token that ends a turn is an ordinary one to the tokenizer: it was added without
            being declared special, and is special here because the chat template writes it after an answer.
    """

    tokens: list[bytes]
    roles: list[Role | None]
    role_ids: Mapping[Role, int]
    prefix_space: bool
    kind: Kind
    byte_fallback: frozenset[int] = frozenset()
    plain_turn_end: bool = False

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, check: bool = True) -> "TokenTable":
        """Read the table of a fast Hugging Face tokenizer.

        Args:
            tokenizer: a tokenizer with a ``backend_tokenizer`` (SentencePiece-style BPE or unigram, or byte-level BPE).
            check: refuse a tokenizer that loses text.

        Raises:
            TokenizerError: the tokenizer is slow, its tokens do not spell bytes (WordPiece, word level), or it loses
                text (see :mod:`fusion_plugins.core.text.round_trip`).
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(
                f"expected a fast tokenizer, got {type(tokenizer).__name__} without `backend_tokenizer`: only fast "
                "tokenizers report offsets. Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert "
                "it to a tokenizer.json."
            )
        spec = json.loads(backend.to_str())
        kind = kind_of(spec)
        names = _names_by_id(backend.get_vocab(with_added_tokens=True))
        special = {entry["id"] for entry in spec["added_tokens"] if entry["special"]}
        added = {entry["id"] for entry in spec["added_tokens"]}
        literal = added - set(model_vocab(spec).values()) | special
        decode = decoder(spec, kind)
        tokens = [
            b"" if name is None else name.encode("utf-8", "surrogatepass") if index in literal else decode(name)
            for index, name in enumerate(names)
        ]
        role_ids, roles = _find_roles(tokenizer, names, special, added)
        fallback = frozenset(
            index for index, name in enumerate(names) if name is not None and byte_token(spec, name) is not None
        )
        others = {found for role, found in role_ids.items() if role is not Role.END_OF_TURN}
        plain = role_ids.get(Role.END_OF_TURN, -1) in added - special - others
        table = cls(tokens, roles, role_ids, adds_prefix_space(spec), kind, fallback, plain)
        if check:
            require_text(tokenizer, table.spell)
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        # Data workers get the table by pickle; one object per token would take seconds.
        roles = {index: role for index, role in enumerate(self.roles) if role is not None}
        rest = tuple(getattr(self, field.name) for field in fields(self)[2:])
        return _unpack, (b"".join(self.tokens), self.lengths, roles, rest, self.fingerprint)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. The model's output layer may be wider."""
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over ids, bytes and roles; the same in every process and on every machine."""
        digest = hashlib.sha256(b"fusion token table 1\n")
        plain = Role.END_OF_TURN if self.plain_turn_end else None
        for token, role in zip(self.tokens, self.roles, strict=True):
            name = "" if role is None or role is plain else _FINGERPRINT_ROLE.get(role, role).value
            digest.update(f"{len(token)} {name} ".encode())
            digest.update(token)
        return digest.hexdigest()

    @cached_property
    def lengths(self) -> IntArray:
        """(W,) int32 number of bytes of each token."""
        return np.fromiter(map(len, self.tokens), np.int32, len(self.tokens))

    @cached_property
    def special(self) -> BoolArray:
        """(W,) bool, True for special tokens."""
        return np.fromiter((role is not None for role in self.roles), np.bool_, len(self.roles))

    @cached_property
    def ordinary(self) -> BoolArray:
        """(W,) bool, True for the tokens that the tokenizer uses for text.

        False for special tokens, ids without a token, and byte-fallback tokens of bytes that have a token of their own:
        the tokenizer never uses ``<0x41>`` for the ``A`` of a text.
        """
        ordinary: BoolArray = ~self.special & (self.lengths > 0)
        own = {self.tokens[index] for index in np.flatnonzero(ordinary).tolist() if index not in self.byte_fallback}
        ordinary[[index for index in self.byte_fallback if self.tokens[index] in own]] = False
        return ordinary

    @cached_property
    def packed(self) -> TokenBytes:
        """The table as arrays, for compiled kernels."""
        flat = np.frombuffer(b"".join(self.tokens), np.uint8).copy()
        starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        closing = np.zeros(self.vocab_size, np.bool_)
        closing[[self.role_ids[role] for role in (Role.EOS, Role.END_OF_TURN) if role in self.role_ids]] = True
        return TokenBytes(flat, starts, self.special.copy(), closing)

    def extends(self, other: "TokenTable") -> bool:
        """Whether this is the other table, or the other one with more tokens added after its own."""
        size = other.vocab_size
        if self.tokens[:size] != other.tokens:  # most tables differ at once, and a fingerprint takes 50 ms
            return False
        return replace(self, tokens=self.tokens[:size], roles=self.roles[:size]).fingerprint == other.fingerprint

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a token; empty for an id without a token, as in a padded output layer."""
        if token_id < 0:
            raise TokenizerError(f"expected a token id of 0 or more, got {token_id}")
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes that ids spell in turn, in pieces: one more than there are runs of the unknown token."""
        unknown = self.role_ids.get(Role.UNK)
        pieces = [b""]
        for at, index in enumerate(ids):
            if index != unknown:
                pieces[-1] += self.tokens[index]
            elif at == 0 or ids[at - 1] != unknown:
                pieces.append(b"")
        return pieces

    def role_of(self, token_id: int) -> Role | None:
        """Return the role of a special token, or ``None`` for an ordinary token or an id without a token."""
        return self.roles[token_id] if 0 <= token_id < len(self.roles) else None

    def id_of_role(self, role: Role) -> int | None:
        """Return the id that has a role; where only one of end_of_turn and eos exists, it is returned for both."""
        found = self.role_ids.get(role)
        if found is None and role is Role.END_OF_TURN:
            return self.role_ids.get(Role.EOS)
        if found is None and role is Role.EOS:
            return self.role_ids.get(Role.END_OF_TURN)
        return found

    def to_columns(self) -> dict[str, list[Any]]:
        """Return the table as columns of equal length, for a file; :meth:`from_columns` reads them back."""
        roles = [[] if role is None else [role.value] for role in self.roles]
        for role in _PRIORITY:
            found = self.role_ids.get(role)
            if found is not None and role.value not in roles[found]:
                roles[found].append(role.value)
        size = len(self.tokens)
        return {
            "id": list(range(size)),
            "token": list(self.tokens),
            "roles": [",".join(names) for names in roles],
            "prefix_space": [self.prefix_space] * size,
            "kind": [self.kind] * size,
            "byte_fallback": [index in self.byte_fallback for index in range(size)],
            "plain_turn_end": [self.plain_turn_end] * size,
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, Sequence[Any]]) -> "TokenTable":
        """Rebuild a table from :meth:`to_columns`.

        Raises:
            TokenizerError: a column is missing or the ids are not 0, 1, 2, ...
        """
        missing = {"id", "token", "roles", "prefix_space", "kind"} - set(columns)
        if missing or list(columns["id"]) != list(range(len(columns["token"]))) or not len(columns["token"]):
            raise TokenizerError(
                "expected a token table with columns id, token, roles, prefix_space and kind and ids 0, 1, 2, ...; "
                f"missing columns: {sorted(missing) or 'none'}. Capture the store again."
            )
        role_ids: dict[Role, int] = {}
        roles: list[Role | None] = []
        for index, names in enumerate(columns["roles"]):
            found = [Role(name) for name in names.split(",")] if names else []
            role_ids.update({role: index for role in found if role is not Role.OTHER})
            roles.append(found[0] if found else None)
        prefix_space, kind = bool(columns["prefix_space"][0]), columns["kind"][0]
        fallback = frozenset(np.flatnonzero(columns.get("byte_fallback", [])).tolist())
        plain = bool(columns.get("plain_turn_end", [False])[0])
        return cls(list(columns["token"]), roles, role_ids, prefix_space, kind, fallback, plain)


def _unpack(
    flat: bytes, lengths: IntArray, roles: Mapping[int, Role], rest: tuple[Any, ...], fingerprint: str
) -> TokenTable:
    """Rebuild a table from its pickle; the fingerprint need not be computed again."""
    stops = np.cumsum(lengths, dtype=np.int64).tolist()
    tokens = [flat[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    table = TokenTable(tokens, [roles.get(index) for index in range(len(tokens))], *rest)
    table.__dict__["fingerprint"] = fingerprint
    return table


def _names_by_id(vocab: Mapping[str, int]) -> list[str | None]:
    if not vocab:
        raise TokenizerError("expected a tokenizer with a vocabulary, got an empty one. Check the tokenizer's files.")
    names: list[str | None] = [None] * (max(vocab.values()) + 1)
    for name, index in vocab.items():
        names[index] = name
    return names


def _find_roles(
    tokenizer: Any, names: Sequence[str | None], special: set[int], added: set[int]
) -> tuple[dict[Role, int], list[Role | None]]:
    role_ids: dict[Role, int] = {}
    for role in (Role.BOS, Role.EOS, Role.PAD, Role.UNK):
        found = getattr(tokenizer, f"{role.value}_token_id", None)
        if found is not None and 0 <= found < len(names) and names[found] is not None:
            role_ids[role] = int(found)
    end_of_turn = _end_of_turn(tokenizer, names, special | added | set(role_ids.values()))
    if end_of_turn is not None:
        role_ids[Role.END_OF_TURN] = end_of_turn
    roles: list[Role | None] = [None] * len(names)
    for index in special:
        roles[index] = Role.OTHER
    for role in reversed(_PRIORITY):
        if role in role_ids:
            roles[role_ids[role]] = role
    return role_ids, roles


def _end_of_turn(tokenizer: Any, names: Sequence[str | None], added: set[int]) -> int | None:
    """Find the token that closes an assistant message: by the chat template, else by a well-known name.

    Tokens that were added without being declared special count as well, because ``tokens:`` of an axolotl
    configuration adds them so.
    """
    by_name = {name: index for index in added if (name := names[index])}
    after = _after_assistant(tokenizer)
    if after is not None:
        found = [name for name in by_name if after.startswith(name)]
        if found:
            return by_name[max(found, key=len)]
    return next((by_name[name] for name in _END_OF_TURN_NAMES if name in by_name), None)


def _after_assistant(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _SENTINEL}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:
        # A template may demand what a plain chat lacks; the well-known names then decide.
        return None
    _, found, after = str(text).partition(_SENTINEL)
    return after.lstrip() if found else None
