"""The table of verdicts in docs/responses.md, on the small datasets of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_99_percent_of_the_verdicts_are_right_in_every_style_and_as_many_as_those_of_math_verify():
    command = [sys.executable, "tools/verdict_table.py", "--data", "tests/data", "--rows", "12", "--examples", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == ["answer", "gsm8k", "math"]
    assert len(rows) == 12
    for style, *cells in rows[1:]:
        for cell in cells:
            ours, alone = (float(number.strip("()")) for number in cell.split())
            # A published solution may end in other words than its answer.
            assert ours >= max(alone, 99 if style != "solution" else 95), (style, run.stdout)
