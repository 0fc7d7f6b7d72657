"""Compiled kernels: loaded from the cache in a new process, compiled anew after a change."""

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

from numba.core.registry import CPUDispatcher

import fusion_plugins
import fusion_plugins.core

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


def test_a_kernel_is_loaded_until_its_file_changes(tmp_path):
    package = tmp_path / "fusion_plugins"
    shutil.copytree(Path(fusion_plugins.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert measure(tmp_path) == ["1", "0"]
    assert measure(tmp_path) == ["1", "1"]
    file = package / "core" / "fusion" / "common_text.py"
    source = file.read_text(encoding="utf-8")
    changed = source.replace("            return at\n    return -1", "            return at + 7\n    return -1")
    assert changed != source
    file.write_text(changed, encoding="utf-8")
    assert measure(tmp_path) == ["8", "0"]
    assert measure(tmp_path) == ["8", "1"]


def test_no_kernel_calls_a_kernel_of_another_file():
    """The cache looks at a kernel's own file only, so a change in the other one would go unnoticed."""
    names = [module.name for module in pkgutil.walk_packages(fusion_plugins.core.__path__, "fusion_plugins.core.")]
    kernels = []
    for module in map(importlib.import_module, names):
        kernels += [value for value in vars(module).values() if isinstance(value, CPUDispatcher)]
    assert len({kernel.py_func for kernel in kernels}) > 20
    for kernel in kernels:
        used = [kernel.py_func.__globals__.get(name) for name in kernel.py_func.__code__.co_names]
        others = [other for other in used if isinstance(other, CPUDispatcher)]
        assert {other.py_func.__module__ for other in others} <= {kernel.py_func.__module__}, kernel.py_func
