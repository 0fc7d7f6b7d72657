"""The store: a folder with what one source says about a set of texts. Capture writes it, every later step reads it.

It holds ``manifest.json``, ``tokens.parquet`` and Parquet shards. The manifest says what was captured, and lists the
shards; a shard that it does not list does not exist. See ``docs/store.md``.

Read ``manifest``, ``shards`` and ``schema`` (what is on disk), then ``shard_writer`` with ``writer`` and ``rows`` (how
it gets there), then ``reader``, ``maintain`` and ``export``. Names are resolved on first use; none loads torch.
"""

from importlib import import_module
from typing import Any

__all__ = ["Manifest", "RowManifest", "RowStore", "RowWriter", "Store", "StoreWriter", "open_rows", "open_store"]

_HOME = {
    "Manifest": "manifest",
    "RowManifest": "manifest",
    "RowStore": "rows",
    "RowWriter": "rows",
    "Store": "reader",
    "StoreWriter": "writer",
    "open_rows": "rows",
    "open_store": "reader",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"fusion_plugins.store.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
