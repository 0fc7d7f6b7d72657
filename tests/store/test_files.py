"""Files appear whole or not at all, and one writer at a time has a folder."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from store_samples import manifest, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, open_store
from fusion_plugins.store.files import FolderLock, interrupts_deferred, write_atomic


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path, manifest(), table()),
        pytest.raises(StoreError, match=r"is being written by process \d+"),
    ):
        StoreWriter(tmp_path, manifest(), table())
    StoreWriter(tmp_path, manifest(), table()).close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """No such file system can be mounted here: the answer of the kernel is all that is replaced."""

    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=rf"gives no locks \({os.strerror(code)}\).*Lustre: the option flock"):
        StoreWriter(tmp_path / "store", manifest(), table())


@pytest.mark.parametrize("below", ["", "store"])
def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"expected a folder, or a name for a new one: .*file"):
        StoreWriter(tmp_path / "file" / below, manifest(), table())
    with pytest.raises(StoreError, match=r"file.*: expected a store or a folder of responses, got no folder"):
        open_store(tmp_path / "file" / below)


def test_a_folder_that_may_not_be_made_is_named() -> None:
    with pytest.raises(StoreError, match="cannot make the folder /proc/store: "):
        StoreWriter("/proc/store", manifest(), table())


FORKED = """
import os, signal, sys
from pathlib import Path
from fusion_plugins.store.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:
    # Printed by the worker itself, which has let go of its parent's lock by then.
    print(os.getpid(), flush=True)
signal.pause()
"""


def test_a_forked_worker_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    worker = int(parent.stdout.readline())
    try:
        with pytest.raises(StoreError, match=rf"is being written by process {parent.pid} on "):
            FolderLock(tmp_path)
        parent.kill()
        parent.wait()
        os.kill(worker, 0)  # it is alive
        FolderLock(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_worker_that_ends_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    worker = os.fork()
    if worker == 0:
        os._exit(0)
    os.waitpid(worker, 0)
    with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on "):
        FolderLock(tmp_path)
    lock.close()


def test_the_lock_may_be_given_back_by_another_thread(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    thread = threading.Thread(target=lock.close)
    thread.start()
    thread.join()
    FolderLock(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_locks_of_earlier_releases_and_ours_see_each_other(tmp_path: Path) -> None:
    """They took `flock` on the same file and wrote the holder into it."""
    with open(tmp_path / ".lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("process 4711 on elsewhere\n")
        file.flush()
        with pytest.raises(StoreError, match="is being written by process 4711 on elsewhere"):
            FolderLock(tmp_path)
    lock = FolderLock(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with open(tmp_path / ".lock", "a+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    steps = []

    def commit() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            steps.append("inside")
        steps.append("after")

    with pytest.raises(KeyboardInterrupt):
        commit()
    assert steps == ["inside"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        with pytest.raises(StoreError, match="cannot write .*file: .* What was written before is kept; free space"):
            write_atomic(path, b"after")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
