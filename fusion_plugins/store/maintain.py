"""Looking after folders that exist: verify, merge, compact. Works on stores and on folders of rows alike."""

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fusion_plugins.core.text.content_id import texts_fingerprint
from fusion_plugins.errors import ConfigError, FusionError, MismatchError, StoreError
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.manifest import Manifest, RowManifest, ShardInfo, load_manifest
from fusion_plugins.store.reader import Store
from fusion_plugins.store.rows import row_codec
from fusion_plugins.store.schema import record_codec
from fusion_plugins.store.shard_writer import ShardWriter
from fusion_plugins.store.shards import Codec, parquet_bytes, read_keys
from fusion_plugins.store.writer import TABLE_NAME, say_how_to_go_on

__all__ = ["Verdict", "codec_of", "compact", "merge", "verify"]

AnyManifest = Manifest | RowManifest
#: parts of one capture agree in these, unless they cover different texts
_TEXT_SETS = ("texts_fingerprint", "prompts_fingerprint")
#: parts may differ in these
_ENGINE = ("engine", "engine_version")


def codec_of(manifest: AnyManifest) -> Codec[Any]:
    """Return how the items of a folder are kept."""
    return record_codec(manifest) if isinstance(manifest, Manifest) else row_codec(manifest)


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        manifest: of the folder, without the shards that were dropped.
        problems: one sentence each; empty when all is well.
        damaged: the shards that cannot be used.
        dropped: whether they were taken out of the manifest.
    """

    manifest: AnyManifest
    problems: list[str] = field(default_factory=list)
    damaged: list[ShardInfo] = field(default_factory=list)
    dropped: bool = False


def verify(folder: str | Path, *, drop_damaged: bool = False) -> Verdict:
    """Read a folder to the last byte and compare it with its manifest.

    Args:
        folder: a store or a folder of rows.
        drop_damaged: take damaged shards out, so that the command that made the folder makes their rows again.

    Raises:
        StoreError: the manifest itself is unusable, or a writer is at work.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems, damaged = _table_problems(folder, manifest), []
    seen: Counter[Hashable] = Counter()
    for shard in manifest.shards:
        try:
            seen.update(_checked_keys(folder, shard, codec_of(manifest)))
        except StoreError as error:
            problems.append(str(error))
            damaged.append(shard)
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        problems.append(f"{len(twice)} rows stand twice, the first of them {twice[0]!r}. Make the folder again.")
    if not (drop_damaged and damaged):
        return Verdict(manifest, problems, damaged)
    return Verdict(_drop(folder, damaged), problems, damaged, dropped=True)


def _table_problems(folder: Path, manifest: AnyManifest) -> list[str]:
    if isinstance(manifest, RowManifest):
        return []
    try:
        _ = Store(folder).table
    except FusionError as error:
        return [str(error)]
    return []


def _checked_keys(folder: Path, shard: ShardInfo, codec: Codec[Any]) -> list[Hashable]:
    try:
        items = list(codec.items(folder, shard))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise StoreError(f"{folder / shard.name} cannot be decoded: {type(error).__name__}: {error}") from error
    tokens = sum(codec.tokens(item) for item in items)
    if (len(items), tokens) != (shard.rows, shard.tokens):
        raise StoreError(
            f"{folder / shard.name} holds {len(items)} rows of {tokens} tokens; the manifest says {shard.rows} of "
            f"{shard.tokens}"
        )
    return [codec.key(item) for item in items]


def _drop(folder: Path, damaged: Sequence[ShardInfo]) -> AnyManifest:
    with closing(FolderLock(folder)):
        manifest = load_manifest(folder)
        kept = [shard for shard in manifest.shards if shard not in damaged]
        manifest = manifest.model_copy(update={"shards": kept, "complete": False})
        manifest.save(folder)
        for shard in damaged:
            (folder / shard.name).unlink(missing_ok=True)
    return manifest


def compact(folder: str | Path) -> AnyManifest:
    """Join small shards and rewrite those of an older version; can be interrupted and repeated at any point.

    Raises:
        StoreError: the folder is damaged, or another writer is at work.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    with closing(_writer(folder, manifest)) as writer:
        writer.compact()
        return writer.manifest  # type: ignore[return-value]


def _writer(folder: Path, manifest: AnyManifest, like: Path | None = None) -> ShardWriter[Any]:
    """Open a folder for writing, a new one with the token table of the folder that it is like."""
    fresh = manifest.model_copy(update={"shards": [], "complete": False, "schema_version": type(manifest).VERSION})
    companions = {}
    if like is not None and isinstance(manifest, Manifest):
        companions[TABLE_NAME] = (like / TABLE_NAME).read_bytes
    return ShardWriter(folder, fresh, codec_of(manifest), companions=companions)


def merge(parts: Sequence[str | Path], out: str | Path) -> AnyManifest:
    """Join folders that were made with the same settings into one; an interrupted merge is continued.

    A row that stands in several parts must be the same in all of them, and is taken once. Parts that cover different
    texts get a text fingerprint made of theirs.

    Raises:
        MismatchError: the parts differ in their settings, or in a row that they share.
        StoreError: a part is damaged, or another writer is at work.
    """
    folders = [Path(part) for part in parts]
    out = Path(out)
    if not folders or out.resolve() in [folder.resolve() for folder in folders]:
        raise ConfigError(f"expected at least one folder to merge, and another one than {out} to write into")
    manifests = [load_manifest(folder) for folder in folders]
    joined = _joined_manifest(folders, manifests)
    codec = codec_of(joined)
    _refuse_conflicts(folders, manifests, codec)
    with closing(_writer(out, joined, folders[0])) as writer:
        try:
            for folder, manifest in zip(folders, manifests, strict=True):
                for shard in manifest.shards:
                    _copy_rows(folder, shard, codec, writer)
        except KeyboardInterrupt:
            writer.flush()
            say_how_to_go_on(out, len(writer.done), "rows")
            raise
        if all(manifest.complete for manifest in manifests):
            writer.finish()
        writer.flush()
        writer.compact()
        return writer.manifest  # type: ignore[return-value]


def _copy_rows(folder: Path, shard: ShardInfo, codec: Codec[Any], writer: ShardWriter[Any]) -> None:
    keys = read_keys(folder, shard, codec)
    if all(writer.holds(key) for key in keys):
        return
    for item in codec.items(folder, shard):
        if not writer.holds(codec.key(item)):
            writer.write(item)


def _joined_manifest(folders: Sequence[Path], manifests: Sequence[AnyManifest]) -> AnyManifest:
    first = manifests[0]
    changes: dict[str, Any] = {}
    for name in _TEXT_SETS:
        values = {manifest.identity().get(name) for manifest in manifests} - {None}
        if len(values) > 1:
            changes[name] = texts_fingerprint((name, str(value)) for value in values)
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        expected = {name: value for name, value in first.identity().items() if name not in changes}
        cure = f"Only parts that were made with the same settings can be merged; the first is {folders[0]}."
        manifest.require(folder, cure, kind=first.kind, **expected)
    provenance = {"merged": [_origin(folder, part) for folder, part in zip(folders, manifests, strict=True)]}
    if isinstance(first, Manifest):
        for name in _ENGINE:
            changes[name] = " + ".join(sorted({getattr(manifest, name) for manifest in manifests}))
        return first.model_copy(update=changes | {"provenance": provenance})
    return first.model_copy(update={"facts": first.facts | changes, "provenance": provenance})


def _origin(folder: Path, manifest: AnyManifest) -> dict[str, Any]:
    """Return what a part says about how it was made and nothing checks; the joined manifest keeps it."""
    names = (*(name for name in _ENGINE if hasattr(manifest, name)), "created", "made_by", "provenance")
    return {"folder": str(folder), **{name: getattr(manifest, name) for name in names}}


def _refuse_conflicts(folders: Sequence[Path], manifests: Sequence[AnyManifest], codec: Codec[Any]) -> None:
    """Compare the rows that several parts hold, before anything is written."""
    shards = [(folder, shard) for folder, manifest in zip(folders, manifests, strict=True) for shard in manifest.shards]
    keys = [read_keys(folder, shard, codec) for folder, shard in shards]
    counts = Counter(key for part in keys for key in part)
    shared = {key for key, count in counts.items() if count > 1}
    digests: dict[Hashable, tuple[str, Path]] = {}
    for (folder, shard), part in zip(shards, keys, strict=True):
        if shared.isdisjoint(part):
            continue
        for item in codec.items(folder, shard):
            key = codec.key(item)
            if key not in shared:
                continue
            digest = hashlib.sha256(parquet_bytes(codec, codec.encode([item]), 0)).hexdigest()
            known, other = digests.setdefault(key, (digest, folder))
            if known != digest:
                raise MismatchError(
                    f"row {key!r} is not the same in {other} and in {folder}. Leave one of the two out, or make them "
                    f"again from the same texts."
                )
