"""Any bytes in a file that is read give a result or a FusionError, and take no more memory than our own files do.

The checksums are those that a forger would give: otherwise nothing behind them would be reached.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import store_jobs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from store_contents import edit_manifest, write_records
from store_samples import record

from fusion_plugins.errors import FusionError, StoreError
from fusion_plugins.inputs import read_prompts, read_texts
from fusion_plugins.row_files import read_row_file
from fusion_plugins.store import open_rows, open_store, shards
from fusion_plugins.store.maintain import verify
from fusion_plugins.store.manifest import load_manifest

EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARD = "the shard"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes") / "store"
    write_records(folder, [record(number) for number in range(4)])
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes") / "rows"
    store_jobs.write_rows(str(folder), 6)
    return folder


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of a file with up to three changes: other bytes, more, fewer, a piece twice."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(found) - 1)))
        stop = start + draw(st.integers(0, 40))
        piece = bytes(found[start:stop])
        found[start:stop] = draw(st.sampled_from([piece * 2, b"\xff" * len(piece), b"\0" * 9]) | st.binary(max_size=12))
    return bytes(found)


def path_of(folder: Path, name: str) -> Path:
    """A file of a folder; the one shard by its nickname."""
    return next(folder.glob("shard-*")) if name == SHARD else folder / name


def use(folder: Path) -> None:
    """Everything that reads a folder."""
    manifest = load_manifest(folder)
    if manifest.kind == "rows":
        found = open_rows(folder)
        keys = found.keys()
        assert [row is not None for row in found] == [True] * len(keys)
    else:
        store = open_store(folder)
        for id in store.ids():
            item = store[id]
            assert len(item.text.ends) == len(item.topk.ids) == len(item.tail)
        _ = store.table
    verify(folder)


def attempt(action: Callable[[], object]) -> None:
    with suppress(FusionError):
        action()


def replaced(folder: Path, name: str, data: bytes) -> None:
    """Put bytes in place of a file, with the checksum that they have, and use the folder."""
    before = {path: path.read_bytes() for path in (path_of(folder, name), folder / "manifest.json")}
    try:
        path_of(folder, name).write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        if name == SHARD:
            edit_manifest(folder, lambda fields: fields["shards"][0].update(bytes=len(data), sha256=sha256))
        elif name == "tokens.parquet":
            edit_manifest(folder, lambda fields: fields.update(files={name: sha256}))
        attempt(lambda: use(folder))
    finally:
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", ["manifest.json", SHARD, "tokens.parquet"])
@given(data=st.data())
@EXAMPLES
def test_any_bytes_in_a_store(store: Path, name: str, data: st.DataObject) -> None:
    replaced(store, name, data.draw(changed(path_of(store, name).read_bytes()) | st.binary(max_size=60)))


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
@given(data=st.data())
@EXAMPLES
def test_any_bytes_in_a_folder_of_rows(rows: Path, name: str, data: st.DataObject) -> None:
    replaced(rows, name, data.draw(changed(path_of(rows, name).read_bytes())))


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", ["store", "rows"])
@given(data=st.data())
@EXAMPLES
def test_any_value_of_any_field_of_a_manifest(store: Path, rows: Path, kind: str, data: st.DataObject) -> None:
    folder = {"store": store, "rows": rows}[kind]
    before = (folder / "manifest.json").read_bytes()
    fields = json.loads(before)
    name = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(JSON)
    if name == "shards" and data.draw(st.booleans()):
        value = [fields[name][0] | {data.draw(st.sampled_from(sorted(fields[name][0]))): value}]
    try:
        edit_manifest(folder, lambda fields: fields.update({name: value}))
        attempt(lambda: use(folder))
    finally:
        (folder / "manifest.json").write_bytes(before)


COLUMNS = [
    pa.array([1, None, 3, 4]),
    pa.array(["a", "b", None, "d"]),
    pa.array([[1], None, [], [4, 5]], pa.list_(pa.int32())),
    pa.array([[1], [None], [], [4, 5]], pa.list_(pa.int32())),
    pa.array([[-1], [2], [3], [4]], pa.list_(pa.int32())),
    pa.array([[b"12345678"], [b"12345678"], [], []], pa.list_(pa.binary(8))),
    pa.array([[b"1"], [b"1"], [], []], pa.list_(pa.binary(1))),
    pa.array([{"a": 1}] * 4),
    pa.array([0xFFFF] * 4, pa.uint16()),
    pa.array([[0x7E00], [0x8000], [], []], pa.list_(pa.uint16())),
    pa.array([float("nan")] * 4),
    pa.nulls(4),
    pa.array(["x"] * 4).dictionary_encode(),
    pa.array([10**15] * 4, pa.timestamp("s")),
    pa.Array.from_buffers(
        pa.string(), 4, [None, pa.py_buffer(np.int32([0, 1, 2, 3, 4])), pa.py_buffer(b"\xff\xfe\xfd\xfc")]
    ),
]


@pytest.mark.parametrize("kind", ["store", "rows"])
@given(data=st.data())
@EXAMPLES
def test_any_column_in_place_of_any_other(store: Path, rows: Path, kind: str, data: st.DataObject) -> None:
    folder = {"store": store, "rows": rows}[kind]
    table = pq.read_table(path_of(folder, SHARD)).slice(0, 4)
    place = data.draw(st.integers(0, table.num_columns - 1))
    name = data.draw(st.sampled_from([table.column_names[place], "other", "id"]))
    table = table.set_column(place, name, data.draw(st.sampled_from(COLUMNS)))
    if data.draw(st.booleans()):
        table = table.remove_column(data.draw(st.integers(0, table.num_columns - 1)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    edit_manifest(folder, lambda fields: fields["shards"][0].update(rows=4))
    replaced(folder, SHARD, sink.getvalue())


@pytest.mark.parametrize("name", [SHARD, "tokens.parquet"])
def test_what_would_unpack_to_far_more_than_a_writer_makes_is_not_unpacked(
    store: Path, tmp_path: Path, name: str
) -> None:
    """Three million rows of nothing take a few kilobytes."""
    folder = shutil.copytree(store, tmp_path / "store")
    path = path_of(folder, name)
    pq.write_table(pa.table({"id": pa.nulls(3_000_000, pa.string())}), path)
    data = path.read_bytes()
    assert len(data) < 10_000
    sha256 = hashlib.sha256(data).hexdigest()
    if name == SHARD:
        edit_manifest(folder, lambda fields: fields["shards"][0].update(rows=3_000_000, bytes=len(data), sha256=sha256))
    else:
        edit_manifest(folder, lambda fields: fields.update(files={name: sha256}))
    before = pa.total_allocated_bytes()
    with pytest.raises(StoreError, match=r"expected at most 1048576 rows.* got 3000000"):
        _ = open_store(folder).ids() if name == SHARD else open_store(folder).table
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize("limit", ["MOST_ROWS", "MOST_BYTES"])
def test_the_rows_and_bytes_of_a_shard_are_bounded_too(
    store: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, limit, 3)
    with pytest.raises(FusionError, match=r"expected at most .*\b3 (rows|bytes)"):
        list(open_store(store))


@given(
    data=st.binary(max_size=200)
    | changed(b'{"id": "a", "text": "some text"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
)
@example(data=b'{"text": ' + b"[" * 3000)
@example(data=b'{"id": 1e999, "text": "a"}')
@example(data=b'{"id": ' + b"9" * 5000 + b', "text": "a"}')
@example(data=b'{"text": "\\ud83d"}')
@example(data=b'{"id": "\\ud83d", "text": "a"}')
@example(data=b'{"text": "a", "tests": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(data=b'{"messages": [{"role": ["user"], "content": "b"}]}')
@settings(parent=EXAMPLES)
def test_any_bytes_in_a_file_of_texts(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(data)
    attempt(lambda: read_texts(path))
    attempt(lambda: read_prompts(path))
    attempt(lambda: list(read_row_file(path)))


@given(data=st.data())
@settings(parent=EXAMPLES)
def test_any_column_in_a_parquet_file_of_texts(tmp_path: Path, data: st.DataObject) -> None:
    """What a column holds that nobody asks for does no harm either."""
    path = tmp_path / "texts.parquet"
    extra = data.draw(st.sampled_from(COLUMNS))
    pq.write_table(pa.table({"id": ["a", "b", "c", "d"], "text": ["e"] * 4, "other": extra}), path)
    attempt(lambda: read_texts(path))
    pq.write_table(pa.table({"id": extra, "text": ["e"] * 4}), path)
    attempt(lambda: read_texts(path))
    path.write_bytes(data.draw(changed(path.read_bytes())))
    attempt(lambda: read_texts(path))
