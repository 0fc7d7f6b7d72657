r"""Write the signs of typesetting and of other scripts as formulas have them: ASCII digits, ``^{2}``, ``_{1}``.

>>> plain_signs("２３８０元, −5, 3½, 10⁻³, x₁, ∛2")
'2380元, -5, 3 1/2, 10^{-3}, x_{1}, \\sqrt[3]{2}'
"""

import re
import unicodedata

#: signs as typesetting and Chinese text have them -> ASCII
_SIGNS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    ord(sign): plain
    for signs, plain in {
        "−﹣‐‑‒": "-",
        "–—": "–",
        "\u00a0\u2009\u202f\u3000": " ",
        "﹪": "%",
        "⁄∕": "/",
        "∗": "*",
        "⋅∙": "·",
        "\u200b\ufeff\u2060": "",
    }.items()
    for sign in signs
}
_VULGAR = "[¼-¾⅐-⅞↉]"
_FRACTIONS = (
    (re.compile(rf"(?<=\^)({_VULGAR})"), r"{\1}"),
    (re.compile(rf"(?<=\d)\s*(?={_VULGAR})"), " "),
    (re.compile(r"(?<=\d)\s*(?=[⁰-⁹¹²³]+[⁄/][₀-₉]+)"), " "),
    (re.compile(r"([⁰-⁹¹²³]+)[⁄/]([₀-₉]+)"), r"\1⁄\2"),
)
_OLD_ROMAN = "[\u2160-\u217f]"
#: what Unicode itself says is another way to write ASCII; digits of other scripts are found by their value
_COMPATIBLE = re.compile(rf"{_VULGAR}|{_OLD_ROMAN}|[⁰-⁹¹²³]+⁄[₀-₉]+|[\u3371-\u33df\U0001d400-\U0001d7ff]")
_RAISED = re.compile(r"(?<=[\w)\]}|′'])[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile(r"(?<=[^\W\d_]|\d)[₀-₉₊₋₍₎ₙᵢₖₓ]+")
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}


def plain_signs(text: str) -> str:
    """Return a text with ASCII digits, letters and minus signs; formulas stay as they are.

    Exponents and indices become ``^{...}`` and ``_{...}``, fractions ``1/2``, and roots LaTeX.
    """
    if not text.isascii():
        text = _ascii(text)
    text = re.sub(r"(?<=[A-Za-z0-9)])\*\*(?=-?\d)", "^", text)  # bold ends before no digit
    text = re.sub(r"(?<=[(\[,\s+-])(?:oo|inf(?:inity)?|∞)(?=\s*[,)\]])", r"\\infty", text)
    # A dash is a minus where nothing is before it that it could part from what follows.
    return re.sub(r"(^|[=({,:$]\s?|[^\W\d]\s)–(?=\d)", r"\1-", text)


def _ascii(text: str) -> str:
    for pattern, plain in _FRACTIONS:
        text = pattern.sub(plain, text)
    text = _COMPATIBLE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _RAISED.sub(lambda match: f"^{{{_small(match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{_small(match[0])}}}", text)
    text = re.sub(r"\d", lambda match: str(unicodedata.digit(match[0])), text.translate(_SIGNS))
    text = re.sub(r"([√∛∜])\s*(\d+|\([^()]*\)|\w)", lambda match: rf"\sqrt{_ROOTS[match[1]]}{{{match[2]}}}", text)
    return text.replace("π", r"\pi ")


def _small(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs).translate(_SIGNS)
