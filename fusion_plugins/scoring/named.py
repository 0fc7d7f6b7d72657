"""Find an answer that is a name, where the gold answer is one: a weekday, a month, a Roman numeral, or words.

A text has many words, so these are looked for only where the gold answer says what to look for. What is found does not
depend on which day, month, numeral or word that is.
"""

import re

from fusion_plugins.scoring.answers import BOLD, PHRASE, SENTENCE_END, Found, said
from fusion_plugins.scoring.dates import MONTH, WEEKDAY
from fusion_plugins.scoring.quantities import read

_ROMAN = r"(?<![A-Za-z])(?=[IVXLCDM]{2})M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})(?![A-Za-z])"
#: an answer in words, such as "east" or "not enough"
WORDS = re.compile(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*")
#: what parts an answer in words from the rest of its sentence
_STOP = r"""(?=\s*(?:[.,;:!?()"”。，；！（*]|\Z|\n|\b(?:because|since|as|which|who|that|and|but|so)\b))"""
_TEXT = re.compile(r"\$?\\(?:text|textbf|textit|mathrm|mbox|rm)\s*\{([^{}]*)\}\$?")
_ARTICLE = re.compile(r"(?:the|an?)\s+(?=[A-Za-z]{2})", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\b(?:rather|other) than|\binstead of|不是|而非)\s*"
    r"(?:on |in )?(?:an? |the )?(?:quadrant |type |class |part )?\W*\Z",
    re.IGNORECASE,
)
#: characters before a name that say what it is
_NEAR = 30
#: characters of a sentence before a name that may say that it is a reason
_SENTENCE = 150
#: what is right before a name that a sentence gives as its answer
_STATED = re.compile(
    r"(?:\b(?:(?:is|are|was|were|be|on|in|gives|called|named|quadrant|statement|type|class|part)|(?:so|thus|hence|therefore),?)"
    r"|['’]s|[:：=是为叫在于])\s*"
    r"(?:an? |the )?[*_(\"]*\Z",
    re.IGNORECASE,
)
#: the rest of a sentence that says why: a name in it is no answer. At the start of a sentence the answer may follow.
_REASON = re.compile(
    r"(?:(?<=[^.!?:\n。！？：]\s)(?:since|because|if|given that|assuming)\b|(?<=[^.!?:\n。！？：\s])(?:因为|由于|如果))"
    r"(?!.*(?:\b(?:then|so|thus)\b|所以|那么))[^,.;:\n，。；：！？]*\Z",
    re.IGNORECASE,
)
#: "if it were false"
_SUPPOSED = re.compile(r"\bif\b[^,.;:\n]*\Z", re.IGNORECASE)
#: what a question gives more often than it asks for it
_PREMISE = re.compile(r"(?:\b(?:today|yesterday)(?: is| was|['’]s)|[今昨]天是)\s*(?:an? )?[*_]*\Z", re.IGNORECASE)
#: bold text that is a heading
_HEADING = re.compile(
    r"(?:final |the )?(?:answer|solution|explanation|reason|reasoning|conclusion|note|summary|result|step|given)\b.*"
    r"|(?:答案|解答|解析|结论|注意?).*",
    re.IGNORECASE,
)
_FIRST = re.compile(r"(?:\A|[.!?:\n。！？：])[\s*_]*\Z")
#: a sentence that only begins or ends with it: "Yes, it is.", "That is true.", and not "There is no rest"
_TRUTH = re.compile(r"\b(?:yes|no|true|false)\b(?=\W*?(?:[.,!;:。，]|\Z|\n)|\s+(?:because|since|as)\b)", re.IGNORECASE)
_PATTERNS = {"weekday": re.compile(WEEKDAY), "month": re.compile(MONTH), "roman": re.compile(_ROMAN), "truth": _TRUTH}


def kind_of_name(gold: str) -> str:
    """Return weekday, month, roman, truth (yes and no) or words; "" for a gold answer that is no name.

    Example:
        >>> [kind_of_name(gold) for gold in ("周二", "March", "XIV", "no", "New York", "12 apples")]
        ['weekday', 'month', 'roman', 'truth', 'words', '']
    """
    kind = read(gold).kind
    if kind in _PATTERNS:
        return kind
    gold = spelled(gold)
    if re.fullmatch(_ROMAN, gold):
        return "roman"
    if gold.lower() in ("yes", "no", "true", "false"):
        return "truth"
    return "words" if not kind and len(gold) > 1 and WORDS.fullmatch(gold) else ""


def find_name(response: str, gold: str, found: Found | None, *, broken_off: bool = False) -> Found | None:
    """Return the answer of a response to a question whose answer is a name.

    Args:
        response: of the model, in full.
        gold: the gold answer, of which only the kind and the number of words count.
        found: what :func:`~fusion_plugins.scoring.answers.find_answer` found; a box or ``####`` stays.
        broken_off: whether the response was cut off.

    Returns:
        The name, or ``found`` where the response has none or the gold answer is none.
    """
    kind = kind_of_name(gold)
    if not kind or (found and found.how in ("boxed", "hashes")):
        return found
    if found and found.how == "phrase" and any(kind_of_name(text.rstrip(".")) == kind for text in found.texts):
        return found
    text = said(response)
    if kind == "words":
        words = _find_words(text, len(without_article(spelled(gold)).split()), broken_off)
        # A formula is more of a mark than the end of a sentence.
        return found if words is None or (words.how == "name" and found and found.how == "formula") else words
    return _last_stated(text, kind) or found


def spelled(text: str) -> str:
    r"""Return the words of LaTeX.

    Example:
        >>> spelled(r"\text{New York}"), spelled("$x$")
        ('New York', '$x$')
    """
    found = _TEXT.fullmatch(text.strip())
    return found[1].strip() if found else text


def roman_numerals(text: str) -> list[str]:
    """Return the Roman numerals of two letters or more in a text.

    Example:
        >>> roman_numerals("Quadrant IV"), roman_numerals("I and you")
        (['IV'], [])
    """
    return re.findall(_ROMAN, text)


def without_article(text: str) -> str:
    """Return words without the article that they begin with."""
    return _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text


def _last_stated(text: str, kind: str) -> Found | None:
    """Return the last name that a sentence states, else the last one, without those that are denied."""
    names = [match for match in _PATTERNS[kind].finditer(text) if not _DENIED.search(_before(text, match))]
    answers = [match for match in names if not _REASON.search(_before(text, match, _SENTENCE))]
    names = answers if answers or kind == "truth" else names
    stated = [match for match in names if _is_stated(_before(text, match)) or _is_bold(text, match)]
    if kind == "truth":  # sentences have these words for other reasons, too
        stated = [match for match in stated if not _SUPPOSED.search(_before(text, match))]
        names = [match for match in names if match in stated or _FIRST.search(_before(text, match))]
    chosen = names if kind == "truth" else stated or names
    return Found((chosen[-1][0],), "name") if chosen else None


def _is_stated(before: str) -> bool:
    return _STATED.search(before) is not None and not _PREMISE.search(before)


def _before(text: str, match: re.Match[str], most: int = _NEAR) -> str:
    """Return the few characters before a match; where it is not the start of the text, that can be told."""
    start = match.start()
    return text[:start] if start <= most else f"…{text[start - most : start]}"


def _is_bold(text: str, match: re.Match[str]) -> bool:
    return text.endswith(("**", "__"), 0, match.start()) and text.startswith(("**", "__"), match.end())


def _find_words(text: str, count: int, broken_off: bool) -> Found | None:
    words = rf"[^\W\d_]+(?:[\s'’-]+[^\W\d_]+){{{count - 1}}}"
    for match in reversed(list(PHRASE.finditer(text))):
        behind = re.match(
            rf"[\s:*_\"“]*(?:(?:the|an?)\s+)?({words})[*_\"”]*{_STOP}", text[match.end() :], re.IGNORECASE
        )
        if behind:
            return Found((behind[1],), "phrase")
    for match in reversed(list(BOLD.finditer(text))):
        bold = without_article((match[1] or match[2]).strip().rstrip(".!。"))
        is_heading = text[match.end() :].startswith((":", "：")) or _HEADING.fullmatch(bold)
        if not is_heading and WORDS.fullmatch(bold):
            return Found((bold,), "bold")
    if broken_off:
        return None
    sentences = [part for part in SENTENCE_END.split(text) if part.strip()]
    last = sentences[-1] if sentences else ""
    stated = re.search(
        rf"(?:\b(?:is|are|was|were|be|called|named)\s|[:：=是为叫])\s*(?:(?:the|an?)\s+)?({words})\W*\Z", last
    )
    if stated:
        return Found((stated[1],), "name")
    whole = text.strip().rstrip(".!。！")
    return Found((whole,), "name") if WORDS.fullmatch(whole) else None
