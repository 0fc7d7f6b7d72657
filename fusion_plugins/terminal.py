"""The terminal: one way to print, one way to turn an error into a message and a status.

Everything that is printed may hold names and texts from outside. The consoles here show them as they are: no markup, no
emoji codes, no control characters. Use :class:`rich.text.Text` where the program itself wants a style.
"""

from typing import Any

from rich.console import Console
from rich.text import Text

from fusion_plugins.escape import for_terminal

#: columns of a table in a file or a pipe, which have no width of their own
PIPE_WIDTH = 200


class _Console(Console):
    """A console that takes every string for data. Messages are not wrapped, so that paths can be copied; tables are."""

    def print(self, *objects: Any, **options: Any) -> None:  # type: ignore[override]
        super().print(*objects, **({"soft_wrap": all(isinstance(part, str) for part in objects)} | options))

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(for_terminal(text), **(options | {"markup": False, "emoji": False}))


def console(*, stderr: bool = False, width: int | None = None, **options: Any) -> Console:
    """Return a console for text from outside.

    Args:
        stderr: print to stderr, where everything belongs that is not the result of the command.
        width: columns; by default those of the terminal, or :data:`PIPE_WIDTH` where there is none.
        options: passed on to :class:`rich.console.Console`.
    """
    settings = {"markup": False, "emoji": False, "highlight": False} | options
    made = _Console(stderr=stderr, width=width, **settings)
    return made if made.is_terminal or width is not None else _Console(stderr=stderr, width=PIPE_WIDTH, **settings)


def say(text: str, *, stderr: bool = False) -> None:
    """Print one message."""
    console(stderr=stderr).print(text)
