"""Records survive the store: values, order, padding, and the layouts of all versions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_contents import assert_same_record, write_records
from store_samples import changed, columns_of, manifest, record, table

from fusion_plugins.store import StoreWriter, open_store
from fusion_plugins.store.maintain import compact
from fusion_plugins.store.packed import PackedRecord
from fusion_plugins.store.schema import _COLUMNS, PARQUET_OPTIONS, find_places


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, top_k: int) -> None:
    records = [record(number, top_k) for number in range(20)]
    store = write_records(tmp_path, records, flush_records=6)
    assert len(store.manifest.shards) == 4
    assert len(store) == 20
    for item in records:
        assert_same_record(store[item.id], item)


def test_dtypes_are_those_of_a_record(tmp_path: Path) -> None:
    got = write_records(tmp_path, [record(1)])["text-0001"]
    assert [columns_of(got)[name].dtype for name in ("input_ids", "ends", "spans", "topk_ids")] == [np.int32] * 4
    assert [columns_of(got)[name].dtype for name in ("topk_logprobs", "token_logprobs", "tail")] == [np.float32] * 3
    assert got.text.exact.dtype == np.bool_


V1 = Path("tests/golden/store_v1")  # records 0 to 3 in two shards, as the first version wrote them
V2 = Path("tests/golden/store_v2")  # likewise; ids of the first two records fit into two bytes
V3 = Path("tests/golden/store_v3")  # the same records
V2_VOCABULARIES = (300, 300, 70_000, 70_000)


def test_a_store_of_version_1_is_read(tmp_path: Path) -> None:
    store = open_store(V1)
    assert store.manifest.schema_version == 1
    for number in range(4):
        expected = record(number)
        assert_same_record(store[expected.id], expected)
        np.testing.assert_array_equal(store[expected.id].topk.logprobs, expected.topk.logprobs)


def test_a_store_of_version_2_is_read() -> None:
    store = open_store(V2)
    assert store.manifest.schema_version == 2
    assert store.ids() == [f"text-{number:04d}" for number in range(4)]
    assert store.table == table()
    for number, vocabulary in enumerate(V2_VOCABULARIES):
        expected = record(number, vocabulary=vocabulary)
        assert_same_record(store[expected.id], expected)
    assert max(store["text-0003"].topk.ids.ravel()) > 0xFFFF


def test_a_store_of_version_3_is_read() -> None:
    store = open_store(V3)
    assert store.manifest.schema_version == 4
    assert store.table == table()
    for number, vocabulary in enumerate(V2_VOCABULARIES):
        assert_same_record(store[f"text-{number:04d}"], record(number, vocabulary=vocabulary))


def unpacked(shard: Path) -> list[tuple[str, bytes, bytes]]:
    """Id, header and arrays of each record, as bytes."""
    found = []
    for row in pq.read_table(shard).to_pylist():
        packed = PackedRecord(row["id"], pa.py_buffer(row["record"]), 4)
        body = bytearray(pa.Codec("zstd").decompress(row["record"][28:], decompressed_size=packed.size, asbytes=True))
        tokens = packed.header[0]
        for byte in (packed.size - 3 * tokens - 1, packed.size - 2 * tokens - 1):
            body[byte] = 0  # of the last next token, which there is none of: the rest of the answer's sum, or nan
        found.append((row["id"], row["record"][:28], bytes(body)))
    return found


def test_shards_and_settings_of_version_3_are_written_as_before(tmp_path: Path) -> None:
    """Record by record: the bytes of a file also depend on the versions of Parquet and zstd."""
    records = [record(number, vocabulary=vocabulary) for number, vocabulary in enumerate(V2_VOCABULARIES)]
    store = write_records(tmp_path, records, flush_records=2)
    assert [shard.name for shard in store.manifest.shards] == ["shard-000000.parquet", "shard-000001.parquet"]
    for shard in store.manifest.shards:
        assert unpacked(tmp_path / shard.name) == unpacked(V3 / shard.name)
        assert pq.read_schema(tmp_path / shard.name).equals(pq.read_schema(V3 / shard.name), check_metadata=True)
    differing = {"created", "made_by", "shards", "schema_version", "checksum", "files", "joined"}
    ours, golden = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path, V3))
    assert {name: ours[name] for name in ours if name not in differing} == {
        name: golden[name] for name in golden if name not in differing
    }


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_version_is_continued_and_rewritten_only_on_request(
    tmp_path: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    older = {1: V1, 2: V2}[version]
    vocabularies = V2_VOCABULARIES if version == 2 else (300,) * 4
    folder = tmp_path / "store"
    shutil.copytree(older, folder)
    settings = {"logits_width": open_store(older).manifest.logits_width}
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    with StoreWriter(folder, manifest(**settings), table()) as writer:
        for number in (4, 5):
            writer.write(record(number))
            writer.flush()
        assert "2 of 2 shards are of an earlier layout, and are read as they are" in capsys.readouterr().err
        versions = [shard.version for shard in writer.manifest.shards]
        assert [item.id for item in open_store(folder)] == [f"text-{number:04d}" for number in range(6)]
        writer.finish()
        assert [shard.version for shard in writer.manifest.shards] == [*versions[:2], 3], "the new ones are joined"
    assert versions == [version, version, 3, 3]
    assert open_store(folder).manifest.complete
    assert {name: (folder / name).read_bytes() for name in before} == before, "nothing old was written again"
    compact(folder)
    rewritten = open_store(folder)
    assert [shard.version for shard in rewritten.manifest.shards] == [3]
    assert rewritten.manifest.schema_version == 4
    for number, vocabulary in enumerate((*vocabularies, 300, 300)):
        assert_same_record(rewritten[f"text-{number:04d}"], record(number, vocabulary=vocabulary))


@pytest.mark.parametrize("vocabulary", [70_000, 65_536, 65_535])
def test_ids_that_need_more_than_two_bytes_survive(tmp_path: Path, vocabulary: int) -> None:
    item = record(1, n_tokens=5)
    ids = item.topk.ids.copy()
    ids[0] = [vocabulary - 1, 0, vocabulary - 2, 1]
    item = changed(item, topk_ids=ids)
    assert_same_record(write_records(tmp_path, [item])[item.id], item)


def test_order_among_equal_probabilities_and_impossible_tokens_survive(tmp_path: Path) -> None:
    item = record(1, n_tokens=4)
    ids, logprobs = item.topk.ids.copy(), item.topk.logprobs.copy()
    ids[0], logprobs[0] = [9, 3, 7, 5], [-1.0, -1.0001, -1.0001, -np.inf]
    ids[3], logprobs[3] = [2, 1, 4, 3], [0.0, -1e-6, -50.0, -1e9]
    item = changed(item, topk_ids=ids, topk_logprobs=logprobs)
    got = write_records(tmp_path, [item])[item.id]
    np.testing.assert_array_equal(got.topk.ids, ids)
    np.testing.assert_allclose(got.topk.logprobs[0], logprobs[0], rtol=2**-11)
    np.testing.assert_allclose(got.topk.logprobs[3], [0, -1e-6, -50, -np.inf], rtol=2**-11, atol=2**-25)


def test_a_value_of_the_next_token_that_is_not_the_one_of_the_top_k_survives(tmp_path: Path) -> None:
    """Another engine run may give the next token a value of its own: it is kept, not replaced."""
    item = record(1, n_tokens=5)
    inputs, next_logprobs = item.text.input_ids.copy(), item.topk.token_logprobs.copy()
    inputs[1], next_logprobs[0] = item.topk.ids[0, 2], item.topk.logprobs[0, 2] - 0.5
    inputs[4], next_logprobs[3] = item.topk.ids[3, 1], item.topk.logprobs[3, 1]
    item = changed(item, input_ids=inputs, token_logprobs=next_logprobs)
    assert_same_record(write_records(tmp_path, [item])[item.id], item)


def test_a_last_row_with_a_value_does_not_look_into_the_next_record(tmp_path: Path) -> None:
    first, second = record(1, n_tokens=4), record(2, n_tokens=4)
    next_logprobs, inputs = first.topk.token_logprobs.copy(), second.text.input_ids.copy()
    next_logprobs[-1], inputs[0] = first.topk.logprobs[3, 0], first.topk.ids[3, 0]
    first, second = changed(first, token_logprobs=next_logprobs), changed(second, input_ids=inputs)
    store = write_records(tmp_path, [first, second])
    next_logprobs[-1] = np.nan  # it has no next token
    assert_same_record(store[first.id], changed(first, token_logprobs=next_logprobs))


def test_records_without_tokens_or_spans_survive(tmp_path: Path) -> None:
    empty = changed(record(2, n_tokens=0), spans=np.zeros((0, 2), np.int32))
    records = [empty, record(3), changed(empty, id="also empty"), changed(record(4), spans=np.zeros((0, 2), np.int32))]
    store = write_records(tmp_path, records)
    for item in records:
        assert_same_record(store[item.id], item)


def test_what_was_read_can_be_written_again_without_a_change(tmp_path: Path) -> None:
    once = write_records(tmp_path / "a", [record(number) for number in range(6)])
    twice = write_records(tmp_path / "b", list(once))
    assert [shard.sha256 for shard in twice.manifest.shards] == [shard.sha256 for shard in once.manifest.shards]


@pytest.mark.parametrize("records", [1, 2, 3])
def test_places_of_records_are_right_or_not_told(records):
    rng, told = np.random.default_rng(records), 0
    for size in range(1, 400):
        values = [rng.bytes(size + number) for number in range(records)]
        table = pa.table({"id": [str(number) for number in range(records)], "record": values}, _COLUMNS)
        pq.write_table(table, out := pa.BufferOutputStream(), **PARQUET_OPTIONS)
        shard = out.getvalue()
        places = find_places(shard, pq.ParquetFile(pa.BufferReader(shard)), 0)
        if places is not None:
            told += 1
            assert [bytes(shard[start:stop]) for start, stop in places.tolist()] == values
    assert told > 300
