"""Compiled kernels: numba with a cache on disk, so that a new process starts warm.

Kernels release the GIL. Whoever wants several threads gives each its own slice of the rows; numba's own thread pools
are not used, because they do not survive the ``fork`` of data workers.
"""

import contextlib
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

__all__ = ["compiled"]

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(function: Kernel) -> Kernel:
    """Compile a kernel without Python objects and without the GIL, and cache the machine code on disk.

    numba writes beside the module or, where that is read-only, into the user's cache folder. Where neither can be
    written it refuses to build a cached kernel; the kernel is then compiled once per process.
    """
    try:
        kernel = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
    # numba looks only at the time and size of the kernel's own file. Code that it calls in other files is compiled
    # into it, and files of an installed package may all have one time.
    with contextlib.suppress(AttributeError):
        file = kernel._cache._cache_file
        file._source_stamp = file._source_stamp, _sources()
    return kernel  # type: ignore[no-any-return]


@cache
def _sources() -> str:
    """Sha256 (hex) over the files of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source = path.read_bytes()
        if b"@compiled" in source:
            digest.update(source)
    return digest.hexdigest()
