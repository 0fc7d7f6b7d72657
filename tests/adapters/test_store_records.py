"""Records survive the store: values, order, padding, and every way of reaching them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from store_samples import manifest, record, table

from fusion_plugins.core.types import Record
from fusion_plugins.errors import DataError
from fusion_plugins.store import Store, StoreWriter, open_store


def write(path: Path, records: list[Record], **options: object) -> Store:
    top_k = records[0].topk_ids.shape[1]
    with StoreWriter(path, manifest(top_k), table(), **options) as writer:
        for item in records:
            writer.write(item)
        writer.finish()
    return open_store(path)


def assert_same(came: Record, expected: Record) -> None:
    for name in ("id", "input_ids", "offsets", "exact", "spans", "topk_ids"):
        np.testing.assert_array_equal(getattr(came, name), getattr(expected, name), err_msg=name)
    for name in ("topk_logprobs", "token_logprobs", "tail"):
        wanted = getattr(expected, name)
        np.testing.assert_allclose(getattr(came, name), wanted, rtol=2**-11, atol=2**-24, err_msg=name)
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
    assert [getattr(came, name).dtype for name in ("input_ids", "offsets", "spans", "topk_ids")] == [np.int32] * 4
    assert [getattr(came, name).dtype for name in ("topk_logprobs", "token_logprobs", "tail")] == [np.float32] * 3
    assert came.exact.dtype == np.bool_


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
