"""Files that appear whole or not at all, and the lock that keeps a second writer out of a folder.

Every commit of a store is one such write: temporary file, fsync, rename, fsync of the folder.
"""

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from fusion_plugins.errors import StoreError

LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"
#: how Lustre, NFS and others say that they were mounted without locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that files made, renamed or deleted there stay so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        StoreError: a file or a permission is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(
            f"expected a folder, or a name for a new one: {folder} is a file or lies below one. Name another folder."
        ) from error
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror or error}. Name another folder.") from error


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is visible under its name only once it is complete and on the disk.

    Raises:
        StoreError: the disk is full, or a quota or a permission is in the way. A file that had this name before is
            still there, unless the message says that the new one is.
    """
    # A rename is atomic only within one file system, so the temporary file lies in the same folder.
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # Before the rename: otherwise a power failure can leave an empty file under the new name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}. What was written before is kept; free space or "
                f"repair the permission, then run the same command again to continue."
            ) from error
        raise
    # A rename changes the folder, which is a file of its own: until it is flushed, a power failure undoes the rename.
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} was written, but its folder cannot be flushed to the disk: {error.strerror or error}. Nothing is "
            f"lost unless the machine fails now; repair the disk, then run the same command again to continue."
        ) from error


class FolderLock:
    """The right to write into a folder, held until :meth:`close` or the end of the process, however it ends.

    Raises:
        StoreError: another process, or another writer of this one, holds it; the file system has no locks; or the
            folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_NAME
        # The lock belongs to an open file, so kill -9 frees it, and a forked worker drops it. A soft lock, which is a
        # file that exists, would outlive its process: where there are no real locks we refuse instead.
        self._lock = FileLock(
            path,
            blocking=False,
            thread_local=False,  # a writer may be closed by another thread than the one that opened it
            fallback_to_soft=False,
            preserve_lock_file=True,
            on_acquired=_sign,
        )
        try:
            self._lock.acquire()
        except Timeout:
            holder = ""
            with suppress(OSError):
                holder = path.read_text().strip()
            raise StoreError(
                f"{folder} is being written by {holder or 'another process'}. Wait until it ends, or give this run a "
                f"folder of its own and join the two with `fusion store merge`."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise StoreError(
                    f"cannot write into {folder}: {error.strerror or error}. Repair the permission or the disk, or "
                    f"name another folder."
                ) from error
            raise StoreError(
                f"the file system of {folder} gives no locks ({error.strerror or error}), so that nothing would keep a "
                f"second writer out. Mount it with locks (Lustre: the option flock; NFS: a lock service on the "
                f"server), or write into a folder on a local disk and copy it when it is complete."
            ) from error

    def close(self) -> None:
        """Let the next writer in."""
        self._lock.release()


def _sign(descriptor: int) -> None:
    """Write into the lock file who holds it, for the message to the next who wants it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold a Ctrl-C back until the block has ended.

    A commit changes the disk and then what the writer remembers of it (which items are done, what is still buffered).
    A KeyboardInterrupt between the two would make the writer, which commits its buffer when it closes, write the same
    items twice.
    """
    # Python runs signal handlers in the main thread, and lets only that thread set them.
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
