"""The store: what capture writes and everything after it reads.

A store is a folder: ``manifest.json``, ``tokens.parquet`` and Parquet shards. The manifest says what was captured, and
lists the shards; a shard that it does not list does not exist. See ``docs/store.md``.

Names are resolved on first use, and none of them loads torch or a host.
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
