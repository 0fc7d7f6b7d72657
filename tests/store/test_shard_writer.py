"""What a writer finds in its folder: leftovers of killed writers, older manifests, files of others, small shards."""

from pathlib import Path

import pytest
from store_contents import content, make_store
from store_samples import manifest, record, table

from fusion_plugins.errors import StoreError
from fusion_plugins.store import StoreWriter, open_store
from fusion_plugins.store.maintain import compact, verify


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


def test_rows_that_an_older_manifest_does_not_list_are_taken_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_store(tmp_path / "store", range(4), finish=False)
    older = (folder / "manifest.json").read_bytes()
    make_store(folder, range(4, 8), finish=False)
    whole = content(folder)
    (folder / "manifest.json").write_bytes(older)
    make_store(folder, range(0), finish=False)
    assert content(folder) == whole
    assert f"{folder}: recovered 4 records of shards that were not in the manifest" in capsys.readouterr().err


def test_nothing_is_deleted_while_shards_of_an_older_manifest_are_missing(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", range(4), finish=False)
    older = (folder / "manifest.json").read_bytes()
    make_store(folder, range(4, 8), finish=False)
    compact(folder)
    whole = content(folder)
    (folder / "manifest.json").write_bytes(older)
    before = sorted(folder.iterdir())
    with pytest.raises(StoreError, match=r"shard-000000.parquet cannot be read: .*--drop-damaged"):
        make_store(folder, range(0), finish=False)
    assert sorted(folder.iterdir()) == before
    verify(folder, drop_damaged=True)
    assert len(open_store(folder)) == 0
    make_store(folder, range(0), finish=False)
    assert content(folder) == whole


@pytest.mark.parametrize("damage", ["foreign", "short", "changed"])
def test_a_shard_that_does_not_belong_here_is_set_aside(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_store(tmp_path / "store", range(2), finish=False)
    with StoreWriter(tmp_path / "other", manifest(model="other" if damage == "foreign" else "tiny"), table()) as other:
        other.write(record(7))
    data = (tmp_path / "other" / "shard-000000.parquet").read_bytes()
    if damage != "foreign":
        data = data[:-9] if damage == "short" else data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    for name in ("orphan-shard-000005.parquet", "orphan-shard-000005-1.parquet"):
        (folder / "shard-000005.parquet").write_bytes(data)
        make_store(folder, range(0), finish=False)
        assert (folder / name).read_bytes() == data
        assert f"It is now {name}" in capsys.readouterr().err
    assert open_store(folder).ids() == ["text-0000", "text-0001"]


def test_many_small_commits_are_joined(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        for number in range(130):
            writer.write(record(number, n_tokens=3))
            writer.flush()
        assert len(writer.manifest.shards) < 64
        writer.finish()
    store = open_store(tmp_path)
    assert len(store.manifest.shards) == 1
    assert store.ids() == [f"text-{number:04d}" for number in range(130)]
    assert len(list(tmp_path.glob("shard-*"))) == 1
