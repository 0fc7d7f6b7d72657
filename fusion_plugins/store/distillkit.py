"""``fusion store import --format distillkit``: teacher outputs that DistillKit has packed -> a store and its texts.

A row has ``input_ids`` and, per position, the bytes ``compressed_logprobs`` and ``bytepacked_indices``: the K most
probable next tokens after reading the tokens so far, which is this package's own convention. A file
``compression_config.yaml`` says how the bytes are laid out; :mod:`~fusion_plugins.store.distillkit_bytes`
reads them. In packed rows, ``attention_mask`` numbers the documents.

What DistillKit does not store: the log-probability of the text's own token where it is not among the K. It is taken as
that of the least entry, or as the mass that is left if that is less; both are upper bounds.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusion_plugins.config import load_config
from fusion_plugins.core.arrays import FloatArray, IntArray
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.content_id import content_id, texts_fingerprint
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, DataError
from fusion_plugins.hub import hub_rows, is_hub
from fusion_plugins.model_names import reason_of, require_model
from fusion_plugins.row_files import readable_rows, row_files
from fusion_plugins.store.distillkit_bytes import CONFIG_NAME, Compression, decode
from fusion_plugins.store.files import FolderLock, new_file
from fusion_plugins.store.manifest import Manifest
from fusion_plugins.store.writer import StoreWriter

COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices", "attention_mask")


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        records: records written by this run.
        tokens: their tokens.
        outside: positions whose own token was not among the entries.
        skipped: place -> why it was left out (``on_unusable="skip"`` only).
    """

    records: int
    tokens: int
    outside: int
    skipped: dict[str, str] = field(default_factory=dict)


def import_distillkit(
    path: str,
    out: str | Path,
    texts: str | Path,
    *,
    tokenizer: str,
    compression: str | Path | None = None,
    model: str | None = None,
    on_unusable: Literal["raise", "skip"] = "raise",
) -> ImportReport:
    """Write a store of what a set says, and the texts that it is of, one JSON object a line.

    Args:
        path: Parquet files, a folder of them, or ``hf:ORG/NAME``.
        out: the store; an import that was stopped is continued.
        texts: .jsonl file to write, for the other sources and for the training; a file of that name with another
            content is left as it is.
        tokenizer: folder or hub name of the teacher's tokenizer.
        compression: YAML file with the settings; None for the one in the folder.
        model: name of the teacher; None for that of the tokenizer.
        on_unusable: what becomes of documents that cannot be used: bytes that are no UTF-8, ids that the tokenizer
            lacks.

    Raises:
        ConfigError: settings are missing or wrong, the tokenizer cannot be loaded, or the file for the texts holds
            something else.
        DataError: a row is broken (with ``on_unusable="raise"``), or the set has another form.
    """
    settings = _settings(path, compression)
    table = _token_table(tokenizer)
    skipped: dict[str, str] = {}
    records = tokens = outside = 0
    texts, name = Path(texts), model or tokenizer

    def refuse(where: str, error: DataError) -> None:
        if on_unusable == "raise":
            raise error
        skipped[where] = str(error)

    def documents() -> Iterator[tuple[str, str, TokenizedText, TopK]]:
        for where, row in _rows(path):
            try:
                yield from _documents(where, row, settings, table, refuse)
            except DataError as error:
                refuse(where, error)

    seen: dict[str, str] = {}
    digest = hashlib.sha256()
    with closing(FolderLock(texts.parent, texts.name)), new_file(texts) as file:
        for _, text, _, _ in documents():
            id = content_id(text)
            if id in seen:
                continue
            seen[id] = id
            line = (json.dumps({"id": id, "text": text}, ensure_ascii=False) + "\n").encode()
            digest.update(line)
            file.write(line)
        _require_own(texts, digest.hexdigest())
    manifest = Manifest(
        model=name,
        tokenizer_fingerprint=table.fingerprint,
        vocab_size=table.vocab_size,
        logits_width=max(settings.d, table.vocab_size),
        top_k=min(settings.k, table.vocab_size),
        dtype=f"distillkit {settings.exact_dtype}",
        texts_fingerprint=texts_fingerprint(seen.items()),
        engine="distillkit",
        engine_version=json.dumps(settings.model_dump(mode="json"), sort_keys=True),
        provenance={"imported": path, "gold": "of a token outside the entries: an upper bound"},
    )
    with StoreWriter(out, manifest, table) as store:
        for _, text, tokenized, topk in documents():
            id = content_id(text)
            if store.holds(id):
                continue
            store.write(build_record(id, tokenized, topk))
            records, tokens = records + 1, tokens + len(tokenized.input_ids)
            outside += _outside(tokenized, topk)
        store.finish()
    return ImportReport(records, tokens, outside, skipped)


def _require_own(texts: Path, digest: str) -> None:
    """Refuse to take the place of a file: most commands read what is named by --texts."""
    if not texts.exists():
        return
    with open(texts, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ConfigError(
            f"texts: expected the name of a new file, which gets the texts of the set, got {str(texts)!r}, which holds "
            "something else. Name another file, or remove this one."
        )


def _token_table(tokenizer: str) -> TokenTable:
    from transformers import AutoTokenizer

    try:
        require_model(tokenizer)
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"cannot load the tokenizer {tokenizer!r}: {reason_of(error)}. Name the folder or the hub id of the "
            "teacher's tokenizer."
        ) from error
    return TokenTable.from_tokenizer(loaded)


def _settings(path: str, compression: str | Path | None) -> Compression:
    found = compression if compression is not None else Path(path) / CONFIG_NAME
    if not Path(found).is_file():
        raise ConfigError(
            f"expected the settings of the compression in {str(found)!r}, got no file. They are "
            "`logprob_compressor` on the page of the set: write them into a YAML file and name it with --compression."
        )
    return load_config(Compression, found, {})


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if is_hub(path):
        yield from hub_rows(path, COLUMNS, needed=("compressed_logprobs",))
        return
    for file in row_files(path):
        for where, row in readable_rows(file, COLUMNS):
            if isinstance(row, DataError):
                raise row
            yield where, row


def _documents(
    where: str,
    row: Mapping[str, Any],
    settings: Compression,
    table: TokenTable,
    refuse: Callable[[str, DataError], None],
) -> Iterator[tuple[str, str, TokenizedText, TopK]]:
    """Yield place, text, tokens and distributions of each document of a row; one that is no text is refused alone."""
    missing = [name for name in COLUMNS[:3] if row.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: expected the columns {', '.join(COLUMNS[:3])}, got none in {', '.join(missing)}. Sets in "
            "DistillKit's older form (packed_indices, exact_values, coeffs) hold centred logits and cannot be imported."
        )
    ids = np.asarray(row["input_ids"], np.int64)
    try:
        packed, indices = (np.array(row[name], np.uint8).reshape(len(row[name]), -1) for name in COLUMNS[1:3])
    except (ValueError, OverflowError, TypeError) as error:
        raise DataError(f"{where}: expected as many bytes at every position, got others: {error}.") from None
    # The last token has no distribution, or it was cut off with packing.
    if len(packed) != len(indices) or not len(packed) <= len(ids) <= len(packed) + 1:
        raise DataError(
            f"{where}: expected a distribution for every token but the last, got {len(ids)} tokens, {len(packed)} and "
            f"{len(indices)} distributions."
        )
    if ids.size and (ids.min() < 0 or ids.max() >= table.vocab_size):
        raise DataError(
            f"{where}: expected ids up to {table.vocab_size - 1}, got {ids.max()}. Name the teacher's tokenizer."
        )
    try:
        entries, logprobs = decode(packed, indices, settings, table.vocab_size)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    marks = np.asarray(row.get("attention_mask") if row.get("attention_mask") is not None else np.ones(len(ids)))
    borders = np.flatnonzero(np.diff(marks[: len(ids)])) + 1
    for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(ids)], strict=True):
        if stop - start < 2 or marks[start] == 0:  # padding
            continue
        try:
            text, tokenized = _text(ids[start:stop].astype(np.int32), table)
        except UnicodeDecodeError as error:
            place = f"{where}, tokens {start} to {stop}"
            refuse(place, DataError(f"{place}: expected tokens that spell UTF-8, got other bytes: {error}."))
            continue
        if text:
            part = slice(start, min(stop, len(packed)))
            yield where, text, tokenized, _topk(tokenized, entries[part], logprobs[part])


def _text(ids: IntArray, table: TokenTable) -> tuple[str, TokenizedText]:
    """The text that tokens spell, without special ones, and where each of them ends."""
    pieces = [b"" if table.special[id] else table.tokens[id] for id in ids.tolist()]
    raw = b"".join(pieces)
    widths = np.array([len(piece) for piece in pieces], np.int32)
    if table.prefix_space and raw.startswith(b" "):  # the tokenizer's own, which is not in the text
        widths[int(np.flatnonzero(widths)[0])] -= 1
        raw = raw[1:]
    ends = np.cumsum(widths, dtype=np.int32)
    spans = np.array([[0, len(raw)]], np.int32)
    return raw.decode(), TokenizedText(ids, ends, spans, np.ones(len(ids), np.bool_))


def _topk(text: TokenizedText, ids: IntArray, logprobs: FloatArray) -> TopK:
    size, k = len(text.input_ids), ids.shape[1]
    if len(ids) < size:  # the last token has no distribution
        ids = np.concatenate([ids, np.full((1, k), -1, np.int32)])
        logprobs = np.concatenate([logprobs, np.full((1, k), -np.inf, np.float32)])
    following = np.append(text.input_ids[1:], -2)
    own = ids == following[:, None]
    with np.errstate(divide="ignore"):
        left = np.log(np.clip(1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1), 1e-8, 1.0))
    least = np.where(ids >= 0, logprobs, np.inf).min(axis=1, initial=0.0)
    gold = np.where(own.any(axis=1), np.where(own, logprobs, -np.inf).max(axis=1), np.minimum(least, left))
    gold[-1] = np.nan
    return TopK(ids, logprobs, gold.astype(np.float32))


def _outside(text: TokenizedText, topk: TopK) -> int:
    return int((~(topk.ids[:-1] == text.input_ids[1:, None]).any(axis=1)).sum())
