"""What the terminal shows of a chain: a table that changes, or a line per event where there is no terminal."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.table import Table

from fusion_plugins.chain.process import Running, tail
from fusion_plugins.progress import duration
from fusion_plugins.terminal import console

REFRESH_SECONDS = 0.5
WAITING, RUNNING, DONE, PRESENT, FAILED, STOPPED = "waits", "runs", "done", "was done", "failed", "stopped"
#: what is shown first where the terminal has fewer lines than there are steps
URGENCY = (FAILED, RUNNING, STOPPED, WAITING, DONE, PRESENT)
#: lines of the terminal that no step can have: the titles, what is not shown, and the cursor's
OTHER_LINES = 3


class Display:
    """The state of the steps.

    Args:
        names: the steps that are shown.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._states: dict[str, tuple[str, float | None]] = dict.fromkeys(names, (WAITING, None))
        self._running: dict[str, Running] = {}
        self._messages = console(stderr=True)
        self._live = Live(console=self._messages, auto_refresh=False) if self._messages.is_terminal else None
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for name in self._running:
            self._states[name] = (STOPPED, None)
        self._running = {}
        if self._live is not None:
            # The last table stays in the terminal, which scrolls: it has every step.
            self._live.update(self._table(list(self._states)), refresh=False)
            self._live.stop()

    @property
    def finished(self) -> list[str]:
        """The steps that are done, now or before."""
        return [name for name, (state, _) in self._states.items() if state in (DONE, PRESENT)]

    def started(self, running: Running) -> None:
        """A step has started."""
        self._running[running.step.name] = running
        self._event(running.step.name, RUNNING, None, f"{running.step.name}: started")

    def passed(self, name: str, seconds: float) -> None:
        """A step was done by an earlier run."""
        self._event(name, PRESENT, seconds, f"{name}: was done")

    def done(self, name: str, seconds: float) -> None:
        """A step has ended well."""
        self._event(name, DONE, seconds, f"{name}: done in {duration(seconds)}")

    def failed(self, name: str, seconds: float) -> None:
        """A step has failed."""
        self._event(name, FAILED, seconds, f"{name}: failed after {duration(seconds)}")

    def say(self, message: str) -> None:
        """Show a message above the table."""
        (self._live.console if self._live is not None else self._messages).print(message)

    def refresh(self, *, now: bool = False) -> None:
        """Draw the table again, if it is time to."""
        if self._live is not None and (now or time.monotonic() - self._shown >= REFRESH_SECONDS):
            self._shown = time.monotonic()
            self._live.update(self._fitting(), refresh=True)

    def _event(self, name: str, state: str, seconds: float | None, line: str) -> None:
        self._states[name] = (state, seconds)
        if state != RUNNING:
            self._running.pop(name, None)
        if self._live is None:
            self._messages.print(line)
        self.refresh(now=True)

    def _fitting(self) -> Group | Table:
        """Return what the terminal has lines for."""
        room = max(1, self._messages.height - OTHER_LINES)
        if len(self._states) <= self._messages.height - 1:
            return self._table(list(self._states))
        urgent = sorted(self._states, key=lambda name: URGENCY.index(self._states[name][0]))[:room]
        table = self._table([name for name in self._states if name in urgent])
        return Group(table, f"{len(self.finished)} of {len(self._states)} steps are done; {room} are shown")

    def _table(self, names: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False)
        for title in ("step", "state", "time"):
            table.add_column(title, no_wrap=True)
        table.add_column("last line of its log", no_wrap=True, overflow="ellipsis", ratio=1)
        for name in names:
            state, seconds = self._states[name]
            running = self._running.get(name)
            line = "".join(tail(running, 1)) if running else ""
            taken = running.seconds if running else seconds
            table.add_row(name, state, "" if taken is None else duration(taken), line)
        return table
