"""What a folder holds, in a form that can be compared with what another one holds."""

from pathlib import Path
from typing import Any

from store_samples import columns_of

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.store import open_rows, open_store
from fusion_plugins.store.maintain import verify

__all__ = ["content", "record_bytes", "store_or_rows"]


def record_bytes(item: Record) -> tuple[object, ...]:
    values = columns_of(item).values()
    return tuple(value.tobytes() if hasattr(value, "tobytes") else repr(value) for value in values)


def content(folder: Path) -> list[Any]:
    """Everything a folder holds, up to the order of the shards; also proves that all of it can be read."""
    assert verify(folder).problems == []
    if "responses" in (folder / "manifest.json").read_text():
        return sorted(open_rows(folder), key=lambda row: (row["prompt_id"], row["index"]))
    return sorted(record_bytes(item) for item in open_store(folder))


def store_or_rows(folder: Path) -> Any:
    return open_rows(folder) if "responses" in (folder / "manifest.json").read_text() else open_store(folder)
