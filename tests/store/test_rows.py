"""Responses and scored rows: what was written comes back, by key and in order."""

import shutil
from pathlib import Path

import pytest
import store_jobs

from fusion_plugins.errors import DataError, MismatchError
from fusion_plugins.store import RowManifest, RowWriter, open_rows

COLUMNS = {"prompt": "json", "source": "string", "index": "int64", "reward": "float64", "correct": "bool"}


def manifest(**facts: object) -> RowManifest:
    return RowManifest(stage="responses", columns=COLUMNS, key=("source", "index"), facts=facts)


ROWS = [
    {"prompt": "plain", "source": "a", "index": 0, "reward": 0.1, "correct": None},
    {"prompt": [{"role": "user", "content": "ü"}], "source": "a", "index": 1, "reward": None, "correct": True},
    {"prompt": None, "source": "b", "index": 0, "reward": 1, "correct": False},
]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    with RowWriter(tmp_path, manifest(), flush_rows=2) as writer:
        for row in ROWS:
            writer.write(row)
        writer.finish()
    rows = open_rows(tmp_path)
    assert list(rows) == ROWS
    assert rows.keys() == [("a", 0), ("a", 1), ("b", 0)]
    assert rows[("a", 1)] == ROWS[1]
    assert ("b", 1) not in rows
    assert len(rows) == 3
    assert rows.manifest.complete


def test_rows_that_an_earlier_release_wrote_are_read_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree("tests/golden/rows_v1", folder)
    assert list(open_rows(folder)) == [store_jobs.row(number) for number in range(4)]
    with RowWriter(folder, store_jobs.rows_manifest()) as writer:
        assert writer.done_keys == {("p0", index) for index in range(4)}
        writer.write(store_jobs.row(4))
    assert list(open_rows(folder)) == [store_jobs.row(number) for number in range(5)]


def test_rows_go_on_where_they_stopped(tmp_path: Path) -> None:
    with RowWriter(tmp_path, manifest(sampling="s1")) as writer:
        writer.write(ROWS[0])
    with RowWriter(tmp_path, manifest(sampling="s1")) as writer:
        assert writer.done_keys == {("a", 0)}
        with pytest.raises(DataError, match="already holds"):
            writer.write(ROWS[0])
    with pytest.raises(MismatchError, match="sampling: the folder has 's1', expected 's2'"):
        RowWriter(tmp_path, manifest(sampling="s2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "expected the declared columns .*, got 'colour'"),
        ({"index": "0"}, "expected int64 in column 'index', got '0'"),
        ({"correct": 1}, "expected bool in column 'correct', got 1"),
        ({"source": None}, "expected a value in every column of the key, got none in 'source'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with RowWriter(tmp_path, manifest()) as writer, pytest.raises(DataError, match=message):
        writer.write(ROWS[0] | change)


def test_rows_can_be_taken_out_and_written_anew(tmp_path: Path) -> None:
    with RowWriter(tmp_path, manifest(), flush_rows=2) as writer:
        for row in ROWS:
            writer.write(row)
        writer.finish()
    with RowWriter(tmp_path, manifest(), flush_rows=2) as writer:
        writer.drop([("a", 0), ("b", 0), ("unknown", 0)])
        assert writer.done_keys == {("a", 1)}
        rows = open_rows(tmp_path)
        assert list(rows) == [ROWS[1]]
        assert not rows.manifest.complete
        assert len(list(tmp_path.glob("shard-*"))) == len(rows.manifest.shards) == 1
        writer.write(ROWS[0] | {"reward": 9.5})
    assert [row["reward"] for row in open_rows(tmp_path)] == [None, 9.5]
