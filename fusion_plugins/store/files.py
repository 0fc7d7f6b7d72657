"""Files that appear whole or not at all, and the lock that keeps a second writer out.

Every commit of a store is one of these writes: temporary file, fsync, rename, fsync of the folder.
"""

import fcntl
import os
import signal
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fusion_plugins.errors import StoreError

__all__ = ["FolderLock", "interrupts_deferred", "make_folder", "sync_folder", "write_atomic"]

LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        StoreError: a file is in the way, or a permission.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"expected a folder, or a name for a new one: {folder} is a file or lies below one") from error
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror or error}. Name another one.") from error


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is visible under its name only once it is complete and on the disk.

    Raises:
        StoreError: the disk is full, a quota or a permission is in the way. What stood there before is still there,
            unless the message says that the new file is.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}. What was written before is kept; free space or "
                f"repair the permission, then run the same command again to go on."
            ) from error
        raise
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} was written, but its folder cannot be flushed to the disk: {error.strerror or error}. Nothing is "
            f"lost unless the machine fails now; repair the disk, then run the same command again to go on."
        ) from error


class FolderLock:
    """The right to write into a folder, held until :meth:`close` or the end of the process, however it ends.

    The lock belongs to an open file, so a killed process leaves none behind.

    Raises:
        StoreError: another process, or another writer of this one, holds it; the file system has no locks; or the
            folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = open(folder / LOCK_NAME, "a+")
        except OSError as error:
            raise StoreError(f"cannot write into {folder}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise StoreError(
                f"{folder} is being written by {holder}. Wait until it ends, or give this run a folder of its own and "
                f"join the two with `fusion store merge`."
            ) from None
        except OSError as error:
            self._file.close()
            raise StoreError(
                f"the file system of {folder} gives no locks ({error.strerror or error}), so that nothing would keep a "
                f"second writer out. Mount it with locks (Lustre: the option flock; NFS: a lock service on the "
                f"server), or write into a folder on a local disk and copy it when it is complete."
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        _HELD.add(self)

    def close(self) -> None:
        """Let the next writer in."""
        self._file.close()


_HELD: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked worker shares the open file; were it kept, the worker would hold the lock after its parent was killed.
    for lock in list(_HELD):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold a Ctrl-C back until the block has ended, so that a commit and what we remember of it stay together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[0])
