"""Writing a store of log-probabilities: capture writes its records here and resumes where it stopped."""

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import DataError, MismatchError
from fusion_plugins.store.manifest import TABLE_NAME, Manifest
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shard_writer import SHARD_ROWS, ShardWriter

if TYPE_CHECKING:
    from fusion_plugins.core.text.token_table import TokenTable


class StoreWriter(ShardWriter[Record, Manifest]):
    """Adds records to a store; commits and resumes as :class:`~fusion_plugins.store.shard_writer.ShardWriter` says.

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
        if table.fingerprint != manifest.tokenizer_fingerprint:
            raise MismatchError(
                f"{path}: expected the table of tokenizer {manifest.tokenizer_fingerprint}, as the manifest says, got "
                f"{table.fingerprint}. Build both from the same tokenizer."
            )

        def table_bytes() -> memoryview:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table(table.to_columns()), sink, compression="zstd")
            return memoryview(sink.getvalue())

        super().__init__(path, manifest, RecordCodec(manifest, table), flush_records, {TABLE_NAME: table_bytes})

    @property
    def done_ids(self) -> Set[str]:
        """Ids of the records that are on the disk; to list them reads the shards."""
        return self.done

    def write(self, item: Record, /) -> None:
        """Take one record; a shard is written when enough are buffered.

        Raises:
            DataError: its arrays do not fit together, or the store has a record of that id already.
        """
        _check(item, self.manifest.top_k)
        super().write(item)


def _check(record: Record, top_k: int) -> None:
    n_tokens = len(record.text.input_ids)
    shapes = {
        "ends": (record.text.ends.shape, (n_tokens,)),
        "exact": (record.text.exact.shape, (n_tokens,)),
        "topk_ids": (record.topk.ids.shape, (n_tokens, top_k)),
        "topk_logprobs": (record.topk.logprobs.shape, (n_tokens, top_k)),
        "token_logprobs": (record.topk.token_logprobs.shape, (n_tokens,)),
        "tail": (record.tail.shape, (n_tokens,)),
        "spans": (record.text.spans.shape, (len(record.text.spans), 2)),
    }
    for name, (found, expected) in shapes.items():
        if found != expected:
            raise DataError(
                f"record {record.id!r}: expected {name} of shape {expected}, got {found}. Give one element per token, "
                f"and the manifest's top_k entries per position."
            )
    logprobs = record.topk.logprobs
    if (logprobs[:, 1:] > logprobs[:, :-1]).any() or np.isnan(logprobs).any():
        raise DataError(
            f"record {record.id!r}: expected topk_logprobs that descend within a position, got others. Sort ids and "
            f"values together, and replace nan."
        )
