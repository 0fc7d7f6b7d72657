"""Verify, merge and compact folders that exist: stores and folders of rows alike."""

import hashlib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_plugins.core.key_set import KeySet
from fusion_plugins.core.text.content_id import texts_fingerprint
from fusion_plugins.errors import ConfigError, FusionError, MismatchError, StoreError
from fusion_plugins.store.files import FolderLock
from fusion_plugins.store.manifest import PART, TABLE_NAME, Manifest, RowManifest, ShardInfo, load_manifest
from fusion_plugins.store.reader import Store
from fusion_plugins.store.rows import RowCodec
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shard_writer import ShardWriter
from fusion_plugins.store.shards import Codec, cure, encode_shard, read_items, read_keys, read_packed

AnyManifest = Manifest | RowManifest
#: parts of one capture agree in these, unless they cover different texts
_TEXT_SETS = ("texts_fingerprint", "prompts_fingerprint")
#: parts may differ in these
_ENGINE = ("engine", "engine_version")


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` found.

    Attributes:
        manifest: of the folder, without the shards that were dropped.
        problems: one message each; empty when there is none.
        damaged: the shards that cannot be used.
        dropped: whether they were removed from the manifest.
    """

    manifest: AnyManifest
    problems: list[str] = field(default_factory=list)
    damaged: list[ShardInfo] = field(default_factory=list)
    dropped: bool = False


def verify(folder: str | Path, *, drop_damaged: bool = False) -> Verdict:
    """Read a folder to the last byte and return what does not agree with its manifest.

    Args:
        folder: a store or a folder of rows.
        drop_damaged: remove damaged shards, so that the command that made the folder makes their content again.

    Raises:
        StoreError: the manifest itself is unusable, or (with ``drop_damaged``) a writer is at work.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems: list[str] = []
    damaged: list[ShardInfo] = []
    if isinstance(manifest, Manifest):
        try:
            _ = Store(folder).table
        except FusionError as error:
            problems.append(str(error))
    seen = KeySet()
    twice: dict[Hashable, None] = {}  # in their order
    for shard in manifest.shards:
        try:
            for key in _checked_keys(folder, shard, _codec_of(manifest)):
                if key in seen:
                    twice[key] = None
                seen.add(key)
        except MismatchError as error:  # the shard is sound, and no other file has what it holds
            problems.append(str(error))
        except StoreError as error:
            problems.append(str(error))
            damaged.append(shard)
    if twice:
        problems.append(
            f"{folder}: expected every key once, got {len(twice)} that appear more often, the first of them "
            f"{next(iter(twice))!r}. Make the folder again."
        )
    if not (drop_damaged and damaged):
        return Verdict(manifest, problems, damaged)
    return Verdict(_drop(folder, damaged), problems, damaged, dropped=True)


def _codec_of(manifest: AnyManifest) -> Codec[Any]:
    return RecordCodec(manifest) if isinstance(manifest, Manifest) else RowCodec(manifest)


def _checked_keys(folder: Path, shard: ShardInfo, codec: Codec[Any]) -> list[Any]:
    items = read_items(folder, shard, codec)
    tokens = sum(codec.tokens(item) for item in items)
    if (len(items), tokens) != (shard.rows, shard.tokens):
        raise StoreError(
            f"{folder / shard.name}: expected {shard.rows} rows of {shard.tokens} tokens, as the manifest says, got "
            f"{len(items)} of {tokens}. {cure(folder)}"
        )
    return [codec.key(item) for item in items]


def _drop(folder: Path, damaged: Sequence[ShardInfo]) -> AnyManifest:
    with closing(FolderLock(folder)):
        manifest = load_manifest(folder)  # again: before the lock was held, a writer may have changed it
        kept = [shard for shard in manifest.shards if shard not in damaged]
        manifest = manifest.model_copy(update={"shards": kept, "complete": False})
        manifest.save(folder)
        for shard in damaged:
            with suppress(OSError):  # a folder, for instance: no longer listed, so that the next writer puts it aside
                (folder / shard.name).unlink(missing_ok=True)
    return manifest


def compact(folder: str | Path) -> AnyManifest:
    """Join small shards, rewrite those of an older version, and return the new manifest.

    It can be interrupted and repeated at any point.

    Raises:
        StoreError: the folder is damaged, or another writer is at work.
    """
    folder = Path(folder)
    with _writer(folder, load_manifest(folder), folder) as writer:
        writer.compact()
        return writer.manifest


def _writer(folder: Path, manifest: AnyManifest, like: Path) -> ShardWriter[Any, AnyManifest]:
    """Open a folder for writing, with the token table of the folder that it is like."""
    fresh = manifest.model_copy(update={"shards": [], "files": {}, "complete": False})
    companions: dict[str, Callable[[], bytes]] = {}
    if isinstance(manifest, Manifest):
        store = Store(like)
        _ = store.table  # refused here if it is not sound
        companions[TABLE_NAME] = store.table_bytes
    return ShardWriter(folder, fresh, _codec_of(manifest), companions=companions)


def merge(parts: Sequence[str | Path], out: str | Path) -> AnyManifest:
    """Join folders that were made with the same settings into one and return its manifest.

    An interrupted merge is continued. A shard none of whose records or rows is there yet is linked, or copied to
    another file system; small shards, and what is left of others, are written anew, with the bytes of the records that
    are there. A record or row that appears in several parts must be the same in all of them, and is taken once. Parts
    that cover different texts get a text fingerprint made of theirs. The result is complete if every part is, and if
    all parts of a division (`--shard i/n`) are there.

    Raises:
        ConfigError: there are no parts, or the folder to write is one of them.
        MismatchError: the parts differ in their settings, or in a record or row that they share.
        StoreError: a part is damaged, or another writer is at work.
    """
    folders = [Path(part) for part in parts]
    out = Path(out)
    if not folders:
        raise ConfigError("merge: expected at least one folder to merge, got none. Name the parts.")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ConfigError(f"merge: expected another folder to write into than the parts, got {out}. Name a new one.")
    manifests = [load_manifest(folder) for folder in folders]
    joined = _joined_manifest(folders, manifests)
    _refuse_conflicts(folders, manifests, _codec_of(joined))
    with _writer(out, joined, folders[0]) as writer:
        for folder, manifest in zip(folders, manifests, strict=True):
            for shard in manifest.shards:
                _take_shard(folder, manifest, shard, writer)
        if all(manifest.complete for manifest in manifests) and not missing_parts(manifests):
            writer.finish()
        writer.flush()
        writer.compact()
        return writer.manifest


def missing_parts(manifests: Iterable[AnyManifest]) -> list[str]:
    """Return the parts `i/n` that are not among folders, of which others are; see `fusion capture --shard`."""
    found = {part for manifest in manifests for part in _parts(manifest.provenance)}
    counts = {int(part.partition("/")[2]) for part in found}
    wanted = {f"{index}/{count}" for count in counts for index in range(1, count + 1)}
    return sorted(wanted - found)


def _parts(provenance: Mapping[str, Any]) -> Iterator[str]:
    if re.fullmatch(r"[1-9][0-9]{0,8}/[1-9][0-9]{0,8}", part := str(provenance.get(PART, ""))):
        yield part
    merged = provenance.get("merged")
    for inner in merged if isinstance(merged, list) else ():
        if isinstance(inner, dict) and isinstance(inner.get("provenance"), dict):
            yield from _parts(inner["provenance"])


def _take_shard(folder: Path, manifest: AnyManifest, shard: ShardInfo, writer: ShardWriter[Any, AnyManifest]) -> None:
    codec = _codec_of(manifest)
    # The keys are a small part of a shard: a merge that is continued passes over what is done without decoding it.
    keys = read_keys(folder, shard, codec)
    held = sum(map(writer.holds, keys))
    if held == len(keys):
        return
    current = shard.version == codec.version and not writer.is_small(shard)
    if current and not held and len(set(keys)) == len(keys):
        writer.adopt(folder, shard, keys, shard.identity or manifest.identity_digest)
        return
    for item in read_packed(folder, shard, codec):
        if not writer.holds(codec.key(item)):
            writer.write(item)


def _joined_manifest(folders: Sequence[Path], manifests: Sequence[AnyManifest]) -> AnyManifest:
    first = manifests[0]
    joined: AnyManifest
    changes: dict[str, Any] = {}
    for name in _TEXT_SETS:
        values = {manifest.identity().get(name) for manifest in manifests} - {None}
        if len(values) > 1:
            changes[name] = texts_fingerprint((name, str(value)) for value in values)
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        expected = {name: value for name, value in first.identity().items() if name not in changes}
        fix = f"Only parts that were made with the same settings can be merged; the first is {folders[0]}."
        manifest.require(folder, fix, kind=first.kind, **expected)
    provenance = {"merged": [_origin(folder, part) for folder, part in zip(folders, manifests, strict=True)]}
    if isinstance(first, Manifest):
        for name in _ENGINE:
            changes[name] = " + ".join(sorted({getattr(manifest, name) for manifest in manifests}))
        joined = first.model_copy(update=changes | {"provenance": provenance})
    else:
        joined = first.model_copy(update={"facts": first.facts | changes, "provenance": provenance})
    # Shards that are linked keep the identity of their part, and one that a killed merge has left has to be known.
    carried = {digest for manifest in manifests for digest in (manifest.identity_digest, *manifest.joined)}
    return joined.model_copy(update={"joined": sorted(carried - {joined.identity_digest})})


def _origin(folder: Path, manifest: AnyManifest) -> dict[str, Any]:
    """Return how a part was made, as far as nothing checks it; the joined manifest keeps it."""
    names = (*(name for name in _ENGINE if hasattr(manifest, name)), "created", "made_by", "provenance")
    return {"folder": str(folder), **{name: getattr(manifest, name) for name in names}}


def _refuse_conflicts(folders: Sequence[Path], manifests: Sequence[AnyManifest], codec: Codec[Any]) -> None:
    """Compare the items that several parts hold, before anything is written; ``codec`` is that of the joined folder."""
    shards = [
        (folder, shard, _codec_of(manifest))
        for folder, manifest in zip(folders, manifests, strict=True)
        for shard in manifest.shards
    ]
    seen, shared = KeySet(), set()
    for folder, shard, own in shards:
        for key in read_keys(folder, shard, own):
            if key in seen:
                shared.add(key)
            seen.add(key)
    digests: dict[Hashable, tuple[str, Path]] = {}
    for folder, shard, own in shards if shared else ():
        if shared.isdisjoint(read_keys(folder, shard, own)):
            continue
        for item in read_items(folder, shard, own):
            key = codec.key(item)
            if key not in shared:
                continue
            # Compared as they would be written: shards of two versions may hold the same record in other bytes.
            data, _ = encode_shard([item], codec)
            digest = hashlib.sha256(data).hexdigest()
            known, other = digests.setdefault(key, (digest, folder))
            if known != digest:
                raise MismatchError(
                    f"expected the same {key!r} in all parts, got two that differ, in {other} and in {folder}. Leave "
                    f"one of the two out, or make them again from the same texts."
                )
