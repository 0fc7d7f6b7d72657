"""Compiled kernels: warm in a new process, fresh after any change."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fusion_plugins

# Prints a result of a kernel, and how often it was loaded instead of compiled.
MEASURE = """
import numpy as np
from fusion_plugins.core.fusion.common_text import _first_difference
a, b = np.array([1, 2], np.int16), np.array([1, 3], np.int16)
print(_first_difference(a, b), sum(_first_difference.stats.cache_hits.values()))
"""


def measure(folder):
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    found = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def test_a_kernel_is_loaded_until_any_file_of_kernels_changes(tmp_path):
    package = tmp_path / "fusion_plugins"
    shutil.copytree(Path(fusion_plugins.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert measure(tmp_path) == ["1", "0"]
    assert measure(tmp_path) == ["1", "1"]
    # Another file, of the same size and time as before, as in an installed package.
    other = package / "core" / "text" / "token_bytes.py"
    times, source = other.stat(), other.read_text(encoding="utf-8")
    other.write_text(source.replace("made once", "MADE once"), encoding="utf-8")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert measure(tmp_path) == ["1", "0"]
    assert measure(tmp_path) == ["1", "1"]
