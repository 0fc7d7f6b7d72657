"""Vocabulary maps kept on disk, so that a pair of tokenizers is mapped once per machine.

A map depends on the two token tables, the method and its parameters, and for ``first_token`` on how the target's
tokenizer encodes. The name of its file is a hash of all of that, so a file never has to be compared with its inputs.
The folder is ``$XDG_CACHE_HOME/fusion_plugins/maps`` (by default under ``~/.cache``). A map that cannot be read is made
again; one that cannot be written is used without being kept.
"""

import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.types import VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import COUNTED, identity_map, map_vocabulary, same_ids
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import encoder
from fusion_plugins.errors import StoreError
from fusion_plugins.store.files import make_folder, plain_file, write_atomic

# Raise this when a method starts to give another map for the same inputs: old files are then not found any more.
_RULES = 2


def map_folder() -> Path:
    """Return the folder of the cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fusion_plugins" / "maps"


def cached_map(
    source: TokenTable,
    target: TokenTable,
    *,
    method: str = "min_edit",
    max_distance: int | None = None,
    counts: AlignmentCounts | None = None,
    tokenizer: Any = None,
) -> VocabularyMap:
    """Return the vocabulary map of two tables, from the cache if it holds it.

    Two tables whose ids mean the same need no map and get the identity. A map by counts depends on the texts, so it is
    made on every call.

    Args:
        source: the source's W tokens.
        target: the target's V tokens.
        method: as for :func:`~fusion_plugins.core.fusion.vocabulary_map.map_vocabulary`; a configuration's default is
            ``first_token``.
        max_distance: as for ``map_vocabulary``.
        counts: as for ``map_vocabulary``.
        tokenizer: the target's fast tokenizer, whose encoding ``first_token`` follows.

    Raises:
        ConfigError: the method is unknown or lacks its counts.
        MismatchError: the counts are of other vocabularies.
    """
    if same_ids(source, target):
        return identity_map(source)
    options: dict[str, Any] = {"method": method, "max_distance": max_distance}
    encode = encoder(tokenizer, target) if method in ("first_token", "one_to_many") and tokenizer is not None else None
    if method in COUNTED:
        return map_vocabulary(source, target, counts=counts, encode=encode, **options)
    path = map_folder() / f"{_key(source, target, options, tokenizer if encode else None)}.npz"
    found = _read(path, source.vocab_size, method)
    if found is None:
        found = map_vocabulary(source, target, encode=encode, **options)
        _write(path, found)
    return found


def _key(source: TokenTable, target: TokenTable, options: dict[str, Any], tokenizer: Any) -> str:
    encoding = "" if tokenizer is None else tokenizer.backend_tokenizer.to_str()
    parts = [_RULES, source.fingerprint, target.fingerprint, sorted(options.items()), encoding]
    # The fingerprint leaves out the pad and end-of-turn roles, because a run may set them, and which tokens are byte
    # fallback; a map depends on both.
    for table in (source, target):
        parts += [sorted(table.role_ids.items()), sorted(table.byte_fallback)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _read(path: Path, size: int, method: str) -> VocabularyMap | None:
    try:
        with np.load(plain_file(path), allow_pickle=False) as file:
            target_ids, distances = file["target_ids"], file["distances"]
    except Exception:
        # No file yet, or a damaged one; damage shows as almost any exception (zipfile, zlib, NotImplementedError, ...).
        return None
    if target_ids.shape != (size,) or distances.shape != (size,):
        return None
    return VocabularyMap(target_ids.astype(np.int32), distances.astype(np.int32), method)


def _write(path: Path, vocabulary: VocabularyMap) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, target_ids=vocabulary.target_ids, distances=vocabulary.distances)
    with suppress(StoreError):  # it is only a cache
        make_folder(path.parent)
        write_atomic(path, buffer.getbuffer())
