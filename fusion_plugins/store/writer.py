"""Writing a store of log-probabilities: capture hands records in, and goes on where it stopped."""

import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import DataError, MismatchError
from fusion_plugins.store.manifest import Manifest
from fusion_plugins.store.schema import record_codec
from fusion_plugins.store.shard_writer import SHARD_ROWS, ShardWriter

if TYPE_CHECKING:
    from fusion_plugins.core.text.token_table import TokenTable

__all__ = ["StoreWriter"]

TABLE_NAME = "tokens.parquet"


class StoreWriter:
    """Adds records to a store, one shard at a time.

    A shard is committed when enough records have come, at :meth:`flush`, and at the end of the ``with`` block, also
    when that ends by Ctrl-C or an error. A killed process loses only what came after the last commit.

    Args:
        path: the folder; made if it does not exist, continued if it does.
        manifest: what is captured. An existing store must have the same identity.
        table: the source tokenizer's tokens, kept beside the records.
        flush_records: records after which a shard is written without being asked.

    Raises:
        MismatchError: the folder was made with other settings (all of them are named), or manifest and table differ.
        StoreError: the folder is damaged, or another writer is at work.

    Example:
        ``with StoreWriter(path, manifest, table) as store: store.write(record); store.finish()``
    """

    def __init__(
        self, path: str | Path, manifest: Manifest, table: "TokenTable", *, flush_records: int = SHARD_ROWS
    ) -> None:
        self.path = Path(path)
        if table.fingerprint != manifest.tokenizer_fingerprint:
            raise MismatchError(
                f"{path}: the manifest names tokenizer {manifest.tokenizer_fingerprint}, the token table is "
                f"{table.fingerprint}. Build both from the same tokenizer."
            )
        manifest = manifest.model_copy(update={"schema_version": Manifest.VERSION})
        companions = {TABLE_NAME: lambda: _table_bytes(table)}
        self._shards = ShardWriter(self.path, manifest, record_codec(manifest), flush_records, companions)

    @property
    def manifest(self) -> Manifest:
        """The manifest as it is on the disk."""
        return cast(Manifest, self._shards.manifest)

    @property
    def done_ids(self) -> set[str]:
        """Ids of the records that are safely on the disk."""
        return cast(set[str], self._shards.done)

    def write(self, record: Record) -> None:
        """Take one record.

        Raises:
            DataError: its arrays do not fit together, or a record of that id is already here.
        """
        _check(record, self.manifest.top_k)
        self._shards.write(record)

    def flush(self) -> None:
        """Commit the records that came so far as a shard of their own."""
        self._shards.flush()

    def finish(self) -> None:
        """Commit, and mark the store complete."""
        self._shards.finish()

    def close(self) -> None:
        """Commit what came so far and let the next writer in."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is KeyboardInterrupt:
            say_how_to_go_on(self.path, len(self.done_ids), "records")


def say_how_to_go_on(path: Path, count: int, what: str) -> None:
    """Tell whoever pressed Ctrl-C that nothing is lost."""
    sys.stderr.write(f"Stopped. {count} {what} are safe in {path}; run the same command again to go on from there.\n")


def _check(record: Record, top_k: int) -> None:
    n_tokens = len(record.text.input_ids)
    shapes = {
        "ends": (record.text.ends.shape, (n_tokens,)),
        "exact": (record.text.exact.shape, (n_tokens,)),
        "topk_ids": (record.topk.ids.shape, (n_tokens, top_k)),
        "topk_logprobs": (record.topk.logprobs.shape, (n_tokens, top_k)),
        "token_logprobs": (record.topk.token_logprobs.shape, (n_tokens,)),
        "tail": (record.tail.shape, (n_tokens,)),
        "spans": (record.text.spans.shape[1:], (2,)),
    }
    for name, (came, expected) in shapes.items():
        if came != expected:
            raise DataError(f"record {record.id!r}: {name} has shape {came}, expected {expected}")
    logprobs = record.topk.logprobs
    if (logprobs[:, 1:] > logprobs[:, :-1]).any() or np.isnan(logprobs).any():
        raise DataError(f"record {record.id!r}: topk_logprobs must descend within a row; sort ids and values together")


def _table_bytes(table: "TokenTable") -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table.to_columns()), sink, compression="zstd")
    return memoryview(sink.getvalue())
