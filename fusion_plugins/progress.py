"""Progress of a long run: a bar with the time left, or a line now and then where there is no terminal.

A line has one unit: what is done, how fast, and how long the rest will take. Speed and rest are measured from the first
results on, so that the start of a model or of its actors does not count.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusion_plugins.escape import for_terminal
from fusion_plugins.terminal import console

SECONDS_BETWEEN_LINES = 30.0
#: results that arrive within this time of the first ones were worked on together with them, and with the start
SETTLING_SECONDS = 1.0
#: unit -> its larger forms
LARGER = {"bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}


class Meter:
    """Counts what is done; see :func:`meter`.

    Attributes:
        tokens: tokens done in this run; 0 where none are counted.
    """

    def __init__(self, label: str, total: int, done: int, unit: str, bar: Progress | None, messages: Console) -> None:
        self.tokens = 0
        self._started = self._last_line = time.monotonic()
        self._label, self._total, self._count, self._at_start = label, total, done, done
        larger = LARGER.get(unit, ())
        self._scale, self._unit = next(((scale, name) for scale, name in larger if total >= scale), (1.0, unit))
        #: (time, count) when the first results were there, at the last result, and where the rate is measured to
        self._settled = self._last = self._mark = (self._started, done)
        self._first_result: float | None = None
        self._burst = self._started
        self._bar, self._messages = bar, messages
        self._task = bar.add_task(label, total=total, completed=done, amount=self._amount, speed="") if bar else None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        """Items per second, without the time until the first results; with it while there are no others.

        Engines give the results of a batch at one moment: the rate is measured from batch to batch.
        """
        (since, before), (until, after), now = self._settled, self._mark, time.monotonic()
        if until > since:
            return (after - before) / (until - since)
        if self._first_result is not None and now - since >= SETTLING_SECONDS:
            return (before - self._at_start) / (now - since)
        return (self._count - self._at_start) / max(now - self._started, 1e-9)

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        """Count more items, and the tokens they are made of where the run counts tokens."""
        now = time.monotonic()
        if self._first_result is None:
            self._first_result = self._burst = now
        elif now - self._last[0] >= SETTLING_SECONDS:
            self._mark, self._burst = self._last, now
        self._count += items
        self.tokens += tokens
        self._last = now, self._count
        if now - self._first_result < SETTLING_SECONDS:
            self._settled = self._mark = self._last
        elif now - self._burst >= SETTLING_SECONDS:
            self._mark = self._last
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._count, amount=self._amount, speed=self._speed)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = duration(max(self._total - self._count, 0) / max(self.rate, 1e-9))
            self._messages.print(f"{self._label}: {self._amount}, {self._speed}, about {left} left")

    @property
    def _amount(self) -> str:
        if self._scale == 1:
            return f"{self._count:,}/{self._total:,} {self._unit}"
        return f"{self._count / self._scale:,.1f}/{self._total / self._scale:,.1f} {self._unit}"

    @property
    def _speed(self) -> str:
        speed = self.rate / self._scale
        return f"{speed:,.0f} {self._unit}/s" if speed >= 100 else f"{speed:.2g} {self._unit}/s"


@contextmanager
def meter(label: str, total: int, done: int = 0, *, unit: str = "items") -> Iterator[Meter]:
    """Show progress on stderr while the block runs.

    Args:
        label: name of the run.
        total: number of all items.
        done: items that an earlier run has done.
        unit: what the items are, as a plural (texts, responses); ``bytes`` are shown as kB, MB or GB.
    """
    messages, label = console(stderr=True), for_terminal(label)  # a label may hold the name of a model
    if not messages.is_terminal:
        yield Meter(label, total, done, unit, None, messages)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages) as bar:
        yield Meter(label, total, done, unit, bar, messages)


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it.

    Example:
        >>> [duration(seconds) for seconds in (0.2, 90, 600, 12_240)]
        ['less than 1 s', '90 s', '10 min', '3.4 hours']
    """
    if seconds < 1:
        return "less than 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
