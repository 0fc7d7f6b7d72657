"""Split a response into its blocks of code: fenced, quoted, in JSON, in the sessions of an interpreter, or bare."""

import ast
import doctest
import io
import itertools
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusion_plugins.scoring.names import UNPARSABLE, bound_names, parse

_FENCE = re.compile(r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")
_LANGUAGE = re.compile(r"[{.]*([A-Za-z][\w+#-]*)")
_PYTHON = {
    "",
    "python",
    "python3",
    "python2",
    "py",
    "py3",
    "ipython",
    "ipython3",
    "pycon",
    "sage",
    "cpython",
    "jupyter",
    "code",
}
_NO_LANGUAGE = {"text", "txt", "plain", "plaintext"}
#: marks that some models are trained to put around code instead of fences
_TAGS = re.compile(r"\[/?(?:PYTHON|CODE|BEGIN|DONE)\]|^[ \t]*</?(?:answer|solution|code|python|output)>", re.M)
_STARTS_BODY = re.compile(r"(?:from\s+\S+\s+import\b|import\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w)")
_STARTS_CODE = re.compile(rf"{_STARTS_BODY.pattern}|[A-Za-z_]\w*\s*=[^=]")
READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(0|\bos\.read\(0")
#: commands of a notebook
_MAGIC = re.compile(r"^[ \t]*[%!].*\n?", re.M)
#: prompts of IPython: "In [1]: x = 1", "   ...:     more", "Out[1]: 2"
_IN = re.compile(r"[ \t]*In ?\[[\d ]*\]:[ ]?(.*)")
_MORE = re.compile(r"[ \t]*\.{3,}:[ ]?(.*)")
_OUT = re.compile(r"[ \t]*Out ?\[\d+\]:")
#: lines of a block quote; the prompt of the interpreter is none
_QUOTE_MARK = re.compile(r"^[ ]{0,3}>(?!>>)[ ]?", re.M)
_QUOTED = re.compile(r"(?:^[ ]{0,3}>(?!>>).*(?:\n|\Z))+", re.M)
_QUOTED_FENCE = re.compile(r"^[ ]{0,3}>(?:[ ]{0,3}>)*[^`\n]*(?:```|~~~)", re.M)
_JSON_OPENING = re.compile(r"(?:^|[\s`:=>])[{\[](?=\s*[\"{\[])")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
BINDING = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Try)


@dataclass(frozen=True)
class Block:
    """A piece of code; ``labelled`` says that its fence names Python."""

    code: str
    labelled: bool

    @cached_property
    def tree(self) -> ast.Module | None:
        """The program; None where it is none."""
        tree: ast.Module | None = parse(self.code)
        return tree

    def defines(self, name: str) -> bool:
        """Return whether the block binds a name at its top, as far as one can see where it is no program."""
        if self.tree is None:
            return (
                re.search(rf"^((async\s+)?(def|class)\s+{re.escape(name)}\b|{re.escape(name)}\s*=)", self.code, re.M)
                is not None
            )
        return any(isinstance(node, BINDING) and name in bound_at_top(node) for node in self.tree.body)

    def is_stub(self) -> bool:
        """Return whether all that the block defines is signatures without bodies."""
        bodies = [node.body for node in (self.tree.body if self.tree else ()) if isinstance(node, ast.FunctionDef)]
        return bool(bodies) and all(map(is_empty, bodies))


def all_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a text, in order; of JSON those in its texts, without fences the bare ones."""
    found, has_fences = _fenced_blocks(text)
    is_json = text.lstrip()[:1] in ("{", "[")
    if is_json or all(block.code.lstrip()[:1] in ("{", "[", "") for block in found):
        inside = [block for value in _json_texts(text) for block in _blocks_of_value(value)]
        if inside:
            return inside
    return found if has_fences else _bare_blocks(text)


def without_quote_marks(text: str) -> str:
    r"""Return a text without the marks of Markdown's block quotes around code.

    Example:
        >>> without_quote_marks("So:\n> ```python\n> x = 1\n> ```")
        'So:\n```python\nx = 1\n```'
    """
    has_fences = "```" in text or "~~~" in text
    while True:
        shorter = _QUOTED.sub(
            lambda found: (
                _QUOTE_MARK.sub("", found[0]) if _QUOTED_FENCE.search(found[0]) or not has_fences else found[0]
            ),
            text,
        )
        if shorter == text:
            return text
        text = shorter


def _json_texts(text: str) -> Iterator[str]:
    """Yield the texts inside of the JSON that a text is or has, where a model was asked to answer with JSON."""
    decoder = json.JSONDecoder(strict=False)  # models write new lines as they are
    place = 0
    while (opening := _JSON_OPENING.search(text, place)) is not None:
        try:
            value, place = decoder.raw_decode(text, opening.end() - 1)
        except UNPARSABLE:
            place = opening.end()
        else:
            yield from _texts_in(value)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        inner = list(_json_texts(value)) if value.lstrip()[:1] in ("{", "[") else []
        yield from inner or [value]
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(part)


def _blocks_of_value(value: str) -> list[Block]:
    """Return the programs in a text out of JSON; none where it is prose, a number or a name."""
    found, has_fences = _fenced_blocks(value)
    if has_fences:
        return found
    tree = parse(value)
    says = tree is not None and any(not isinstance(node, ast.Expr) or READS_INPUT.search(value) for node in tree.body)
    return [Block(value, labelled=True)] if says or _STARTS_BODY.match(value) else []


def _fenced_blocks(text: str) -> tuple[list[Block], bool]:
    """Return the Python blocks of a text, and whether it has any fence."""
    lines, place, outside = text.split("\n"), 0, list[str]()
    found: list[Block] = []
    has_fences = False
    while place < len(lines):
        line = lines[place]
        fence = _FENCE.fullmatch(line)
        if fence is None or (fence["fence"][0] == "~" and fence["before"].strip()):
            outside.append(line)
            place += 1
            continue
        before = [*outside, fence["before"]]
        language = _language(fence["info"])
        if not has_fences and not fence["info"].strip() and _looks_like_code(before):
            # A fence that closes what the prompt has opened.
            found.append(Block(_clean(before, 0), labelled=True))
            place += 1
        else:
            body, next_place = _body(lines, place + 1, fence["fence"], python=language in _PYTHON)
            rest = fence["info"].strip().partition(" ")[2]  # "```python def f(): ..." on one line
            if language in _PYTHON:
                body = [rest, *body] if _STARTS_BODY.match(rest) else body
                found.append(Block(_clean(body, len(line) - len(line.lstrip())), labelled=language != ""))
            place = next_place
        has_fences, outside = True, []
    return found, has_fences


def _body(lines: list[str], start: int, fence: str, *, python: bool) -> tuple[list[str], int]:
    """Return the lines of a block that begins at ``start``, and the place of the line to read next.

    The block ends at the first fence like its own. A fence inside a string of Python does not end it; a fence that
    names a language ends it and opens the next one; an answer that was cut off ends it at last.
    """
    passed_over = None
    for place in range(start, len(lines)):
        match = _FENCE.fullmatch(lines[place])
        if match is None or not match["fence"].startswith(fence):
            continue
        before, info = match["before"].strip(), match["info"].strip()
        # The end of a line of code may close a block, a comment or a string that holds a fence does not.
        if before and (info or before.startswith("#")):
            continue
        body = lines[start:place] + ([match["before"]] if before else [])
        found = body, place if re.fullmatch(r"[A-Za-z][\w+#-]*", info) else place + 1
        if not (python and _ends_in_string("\n".join(body))):
            return found
        passed_over = passed_over or found
    if passed_over and _ends_in_string("\n".join(lines[start:])):
        return passed_over
    return lines[start:], len(lines)


def _language(info: str) -> str:
    match = _LANGUAGE.match(info.strip())
    language = match[1].lower() if match else ""
    return "" if language in _NO_LANGUAGE else language


def _ends_in_string(code: str) -> bool:
    """Return whether a text ends inside a triple-quoted string."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(code + "\n").readline):
            pass
    except tokenize.TokenError as error:
        return "string" in str(error)
    except (SyntaxError, ValueError):
        return False
    return False


def _looks_like_code(lines: list[str]) -> bool:
    """Return whether lines are a program, or its indented continuation."""
    text = "\n".join(lines)
    first = next((line for line in lines if line.strip()), "")
    if first[:4] in ("    ", "\t"):
        return parse(textwrap.dedent(text)) is not None
    return _STARTS_CODE.match(first) is not None


def _clean(lines: list[str], indent: int) -> str:
    """Return the code of a block without the indentation of its fence, prompts of the interpreter and other marks."""
    if session := _notebook_session(lines):
        return session
    if lines and lines[0].lstrip().startswith((">>>", "...")) and (session := _interpreter_session(lines)):
        return session
    code = "\n".join(line[min(indent, len(line) - len(line.lstrip())) :] for line in lines) + "\n"
    for mend in (str, textwrap.dedent, _without_marks, lambda code: textwrap.dedent(_without_marks(code))):
        if parse(mend(code)) is not None:
            return mend(code)
    return code


def _interpreter_session(lines: list[str]) -> str:
    """Return the code of a session with the prompts of Python; empty where there are none."""
    if not any(line.lstrip().startswith(">>> ") for line in lines):
        return ""
    try:
        examples = doctest.DocTestParser().get_examples("\n".join(lines))
    except ValueError:
        return ""
    return "".join(example.source for example in examples)


def _notebook_session(lines: list[str]) -> str:
    r"""Return the code of a session with the prompts of IPython; empty where there are none.

    Example:
        >>> _notebook_session(["In [1]: def f(x):", "   ...:     return 2 * x", "In [2]: f(1)", "Out[2]: 2"])
        'def f(x):\n    return 2 * x\nf(1)\n'
    """
    if not any(map(_IN.match, lines)):
        return ""
    # A session of the terminal marks every line; a page marks the first of each cell, and its code is below.
    marked = any(map(_MORE.match, lines)) or any(mark[1] for mark in map(_IN.match, lines) if mark)
    code, inside = list[str](), False
    for line in lines:
        mark = _IN.match(line) or (_MORE.match(line) if inside else None)
        if mark:
            inside = True
            code.append(mark[1])
        elif _OUT.match(line):
            inside = False
        elif inside and not marked:
            code.append(line)
    return _without_marks("\n".join(code).strip("\n") + "\n")


def _without_marks(code: str) -> str:
    # Spaces as typesetting has them, and commands of a notebook, are no Python.
    return _MAGIC.sub("", code.replace("\u00a0", " ").replace("\u200b", ""))


def _bare_blocks(text: str) -> list[Block]:
    """Return the programs in a text without fences; all of the text where it has none."""
    lines = _TAGS.sub("\n", text).split("\n")
    # The prompt "In [1]: x = 1" is an annotation of Python, too.
    session = _notebook_session(lines)
    if not session and parse("\n".join(lines)) is not None:
        return [Block("\n".join(lines), labelled=True)]
    if session := session or _interpreter_session(lines):
        return [Block(session, labelled=True)]
    found, place = [], 0
    while place < len(lines):
        code = _leading_code(lines[place:]) if _STARTS_CODE.match(lines[place]) else ""
        if code:
            found.append(Block(code, labelled=True))
        place += code.count("\n") + 1
    return found or _indented_blocks(lines) or [Block("\n".join(lines), labelled=True)]


def _indented_blocks(lines: list[str]) -> list[Block]:
    """Return the programs that are marked by their indentation alone, which is Markdown's oldest way."""
    found = list[Block]()
    for indented, part in itertools.groupby(
        lines, lambda line: not line.strip() or line[:1] == "\t" or line[:4] == "    "
    ):
        code = textwrap.dedent("\n".join(part)).strip("\n") + "\n"
        if indented and _STARTS_CODE.match(code) and parse(code) is not None:
            found.append(Block(code, labelled=True))
    return found


def _leading_code(lines: list[str]) -> str:
    """Return the longest program that lines begin with."""
    end = len(lines)
    while end > 0:
        try:
            body = ast.parse("\n".join(lines[:end])).body
        except SyntaxError as error:
            end = min(end - 1, max(0, (error.lineno or 1) - 1))
        except (ValueError, MemoryError, RecursionError):
            return ""
        else:
            # "Complexity: O(n)" reads as an annotation, and "Done" as a name.
            while body and (
                (isinstance(body[-1], ast.AnnAssign) and body[-1].value is None)
                or (isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, ast.Name | ast.Constant | ast.Tuple))
            ):
                body.pop()
            return "\n".join(lines[: body[-1].end_lineno]) + "\n" if body else ""
    return ""


def bound_at_top(node: ast.stmt) -> frozenset[str]:
    """Return the names that a statement binds."""
    return frozenset({node.name}) if isinstance(node, DEFINITIONS) else bound_names(node)


def is_empty(body: list[ast.stmt]) -> bool:
    """Return whether the body of a function does nothing: a docstring, ``pass``, ``...`` or NotImplementedError."""
    return all(
        isinstance(node, ast.Pass)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node))
        for node in body
    )
