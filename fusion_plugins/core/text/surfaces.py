"""Printed tokens (surfaces) -> their bytes, for lists of tokens without a tokenizer.

Published data hold such lists: decoded text, SentencePiece surfaces (``▁``, ``<0x0A>``) or byte-level surfaces (``Ġ``).
Where there is a tokenizer, use :mod:`fusion_plugins.core.text.token_table`.
"""

from collections.abc import Sequence

from fusion_plugins.core.text.tokenizer_json import BYTE_TOKEN, byte_alphabet
from fusion_plugins.errors import AlignmentError

SENTENCEPIECE_SPACE = "▁"
BYTE_LEVEL_SPACE = "Ġ"
_CONTEXT = 24

Tokens = Sequence[str] | Sequence[bytes]


def space_marker(tokens: Tokens) -> str:
    """Return the boundary character of a list of surfaces: the one that more tokens begin with, or ``""``."""
    text = [token for token in tokens if isinstance(token, str)]
    counts = {mark: sum(t.startswith(mark) for t in text) for mark in (SENTENCEPIECE_SPACE, BYTE_LEVEL_SPACE)}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ""


def common_bytes(source: Tokens, target: Tokens) -> tuple[list[bytes], list[bytes]]:
    """Read both lists so that they spell one text, and return their tokens as bytes.

    Each list of str is read as plain text, as SentencePiece surfaces or as byte-level surfaces; the first pair of
    readings that agrees holds. One leading space that only one side has is a dummy prefix and is taken off.

    Raises:
        AlignmentError: no pair of readings agrees.
    """
    source_readings, target_readings = _readings(source), _readings(target)
    for left in source_readings:
        for right in target_readings:
            a, b = b"".join(left), b"".join(right)
            if a == b:
                return left, right
            if a == b" " + b:
                return _without_prefix(left), right
            if b == b" " + a:
                return left, _without_prefix(right)
    raise AlignmentError(_difference(_likely(source, source_readings), _likely(target, target_readings)))


def _readings(tokens: Tokens) -> list[list[bytes]]:
    if all(isinstance(token, bytes) for token in tokens):
        return [[bytes(token) for token in tokens]]  # type: ignore[arg-type]
    text = [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in tokens]
    return [
        [token.encode("utf-8", "surrogatepass") for token in text],
        [_sentencepiece_bytes(token) for token in text],
        [_byte_level_bytes(token) for token in text],
    ]


def _likely(tokens: Tokens, readings: list[list[bytes]]) -> bytes:
    order = {SENTENCEPIECE_SPACE: 1, BYTE_LEVEL_SPACE: 2}
    return b"".join(readings[order.get(space_marker(tokens), 0) if len(readings) > 1 else 0])


def _difference(source: bytes, target: bytes) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(source, target, strict=False)) if a != b), min(len(source), len(target))
    )
    window = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return (
        f"expected tokens of one text; at byte {at} the source continues {source[window]!r} and the target "
        f"{target[window]!r} (lengths {len(source)} and {len(target)} bytes). Align tokens of the same text, or use "
        "method='dtw', which does not need equal texts."
    )


def _without_prefix(tokens: list[bytes]) -> list[bytes]:
    first = next(i for i, token in enumerate(tokens) if token)
    return [*tokens[:first], tokens[first][1:], *tokens[first + 1 :]]


def _sentencepiece_bytes(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace(SENTENCEPIECE_SPACE, " ").encode("utf-8", "surrogatepass")


def _byte_level_bytes(token: str) -> bytes:
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode("utf-8", "surrogatepass")
