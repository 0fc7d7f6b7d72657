"""Compiled kernels: numba with a cache on disk, so that a new process starts warm.

Kernels release the GIL. Whoever wants several threads gives each its own slice of the work; numba's own thread pools
are not used, because they do not survive the ``fork`` of data workers.

numba's cache looks at the time and size of a kernel's own file, so a change in another file would go unnoticed.
Hence two rules: a kernel calls other kernels of its own file only, and the fields of a tuple that kernels of another
file read (:class:`~fusion_plugins.core.text.token_bytes.TokenBytes`) are not reordered without a new
name for the tuple.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(function: Kernel) -> Kernel:
    """Compile a kernel without Python objects and without the GIL, and cache the machine code on disk.

    numba writes beside the module or, where that is read-only, into the user's cache folder. Where neither can be
    written it refuses to build a cached kernel; the kernel is then compiled once per process.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
