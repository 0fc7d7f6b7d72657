"""What the terminal shows of a chain."""

import subprocess
import sys
import time
from io import StringIO

import pytest
from rich.console import Console

from fusion_plugins.chain import show
from fusion_plugins.chain.process import Running
from fusion_plugins.chain.settings import Step


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes a terminal of some lines and gives it to the display."""

    def make(height: int) -> Console:
        made = Console(file=StringIO(), force_terminal=True, width=80, height=height, color_system=None)
        monkeypatch.setattr(show, "console", lambda **_: made)
        return made

    return make


def started(name: str, tmp_path) -> Running:
    step = Step(name=name, command="true")
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return Running(step, process, tmp_path / f"{name}.log", 0, time.monotonic())


def lines(terminal: Console, shown) -> list[str]:
    return [line.rstrip() for line in "".join(segment.text for segment in terminal.render(shown)).splitlines()]


def names(terminal: Console, shown) -> list[str]:
    return [line.split()[0] for line in lines(terminal, shown)[1:]]


def test_a_chain_that_fits_is_shown_whole(terminal):
    made = terminal(8)
    steps = [f"step{number}" for number in range(7)]
    display = show.Display(steps)
    assert names(made, display._fitting()) == steps


def test_of_more_steps_than_lines_those_at_work_and_the_next_ones_are_shown(terminal, tmp_path):
    made = terminal(10)
    steps = [f"step{number}" for number in range(40)]
    display = show.Display(steps)
    for name in steps[:20]:
        display.passed(name, 1.0)
    display.started(started("step30", tmp_path))
    display.failed("step25", 2.0)
    shown = display._fitting()
    assert names(made, shown)[:-1] == ["step20", "step21", "step22", "step23", "step24", "step25", "step30"]
    assert lines(made, shown)[-1] == "20 of 40 steps are done; 7 are shown"
    assert len(lines(made, shown)) < made.height


@pytest.mark.parametrize("height", [1, 2, 3])
def test_a_terminal_of_few_lines_shows_one_step(terminal, height):
    made = terminal(height)
    display = show.Display(["a", "b", "c", "d"])
    assert names(made, display._fitting())[:-1] == ["a"]


def test_the_last_table_has_every_step(terminal):
    made = terminal(6)
    steps = [f"step{number:02d}" for number in range(20)]
    with show.Display(steps) as display:
        for name in steps:
            display.passed(name, 1.0)
    end = made.file.getvalue().rpartition("last line of its log")[2]
    assert all(name in end for name in steps)
