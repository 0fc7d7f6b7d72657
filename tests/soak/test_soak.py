"""The soak itself, in short: the whole of it is ``make soak``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak.py"


def soak(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SOAK), "--out", str(out), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_four_jobs_a_failing_server_and_flipped_bytes_leave_nothing_wrong(tmp_path: Path) -> None:
    few = ("--kills", 3, "--pairs", 1, "--disks", 2, "--prompts", 12, "--flips", 60)
    done = soak(tmp_path, "--jobs", "merge,compact,verify,export", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["check"]: line for line in json.loads((tmp_path / "lines.json").read_text())}
    assert {check: lines[f"kill -9: {check}"]["faults"] for check in ("merge", "compact", "verify", "export")} == {
        "merge": 3,
        "compact": 3,
        "verify": 3,
        "export": 3,
    }
    assert lines["server: 12 prompts x 8 answers"]["faults"] > 3
    assert lines["byte flips: store/tokens.parquet"]["faults"] == 60
    assert all(check in done.stdout for check in lines)


def test_what_is_wrong_is_in_the_table_and_in_the_status(tmp_path: Path) -> None:
    """What is done is kept; what was wrong is done again, here with the same end: there is no such job."""
    right = {"check": "byte flips: x", "faults": 3, "wrong": [], "seconds": 1.0, "note": "noted"}
    wrong = {"check": "kill -9: x", "faults": 3, "wrong": ["lost"], "seconds": 1.0, "note": ""}
    (tmp_path / "lines.json").write_text(json.dumps([right, wrong]))
    done = soak(tmp_path, "--jobs", "no such job", "--prompts", 0)
    assert done.returncode == 1
    assert "noted" in done.stdout
    assert "lost" not in done.stdout
    assert "no such job" in done.stdout
    assert soak(tmp_path, "--jobs", "", "--prompts", 0).returncode == 0
