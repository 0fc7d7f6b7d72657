"""The class of a label: digits, CJK, white space, special tokens, the rest.

A token that holds only a part of a character (byte-level BPE and byte fallback make such tokens) has the class of that
character, which only the text around the token tells.
"""

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText

CLASSES = ("special", "digits", "cjk", "white space", "other")
#: in place of a class: the token begins or ends inside a character, so its class depends on the text
FRAGMENT = 255
#: CJK scripts, kana, hangul and their punctuation as ranges of code points
CJK = ((0x1100, 0x11FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0xFF01, 0xFFEF), (0x20000, 0x3FFFF))

Classes = npt.NDArray[np.uint8]


def token_classes(table: TokenTable) -> Classes:
    """Return (V,) uint8: for every token the index into :data:`CLASSES`, or ``FRAGMENT`` (255).

    A token with several kinds of characters counts as digits, else as CJK. Ids without bytes count as special.
    """
    return np.array([_token_class(table, index) for index in range(table.vocab_size)], np.uint8)


def label_classes(text: TokenizedText, table: TokenTable, by_token: Classes) -> Classes:
    """Return (T,) uint8: the index into :data:`CLASSES` of every token of a text.

    Args:
        text: T tokens.
        table: their table.
        by_token: :func:`token_classes` of it.
    """
    classes = by_token[text.input_ids]
    fragments = np.flatnonzero(classes == FRAGMENT).tolist()
    if fragments:
        begins, ends = [0, *text.ends[:-1].tolist()], text.ends.tolist()
        # Question marks stay where a normaliser changed the bytes of the text, so that a token's own do not fit.
        data = bytearray(b"?" * ends[-1])
        for token, begin, end in zip(text.input_ids.tolist(), begins, ends, strict=True):
            if len(table.tokens[token]) == end - begin:
                data[begin:end] = table.tokens[token]
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


def _whole_characters(data: bytearray, begin: int, end: int) -> str:
    """Return the characters that the bytes from ``begin`` to ``end`` belong to."""
    while 0 < begin < len(data) and _continues(data[begin]):
        begin -= 1
    while end < len(data) and _continues(data[end]):
        end += 1
    return data[begin:end].decode(errors="replace")


def _continues(byte: int) -> bool:
    """Whether a byte is the second or a later one of its character: UTF-8 marks these with the bits 10......"""
    return byte & 0xC0 == 0x80
