"""The store: a folder with what one source says about a set of texts. Capture writes it, every later step reads it.

It holds ``manifest.json``, ``tokens.parquet`` and Parquet shards. The manifest says what was captured, and lists the
shards. Readers ignore a shard that it does not list; the next writer recovers its records. See ``docs/store.md``.

Read ``manifest``, ``shards`` and ``schema`` (what is on disk), then ``shard_writer`` with ``writer`` and ``rows`` (how
it gets there), then ``reader``, ``maintain`` and ``export``. Names are resolved on first use; none loads torch.
"""

from typing import TYPE_CHECKING

from fusion_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from fusion_plugins.store.manifest import ColumnKind, Manifest, RowManifest
    from fusion_plugins.store.reader import Store, open_store
    from fusion_plugins.store.rows import RowStore, RowWriter, open_rows
    from fusion_plugins.store.writer import StoreWriter

__all__ = [
    "ColumnKind",
    "Manifest",
    "RowManifest",
    "RowStore",
    "RowWriter",
    "Store",
    "StoreWriter",
    "open_rows",
    "open_store",
]

__getattr__ = lazy_names(
    __name__,
    {
        "manifest": ("ColumnKind", "Manifest", "RowManifest"),
        "reader": ("Store", "open_store"),
        "rows": ("RowStore", "RowWriter", "open_rows"),
        "writer": ("StoreWriter",),
    },
)
