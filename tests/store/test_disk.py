"""A disk that fails at any one system call costs no row: the next run ends with the same content."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pytest
import store_jobs
from store_contents import content, store_or_rows
from store_samples import manifest, record, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, files, open_store
from fusion_plugins.store.maintain import compact, merge, verify

N_RECORDS = 9


class Disk:
    """Notes the calls that change files, and lets the ``fail_at``-th of them fail.

    Args:
        fail_at: number of the call; 0 for none.
        how: "before" or "after" it has done its work, or "for good": before, and so do all later ones.
    """

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int = 0, how: str = "before") -> None:
        self.calls: list[str] = []
        self.fail_at, self.how = fail_at, how
        for name in ("replace", "rename", "unlink"):
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
        return FailingFile(self, open(path, mode)) if mode == "wb" else open(path, mode)  # type: ignore[arg-type]


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


def make(folder: Path, numbers: range) -> Path:
    """A store of small shards."""
    with StoreWriter(folder, manifest(), table()) as writer:
        for number in numbers:
            writer.write(record(number))
            if number % 2:
                writer.flush()
    return folder


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
    parts = [make(tmp_path / "a", range(5)), make(tmp_path / "b", range(3, N_RECORDS))] if job == "merge" else []
    small = make(tmp_path / "small", range(N_RECORDS)) if job == "compact" else None

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
        ended, came = attempt(folder, fail_at)
        assert came[:fail_at] == calls[:fail_at]
        assert not ended or calls[fail_at - 1] == "unlink"  # the next run deletes it
        if (folder / "manifest.json").exists():
            held = content(folder)
            assert held == expected if small else all(item in expected for item in held)
        assert attempt(folder)[0]
        assert content(folder) == expected
        left = {path.name for path in folder.iterdir()} - {"manifest.json", "tokens.parquet", ".lock"}
        assert left == {shard.name for shard in store_or_rows(folder).manifest.shards}
        shutil.rmtree(folder)


def test_rows_that_an_older_manifest_does_not_list_are_taken_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "store", range(4))
    older = (folder / "manifest.json").read_bytes()
    make_more(folder, range(4, 8))
    whole = content(folder)
    (folder / "manifest.json").write_bytes(older)
    make_more(folder, range(0))
    assert content(folder) == whole
    assert f"{folder}: took in 4 rows of shards that were not in the manifest" in capsys.readouterr().err


def test_nothing_is_deleted_while_shards_of_an_older_manifest_are_missing(tmp_path: Path) -> None:
    folder = make(tmp_path / "store", range(4))
    older = (folder / "manifest.json").read_bytes()
    make_more(folder, range(4, 8))
    compact(folder)
    whole = content(folder)
    (folder / "manifest.json").write_bytes(older)
    before = sorted(folder.iterdir())
    with pytest.raises(StoreError, match=r"shard-000000.parquet cannot be read: .*--drop-damaged"):
        make_more(folder, range(0))
    assert sorted(folder.iterdir()) == before
    verify(folder, drop_damaged=True)
    assert len(open_store(folder)) == 0
    make_more(folder, range(0))
    assert content(folder) == whole


def make_more(folder: Path, numbers: range) -> None:
    with StoreWriter(folder, manifest(), table()) as writer:
        for number in numbers:
            writer.write(record(number))
            writer.flush()


@pytest.mark.parametrize("damage", ["foreign", "short", "changed"])
def test_a_shard_that_does_not_belong_here_is_set_aside(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "store", range(2))
    with StoreWriter(tmp_path / "other", manifest(model="other" if damage == "foreign" else "tiny"), table()) as other:
        other.write(record(7))
    data = (tmp_path / "other" / "shard-000000.parquet").read_bytes()
    if damage != "foreign":
        data = data[:-9] if damage == "short" else data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    for name in ("orphan-shard-000005.parquet", "orphan-shard-000005-1.parquet"):
        (folder / "shard-000005.parquet").write_bytes(data)
        make_more(folder, range(0))
        assert (folder / name).read_bytes() == data
        assert f"It is now {name}" in capsys.readouterr().err
    assert open_store(folder).ids() == ["text-0000", "text-0001"]


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
