"""Text from outside, in each place where it is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_plugins.escape import for_html, for_markdown, for_plot, for_terminal

HOSTILE = {
    "\x1b[2J\x1b]0;title\x07": r"\x1b[2J\x1b]0;title\x07",
    "\x9b31m": r"\x9b31m",
    "a\rb\x00": r"a\x0db\x00",
    "half \ud83d": r"half \ud83d",
    "right to left \u202e": r"right to left \u202e",
    "tab\tand\nnewline": "tab\tand\nnewline",
    "中文 naïve 🙂": "中文 naïve 🙂",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_controls_are_written_out_and_letters_stay(text):
    assert for_terminal(text) == HOSTILE[text]


@given(st.text(st.characters(codec=None)))
def test_nothing_reaches_a_terminal_that_moves_its_cursor_or_cannot_be_encoded(text):
    shown = for_terminal(text)
    shown.encode()
    assert not any(ord(letter) < 32 and letter not in "\t\n" or 127 <= ord(letter) < 160 for letter in shown)


def test_html_is_text():
    assert for_html("<script>alert('1')</script> & \"q\"") == (
        "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;q&quot;"
    )


def test_markdown_is_one_line_of_text():
    assert for_markdown("a|b\n# **c** <script> [x](y) `z`") == (r"a\|b \# \*\*c\*\* &lt;script&gt; \[x\]\(y\) \`z\`")


@pytest.mark.parametrize("name", ["$x$", r"\frac{1}{2}$", "a$b", r"\$", "$$", r"$\undefined$"])
def test_a_plot_draws_the_name_itself(name):
    pytest.importorskip("matplotlib")
    from fusion_plugins.page import new_figure, svg

    figure = new_figure(4, 2)
    figure.subplots().set_title(for_plot(name))
    assert name in str(svg(figure, "a title"))
