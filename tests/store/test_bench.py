"""The benchmark runs, and what docs/store.md promises holds on a small run of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_store.py"


@pytest.mark.slow
def test_the_store_keeps_its_promises_on_realistic_rows() -> None:
    command = [sys.executable, str(SCRIPT), "--tokens", "6000", "--megabytes", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bytes/token") == 4
