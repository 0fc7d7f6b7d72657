"""Records survive the store: values, order, padding, and every way of reaching them."""

import multiprocessing
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from store_samples import changed, columns_of, manifest, record, table

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import DataError, MismatchError, StoreError
from fusion_plugins.store import Store, StoreWriter, open_store


def write(path: Path, records: list[Record], **options: object) -> Store:
    top_k = records[0].topk.ids.shape[1]
    with StoreWriter(path, manifest(top_k), table(), **options) as writer:
        for item in records:
            writer.write(item)
        writer.finish()
    return open_store(path)


def assert_same(came: Record, expected: Record) -> None:
    found, wanted = columns_of(came), columns_of(expected)
    for name in ("id", "input_ids", "ends", "exact", "spans", "topk_ids"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    for name in ("topk_logprobs", "token_logprobs", "tail"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-11, atol=2**-24, err_msg=name)
    assert (came.ce_per_token, came.ce_per_byte) == pytest.approx(
        (expected.ce_per_token, expected.ce_per_byte), nan_ok=True
    )


@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, top_k: int) -> None:
    records = [record(number, top_k) for number in range(20)]
    store = write(tmp_path, records, flush_records=6)
    assert len(store.manifest.shards) == 4
    assert len(store) == 20
    for item in records:
        assert_same(store[item.id], item)


def test_dtypes_are_those_of_a_record(tmp_path: Path) -> None:
    came = write(tmp_path, [record(1)])["text-0001"]
    assert [columns_of(came)[name].dtype for name in ("input_ids", "ends", "spans", "topk_ids")] == [np.int32] * 4
    assert [columns_of(came)[name].dtype for name in ("topk_logprobs", "token_logprobs", "tail")] == [np.float32] * 3
    assert came.text.exact.dtype == np.bool_


def test_iteration_goes_through_the_shards_in_order(tmp_path: Path) -> None:
    store = write(tmp_path, [record(number) for number in (3, 1, 2)], flush_records=2)
    assert [item.id for item in store] == store.ids() == ["text-0003", "text-0001", "text-0002"]


def test_a_missing_id_is_a_key_error_and_get_gives_the_default(tmp_path: Path) -> None:
    store = write(tmp_path, [record(1)])
    assert "text-0001" in store
    assert "other" not in store
    assert store.get("other") is None
    with pytest.raises(KeyError, match="holds no record 'other'"):
        store["other"]


def test_the_token_table_comes_back(tmp_path: Path) -> None:
    assert write(tmp_path, [record(1)]).table == table()


def test_a_store_can_be_pickled(tmp_path: Path) -> None:
    store = write(tmp_path, [record(1)])
    assert_same(pickle.loads(pickle.dumps(store))["text-0001"], record(1))


def test_a_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(4), table()) as writer:
        with pytest.raises(DataError, match=r"topk_ids has shape \(\d+, 5\), expected \(\d+, 4\)"):
            writer.write(record(1, top_k=5))
        writer.write(record(1))
        with pytest.raises(DataError, match="already holds 'text-0001'"):
            writer.write(record(1))
        writer.flush()
        with pytest.raises(DataError, match="already holds 'text-0001'"):
            writer.write(record(1))


V1 = Path("tests/golden/store_v1")  # records 0 to 3 in two shards, as the first version wrote them


def test_a_store_of_version_1_is_read(tmp_path: Path) -> None:
    store = open_store(V1)
    assert store.manifest.schema_version == 1
    for number in range(4):
        expected = record(number)
        assert_same(store[expected.id], expected)
        np.testing.assert_array_equal(store[expected.id].topk.logprobs, expected.topk.logprobs)


def test_a_store_of_version_1_is_continued_and_then_rewritten(tmp_path: Path) -> None:
    shutil.copytree(V1, tmp_path / "store")
    with StoreWriter(tmp_path / "store", manifest(), table()) as writer:
        writer.write(record(4))
        writer.flush()
        versions = [shard.version for shard in writer.manifest.shards]
        mixed = open_store(tmp_path / "store")
        assert [item.id for item in mixed] == [f"text-{number:04d}" for number in range(5)]
        writer.finish()
    assert versions == [1, 1, 2]
    rewritten = open_store(tmp_path / "store")
    assert [shard.version for shard in rewritten.manifest.shards] == [2]
    assert rewritten.manifest.schema_version == 2
    for number in range(5):
        assert_same(rewritten[f"text-{number:04d}"], record(number))


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [record(1)])
    text = (tmp_path / "manifest.json").read_text().replace('"schema_version": 2', '"schema_version": 3')
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="has schema version 3; this version of fusion-plugins reads 1 to 2"):
        open_store(tmp_path)


@pytest.mark.parametrize("vocabulary", [70_000, 65_536, 65_535])
def test_ids_that_need_more_than_two_bytes_survive(tmp_path: Path, vocabulary: int) -> None:
    item = record(1, n_tokens=5)
    ids = item.topk.ids.copy()
    ids[0] = [vocabulary - 1, 0, vocabulary - 2, 1]
    item = changed(item, topk_ids=ids)
    assert_same(write(tmp_path, [item])[item.id], item)


def test_order_among_equal_probabilities_and_impossible_tokens_survive(tmp_path: Path) -> None:
    item = record(1, n_tokens=4)
    ids, logprobs = item.topk.ids.copy(), item.topk.logprobs.copy()
    ids[0], logprobs[0] = [9, 3, 7, 5], [-1.0, -1.0001, -1.0001, -np.inf]
    ids[3], logprobs[3] = [2, 1, 4, 3], [0.0, -1e-6, -50.0, -1e9]
    item = changed(item, topk_ids=ids, topk_logprobs=logprobs)
    came = write(tmp_path, [item])[item.id]
    np.testing.assert_array_equal(came.topk.ids, ids)
    np.testing.assert_allclose(came.topk.logprobs[0], logprobs[0], rtol=2**-11)
    np.testing.assert_allclose(came.topk.logprobs[3], [0, -1e-6, -50, -np.inf], rtol=2**-11, atol=2**-25)


def test_a_gold_value_that_is_not_the_one_of_the_top_k_survives(tmp_path: Path) -> None:
    """Another engine run may give the gold token a value of its own: it is kept, not replaced."""
    item = record(1, n_tokens=5)
    inputs, gold = item.text.input_ids.copy(), item.topk.token_logprobs.copy()
    inputs[1], gold[0] = item.topk.ids[0, 2], item.topk.logprobs[0, 2] - 0.5
    inputs[4], gold[3] = item.topk.ids[3, 1], item.topk.logprobs[3, 1]
    item = changed(item, input_ids=inputs, token_logprobs=gold)
    assert_same(write(tmp_path, [item])[item.id], item)


def test_a_last_row_with_a_value_does_not_look_into_the_next_record(tmp_path: Path) -> None:
    first, second = record(1, n_tokens=4), record(2, n_tokens=4)
    gold, inputs = first.topk.token_logprobs.copy(), second.text.input_ids.copy()
    gold[-1], inputs[0] = first.topk.logprobs[3, 0], first.topk.ids[3, 0]
    first, second = changed(first, token_logprobs=gold), changed(second, input_ids=inputs)
    store = write(tmp_path, [first, second])
    assert_same(store[first.id], first)


def test_records_without_tokens_or_spans_survive(tmp_path: Path) -> None:
    empty = changed(record(2, n_tokens=0), spans=np.zeros((0, 2), np.int32))
    records = [empty, record(3), changed(empty, id="also empty"), changed(record(4), spans=np.zeros((0, 2), np.int32))]
    store = write(tmp_path, records)
    for item in records:
        assert_same(store[item.id], item)


def test_what_was_read_can_be_written_again_without_a_change(tmp_path: Path) -> None:
    once = write(tmp_path / "a", [record(number) for number in range(6)])
    twice = write(tmp_path / "b", list(once))
    assert [shard.sha256 for shard in twice.manifest.shards] == [shard.sha256 for shard in once.manifest.shards]


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


def test_a_record_is_read_only(tmp_path: Path) -> None:
    came = write(tmp_path, [record(1)])["text-0001"]
    with pytest.raises(ValueError, match="read-only"):
        came.topk.ids[0] = 0


def in_worker(store: Store, id: str) -> float:
    return store[id].ce_per_token


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_a_store_that_their_parent_has_open(tmp_path: Path, method: str) -> None:
    store = write(tmp_path, [record(number) for number in range(8)], flush_records=3)
    expected = [item.ce_per_token for item in store]
    with multiprocessing.get_context(method).Pool(1 if method == "spawn" else 2) as pool:
        came = pool.starmap(in_worker, [(store, id) for id in store.ids()])
    assert came == expected


def test_a_worker_notices_that_the_store_changed(tmp_path: Path) -> None:
    pickled = pickle.dumps(write(tmp_path, [record(1)]))
    write(tmp_path, [record(2)])
    with pytest.raises(MismatchError, match="changed while it was in use"):
        pickle.loads(pickled)


def test_ids_in_order_are_read_at_more_than_2000_records_per_second(tmp_path: Path) -> None:
    """CPU seconds, so that a busy machine does not decide."""
    store = write(tmp_path, [changed(record(number % 20, 10, 100), id=str(number)) for number in range(600)])
    ids = store.ids()
    start = time.process_time()
    for id in ids:
        _ = store[id]
    assert len(ids) / (time.process_time() - start) > 2000
