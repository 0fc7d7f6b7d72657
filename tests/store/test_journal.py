"""Commits are lines of a journal; what a stopped writer or a stranger leaves there is told apart."""

import json
import os
import shutil
from pathlib import Path

import pytest
from store_contents import content, make_store
from store_samples import manifest, record, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, open_store


def killed(folder: Path, source: Path, count: int = 5) -> Path:
    """A copy of a folder as a writer leaves it that is killed after some commits."""
    with StoreWriter(source, manifest(), table()) as writer:
        for number in range(count):
            writer.write(record(number))
            writer.flush()
        return Path(shutil.copytree(source, folder))


def test_a_commit_adds_a_line_and_leaves_the_manifest_alone(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        before = (tmp_path / "manifest.json").read_bytes()
        for number in range(5):
            writer.write(record(number))
            writer.flush()
            assert open_store(tmp_path).ids() == [f"text-{i:04d}" for i in range(number + 1)]
        assert (tmp_path / "manifest.json").read_bytes() == before
        assert (tmp_path / "manifest.log").read_bytes().count(b"\n") == 5
    assert not (tmp_path / "manifest.log").exists()
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 5


def test_lines_are_written_into_the_manifest_before_there_are_many(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table(), flush_records=1) as writer:
        most = 0
        for number in range(150):
            writer.write(record(number, n_tokens=3))
            lines = (tmp_path / "manifest.log").read_bytes() if (tmp_path / "manifest.log").exists() else b""
            most = max(most, lines.count(b"\n"))
        assert len(open_store(tmp_path)) == 150
    assert most == 65  # after 64 lines, and after as many as there were shards


@pytest.mark.parametrize("cut", [1, 7, 200])
def test_a_line_that_is_not_whole_is_a_commit_that_did_not_happen_and_its_records_are_recovered(
    tmp_path: Path, cut: int
) -> None:
    folder = killed(tmp_path / "killed", tmp_path / "whole")
    log = folder / "manifest.log"
    log.write_bytes(log.read_bytes()[:-cut])
    assert open_store(folder).ids() == [f"text-{number:04d}" for number in range(4)]
    StoreWriter(folder, manifest(), table()).close()
    assert content(folder) == content(tmp_path / "whole")
    assert not log.exists()


def test_a_journal_of_another_manifest_is_ignored_and_nothing_is_lost(tmp_path: Path) -> None:
    folder = killed(tmp_path / "killed", tmp_path / "whole")
    stale = (folder / "manifest.log").read_bytes()
    shutil.copy(tmp_path / "whole" / "manifest.json", folder)  # written anew; the journal was not deleted yet
    assert content(folder) == content(tmp_path / "whole")
    StoreWriter(folder, manifest(), table()).close()
    assert not (folder / "manifest.log").exists()
    (folder / "manifest.log").write_bytes(stale)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "drop", "name", "link", "pipe"])
def test_a_journal_that_was_changed_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = killed(tmp_path / "killed", tmp_path / "whole")
    log = folder / "manifest.log"
    lines = log.read_bytes().splitlines(keepends=True)
    if damage == "flip":
        lines[2] = lines[2].replace(b'"rows": 1', b'"rows": 2')
    elif damage == "drop":
        del lines[2]
    elif damage == "name":
        lines[2] = lines[2].replace(b"shard-000002", b"../../../etc")
    log.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(b"".join(lines))
        log.symlink_to(tmp_path / "elsewhere")
    elif damage == "pipe":
        os.mkfifo(log)
    else:
        log.write_bytes(b"".join(lines))
    with pytest.raises(StoreError, match=r"manifest\.log"):
        open_store(folder)
    with pytest.raises(StoreError, match=r"manifest\.log"):
        make_store(folder, [7])
