"""What kind of text a token stands for: digits, CJK, white space, special tokens, the rest.

A token that holds only a part of a character (byte-level BPE and byte fallback make such tokens) belongs to the class
of the character that it is a part of in its text.
"""

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText

__all__ = ["CLASSES", "FRAGMENT", "label_classes", "token_classes"]

CLASSES = ("special", "digits", "cjk", "white space", "other")
#: class of a token that begins or ends inside a character: only its text says what it is
FRAGMENT = 255
#: CJK scripts, kana, hangul and their punctuation as ranges of code points
CJK = ((0x1100, 0x11FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0xFF01, 0xFFEF), (0x20000, 0x3FFFF))

Classes = npt.NDArray[np.uint8]


def token_classes(table: TokenTable) -> Classes:
    """Return (V,) uint8, for every token the index into :data:`CLASSES`, or :data:`FRAGMENT`.

    Digits win over everything, then CJK, then white space; ids without bytes count as special.
    """
    return np.array([_token_class(table, index) for index in range(table.vocab_size)], np.uint8)


def label_classes(text: TokenizedText, table: TokenTable, by_token: Classes) -> Classes:
    """Return (T,) uint8, the index into :data:`CLASSES` of every token of a text.

    Args:
        text: T tokens.
        table: their table.
        by_token: :func:`token_classes` of it.
    """
    classes = by_token[text.input_ids]
    fragments = np.flatnonzero(classes == FRAGMENT).tolist()
    if fragments:
        begins, ends = [0, *text.ends[:-1].tolist()], text.ends.tolist()
        data = _spell(text.input_ids.tolist(), begins, ends, table)
        classes[fragments] = [_class_of(_whole_characters(data, begins[t], ends[t])) for t in fragments]
    return classes


def _token_class(table: TokenTable, index: int) -> int:
    data = table.tokens[index]
    if not data or table.role_of(index) is not None:
        return CLASSES.index("special")
    try:
        return _class_of(data.decode())
    except UnicodeDecodeError:
        return FRAGMENT


def _class_of(text: str) -> int:
    if any(character.isdigit() for character in text):
        return CLASSES.index("digits")
    if any(low <= ord(character) <= high for character in text for low, high in CJK):
        return CLASSES.index("cjk")
    return CLASSES.index("white space" if text.isspace() else "other")


def _spell(ids: list[int], begins: list[int], ends: list[int], table: TokenTable) -> bytes:
    """Return the text as far as its tokens tell it; a question mark for each byte that a normaliser changed."""
    data = bytearray(b"?" * ends[-1])
    for token, begin, end in zip(ids, begins, ends, strict=True):
        if len(table.tokens[token]) == end - begin:
            data[begin:end] = table.tokens[token]
    return bytes(data)


def _whole_characters(data: bytes, begin: int, end: int) -> str:
    while 0 < begin < len(data) and _continues(data[begin]):
        begin -= 1
    while end < len(data) and _continues(data[end]):
        end += 1
    return data[begin:end].decode(errors="replace")


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 is the second or a later one of its character."""
    return byte & 0xC0 == 0x80
