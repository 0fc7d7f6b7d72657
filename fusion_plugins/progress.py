"""Progress of a long run: a bar with tokens/s and time left, or a line now and then where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "meter"]

SECONDS_BETWEEN_LINES = 30.0


class Meter:
    """Counts what is done; see :func:`meter`.

    Attributes:
        tokens: tokens done in this run.
        seconds: since the meter was made.
    """

    def __init__(self, label: str, total: int, done: int, bar: Progress | None, console: Console) -> None:
        self.tokens = 0
        self._started = self._last_line = time.monotonic()
        self._label, self._total, self._count, self._at_start = label, total, done, done
        self._bar, self._console = bar, console
        self._task = bar.add_task(label, total=total, completed=done, speed="") if bar else None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Tokens done in this run over its time."""
        return self.tokens / max(self.seconds, 1e-9)

    def advance(self, items: int, tokens: int) -> None:
        """Note that so many more items, made of so many tokens, are done."""
        self._count += items
        self.tokens += tokens
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._count, speed=speed)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = self.seconds / max(self._count - self._at_start, 1) * (self._total - self._count)
            self._console.print(f"{self._label}: {self._count}/{self._total}, {speed}, about {left:,.0f} s left")


@contextmanager
def meter(label: str, total: int, done: int = 0) -> Iterator[Meter]:
    """Show progress on stderr while the block runs.

    Args:
        label: what is being done.
        total: items in all.
        done: items that an earlier run has done.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(label, total, done, None, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(label, total, done, bar, console)
