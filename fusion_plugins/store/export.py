"""Stores in other formats: plain Parquet folders that Hugging Face datasets and axolotl read as they are.

``datasets`` has one row per record with the fields of :class:`~fusion_plugins.core.fusion.types.Record` as plain lists.
``axolotl-kd`` has the columns of axolotl's own knowledge distillation (same tokenizer, one teacher), already tokenized.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.errors import ConfigError, StoreError
from fusion_plugins.store.files import leftovers, make_folder, temporary_name, write_atomic
from fusion_plugins.store.reader import Store, open_store

FORMATS = ("datasets", "axolotl-kd")
#: log-probabilities per exported file
FILE_VALUES = 1 << 23
#: log-probability of an entry that is masked; axolotl's collator pads with the same
MASKED = -1e9
IGNORED_LABEL = -100


def kd_columns(record: Record, exponent: float = 1.0) -> dict[str, Any]:
    """Return a record as a tokenized row of axolotl's knowledge distillation.

    Element t of ``target_*`` belongs to the logits at position t, as in the store; axolotl shifts only the labels. Each
    distribution is renormalised over its entries after probabilities were raised to ``exponent`` (temperature of the
    store over that of the run). Labels are the tokens that stored distributions predict.
    """
    held = record.topk.ids >= 0
    scaled = record.topk.logprobs.astype(np.float64) * exponent
    with np.errstate(divide="ignore"):
        normaliser = np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    logprobs = np.where(held, scaled - np.where(np.isfinite(normaliser), normaliser, 0), MASKED)
    # A label is the token itself; the distribution that predicts it is one position to the left.
    predicted = np.concatenate([[False], held.any(axis=1)])[:-1]
    return {
        "input_ids": record.text.input_ids,
        "attention_mask": np.ones(len(record.text.input_ids), np.int8),
        "labels": np.where(predicted, record.text.input_ids, IGNORED_LABEL),
        "target_logprobs": np.maximum(logprobs, MASKED).astype(np.float32),
        "target_token_ids": np.where(held, record.topk.ids, 0),
        "target_mask": held.astype(np.int8),
    }


def export(path: str | Path, out: str | Path, *, format: str = "datasets", temperature: float = 1.0) -> int:
    """Write a store as a folder of plain Parquet files and return the number of records.

    The folder stays empty until all files are there.

    Args:
        path: the store.
        out: a folder that does not exist or is empty.
        format: one of :data:`FORMATS`.
        temperature: for ``axolotl-kd``: the run's ``kd_temperature``.

    Raises:
        ConfigError: the format is unknown, the temperature is not positive, or the folder is not empty.
        StoreError: the path is no store of log-probabilities, or it is damaged; or the disk is full.
    """
    out = Path(out).absolute()
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}. Name one of them.")
    if temperature <= 0 or (temperature != 1.0 and format != "axolotl-kd"):
        raise ConfigError(
            f"temperature: expected a positive number, and 1.0 for any format but axolotl-kd, got {temperature} for "
            f"{format}. Leave --temperature out."
        )
    store = open_store(path)
    if out.is_symlink():
        raise ConfigError(f"out: expected an empty or new folder, got {out}, which is a link. Name the folder itself.")
    make_folder(out)
    if any(out.iterdir()):
        raise ConfigError(f"out: expected an empty or new folder, got {out}, which holds files. Name another folder.")
    _remove_leftovers(out)
    unfinished = temporary_name(out)
    try:
        unfinished.mkdir()
        with _held(unfinished):
            count = _write(store, unfinished, format, store.manifest.temperature / temperature)
            os.replace(unfinished, out)  # a folder may replace an empty one, in one step
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror or error}. Name another folder.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Mark a folder as being worked on; the mark ends with the process.

    Raises:
        OSError: another export has marked it, or it is no folder of ours.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    """Remove what exports that were killed left beside a folder, but not what a running one is writing."""
    for left in leftovers(out):
        with suppress(OSError), _held(left):
            shutil.rmtree(left)


def _write(store: Store, folder: Path, format: str, exponent: float) -> int:
    count = 0
    for number, records in enumerate(_portions(store)):
        kd = format == "axolotl-kd"
        rows = [kd_columns(record, exponent) if kd else _plain_columns(record) for record in records]
        table = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomic(folder / f"data-{number:05d}.parquet", memoryview(sink.getvalue()))
        count += len(records)
    return count


def _plain_columns(record: Record) -> dict[str, Any]:
    """Return a record as plain lists; entries as in the store, -1 and -inf where there is none."""
    return {
        "id": record.id,
        "input_ids": record.text.input_ids,
        "ends": record.text.ends,
        "exact": record.text.exact,
        "spans": record.text.spans,
        "topk_ids": record.topk.ids,
        "topk_logprobs": record.topk.logprobs,
        "token_logprobs": record.topk.token_logprobs,
        "tail": record.tail,
        "ce_per_token": record.ce_per_token,
        "ce_per_byte": record.ce_per_byte,
    }


def _column(values: list[Any]) -> pa.Array:
    """Return numbers and strings as they are, (U,) arrays as lists and (U, K) arrays as lists of lists."""
    if not isinstance(values[0], np.ndarray):
        return pa.array(values, from_pandas=False)
    flat = pa.array(np.concatenate(values).ravel())
    if values[0].ndim == 2:
        width = values[0].shape[1]
        flat = pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, width, dtype=np.int32)), flat)
    starts = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), flat)


def _portions(store: Store) -> Iterator[list[Record]]:
    records: list[Record] = []
    tokens = 0
    for record in store:
        records.append(record)
        tokens += len(record.text.input_ids)
        if tokens * store.manifest.top_k >= FILE_VALUES:
            yield records
            records, tokens = [], 0
    if records:
        yield records
