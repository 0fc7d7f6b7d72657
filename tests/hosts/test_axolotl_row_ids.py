"""Ids that the JSON reader of the host makes dates and numbers of are those of the file again."""

from datetime import datetime

import pytest
import source_checks
from datasets import load_dataset

from fusion_plugins.axolotl.row_ids import with_written_ids, written_ids
from fusion_plugins.errors import MismatchError
from fusion_plugins.sources.capture import capture_texts
from fusion_plugins.store import open_store

COLUMNS = {
    "days": ["2024-01-01", "2024-01-02", "2024-02-29"],
    "times": ["2024-01-01T10:00:00", "2024-01-01 10:00:01", "2024-01-01T10:00:02Z"],
    "integers beyond 64 bits": [2**70, 2**65, 12],
    "one beyond and a negative": [2**63, -(2**63) - 2**20, 0],
    "mixed words": ["2024-01-01", "a", "007"],
    "small integers": [1, 2, 3],
    "dates and none": ["2024-01-01", None, "2024-01-03"],
    "booleans": [True, False, None],
}


@pytest.mark.parametrize("ids", COLUMNS.values(), ids=COLUMNS)
def test_a_store_has_every_row_whatever_the_reader_took_its_id_for(tmp_path, model, ids):
    rows = [{"id": id, "text": f"text number {number}"} for number, id in enumerate(ids)]
    texts = source_checks.write_rows(tmp_path / "texts.jsonl", rows)
    capture_texts(source_checks.capture_config(model, texts, tmp_path / "store"))
    store = open_store(tmp_path / "store")
    dataset = load_dataset("json", data_files=str(texts), split="train", cache_dir=str(tmp_path / "cache"))
    found = with_written_ids(dataset, [store], str(texts))
    assert found["text"][:] == [row["text"] for row in rows]
    for id, text in zip(found["id"], found["text"], strict=True):
        assert id is None or str(id) in store, (id, text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return source_checks.checkpoint(tmp_path_factory.mktemp("models") / "llama")


def test_ids_that_were_read_as_one_value_are_refused_with_the_right_cure():
    for values, known in (
        ([datetime(2024, 1, 1)], ["2024-01-01", "2024-01-01T00:00:00"]),
        ([2.0**70], [str(2**70), str(2**70 + 1)]),
        ([1.0], ["1", "1.0"]),
    ):
        with pytest.raises(MismatchError, match="were all read as .*Begin each id with a letter"):
            written_ids(values, known, "a.jsonl")


def test_what_no_id_was_read_as_stays_as_it_is():
    assert written_ids([datetime(2024, 1, 1), 0.5, float("nan")], ["a", "20240101"], "a.jsonl") == [
        "2024-01-01 00:00:00",
        "0.5",
        None,
    ]
