"""Whether a tokenizer keeps the text: a fixed set of strings, there and back.

A tokenizer that was loaded through the wrong class may drop every space, or all that is not Latin, without a word. Its
model then reads another text than the one that is stored, sampled or trained.

Known changes are accepted, and named for the report: a space before the text, a Unicode normal form, the white space of
Unigram tokenizers (SentencePiece makes one space of every run), and characters for which there is only the unknown
token. Everything else is a loss.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fusion_plugins.errors import TokenizerError

#: ids -> the bytes that they spell, cut at unknown tokens
Spell = Callable[[Sequence[int]], Sequence[bytes]]
#: name of a known change; a function of the text and one of what became of it, whose results are equal
Comparison = tuple[str, Callable[[str], str], Callable[[str], str]]

#: what a text shows -> the text; short, and of one kind each, so that the message can name what was lost
PROBES = {
    "spaces": "the quick brown fox",
    "runs of spaces": "a  b    c        d",
    "spaces at the ends": "  begin and end  ",
    "tabs": "a\tb\t\tc",
    "newlines": "one\ntwo\n\nthree\n",
    "newlines at the start": "\n\none",
    "Windows line ends": "one\r\ntwo\r\n",
    "indentation": "if x:\n    y = z\n\tz = x\n",
    "digits": "0123456789 42 2026 3.14",
    "capital letters": "Hello WORLD, iPhone",
    "punctuation": "a, b. c; d: e! f? (g) [h] {i} <j>",
    "signs": "'a' \"b\" #c $d e% x^y ~y | z & a_b @c \\d `e` + - * / =",
    "accents": "café naïve Straße señor Ångström",
    "combining marks": "e\u0301 n\u0303 q\u0307\u0323",
    "typography": "“a” ‘b’ – — … • € £ ™ → ≤ √",
    "compatibility forms": "ﬁne ½ ① Ａ x²",
    "no-break spaces": "a\u00a0b",
    "Greek": "Γειά σου Κόσμε",
    "Cyrillic": "Привет, мир",
    "Armenian": "Բարեւ աշխարհ",
    "Georgian": "გამარჯობა",
    "Hebrew": "שלום עולם",
    "Arabic": "مرحبا بالعالم",
    "Devanagari": "नमस्ते दुनिया",
    "Bengali": "ওহে বিশ্ব",
    "Tamil": "வணக்கம்",
    "Thai": "สวัสดีชาวโลก",
    "Ethiopic": "ሰላም ልዑል",
    "Chinese": "你好,世界。数学题",
    "Japanese": "こんにちは カタカナ",
    "Korean": "안녕하세요 세계",
    "emoji": "🙂 🎉 ✅",
    "emoji with joiners": "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽",
    "rare characters": "𐍈 𝕏 𠀀",
}
_SPACE = " "
PREFIX_SPACE = "a space before the text"
_WHITE_SPACE = "one space for every run of white space, none at the ends"


@dataclass(frozen=True)
class TextChanges:
    """What a tokenizer does to :data:`PROBES`.

    Attributes:
        known: names of the accepted changes that were seen.
        lost: kind of text -> (the text, what became of it), for every text that was not kept.
    """

    known: tuple[str, ...]
    lost: dict[str, tuple[str, str]]


def text_changes(tokenizer: Any, spell: Spell | None = None) -> TextChanges:
    """Tokenize every probe, and compare what the tokens spell, and what the tokenizer decodes, with the text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        spell: the bytes of tokens. Without it only what the tokenizer decodes is compared, and texts with unknown
            characters are passed over.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    comparisons = _comparisons(unigram=type(getattr(backend, "model", None)).__name__ == "Unigram")
    known: dict[str, None] = {}
    unknown: list[str] = []
    lost: dict[str, tuple[str, str]] = {}
    for kind, text in PROBES.items():
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        pieces = [""] if spell is None else [piece.decode("utf-8", "replace") for piece in spell(ids)]
        change = () if spell is None else _change(text, pieces, comparisons)
        if change is None:
            lost[kind] = text, "\ufffd".join(pieces)
            continue
        known |= dict.fromkeys(change)
        if tokenizer.unk_token_id in ids:
            unknown.append(kind)
            continue
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A decoder takes the space before the text off again, or one of the text's own where there was none.
        if _change(text.lstrip(_SPACE), [decoded.lstrip(_SPACE)], comparisons) is None:
            lost[kind] = text, decoded
    if unknown:
        known[f"no token for some of: {', '.join(unknown)}"] = None
    return TextChanges(tuple(known), lost)


def require_text(tokenizer: Any, spell: Spell | None = None) -> tuple[str, ...]:
    """Return the known changes of a tokenizer; see :func:`text_changes`.

    Raises:
        TokenizerError: it loses text, or cuts the same text at random.
    """
    _refuse_random_tokens(tokenizer)
    found = text_changes(tokenizer, spell)
    if not found.lost:
        return found.known
    kinds = list(found.lost)
    text, read = found.lost[kinds[0]]
    more = f" and {len(kinds) - 5} more kinds" if len(kinds) > 5 else ""
    name = getattr(tokenizer, "name_or_path", None)
    raise TokenizerError(
        f"expected a tokenizer that keeps the text; {type(tokenizer).__name__}{f' of {name!r}' if name else ''} loses "
        f"or changes {', '.join(kinds[:5])}{more}: {text!r} becomes {read!r}. {_cure(tokenizer, text, read)}"
    )


def _refuse_random_tokens(tokenizer: Any) -> None:
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    dropout = getattr(model, "dropout", None)
    sampling = (getattr(tokenizer, "sp_model_kwargs", None) or {}).get("enable_sampling")
    if dropout or sampling:
        where = f"dropout {dropout:g} in the model of its tokenizer.json" if dropout else "enable_sampling"
        raise TokenizerError(
            f"expected a tokenizer that cuts the same text into the same tokens every time; "
            f"{type(tokenizer).__name__} cuts it at random ({where}). Take that out: it is for training alone."
        )


def _cure(tokenizer: Any, text: str, read: str) -> str:
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    normalised = normaliser.normalize_str(text).replace("\u2581", _SPACE) if normaliser is not None else text
    if normaliser is not None and normalised.lstrip(_SPACE) == read.lstrip(_SPACE):
        return (
            "The normalizer in its tokenizer.json does this. If it does not belong there, take it out; else use a "
            "model with another tokenizer."
        )
    return (
        "Its tokenizer_config.json probably names a class that does not fit its tokenizer.json: set "
        '"tokenizer_class": "PreTrainedTokenizerFast" there (in axolotl `tokenizer_type: PreTrainedTokenizerFast`), or '
        "use a model with another tokenizer."
    )


def _comparisons(*, unigram: bool) -> list[Comparison]:
    """Return the known changes, the smallest first."""
    forms = {form: partial(unicodedata.normalize, form) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    known: list[Comparison] = [("", str, str), *((form, normalise, str) for form, normalise in forms.items())]
    known.append(("Unicode forms", forms["NFKD"], forms["NFKD"]))
    if unigram:
        # SentencePiece's rules make some invisible characters spaces and remove others.
        folds = [partial(_fold, invisible=replacement) for replacement in (_SPACE, "")]
        known += [(_WHITE_SPACE, fold, fold) for fold in folds]
    return known


def _fold(text: str, invisible: str = _SPACE) -> str:
    """Compatibility form, with one space for every run of white space."""
    replacements = {"Z": _SPACE, "C": invisible}
    letters = unicodedata.normalize("NFKD", text)
    spaced = (_SPACE if c in "\t\n\r\f" else replacements.get(unicodedata.category(c)[0], c) for c in letters)
    return re.sub(" +", _SPACE, "".join(spaced))


def _change(text: str, pieces: Sequence[str], comparisons: Sequence[Comparison]) -> list[str] | None:
    """Return the known changes that make the pieces of the text, with unknown characters between them; None if none."""
    for name, of_text, of_piece in comparisons:
        for prefix in ("", _SPACE):
            expected, found = of_text(prefix + text), [of_piece(piece) for piece in pieces]
            if name == _WHITE_SPACE:
                expected, found[0] = expected.strip(), found[0].lstrip()
                found[-1] = found[-1].rstrip()
            gaps = _gaps(expected, found, least=0 if name == _WHITE_SPACE else 1)
            if gaps is None:
                continue
            # Other white space may have no token; a space without one is the mark of a wrong class.
            if _SPACE in gaps and not re.search(r"[^\S ]", text):
                continue
            return [change for change in (PREFIX_SPACE if prefix else "", name) if change]
    return None


def _gaps(text: str, pieces: Sequence[str], *, least: int) -> list[str] | None:
    """Return the ``least`` or more characters between the pieces, None if these do not occur in the text in turn."""
    first, *rest = pieces
    if not rest:
        return [] if text == first else None
    *middle, last = rest
    gaps, position, stop = [], len(first), len(text) - len(last)
    for piece in middle:
        found = text.find(piece, position + least, stop)
        if found < 0:
            return None
        gaps.append(text[position:found])
        position = found + len(piece)
    fits = text.startswith(first) and text.endswith(last) and position + least <= stop
    return [*gaps, text[position:stop]] if fits else None
