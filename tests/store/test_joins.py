"""Small shards are joined by copying the bytes of their records: by a writer, `merge` and `compact`."""

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_contents import assert_same_record, content, edit_manifest, make_store, write_records
from store_samples import manifest, record, table

from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store import StoreWriter, open_store, packed, schema
from fusion_plugins.store.maintain import compact, merge, verify

GOLDEN = Path("tests/golden")
#: name of a part -> numbers of its records
PARTS = {"a": (0, 30), "b": (30, 50), "c": (50, 70)}


@pytest.fixture
def never_packed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on no record may be packed or unpacked."""

    def refuse(*_: object) -> None:
        raise AssertionError("a record was packed or unpacked")

    def start() -> None:
        monkeypatch.setattr(schema, "pack", refuse)
        monkeypatch.setattr(packed.PackedRecord, "unpack", refuse)

    return start


def packed_records(folder: Path) -> dict[str, bytes]:
    """Id -> bytes of every record, as they are in the files."""
    rows = [row for shard in folder.glob("shard-*.parquet") for row in pq.read_table(shard).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["record"] for row in rows}


def shard_bytes(folder: Path) -> list[bytes]:
    return [(folder / shard.name).read_bytes() for shard in open_store(folder).manifest.shards]


def test_a_joined_shard_is_the_file_that_one_commit_would_have_written(
    tmp_path: Path, never_packed: Callable[[], None]
) -> None:
    write_records(tmp_path / "once", [record(number) for number in range(70)])
    parts = [make_store(tmp_path / name, range(*ends), finish=False) for name, ends in PARTS.items()]
    before = {name: data for part in parts for name, data in packed_records(part).items()}
    shutil.copytree(parts[0], tmp_path / "grown")
    never_packed()
    compacted = compact(parts[0])
    assert (len(compacted.shards), compacted.shards[0].rows) == (1, 30)
    merge(parts, tmp_path / "all")
    with StoreWriter(tmp_path / "grown", manifest(), table()) as writer:
        writer.finish()
    assert shard_bytes(tmp_path / "grown") == shard_bytes(parts[0])
    assert shard_bytes(tmp_path / "all") == shard_bytes(tmp_path / "once")
    assert packed_records(tmp_path / "all") == before


def test_the_joins_of_a_writer_copy_and_count_what_they_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packings: list[str] = []
    pack = schema.pack
    monkeypatch.setattr(schema, "pack", lambda item, table: packings.append(item.id) or pack(item, table))
    records = [record(number) for number in range(16)]
    with StoreWriter(tmp_path, manifest(), table(), flush_records=6) as writer:
        for item in records:
            writer.write(item)
            writer.flush()
        writer.finish()
        shards = writer.manifest.shards
    assert packings == [item.id for item in records]
    assert [shard.rows for shard in shards] == [6, 6, 4]
    assert [shard.tokens for shard in shards] == [
        sum(len(item.text.input_ids) for item in part) for part in (records[:6], records[6:12], records[12:])
    ]
    store = open_store(tmp_path)
    for item in records:
        assert_same_record(store[item.id], item)


def test_what_several_parts_hold_is_copied_once(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / "a", range(6)), make_store(tmp_path / "b", range(3, 9), finish=False)]
    merge(parts, tmp_path / "all")
    assert packed_records(tmp_path / "all") == packed_records(parts[0]) | packed_records(parts[1])
    assert verify(tmp_path / "all").problems == []
    merge(parts, tmp_path / "all")  # again: everything is there
    assert len(open_store(tmp_path / "all")) == 9


@pytest.mark.parametrize("version", [1, 2])
def test_shards_of_an_older_layout_are_packed_and_the_others_beside_them_copied(tmp_path: Path, version: int) -> None:
    shutil.copytree(GOLDEN / f"store_v{version}", tmp_path / "store")
    old = {item.id: item for item in open_store(tmp_path / "store")}
    make_store(tmp_path / "store", range(4, 7), finish=False)
    new = {name: data for name, data in packed_columns(tmp_path / "store").items() if name not in old}
    compact(tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert [shard.version for shard in store.manifest.shards] == [3]
    assert packed_records(tmp_path / "store").items() >= new.items()
    assert len(new) == 3
    for item in old.values():
        assert_same_record(store[item.id], item)


def packed_columns(folder: Path) -> dict[str, bytes]:
    """Like `packed_records`, of a folder in which some shards have no packed records."""
    tables = [pq.read_table(shard) for shard in folder.glob("shard-*.parquet")]
    return {row["id"]: row["record"] for one in tables if "record" in one.column_names for row in one.to_pylist()}


@pytest.mark.parametrize("how", ["compact", "merge", "writer"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_small_shard_is_refused_and_nothing_is_lost(tmp_path: Path, how: str, place: float) -> None:
    folder = make_store(tmp_path / "store", range(5), finish=False)
    shard = folder / "shard-000002.parquet"
    data = bytearray(shard.read_bytes())
    data[int(len(data) * place)] ^= 4
    shard.write_bytes(data)
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    with pytest.raises(StoreError, match=r"shard-000002\.parquet is damaged"):
        join(how, folder, tmp_path)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not [item for item in tmp_path.glob("all/shard-*") if b"text-0002" in item.read_bytes()]


def join(how: str, folder: Path, tmp_path: Path) -> None:
    if how == "compact":
        compact(folder)
    elif how == "merge":
        merge([folder], tmp_path / "all")
    else:
        with StoreWriter(folder, manifest(), table()) as writer:
            writer.finish()


HEADER = struct.Struct("<IIIdd")
STRANGE = {
    "no bytes": b"",
    "half a header": HEADER.pack(1, 1, 2, 0, 0)[:-1],
    "ids of three bytes": HEADER.pack(1, 1, 3, 0, 0),
    "more than memory": HEADER.pack(2**32 - 1, 0, 2, 0, 0),
    "no record": None,
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("how", ["compact", "merge", "writer"])
def test_a_record_that_no_writer_makes_is_not_passed_on(tmp_path: Path, how: str, name: str) -> None:
    """Its checksums are right: it is a stranger's."""
    folder = make_store(tmp_path / "store", range(3), finish=False)
    shard = folder / "shard-000001.parquet"
    found = pq.read_table(shard)
    column = pa.array([STRANGE[name]], pa.binary())
    pq.write_table(found.set_column(1, found.schema.field("record"), column), shard, compression="none")
    data = shard.read_bytes()

    def sign(fields: dict) -> None:
        fields["shards"][1] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, sign)
    with pytest.raises(StoreError, match=r"shard-000001\.parquet is damaged: .*(expected|got)"):
        join(how, folder, tmp_path)
    assert len(list(folder.glob("shard-*"))) == 3


def test_joining_is_refused_where_a_shard_is_of_another_folder(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "store", range(3), finish=False)
    other = make_store(tmp_path / "other", range(3), finish=False, model="other")
    data = (other / "shard-000001.parquet").read_bytes()
    (folder / "shard-000001.parquet").write_bytes(data)

    def sign(fields: dict) -> None:
        fields["shards"][1] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(folder, sign)
    with pytest.raises(MismatchError, match=r"shard-000001\.parquet was made with other settings"):
        compact(folder)


def test_records_that_are_dropped_leave_the_bytes_of_the_others(tmp_path: Path) -> None:
    make_store(tmp_path, range(6))
    before = packed_records(tmp_path)
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.drop(["text-0001", "text-0004"])
    left = {name: data for name, data in before.items() if name not in {"text-0001", "text-0004"}}
    assert packed_records(tmp_path) == left
    assert len(content(tmp_path)) == 4
