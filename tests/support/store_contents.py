"""Stores made for tests, and what a folder holds in a form that can be compared with what another one holds."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_samples import columns_of, manifest, record, table
from typer.testing import CliRunner

from fusion_plugins.cli import app
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.store import Store, StoreWriter, open_rows, open_store
from fusion_plugins.store.maintain import verify

__all__ = [
    "assert_same_record",
    "command",
    "content",
    "edit_manifest",
    "flip",
    "make_store",
    "record_bytes",
    "store_or_rows",
    "write_records",
]


def make_store(folder: Path, numbers: Iterable[int], finish: bool = True, **changes: object) -> Path:
    """Add records to a store, one shard each."""
    with StoreWriter(folder, manifest(**changes), table()) as writer:
        for number in numbers:
            writer.write(record(number))
            writer.flush()
        if finish:
            writer.finish()
    return folder


def write_records(path: Path, records: list[Record], **options: object) -> Store:
    """Write a complete store and open it."""
    with StoreWriter(path, manifest(records[0].topk.ids.shape[1]), table(), **options) as writer:
        for item in records:
            writer.write(item)
        writer.finish()
    return open_store(path)


def assert_same_record(got: Record, expected: Record) -> None:
    """Ids and positions are exact, probabilities as near as float16 allows."""
    found, wanted = columns_of(got), columns_of(expected)
    for name in ("id", "input_ids", "ends", "exact", "spans", "topk_ids"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    for name in ("topk_logprobs", "token_logprobs", "tail"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-11, atol=2**-24, err_msg=name)
    assert (got.ce_per_token, got.ce_per_byte) == pytest.approx(
        (expected.ce_per_token, expected.ce_per_byte), nan_ok=True
    )


def record_bytes(item: Record) -> tuple[object, ...]:
    values = columns_of(item).values()
    return tuple(_with_one_nan(value).tobytes() if hasattr(value, "tobytes") else repr(value) for value in values)


def _with_one_nan(value: Any) -> np.ndarray:
    """Give every NaN the same bits: those of an older layout are others."""
    array = np.array(value)
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
    return array


def content(folder: Path) -> list[Any]:
    """Everything a folder holds, up to the order of the shards; also proves that all of it can be read."""
    assert verify(folder).problems == []
    if "responses" in (folder / "manifest.json").read_text():
        return sorted(open_rows(folder), key=lambda row: (row["prompt_id"], row["index"]))
    return sorted(record_bytes(item) for item in open_store(folder))


def store_or_rows(folder: Path) -> Any:
    return open_rows(folder) if "responses" in (folder / "manifest.json").read_text() else open_store(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object], signed: bool = True) -> None:
    """Change the fields of a manifest; a signed one gets the checksum of what it then holds, as a forger gives it."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    checksum = fields.pop("checksum")
    change(fields)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(fields | {"checksum": digest if signed else checksum}))


def flip(path: Path, near: bytes, distance: int) -> None:
    """Change one bit at a distance from the first place where some bytes are found."""
    data = bytearray(path.read_bytes())
    data[data.index(near) + distance] ^= 1
    path.write_bytes(data)


def command(*arguments: object) -> str:
    """Run ``fusion store`` and return what it prints, with single spaces."""
    result = CliRunner().invoke(app, ["store", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return " ".join(result.output.split())
