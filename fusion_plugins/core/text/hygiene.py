"""What may be wrong with a prompt or an answer as a text: repeated, known from an evaluation, or a refusal.

Pure functions; :mod:`fusion_plugins.scoring.clean` reads and writes the files.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

#: evaluation texts with fewer words are only found where they are the whole prompt: "yes or no" is in many
LEAST_WORDS = 5
#: a refusal is at the start of an answer, and the answer is not much more
REFUSAL_CHARACTERS = 1000

#: one word: letters and digits, or one character of a script without spaces
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+"
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")

_ABLE = (
    r"(?:can(?:no|')t|can ?not|won't|will not|(?:am |'m )(?:not able|unable) to|(?:must|have to) decline to"
    r"|do(?: not|n't) feel comfortable|(?:am |'m )not comfortable)"
)
#: what is refused; with an object, where the word alone is part of many an answer ("I can't give you an exact date")
_DEED = (
    r"(?:help(?:ing)?\b(?! but\b)|assist(?:ing)?\b|comply\b|fulfil|engag|participat|do that\b|continue (?:with|this)"
    r"|support (?:that|this|such|any)|(?:provid|creat|writ|generat|produc|shar|offer|giv|discuss|answer)(?:e|ing)?"
    r"(?: you)?(?: with)? (?:that|this|these|those|such|any|instructions|guidance|information|assistance|content"
    r"|explicit|harmful|hateful|details on how|a (?:guide|tutorial|recipe)))"
)
_SORRY = (
    r"(?:(?:i'?m|i am)(?: really| very| so| truly| deeply)? sorry|sorry|i apologi[sz]e|my apologies|apologies"
    r"|unfortunately|no)"
)
_AS_AN_AI = r"as an ai(?: language model| assistant| model)?(?: \w+ by [\w ]{1,30})?,?\s+"
_REFUSALS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:{_SORRY}\b[^.!?\n]{{0,60}}?[,.!:;-]?\s*(?:but|however)?,?\s*)?(?:{_AS_AN_AI})?i ?{_ABLE} {_DEED}",
        rf"(?:{_SORRY}\b[,.!]?\s*(?:but )?)?{_AS_AN_AI}i ?(?:{_ABLE}|do(?: not|n't) have the (?:ability|capability))\b",
        r"(?:非常|很|十分)?(?:抱歉|对不起|不好意思|遗憾)[，,。!！]?[^。！？\n]{0,20}?(?:无法|不能|不便|没法|没有办法|不可以)"
        r"[^。！？\n]{0,12}?(?:提供|帮助|协助|回答|满足|完成|讨论|生成|处理|参与|支持)",
        r"(?:作为|身为)(?:一个|一名)?(?:ai|人工智能|语言模型)[^。！？\n]{0,20}?(?:无法|不能|没有能力)",
        r"(?:es )?tut mir (?:sehr )?leid, (?:aber )?(?:ich|dabei|damit|das) kann[^.!?\n]{0,40}?nicht "
        r"(?:helfen|weiterhelfen|beantworten|erfüllen|unterstützen)",
        r"(?:je suis (?:vraiment )?désolée?|désolée?), mais je ne (?:peux|suis)[^.!?\n]{0,20}?"
        r"(?:aider|fournir|répondre|capable)",
        r"lo siento,? (?:mucho,? )?pero no (?:puedo|estoy)[^.!?\n]{0,20}?"
        r"(?:ayudar|proporcionar|responder|cumplir|capacitad)",
    )
)


def words(text: str) -> list[str]:
    """Return the words of a text for comparison: lower case, without accents of width and punctuation.

    Example:
        >>> words("Tom's  cat\u2014CAT, \uff11\uff12!"), words("\u5c0f\u660e12")
        (['tom', 's', 'cat', 'cat', '12'], ['\u5c0f', '\u660e', '12'])
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def same_text(text: str) -> str:
    """Return the form in which two texts are equal: Unicode composed, one kind of line end, no space around it."""
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip()


def shingles(text: str, size: int) -> NDArray[np.uint64]:
    """Return the sorted hashes of all runs of ``size`` words, (S,) uint64; of a shorter text, of all of it."""
    found = words(text)
    runs = {" ".join(found[start : start + size]) for start in range(max(1, len(found) - size + 1))}
    return np.array(sorted(_hash(run) for run in runs), np.uint64)


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Return the share of two sorted sets that is common, in [0, 1]."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def numbers(text: str) -> Counter[str]:
    """Return the numbers of a text: two prompts that differ in one ask for different answers.

    Example:
        >>> numbers("12 apples and 1,000 pears") == numbers("1,000 apples and 12 pears")
        True
    """
    return Counter(_NUMBER.findall(unicodedata.normalize("NFKC", text)))


class KnownTexts:
    """Runs of words that evaluations consist of; finds them in other texts.

    Args:
        size: words of a run. A text of fewer words is looked for as a whole.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        #: number of words -> hash of such a run -> where it is from
        self._runs: dict[int, dict[int, str]] = {}
        self._whole: dict[int, str] = {}

    def add(self, text: str, where: str) -> None:
        """Remember a text of an evaluation, and where it is from."""
        found = words(text)
        if not found:
            return
        self._whole.setdefault(_hash(" ".join(found)), where)
        size = min(self._size, len(found))
        if size >= min(LEAST_WORDS, self._size):
            runs = self._runs.setdefault(size, {})
            for run in _runs(found, size):
                runs.setdefault(_hash(run), where)

    def find(self, text: str) -> tuple[str, str] | None:
        """Return (where it is from, the common words) of the first run that a text shares with an evaluation."""
        found = words(text)
        whole = " ".join(found)
        if found and (where := self._whole.get(_hash(whole))) is not None:
            return where, whole
        for size, known in sorted(self._runs.items(), reverse=True):
            for run in _runs(found, size) if len(found) >= size else ():
                if (where := known.get(_hash(run))) is not None:
                    return where, run
        return None


def refusal_of(answer: str) -> str | None:
    """Return the words with which an answer refuses; None where it does not.

    An answer refuses that begins so and is not much longer: an answer that only begins with a reservation goes on.

    Example:
        >>> refusal_of("I'm sorry, but I can't help with that request.")
        "I'm sorry, but I can't help"
        >>> refusal_of("I can't stress enough how useful this is.") is None
        True
    """
    start = answer.lstrip(" \n\t*_#>\"'").replace("\u2019", "'")
    if len(answer) > REFUSAL_CHARACTERS:
        return None
    return next((found[0] for pattern in _REFUSALS if (found := pattern.match(start))), None)


def _runs(found: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(found[start : start + size]) for start in range(len(found) - size + 1))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
