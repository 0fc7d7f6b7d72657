r"""Text from outside (names, ids, texts, answers, paths), made safe for the place where it is shown.

Models, stores, templates and servers choose these texts, so each is data: in a terminal it must not move the cursor, in
a page it must not be markup, in a plot it must not be mathematics. There is one function per place.

Example:
    >>> for_terminal("a\x1b[2Jb")
    'a\\x1b[2Jb'
    >>> str(for_html("<script>"))
    '&lt;script&gt;'
    >>> for_markdown("a|b\n# c")
    'a\\|b \\# c'
    >>> for_plot("$x$")
    '\\$x\\$'
"""

import html
import re
import unicodedata

# Controls but tab and newline, halves of surrogate pairs, and the marks that reorder what a reader sees.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|~$])")


def for_terminal(text: object) -> str:
    """Return the text with every control character written out, so that no escape sequence reaches the terminal.

    Tabs and newlines stay. Print the result with :func:`fusion_plugins.terminal.console`: rich would read ``[/b]`` as
    markup otherwise.
    """
    return _UNSEEN.sub(lambda found: _written_out(found[0]), str(text))


def for_html(text: object) -> str:
    """Return the text for the inside of an element or of a quoted attribute."""
    return html.escape(for_terminal(text), quote=True)


def for_markdown(text: object) -> str:
    """Return the text as one line of plain Markdown, also inside a table or a heading."""
    line = " ".join(for_terminal(text).split())
    # HTML inside Markdown is markup too, and backslashes do not stop all renderers from reading it.
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line)


def for_plot(text: object) -> str:
    """Return the text for matplotlib, which takes what stands between two dollars for mathematics."""
    return for_terminal(text).replace("$", r"\$")


def _written_out(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) == "Cc":
        return f"\\x{code:02x}"
    return f"\\u{code:04x}"
