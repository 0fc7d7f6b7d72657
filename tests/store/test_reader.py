"""Every way of reaching a record: by id, in order, from another process; and what a reader refuses."""

import hashlib
import multiprocessing
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_contents import assert_same_record, edit_manifest, flip, write_records
from store_samples import changed, columns_of, manifest, record, table

from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store import Store, StoreWriter, open_store, reader
from fusion_plugins.store.id_index import IdIndex
from fusion_plugins.store.maintain import verify
from fusion_plugins.store.packed import warm_up
from fusion_plugins.store.schema import PARQUET_OPTIONS, find_places


def test_iteration_goes_through_the_shards_in_order(tmp_path: Path) -> None:
    store = write_records(tmp_path, [record(number) for number in (3, 1, 2)], flush_records=2)
    assert [item.id for item in store] == store.ids() == ["text-0003", "text-0001", "text-0002"]


def test_a_missing_id_is_a_key_error_and_get_gives_the_default(tmp_path: Path) -> None:
    store = write_records(tmp_path, [record(1)])
    assert "text-0001" in store
    assert "other" not in store
    assert store.get("other") is None
    with pytest.raises(KeyError, match="holds no record 'other'"):
        store["other"]


def test_the_token_table_comes_back(tmp_path: Path) -> None:
    assert write_records(tmp_path, [record(1)]).table == table()


def test_the_token_table_of_another_store_is_refused(sound: Path, tmp_path: Path) -> None:
    other = table(301)
    wanted = manifest(tokenizer_fingerprint=other.fingerprint, vocab_size=301)
    StoreWriter(tmp_path / "other", wanted, other).close()
    (sound / "tokens.parquet").write_bytes((tmp_path / "other" / "tokens.parquet").read_bytes())
    with pytest.raises(MismatchError, match="One of the two files is of another store"):
        _ = open_store(sound).table
    (sound / "tokens.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="tokens.parquet cannot be read"):
        _ = open_store(sound).table
    assert "tokens.parquet" in verify(sound).problems[0]


def test_a_record_is_read_only(tmp_path: Path) -> None:
    got = write_records(tmp_path, [record(1)])["text-0001"]
    with pytest.raises(ValueError, match="read-only"):
        got.topk.ids[0] = 0


def test_a_reader_does_not_see_what_is_not_committed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), table()) as writer:
        writer.write(record(0))
        assert len(open_store(tmp_path)) == 0
        writer.flush()
        assert open_store(tmp_path).ids() == ["text-0000"]


def test_the_list_of_ids_costs_no_checksum_and_no_row_of_a_damaged_shard_is_handed_out(sound: Path) -> None:
    flip(sound / "shard-000001.parquet", b"PAR1", 300)
    store = open_store(sound)
    assert store.ids() == [f"text-{number:04d}" for number in range(4)]
    assert store["text-0001"].id == "text-0001"
    for use in (lambda: store["text-0002"], lambda: store.get("text-0003"), lambda: list(store)):
        with pytest.raises(StoreError, match="shard-000001.parquet is damaged: expected sha256"):
            use()


def test_a_store_can_be_pickled(tmp_path: Path) -> None:
    store = write_records(tmp_path, [record(1)])
    assert_same_record(pickle.loads(pickle.dumps(store))["text-0001"], record(1))


def in_worker(store: Store, id: str) -> float:
    return store[id].ce_per_token


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_store_that_their_parent_has_open(tmp_path: Path, method: str) -> None:
    store = write_records(tmp_path, [record(number) for number in range(8)], flush_records=3)
    expected = [item.ce_per_token for item in store]
    with multiprocessing.get_context(method).Pool(1 if method == "spawn" else 2) as pool:
        got = pool.starmap(in_worker, [(store, id) for id in store.ids()])
    assert got == expected


def test_a_worker_notices_that_the_store_changed(tmp_path: Path) -> None:
    pickled = pickle.dumps(write_records(tmp_path, [record(1)]))
    write_records(tmp_path, [record(2)])
    with pytest.raises(MismatchError, match="changed while it was in use"):
        pickle.loads(pickled)


def test_a_worker_checks_what_its_parent_did_not(sound: Path) -> None:
    pickled = pickle.dumps(open_store(sound))
    shard = sound / "shard-000001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:100] + b"x" + data[101:])
    with pytest.raises(StoreError, match="shard-000001.parquet is damaged"):
        _ = pickle.loads(pickled)["text-0002"]


def test_a_record_keeps_nothing_else_in_memory(tmp_path: Path) -> None:
    """Each array owns its bytes, or shares them with no other record: whoever keeps a record keeps only that."""
    write_records(tmp_path / "new", [record(number, n_tokens=50) for number in range(40)])
    for folder in (tmp_path / "new", Path("tests/golden/store_v1"), Path("tests/golden/store_v2")):
        held = next(iter(open_store(folder)))
        arrays = {name: array for name, array in columns_of(held).items() if isinstance(array, np.ndarray)}
        for name, array in arrays.items():
            base = array
            while isinstance(base.base, np.ndarray):
                base = base.base
            assert base.base is None, (folder, name)
            assert base.nbytes <= 2 * array.nbytes, (folder, name)


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operating system maps a limited number of files into one process."""
    monkeypatch.setattr(reader, "OPEN_SHARDS", 3)
    numbers = list(range(20))
    write_records(tmp_path, [record(number) for number in numbers], flush_records=1)
    store = open_store(tmp_path)
    for number in random.Random(0).sample(numbers * 2, 40):
        assert_same_record(store[f"text-{number:04d}"], record(number))
        maps = Path("/proc/self/maps")
        assert not maps.exists() or maps.read_text().count(str(tmp_path)) <= 3 + reader.CACHED_GROUPS


AS_THEY_ARE: list[dict[str, Any]] = [{}, {"write_statistics": False}, {"row_group_size": 1}, {"row_group_size": 3}]
OTHERWISE: list[dict[str, Any]] = [
    {"data_page_version": "2.0"},
    {"compression": "zstd"},
    {"use_dictionary": True},
    {"data_page_size": 1, "write_batch_size": 1},
]


@pytest.mark.parametrize("options", AS_THEY_ARE + OTHERWISE, ids=str)
def test_records_are_read_again_from_the_bytes_where_they_are(tmp_path: Path, options: dict[str, Any]) -> None:
    """Where Parquet keeps them as they are, which is how we write; otherwise through Parquet each time."""
    ours = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    made = [record(number, n_tokens=number) for number in (0, 1, 9, 50, 3, 7)]
    write_records(tmp_path, made)
    shard = next(tmp_path.glob("shard-*"))
    pq.write_table(pq.read_table(shard), shard, **(ours | options))
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    edit_manifest(tmp_path, lambda f: f["shards"][0].update(bytes=shard.stat().st_size, sha256=sha256))
    store = open_store(tmp_path)
    for number in (5, 0, 3, 1, 2, 4, 5, 0, 1, 3):
        assert_same_record(store[made[number].id], made[number])
    found = store._file(0).places[:, 1] > 0
    assert found.tolist() == [options in AS_THEY_ARE] * len(made)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 64, 128, 300, 9000])
def test_values_are_found_where_parquet_has_them(count: int) -> None:
    """However many there are, and whatever their lengths: one of 505 bytes looks like the end of the page's header."""
    rng = random.Random(count)
    for lengths in ([505] * count, [1] * count, [rng.randrange(600) for _ in range(count)]):
        values = [rng.randbytes(length) for length in lengths]
        table = pa.table([pa.array(map(str, range(count))), pa.array(values, pa.binary())], ["id", "record"])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **PARQUET_OPTIONS, write_page_checksum=True, data_page_size=1 << 30)
        data = sink.getvalue()
        found = find_places(data, pq.ParquetFile(pa.BufferReader(data)), 0)
        assert found is not None
        assert [data.slice(start, stop - start).to_pybytes() for start, stop in found.tolist()] == values


def test_the_text_alone_is_that_of_the_record(tmp_path: Path) -> None:
    made = [record(number, n_tokens=number) for number in (0, 1, 9, 5000)]
    write_records(tmp_path / "new", made)
    for folder in (tmp_path / "new", Path("tests/golden/store_v1"), Path("tests/golden/store_v2")):
        store = open_store(folder)
        for id in store.ids() * 2:
            for name, array in vars(store[id].text).items():
                found = getattr(store.text(id), name)
                np.testing.assert_array_equal(found, array)
                assert (found.dtype, found.shape) == (array.dtype, array.shape)
                assert not found.flags.writeable
        with pytest.raises(KeyError, match="holds no record 'x'"):
            store.text("x")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_lazy_record_and_the_cross_entropies_are_those_of_the_record(version: int) -> None:
    store = Store(Path(__file__).parents[1] / "golden" / f"store_v{version}")
    for id in store.ids():
        record, lazy = store[id], Store(store.path).lazy(id)
        assert "topk" not in vars(lazy), "read when it is asked for"
        np.testing.assert_array_equal(lazy.text.input_ids, record.text.input_ids)
        np.testing.assert_array_equal(lazy.text.spans, record.text.spans)
        for name, values in vars(record.topk).items():
            np.testing.assert_array_equal(getattr(lazy.topk, name), values)
        found = np.array([store.cross_entropies(id), (lazy.ce_per_token, lazy.ce_per_byte)])
        np.testing.assert_array_equal(found, [(record.ce_per_token, record.ce_per_byte)] * 2)
    for read in (store.lazy, store.cross_entropies, store.text):
        with pytest.raises(KeyError, match="holds no record 'none of them'"):
            read("none of them")


def test_threads_read_one_store(tmp_path: Path) -> None:
    made = [record(number, n_tokens=40) for number in range(12)]
    store = write_records(tmp_path, made)

    def read(number: int) -> None:
        assert_same_record(store[made[number % 12].id], made[number % 12])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(400)))


def test_ids_in_any_order_are_read_at_more_than_2000_records_per_second(tmp_path: Path) -> None:
    """CPU seconds, so that a busy machine does not decide."""
    store = write_records(tmp_path, [changed(record(number % 20, 10, 100), id=str(number)) for number in range(600)])
    ids = store.ids()
    random.Random(0).shuffle(ids)
    warm_up()
    start = time.process_time()
    for id in ids:
        _ = store[id]
    assert len(ids) / (time.process_time() - start) > 2000


def test_an_index_finds_each_id_and_no_other(tmp_path: Path) -> None:
    parts = [[f"id {number}" for number in range(start, start + 7)] for start in range(0, 70, 7)] + [[], ["é", "id 3"]]
    index = IdIndex(parts)
    flat = [id for part in parts for id in part]
    assert [index.find(id) for id in flat[:3]] == [0, 1, 2]
    assert index.find("id 3") == len(flat) - 1, "of equal ids the last"
    assert index.ids() == list(dict.fromkeys(flat))
    assert [index.find(other) for other in ("", "id", "id 70", None, 3, ("id 1",))] == [None] * 6
    assert IdIndex([]).find("a") is None


def test_ids_with_the_same_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion_plugins.store.id_index.hash", lambda id: 7, raising=False)
    index = IdIndex([["a", "b"], ["c"]])
    assert [index.find(id) for id in "abcd"] == [0, 1, 2, None]
