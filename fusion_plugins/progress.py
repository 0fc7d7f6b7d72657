"""Progress of a long run: a bar with the time left, or a line now and then where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class Meter:
    """Counts what is done; see :func:`meter`.

    Attributes:
        tokens: tokens done in this run; 0 where none are counted.
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

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        """Count more items, and the tokens they are made of where the run counts tokens."""
        self._count += items
        self.tokens += tokens
        speed = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s" if self.tokens else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._count, speed=speed)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            # Only this run's items tell its speed; what an earlier run has done took no time now.
            seconds_per_item = self.seconds / max(self._count - self._at_start, 1)
            left = f"about {seconds_per_item * max(self._total - self._count, 0):,.0f} s left"
            parts = [f"{self._label}: {self._count}/{self._total}", speed, left]
            self._console.print(", ".join(part for part in parts if part))


@contextmanager
def meter(label: str, total: int, done: int = 0) -> Iterator[Meter]:
    """Show progress on stderr while the block runs.

    Args:
        label: name of the run.
        total: number of all items, in any unit (texts, bytes, responses).
        done: items that an earlier run has done.
    """
    console = Console(stderr=True, markup=False)  # a label may hold a name with brackets
    if not console.is_terminal:
        yield Meter(label, total, done, None, console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(label, total, done, bar, console)
