"""Read a ``tokenizer.json``: the family of the tokenizer, and the bytes of its printed tokens.

The file is a pipeline (normaliser, pre-tokenizer, model, decoder); each section is one part or a sequence of parts.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

from fusion_plugins.errors import TokenizerError

Spec = Mapping[str, Any]
Kind = Literal["byte_level", "sentencepiece"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte-fallback token."""


def _parts(spec: Spec, section: str) -> list[dict[str, Any]]:
    """Flatten a section of a tokenizer.json (a part, a sequence of parts, or nothing)."""
    node = spec.get(section)
    if node is None:
        return []
    children = node.get("pretokenizers") or node.get("normalizers") or node.get("decoders")
    if children is None:
        return [node]
    return [part for child in children for part in _parts({section: child}, section)]


def _has(spec: Spec, kind: str, *sections: str) -> bool:
    return any(part["type"] == kind for section in sections for part in _parts(spec, section))


def kind_of(spec: Spec) -> Kind:
    """Return the family, or refuse the tokenizer.

    Raises:
        TokenizerError: its tokens do not spell bytes.
    """
    model = spec["model"]
    name = model.get("type", "BPE")
    affix = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    if name in ("BPE", "Unigram") and not affix:
        if _has(spec, "ByteLevel", "pre_tokenizer", "decoder", "normalizer"):
            return "byte_level"
        if _space_marker(spec) is not None or model.get("byte_fallback"):
            return "sentencepiece"
    if name in ("WordPiece", "WordLevel"):
        reason = "its tokens drop the spaces between words, and often case and accents, so they do not spell the text"
    elif affix:
        reason = f"its tokens mark the parts of a word with {affix!r} instead of spelling the spaces"
    else:
        reason = "its tokens have neither a byte alphabet nor a mark for spaces, so their bytes are unknown"
    raise TokenizerError(
        f"expected byte-level BPE or a SentencePiece-style tokenizer, got a {name} tokenizer: {reason}. "
        "Use a model with another tokenizer."
    )


def _space_marker(spec: Spec) -> str | None:
    for part in [*_parts(spec, "pre_tokenizer"), *_parts(spec, "decoder")]:
        if part["type"] == "Metaspace":
            return str(part["replacement"])
    for part in _parts(spec, "normalizer"):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "}:
            return str(part["content"])
    return None


def adds_prefix_space(spec: Spec) -> bool:
    """Return whether the tokenizer puts a space of its own before a text."""
    for part in [*_parts(spec, "normalizer"), *_parts(spec, "pre_tokenizer")]:
        if part["type"] == "Prepend":
            return True
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return bool(part.get("add_prefix_space", True))
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return True
    return False


def model_vocab(spec: Spec) -> dict[str, int]:
    """Return token -> id of the model, without the added tokens."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {piece: index for index, (piece, _) in enumerate(vocab)}


@cache
def byte_alphabet() -> dict[str, int]:
    """Return character -> byte of byte-level BPE: printable Latin-1 is itself, the rest is shifted to 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    shifted = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(shifted)}


def decoder(spec: Spec, kind: Kind) -> Callable[[str], bytes]:
    """Return the function from a printed token to its bytes."""
    if kind == "byte_level":
        return _byte_level_decoder()
    marker = _space_marker(spec) or "\u2581"

    def decode(name: str) -> bytes:
        value = byte_token(spec, name)
        return name.replace(marker, " ").encode("utf-8", "surrogatepass") if value is None else bytes([value])

    return decode


def _byte_level_decoder() -> Callable[[str], bytes]:
    alphabet = byte_alphabet()

    def decode(name: str) -> bytes:
        # A name with a character outside the alphabet is taken literally, as in the tokenizer's own decoder.
        values = [alphabet.get(character, -1) for character in name]
        return name.encode() if -1 in values else bytes(values)

    return decode


def byte_token(spec: Spec, name: str) -> int | None:
    """Return the byte of a byte-fallback token such as ``<0x0A>``, ``None`` for any other token."""
    match = BYTE_TOKEN.fullmatch(name)
    if match is None or not (spec["model"].get("byte_fallback") or _has(spec, "ByteFallback", "decoder")):
        return None
    return int(match[1], 16)
