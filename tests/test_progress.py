"""Progress lines where there is no terminal."""

import os
import subprocess
import sys

import pytest

from fusion_plugins import progress
from fusion_plugins.progress import meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_comes_now_and_then_with_the_speed_and_the_time_left(clock, capsys):
    with meter("capture a", total=1000, done=400) as counted:
        clock[0] += 20
        counted.advance(50, tokens=100)
        assert capsys.readouterr().err == ""
        clock[0] += 20
        counted.advance(50, tokens=300)
        # 100 items in 40 s: what an earlier run has done does not count.
        assert capsys.readouterr().err == "capture a: 500/1000, 10 tokens/s, about 200 s left\n"
        counted.advance(1, tokens=1)
        assert capsys.readouterr().err == ""
    assert (counted.tokens, counted.seconds) == (401, 40.0)


def test_a_run_that_counts_no_tokens_shows_no_speed(clock, capsys):
    with meter("score [a]", total=3) as counted:
        clock[0] += 31
        counted.advance()
        assert capsys.readouterr().err == "score [a]: 1/3, about 62 s left\n"
        clock[0] += 31
        counted.advance(5)
        assert capsys.readouterr().err == "score [a]: 6/3, about 0 s left\n"
    assert counted.tokens == 0


def test_on_a_terminal_there_is_a_bar():
    """In a process of its own: hosts that other tests load change what rich takes for a terminal."""
    code = (
        "from fusion_plugins.progress import meter\n"
        "with meter('sample [a]', total=2) as counted:\n"
        "    counted.advance(1, tokens=5)\n"
        "    counted.advance(1, tokens=5)\n"
    )
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120"}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stderr
    assert "sample [a]" in shown
    assert "2/2" in shown
    assert "tokens/s" in shown
