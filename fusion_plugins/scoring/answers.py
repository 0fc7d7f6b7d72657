r"""Find the answer in a model's response and in a gold reference; text only, nothing is evaluated.

The marks of an answer, from the strongest: ``\boxed{}``; ``####`` and a value; "the answer is", in English or Chinese;
bold. Of several the last group counts: boxes that only "and", "or" or a comma parts are one answer.
"""

import re
from dataclasses import dataclass

from fusion_plugins.scoring.quantities import LIST, is_list, read
from fusion_plugins.scoring.signs import plain_signs

#: the end of a model's thinking; in a program it is inside quotes
_THOUGHT = re.compile(
    r"""(?<!["'`])(?:</(?:think|thinking|thoughts?|reasoning|seed:think)>|\[/THINK\]|◁/think▷"""
    r"""|<\|(?:END_THINKING|end_of_thought|channel\|>final<\|message)\|>)(?!["']|`(?!``))""",
    re.IGNORECASE,
)
_THINKING = re.compile(
    r"^[ \t]*(?:<(?:think|thinking|thoughts?|reasoning|seed:think)>|\[THINK\]|◁think▷"
    r"|<\|(?:START_THINKING|begin_of_thought|channel\|>analysis<\|message)\|>)",
    re.IGNORECASE | re.MULTILINE,
)
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
# "\boxed 3" is TeX for "\boxed{3}"; "\boxed as asked" only names the command.
_BOXED = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?<=\s)(-?[\d.,]*\d|[A-J](?![\w'])))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LETTER = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Cc]hoose|[Ss]elect|[Pp]ick)\s*:?\s*[(\[*]*([A-J])\b|[(\[]([A-J])[)\]]|选(?:择|项)?\s*[:：]?\s*([A-J])"
    r"|(?:^|\n)\W*([A-J])(?=\W*(?:$|\n)|[).:]|\s+is\s+(?:the\s+)?(?:correct|right|best))|\b([B-J])\W*\Z"
)
_MAX_BETWEEN = 60
#: what may be between two boxes of one answer: "and", a comma, the name of the second
_BETWEEN = re.compile(
    r"(?:[\s$,;.、，；&]|\\[()\[\],;]|\\quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|和|或者?|以及|[a-z](?:_\{?\w\}?)?\s*=)*"
)
#: the end of a response that was cut off: an operator, an unfinished sentence, an open box
_BROKEN_OFF = re.compile(
    r"(?:[=+/×÷({\\<>]|\d\s*[-*]|\b(?:is|are|be|answer|equals|has|have|the|an?|of|to|and|or|so)|答案[是为]|\\boxed\s*\{[^{}]*)\s*\Z",
    re.IGNORECASE,
)
#: "The answer is not 5."
_DENIED = re.compile(
    r"(\b(?:answer|result|it)\s+(?:is\s+not|isn['’]t)\s+)-?\d[\d,.]*(?=[.,;!]?(?:\s|$))", re.IGNORECASE
)
#: marks of a chat template, such as <|end_of_solution|>
_TOKEN = re.compile(r"<\|\w+\|>")
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S[^\n]*)", re.MULTILINE)
_GOLD_HASHES = re.compile(r"####(?!#)[ \t]*(\S[^\n]*)")
PHRASE = re.compile(
    r"(?P<final>\bfinal\s+)?\b(?:ans(?:wer)?|(?<=final )(?:result|value)|correct\s+(?:option|choice)|option)s?\b"
    r"(?:\s+(?:to|of|for)\s[^.\n:]{0,80}?)?\s*"
    r"(?:(?:is|are|was|would\s+be|must\s+be|should\s+be|equals)\b|[:=：])\s*:?"
    # a heading
    r"|^[\W_]*(?:final\s+)?answer[*_:# ]*$"
    r"|(?:最终|最后|正确)?(?:答案|选项)(?:应该|应|就)?\s*(?:是|为|选|[:：=])+|(?:^|[\s。，])答\s*[:：]|(?:故|因此|所以|应该?)选(?:择)?\s*[:：]?(?=\s*[A-J])",
    re.IGNORECASE | re.MULTILINE,
)
BOLD = re.compile(r"\*\*([^*\n]+?)\*\*|__([^_\n]+?)__")
SENTENCE_END = re.compile(r"\n|[。！？!?；]|\.(?=\s|$|\*\*)|;\s")
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$"
    # "$18 per day and $20" are two prices.
    r"|(?<!\\)\$(?!\s?\d[\d,.]*\s+[A-Za-z]{2})((?:\\\$|[^$\n])+?)(?<!\\)\$(?!\d)"
    r"|\\\((.+?)\\\)|\\\[(.+?)\\\]"
    r"|\\begin\{(?P<kind>align|equation|gather|eqnarray|multline)\*?\}(.+?)\\end\{(?P=kind)\*?\}",
    re.DOTALL,
)
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# The minus of "10-5" is no sign and "x2" is no number, hence the look-behind. ASCII, because a Chinese character would
# count as a letter and "付2380元" would hold no number.
_VALUE_IN_TEXT = re.compile(
    rf"(?<![\w.^])(?<![\^_]\{{)(?:(?<=[\s=(:：,，是为])|^|(?<=[^\x00-\x7f])|(?<![\d)]))(?:-\((?:{_NUMBER})\)|[-+]?[$€£¥]?\s?(?:{_NUMBER}))"
    rf"(?:\s*(?:[-+*/×÷^]|\\times|\\div|\\cdot)\s*[({{]?-?(?:{_NUMBER})[)}}]?|[eE][-+]?\d{{1,3}})*(?:\s*\\?%)?",
    re.ASCII | re.MULTILINE,
)
_ROOT = r"\\sqrt(?:\[\d\])?\{[^{}]*\}|\\pi\b"
_TERM = rf"\(*(?:(?:(?:{_NUMBER})\s?)?(?:{_ROOT})|{_NUMBER})(?:\s?\))*"
#: sums and products with roots or pi, such as 2√3 and π/4: each of their numbers is only a part
_ROOTED = re.compile(rf"(?<![\w.}}])-?{_TERM}(?:\s*[-+*/]\s*{_TERM})*")
#: "step 2: 14" is a label and a number, no ratio
_LABELLED = re.compile(r"\S[:∶]\s")
#: a quantity in two units, such as "2 hours and 30 minutes"
_COMPOUND = re.compile(r"\d[\d,.]*\s*[A-Za-z]+\.?(?:,|\s+and)?\s+\d[\d,.]*\s*[A-Za-z]+\.?\Z")
#: the number that a sentence of Chinese ends with, and its unit: "小明有7个苹果"
_CHINESE_QUANTITY = re.compile(r"(?<=[^\x00-\x7f：])-?\d[\d,.]*[^\x00-\x7f]+\Z")
_MULTIPLIED = re.compile(
    r"\s*-?\s*(?:(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?\b|bn\b|percent\b|[十百千]?[万亿]|(?<=\d)[kKMB](?![A-Za-z]))",
    re.ASCII,
)
_EXPRESSION = re.compile(
    r"(?:[A-Za-z](?:\([A-Za-z]\))? *=)?"
    r"(?:\\[a-zA-Z]+|\b(?:sqrt|pi|sin|cos|tan|log|ln|exp)\b|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[\d\s.()\[\]{}^_+*/|!-])+"
)
_WORDS = ("yes", "no", "true", "false")


@dataclass(frozen=True)
class Found:
    """An answer in a response.

    Attributes:
        texts: the ways to read it, the most likely first.
        how: boxed, hashes, phrase, bold, formula, number or name.
    """

    texts: tuple[str, ...]
    how: str


def final_part(response: str) -> str:
    """Return what a response says after its thinking; nothing where the thinking has no end.

    Example:
        >>> final_part("<think>5? </think>It is 6."), final_part("<think>5?")
        ('It is 6.', '')
    """
    behind = _THOUGHT.split(response)[-1]
    return "" if _THINKING.search(behind) else behind


def gold_answer(reference: str) -> str:
    r"""Return the answer inside a reference: after ``####``, inside the last ``\boxed{}``, or all of it.

    Example:
        >>> gold_answer("9 * 2 = 18\n#### 18"), gold_answer(r"so \boxed{\frac{1}{2}}"), gold_answer("2380元")
        ('18', '\\frac{1}{2}', '2380元')
    """
    hashed = _GOLD_HASHES.findall(reference)
    return (hashed[-1] if hashed else _last_boxes(reference)[0] or reference).strip()


def find_answer(response: str, *, marked_only: bool = False, broken_off: bool = False) -> Found | None:
    r"""Return the answer of a response; None where it has none.

    Args:
        response: of the model, in full.
        marked_only: whether only ``\boxed{}`` and ``####`` count.
        broken_off: whether the response was cut off, so that what it says last is no answer unless it is marked.

    Example:
        >>> find_answer(r"\boxed{3}, no, \boxed{4}").texts, find_answer("#### 2. Add\n3 + 4\n#### 7 apples").texts
        (('4',), ('7 apples',))
        >>> find_answer("The answer is 90/3=30 bananas, as shown.").texts[0]
        '90/3=30 bananas'
    """
    text = said(response)
    broken_off = broken_off or _BROKEN_OFF.search(text) is not None
    boxes, place = _last_boxes(text)
    hashed = [match for match in _HASHES.finditer(text) if _is_value(match[1])]
    if marked_only:
        return Found((boxes,), "boxed") if boxes else Found((hashed[-1][1].strip(),), "hashes") if hashed else None
    phrase = _last_phrase(text, boxes, place)
    if boxes and not (phrase and phrase[1] > place and phrase[2]):
        return Found((boxes,), "boxed")
    if hashed and not (phrase and phrase[1] > hashed[-1].start()):
        # "#### 3 key points" is a heading, "#### 3 apples" an answer; where both are possible, what is said decides.
        if not phrase or _is_bare(hashed[-1][1]):
            return Found((hashed[-1][1].strip().rstrip("!"),), "hashes")
    bold = [match for match in BOLD.finditer(text) if _is_value(match[1] or match[2])]
    # A bold value counts where no number follows it, and against what was said before only in a line of its own.
    if bold and not broken_off and not re.search(r"\d", text[bold[-1].end() :]):
        if not phrase or (bold[-1].start() > phrase[1] and re.search(r"\n\W*\Z", text[: bold[-1].start()])):
            return Found(((bold[-1][1] or bold[-1][2]).strip().rstrip("!"),), "bold")
    # A mere word is what a sentence says on the way, unless nothing else follows.
    if phrase and (re.search(r"\d", phrase[0][0]) or read(phrase[0][0]).kind or not _last_value(text[phrase[1] :])):
        return Found(phrase[0], "phrase")
    if broken_off:
        return None
    whole = text.strip().rstrip("!")
    # "2√3" is one value.
    root = re.fullmatch(r"-?\d*\\sqrt\{[^{}]*\}\.?", whole)
    if root or read(whole).kind or is_list(whole) or re.fullmatch(r"[A-Za-z-]+\.?", whole) or _is_expression(whole):
        return Found((whole,), "number")
    return _last_value(text)


def said(response: str) -> str:
    """Return what a response says at last, without drawings, marks of templates, and answers that it denies."""
    text = plain_signs(_TOKEN.sub(" ", _DRAWING.sub("", final_part(response))))
    tagged = _ANSWER_TAG.findall(text)
    if tagged and "\\box" not in text and re.search(r"\w", tagged[-1]):
        return f"The final answer is: {tagged[-1].strip()}"
    return _DENIED.sub(r"\1", text)


def find_letter(response: str) -> str | None:
    """Return the letter of a multiple choice that a response names at last, in whatever way.

    Example:
        >>> find_letter("Option A is too small. So I choose B."), find_letter("Paris (C) is right."), find_letter("No.")
        ('B', 'C', None)
    """
    found = list(_LETTER.finditer(final_part(response)))
    return next(filter(None, found[-1].groups())) if found else None


def _last_phrase(text: str, boxes: str | None, boxed_at: int) -> tuple[tuple[str, ...], int, bool] | None:
    """Return the ways to read what the last "the answer is" says, its place, and whether it is called final."""
    for match in reversed(list(PHRASE.finditer(text))):
        said = text[match.end() :].lstrip(" \t:*_")
        if said.startswith("\n"):
            said = said.lstrip()
        if re.match(r"(?:not|不是?)\b", said):
            continue
        if boxes and match.start() < boxed_at:
            return None
        texts = _ways_to_read(said)
        if texts:
            return texts, match.start(), bool(match["final"])
    return None


def _ways_to_read(said: str) -> tuple[str, ...]:
    """Return what a sentence that begins with an answer may say; nothing where it says none."""
    said = said.removeprefix("**").removeprefix("__")
    formula = _FORMULA.match(said)
    if formula:
        # "$x = 3$ or $x = -1$" is one answer.
        parts, place = [_inside(formula)], formula.end()
        while (link := LIST.match(said, place)) and (formula := _FORMULA.match(said, link.end())):
            parts.append(_inside(formula))
            place = formula.end()
        behind = _MULTIPLIED.match(said, place)
        return (", ".join(part.strip() for part in parts) + (behind[0] if behind else ""),)
    end = SENTENCE_END.search(said)
    sentence = (said[: end.start()] if end else said).replace("**", "").replace("__", "").strip()
    if read(sentence).kind or is_list(sentence) or ("=" in sentence and _is_expression(sentence)):
        return (sentence,)
    # Chinese has no spaces: "小明有7个苹果" is a sentence and no word.
    is_word = re.fullmatch(r"[\w-]+", sentence) and (sentence.isascii() or not re.search(r"\d", sentence))
    if is_word or re.search(r"\\[a-z]+|[\^_{}]", sentence):
        return (sentence,)
    letter = re.match(r"[(\[]?([A-J])(?:[)\].:、,]|\s*$|\s+(?:because|since|as)\b|(?=[^\x00-\x7f]))", sentence)
    if letter:
        return (letter[1],)
    word = re.match(r"(yes|no|true|false)\b(?:,|\s+(?:because|since|as)\b)", sentence, re.IGNORECASE)
    if word:
        return (word[1],)
    # The longest beginning that is a value: "7 apples because 3 + 4 = 7".
    words = sentence.split(" ")
    for length in range(min(len(words), 8), 0, -1):
        beginning = " ".join(words[:length]).rstrip(",;:")
        if read(beginning).kind or is_list(beginning):
            return (beginning,)
    quantity = _CHINESE_QUANTITY.search(sentence)
    if quantity and read(quantity[0]).kind:
        return (quantity[0],)
    found = _last_value(sentence)
    return found.texts if found else ()


def _last_value(text: str) -> Found | None:
    """Return the formula or number that a text ends with."""
    formulas = list(_FORMULA.finditer(text))
    numbers = [
        match
        for match in _VALUE_IN_TEXT.finditer(text)
        if not any(f.start() <= match.start() < f.end() for f in formulas)
    ]
    if formulas and (not numbers or formulas[-1].start() > numbers[-1].start()):
        whole = _inside(formulas[-1])
        last = re.split(r"(?<![\\<>!])=|\\(?:approx|implies|Rightarrow|to)\b", whole)[-1].strip()
        return Found((whole, last) if last and last != whole else (whole,), "formula")
    if numbers:
        match = numbers[-1]
        rooted = [found for found in _ROOTED.finditer(text) if found.start() <= match.start() < found.end()]
        if rooted and re.search(_ROOT, rooted[0][0]):
            return Found((rooted[0][0].strip(),), "number")
        multiplied = _MULTIPLIED.match(text, match.end())
        value = match[0].strip() + (multiplied[0] if multiplied else "")
        first = match.start()
        for other in reversed(numbers[:-1]):
            if not LIST.fullmatch(text[other.end() : first]):
                break
            first = other.start()
        listed = () if first == match.start() else (text[first : match.start()] + value,)
        around = _around(text, match)
        # A term of a ratio, an end of an interval, or the minutes behind the hours are no answer by themselves.
        is_part = bool(around) and read(around[0]).kind in ("ratio", "interval", "number")
        return Found(around if is_part else (*around, *listed, value), "number")
    # "twenty one thousand" begins where no word before it belongs to the number.
    words = re.findall(r"[A-Za-z-]+|[零〇一二两三四五六七八九十百千万亿点分之]+", text)
    for last in range(len(words), 0, -1):
        if words[last - 1].lower() in ("a", "an", "one", "一") or read(words[last - 1]).kind != "number":
            continue
        first = last - 1
        while first and words[first].isascii() and read(" ".join(words[first - 1 : last])).kind == "number":
            first -= 1
        return Found((" ".join(words[first:last]),), "number")
    return None


def _inside(formula: re.Match[str]) -> str:
    """Return what a formula says, without its environment and punctuation."""
    kind = formula.re.groupindex["kind"]
    inside = next(text for place, text in enumerate(formula.groups(), 1) if text and place != kind)
    inside = re.sub(r"\\(?:begin|end)\{(?:aligned|split|gathered)\}|&(?=\s*=)|\\\\\s*$", " ", inside)
    return inside.strip().rstrip(".,;").strip()


def _around(text: str, number: re.Match[str]) -> tuple[str, ...]:
    """Return the time, date, range or quantity in two units that a number of a text belongs to, if there is one."""
    start = max(text.rfind("\n", 0, number.start()), text.rfind(". ", 0, number.start())) + 1
    line = text[start:].partition("\n")[0]
    words = [(match.start() + start, match.end() + start) for match in re.finditer(r"\S+", line)]
    inside = next((place for place, (_, end) in enumerate(words) if end > number.start()), None)
    if inside is None:
        return ()
    windows = [
        (first, last)
        for first in range(max(0, inside - 4), inside + 1)
        for last in range(inside + 1, min(len(words), inside + 4) + 1)
    ]
    for first, last in sorted(windows, key=lambda window: window[0] - window[1]):
        window = text[words[first][0] : words[last - 1][1]]
        window = window.rstrip(",;")
        kind = read(window).kind
        if kind == "ratio" and _LABELLED.search(window):
            continue
        if kind in ("time", "date", "range", "ratio", "interval") or (kind == "number" and _COMPOUND.match(window)):
            return (window,)
    return ()


def _is_value(text: str) -> bool:
    """Return whether a text is an answer and nothing else: a quantity, a list, a formula, or one word."""
    text = text.strip().rstrip(".")
    if re.match(r"\d+[.)]\s", text):
        return False
    if read(text).kind or is_list(text) or _FORMULA.fullmatch(text) or text.lower() in _WORDS:
        return True
    if re.search(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+(?:\{[^{}]*\})?", "", text)):
        return False
    # A formula without its marks: it begins with a sign, a digit, a bracket, a command or a variable.
    return re.match(r"[-+(\[{|\\$\d.√]|[A-Za-z](?![A-Za-z])|(?:sqrt|pi|ln|log|sin|cos|tan)\b", text) is not None


def _is_expression(text: str) -> bool:
    """Return whether a text is a formula without marks, such as x^2 + 1 and y = 2x + 1."""
    return _EXPRESSION.fullmatch(text) is not None and re.search(r"[A-Za-z^]", text) is not None


def _is_bare(text: str) -> bool:
    """Return whether an answer has at most one word beside its number."""
    return len(re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[a-zA-Z]+", "", text))) <= 1


def _last_boxes(text: str) -> tuple[str | None, int]:
    """Return the answer in the last boxes that are closed and not empty, and the place of the first of them."""
    found: list[tuple[int, int, str]] = []
    for match in _BOXED.finditer(text):
        inside = match[1] or _balanced(text, match.end())
        # Of nested boxes the inner one.
        if inside is not None and inside.strip() and not _BOXED.match(inside.strip()):
            end = match.end() if match[1] else match.end() + len(inside) + 1
            found.append((match.start(), end, inside.strip()))
    if not found:
        return None, -1
    group = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : group[0][0]]
        if len(between) > _MAX_BETWEEN or not _BETWEEN.fullmatch(between):
            break
        group.insert(0, box)
    return ", ".join(dict.fromkeys(inside for _, _, inside in group)), group[0][0]


def _balanced(text: str, start: int) -> str | None:
    """Return ``text[start:]`` up to the brace that closes the one before ``start``; None where none does."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None
