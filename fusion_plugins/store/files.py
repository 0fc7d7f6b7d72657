"""Files that appear whole or not at all, files that are what they seem, and the lock that keeps a second writer out.

Every commit of a store is one write: temporary file, fsync, rename, fsync of the folder. Pages and reports are written
the same way. A folder may come from a stranger: no link in it is followed when something is written or deleted, and
what is no plain file is refused before it is opened, because to open a pipe can take for ever.
"""

import errno
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from filelock import FileLock, Timeout

from fusion_plugins.errors import StoreError

LOCK_NAME = ".lock"
TEMPORARY_SUFFIX = ".tmp"
#: how Lustre, NFS and others say that they were mounted without locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
#: what the holder of a lock writes into the lock file
_HOLDER = re.compile(r"process \d{1,20} on [\w.-]{1,255}")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def plain_file(path: Path) -> Path:
    """Return where a file of a store really lies, after a look at what it is.

    The folder itself may be reached through links. A file in it may be a link only to a file of the same folder, or, in
    the cache of the Hugging Face hub, to one of the same repository's blobs, which is how that cache keeps files.

    Raises:
        FileNotFoundError: there is none.
        StoreError: it is a pipe, a device, a socket, a folder, or a link that leads elsewhere.
    """
    found = path
    if stat.S_ISLNK(path.lstat().st_mode):
        found = Path(os.path.realpath(path, strict=True))
        if found.parent not in _homes(Path(os.path.realpath(path.parent))):
            raise StoreError(
                f"{path}: expected a file of its own folder, got a link to {found}. Links are not followed out of a "
                f"store: copy the file to its place if you trust it."
            )
    _require_plain(found.lstat().st_mode, path)
    return found


def _homes(folder: Path) -> list[Path]:
    """Return the folders in which the files of a folder may lie: itself, and the blobs of its repository."""
    return [folder] + [above.parent / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots"]


def _require_plain(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        got = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise StoreError(f"{path}: expected a plain file, got {got}. Remove it, or name another.")


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


def temporary_name(path: Path) -> Path:
    """Return a private name beside a path, which nobody can know beforehand."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def leftovers(path: Path) -> list[Path]:
    """Return what killed writers of a path left beside it; call it only while no other writer can be at work."""
    pattern = re.compile(re.escape(f".{path.name}") + r"(\.[0-9a-f]{16})?" + re.escape(TEMPORARY_SUFFIX))
    return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that is visible under its name only once the block has ended, complete and on the disk.

    A link of that name is replaced, not followed.

    Raises:
        StoreError: the disk is full, a quota or a permission is in the way, or the name is that of a folder, a device,
            a pipe or a socket. A file that had this name before is still there, unless the message says that the new
            one is.
    """
    with suppress(OSError):  # nothing there, or a link to nothing
        _require_plain(path.stat().st_mode, path)
    # A rename is atomic only within one file system, so the temporary file lies in the same folder.
    temporary = temporary_name(path)
    try:
        # Mode x fails on whatever has that name, links to nothing included.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            # Before the rename: otherwise a power failure can leave an empty file under the new name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    # A rename changes the folder, which is a file of its own: until it is flushed, a power failure undoes the rename.
    try:
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} was written, but its folder cannot be flushed to the disk: {error.strerror or error}. Nothing is "
            f"lost unless the machine fails now; repair the disk, then run the same command again to continue."
        ) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of ours, which is made if it is not there; it is on the disk afterwards.

    A reader may see the line cut off, and so does everyone after a failure.

    Raises:
        StoreError: the disk is full, a permission is in the way, or the name is taken by something that is no file.
    """
    with suppress(FileNotFoundError):
        _require_plain(path.lstat().st_mode, path)
    try:
        fresh = not path.exists()
        with open(path, "ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. What was written before is kept; free space or repair the "
        "permission, then run the same command again to continue."
    )


def link_or_copy(source: Path, path: Path) -> bool:
    """Give a file that never changes a second name, or copy it where no link can be made; return whether it is a link.

    Args:
        source: the file, as :func:`plain_file` returns it.
        path: a name that no file has.

    Raises:
        StoreError: as for :func:`new_file`.
    """
    try:
        os.link(source, path)
    except OSError:  # another file system, one without links, too many of them, a file of somebody else
        try:
            with source.open("rb") as file, new_file(path) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
        except OSError as error:
            raise StoreError(f"{source} cannot be read: {error}. Repair the permission or the disk.") from error
        return False
    try:
        with source.open("rb") as file:
            os.fsync(file.fileno())  # whoever put it there may not have done it
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} was linked, but cannot be flushed to the disk: {error.strerror or error}. Repair the disk, then "
            f"run the same command again to continue."
        ) from error
    return True


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file as :func:`new_file` does; text becomes UTF-8.

    Raises:
        StoreError: as for :func:`new_file`.
    """
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


class FolderLock:
    """The right to write into a folder, held until :meth:`close` or the end of the process, however it ends.

    Args:
        folder: the folder.
        file: a single file of the folder that is to be written, where others may write other files of it.

    Raises:
        StoreError: another process, or another writer of this one, holds it; the file system has no locks; the folder
            cannot be written; or the name of the lock file is taken by something else.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        path = folder / (LOCK_NAME if file is None else f".{file}{LOCK_NAME}")
        wanted = folder if file is None else folder / file
        with suppress(FileNotFoundError, NotADirectoryError):
            _require_plain(path.lstat().st_mode, path)
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
            raise StoreError(
                f"{wanted} is being written by {_holder(path)}. Wait until it ends, or give this run "
                + ("a folder of its own and join the two with `fusion store merge`." if file is None else "another.")
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


def _holder(path: Path) -> str:
    """Return who says to hold a lock; the file may be anybody's, so only what looks like us is repeated."""
    with suppress(OSError), path.open("rb") as file:
        found = _HOLDER.match(file.read(300).decode(errors="replace"))
        if found:
            return found[0]
    return "another process"


def _sign(descriptor: int) -> None:
    """Write into the lock file who holds it, for the message to the next who wants it."""
    # Another file may have got this name, by a hard link for instance: nothing is taken from a file that is not ours.
    if os.fstat(descriptor).st_size and not _HOLDER.match(os.pread(descriptor, 300, 0).decode(errors="replace")):
        return
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
