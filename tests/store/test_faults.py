"""No fault costs a committed record: kill -9 at any call, Ctrl-C, a full disk, a disk that fails at any call."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pytest
import store_jobs
from store_contents import content, make_store, record_bytes, store_or_rows
from store_samples import manifest, record, table

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, files, open_store
from fusion_plugins.store.maintain import compact, merge, verify

JOBS = str(Path(store_jobs.__file__))
KILLS = 20
N_RECORDS = 9


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, JOBS, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment(), **options)


class JobServer:
    def __init__(self) -> None:
        self.process = start("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, kill_at: str, *arguments: object) -> tuple[int, int, int]:
        """Run a job in a process of its own; return its status, the calls it made, and those that change files."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(" ".join(map(str, (kill_at, *arguments))) + "\n")
        self.process.stdin.flush()
        status, calls, file_calls = map(int, self.process.stdout.readline().split())
        return status, calls, file_calls


@pytest.fixture(scope="module")
def jobs() -> Iterator[JobServer]:
    server = JobServer()
    yield server
    assert server.process.stdin
    server.process.stdin.close()
    server.process.wait()


@pytest.mark.parametrize("job", ["write_store", "write_rows", "merge"])
def test_killed_anywhere_the_next_run_ends_with_the_same_content(jobs: JobServer, tmp_path: Path, job: str) -> None:
    parts: list[object] = []
    if job == "merge":
        parts = [tmp_path / "a", tmp_path / "b"]
        for part, (first, last) in zip(parts, [(0, 14), (10, store_jobs.N_ITEMS)], strict=True):
            assert jobs.run("never", "write_store", part, first, last)[0] == 0
    status, calls, file_calls = jobs.run("never", job, tmp_path / "whole", *parts)
    assert status == 0
    expected = content(tmp_path / "whole")
    assert len(expected) == store_jobs.N_ITEMS
    rng = random.Random(job)
    points = [str(point) for point in rng.sample(range(1, calls), KILLS // 2)]
    points += [f"f{point}" for point in rng.sample(range(1, file_calls), KILLS // 2)]
    for kill_at in points:
        folder = tmp_path / f"killed-{kill_at}"
        assert jobs.run(kill_at, job, folder, *parts)[0] == -signal.SIGKILL
        if (folder / "manifest.json").exists():
            assert set(map(str, content(folder))) <= set(map(str, expected))
        assert jobs.run("never", job, folder, *parts)[0] == 0
        assert content(folder) == expected
        left = sorted(path.name for path in folder.iterdir() if path.name not in {"manifest.json", "tokens.parquet"})
        assert left == [".lock", *sorted(shard.name for shard in store_or_rows(folder).manifest.shards)]


def test_ctrl_c_keeps_the_batch_and_a_second_writer_is_refused(tmp_path: Path) -> None:
    writer = start("write_store", tmp_path, 0, 300, 0.2, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout
    writer.stdout.readline()
    with pytest.raises(StoreError, match=rf"is being written by process {writer.pid} on "):
        StoreWriter(tmp_path, manifest(), table())
    writer.send_signal(signal.SIGINT)
    _, errors = writer.communicate(timeout=60)
    assert writer.returncode == 130
    found = re.search(r"Stopped\. (\d+) records are safe in .*; run the same command again", errors)
    assert found
    assert int(found[1]) == len(open_store(tmp_path)) >= store_jobs.BATCH
    StoreWriter(tmp_path, manifest(), table()).close()


def test_a_full_disk_keeps_what_was_there_before(tmp_path: Path) -> None:
    small = tmp_path / "limited"
    full = start("fill_disk", small, 7000, stderr=subprocess.PIPE)
    _, errors = full.communicate(timeout=60)
    assert full.returncode == 1
    assert re.search(
        r"StoreError: cannot write .*shard-\d+.parquet: File too large\. What was written before is kept", errors
    )
    kept = open_store(small)
    assert 0 < len(kept) < store_jobs.N_ITEMS or len(kept.manifest.shards) > 1
    assert verify(small).problems == []
    assert list(small.glob("*.tmp")) == list(small.glob(".*.tmp")) == []
    store_jobs.write_store(str(small))
    assert content(small) == sorted(record_bytes(read_back(tmp_path, number)) for number in range(store_jobs.N_ITEMS))


def read_back(folder: Path, number: int) -> Record:
    """A record as any store gives it back."""
    one = folder / f"one-{number}"
    with StoreWriter(one, manifest(), table()) as writer:
        writer.write(record(number))
    return open_store(one)[f"text-{number:04d}"]


class Disk:
    """Notes the calls that change files, and lets the ``fail_at``-th of them fail.

    Args:
        fail_at: number of the call; 0 for none.
        how: "before" or "after" it has done its work, or "for good": before, and so do all later ones.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int = 0, how: str = "before") -> None:
        self.calls: list[str] = []
        self.fail_at, self.how = fail_at, how
        for name in ("replace", "rename", "unlink", "link"):
            patch.setattr(os, name, self.failing(name, getattr(os, name)))
        patch.setattr(
            os, "fsync", self.failing("fsync", lambda descriptor: None)
        )  # the machine does not fail, and fast
        patch.setattr(files, "open", self.open, raising=False)

    def failing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            late = self.fail_at and len(self.calls) > self.fail_at and self.how == "for good"
            if len(self.calls) != self.fail_at and not late:
                return function(*arguments, **options)
            if self.how == "after":
                function(*arguments, **options)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return call

    def open(self, path: Path, mode: str) -> Any:
        return FailingFile(self, open(path, mode)) if mode == "xb" else open(path, mode)  # type: ignore[arg-type]


class FailingFile:
    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self.file, self.flush, self.fileno = file, file.flush, file.fileno
        self.write = disk.failing("write", file.write)

    def __enter__(self) -> "FailingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def run(job: str, folder: Path, parts: list[Path]) -> None:
    if job == "store":
        store_jobs.write_store(str(folder), "0", str(N_RECORDS))
    elif job == "rows":
        store_jobs.write_rows(str(folder), N_RECORDS)
    elif job == "compact":
        compact(folder)
    else:
        merge(parts, folder)


@pytest.mark.parametrize("how", ["before", "after", "for good"])
@pytest.mark.parametrize("job", ["store", "rows", "compact", "merge"])
def test_a_disk_that_fails_at_any_call_costs_no_row(tmp_path: Path, job: str, how: str) -> None:
    parts: list[Path] = []
    if job == "merge":
        parts = [
            make_store(tmp_path / name, range(*numbers), finish=False)
            for name, numbers in {"a": (0, 5), "b": (3, N_RECORDS)}.items()
        ]
    small = make_store(tmp_path / "small", range(N_RECORDS), finish=False) if job == "compact" else None

    def attempt(folder: Path, fail_at: int = 0) -> tuple[bool, list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, fail_at, how)
            try:
                run(job, folder, parts)
            except StoreError:
                return False, disk.calls
            return True, disk.calls

    def fresh(name: str) -> Path:
        return shutil.copytree(small, tmp_path / name) if small else tmp_path / name

    ended, calls = attempt(fresh("whole"))
    assert ended
    assert set(calls) - {"unlink"} == {"write", "fsync", "replace"}
    expected = content(tmp_path / "whole")
    assert len(expected) == N_RECORDS
    for fail_at in range(1, len(calls) + 1):
        folder = fresh(f"failed-{fail_at}")
        ended, made = attempt(folder, fail_at)
        assert made[:fail_at] == calls[:fail_at]
        assert not ended or calls[fail_at - 1] == "unlink"  # the next run deletes it
        if (folder / "manifest.json").exists():
            held = content(folder)
            assert held == expected if small else all(item in expected for item in held)
        assert attempt(folder)[0]
        assert content(folder) == expected
        left = {path.name for path in folder.iterdir()} - {"manifest.json", "tokens.parquet", ".lock"}
        assert left == {shard.name for shard in store_or_rows(folder).manifest.shards}
        shutil.rmtree(folder)


def test_a_writer_whose_commit_failed_takes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(0))
        with monkeypatch.context() as patch:
            Disk(patch, 1)
            with pytest.raises(StoreError, match="Input/output error"):
                writer.flush()
        with pytest.raises(StoreError, match="an earlier write failed"):
            writer.flush()
    assert len(open_store(tmp_path)) == 0
