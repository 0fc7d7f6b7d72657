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
    with meter("capture a", total=1000, done=400, unit="texts") as counted:
        clock[0] += 20
        counted.advance(50, tokens=100)
        assert capsys.readouterr().err == ""
        clock[0] += 20
        counted.advance(50, tokens=300)
        # 50 texts in 20 s: neither what an earlier run has done counts, nor the time until the first results.
        assert capsys.readouterr().err == "capture a: 500/1,000 texts, 2.5 texts/s, about 3 min left\n"
        counted.advance(1, tokens=1)
        assert capsys.readouterr().err == ""
    assert (counted.tokens, counted.seconds) == (401, 40.0)


def test_the_first_results_alone_give_a_rate_with_the_start_in_it(clock, capsys):
    with meter("score [a]", total=3) as counted:
        clock[0] += 31
        counted.advance()
        assert capsys.readouterr().err == "score [a]: 1/3 items, 0.032 items/s, about 62 s left\n"
        clock[0] += 31
        counted.advance(5)
        assert capsys.readouterr().err == "score [a]: 6/3 items, 0.032 items/s, about less than 1 s left\n"
    assert counted.tokens == 0


def test_the_start_of_a_slow_model_is_in_neither_rate_nor_rest(clock, capsys):
    """Ten minutes of start, then a batch of 16 responses every 20 s, which arrive at the same moment."""
    with meter("sample a", total=64, unit="responses") as counted:
        clock[0] += 600
        for batch in range(3):
            clock[0] += 20
            for _ in range(16):
                counted.advance(tokens=7)
            if batch == 1:
                assert counted.rate == pytest.approx(16 / 20, rel=0.1)
        lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "sample a: 33/64 responses, 0.8 responses/s, about 39 s left"
    assert not any("token" in line for line in lines)


@pytest.mark.parametrize(
    ("total", "shown"),
    [(900, "450/900 bytes"), (5_000, "2.5/5.0 kB"), (3_000_000, "1.5/3.0 MB"), (7_000_000_000, "3.5/7.0 GB")],
)
def test_bytes_are_shown_in_one_unit_that_suits_them(clock, capsys, total, shown):
    with meter("capture a", total=total, unit="bytes") as counted:
        clock[0] += 31
        counted.advance(total // 2, tokens=5)
    line = capsys.readouterr().err
    assert line.startswith(f"capture a: {shown}, ")
    assert f" {shown.split()[1]}/s, about 31 s left" in line


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
    assert "2/2 items" in shown
    assert "items/s" in shown


def test_a_stream_of_results_is_measured_as_it_comes(clock):
    with meter("sample a", total=1000, unit="responses") as counted:
        clock[0] += 300
        for _ in range(200):
            clock[0] += 0.1
            counted.advance()
        assert counted.rate == pytest.approx(10, rel=0.01)
