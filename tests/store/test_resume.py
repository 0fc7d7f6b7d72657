"""A store goes on where it stopped, and only as what it was."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from store_samples import manifest, record, table

from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store import StoreWriter, open_store


def test_the_next_writer_knows_what_is_done(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(1))
    assert not open_store(tmp_path).manifest.complete
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        assert writer.done_ids == {"text-0001"}
        writer.write(record(2))
        writer.finish()
    store = open_store(tmp_path)
    assert store.ids() == ["text-0001", "text-0002"]
    assert store.manifest.complete


def write_and_raise(path: Path, error: BaseException) -> None:
    with StoreWriter(path, manifest(), table()) as writer:
        writer.write(record(1))
        raise error


def test_an_error_in_the_block_keeps_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_and_raise(tmp_path, ZeroDivisionError())
    assert open_store(tmp_path).ids() == ["text-0001"]


def test_ctrl_c_keeps_what_was_written_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(tmp_path, KeyboardInterrupt())
    assert open_store(tmp_path).ids() == ["text-0001"]
    assert "1 records are safe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "other"),
        ("tokenizer_fingerprint", None),
        ("top_k", 8),
        ("temperature", 2.0),
        ("texts_fingerprint", "changed"),
        ("template_hash", "changed"),
        ("dtype", "bfloat16"),
    ],
)
def test_another_run_is_refused_with_both_values(tmp_path: Path, field: str, value: object) -> None:
    StoreWriter(tmp_path, manifest(), table()).close()
    other = table(301)
    tokens = other if field == "tokenizer_fingerprint" else table()
    wanted = manifest(**{field: other.fingerprint if value is None else value})
    old, new = getattr(manifest(), field), getattr(wanted, field)
    with pytest.raises(MismatchError, match=f"{field}: the folder has {old!r}, expected {new!r}"):
        StoreWriter(tmp_path, wanted, tokens)


def test_a_table_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="Build both from the same tokenizer"):
        StoreWriter(tmp_path, manifest(), table(301))


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path, manifest(), table()),
        pytest.raises(StoreError, match=r"is being written by process \d+"),
    ):
        StoreWriter(tmp_path, manifest(), table())
    StoreWriter(tmp_path, manifest(), table()).close()


def test_temporary_files_of_a_killed_writer_are_removed_and_a_broken_shard_is_set_aside(tmp_path: Path) -> None:
    StoreWriter(tmp_path, manifest(), table()).close()
    broken, temporary = tmp_path / "shard-000007.parquet", tmp_path / ".manifest.json.tmp"
    broken.write_bytes(b"half")
    temporary.write_bytes(b"half")
    StoreWriter(tmp_path, manifest(), table()).close()
    assert not broken.exists()
    assert (tmp_path / "orphan-shard-000007.parquet").read_bytes() == b"half"
    assert not temporary.exists()


def test_a_complete_store_that_grows_is_not_complete_until_it_is_finished_again(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(1))
        writer.finish()
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        assert open_store(tmp_path).manifest.complete
        writer.write(record(2))
        writer.flush()
        assert not open_store(tmp_path).manifest.complete
        writer.finish()
    assert open_store(tmp_path).manifest.complete


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
    with pytest.raises(StoreError, match=r"file.* is no store: it has no manifest.json"):
        open_store(tmp_path / "file" / below)


def test_a_folder_that_may_not_be_made_is_named() -> None:
    with pytest.raises(StoreError, match="cannot make the folder /proc/store: "):
        StoreWriter("/proc/store", manifest(), table())
