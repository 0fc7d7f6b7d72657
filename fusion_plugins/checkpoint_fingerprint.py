"""One fingerprint of a model's files by their content, for source models and reward models; standard library only.

A model and a further-trained copy can have equal names and sizes, so contents are hashed.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

#: the first pattern that matches any file counts, in the order in which transformers looks for weights
WEIGHT_FILES = ("*.safetensors", "*model*.bin")
#: blocks sampled from large files: in total, and the minimum per file
SAMPLED_BLOCKS, LEAST_BLOCKS = 8192, 64
BLOCK_BYTES = 16_384
CHUNK_BYTES = 1 << 20
#: larger weight files of a source are hashed in part; stores keep the result, so this must not change
SOURCE_WHOLE_BYTES = 1 << 26


def checkpoint_fingerprint(
    folder: str | Path,
    *,
    also: Sequence[str] = (),
    whole_bytes: int | None = None,
    weight_files: Sequence[str] = WEIGHT_FILES,
    with_config: bool = True,
) -> str | None:
    """Return a sha256 (hex) that changes when a local checkpoint is trained on or replaced.

    ``config.json`` is hashed, and of each weight file the name, the size and the content. The index of a sharded
    checkpoint is not: the shards name their tensors themselves.

    Args:
        folder: of the checkpoint; a name on a hub is no folder.
        also: patterns of other files to hash, such as ``tokenizer*.json`` or ``*.py``.
        whole_bytes: read larger weight files in part: the header and some thousand evenly spaced blocks, which takes
            seconds for hundreds of gigabytes. Training of all tensors is always noticed then, training of one small
            tensor (a head alone) may not be. None: read everything.
        weight_files: patterns of weight files; the first that matches any file counts.
        with_config: hash ``config.json`` too.

    Returns:
        The fingerprint; None where there is no folder, or no weights in it. It depends on contents and on the names
        inside the folder, not on the folder's own name. Within a process it is computed anew only when a size or a
        modification time has changed.
    """
    path = Path(folder)
    if not path.is_dir():
        return None
    weights = next((found for pattern in weight_files if (found := sorted(path.glob(pattern)))), None)
    if weights is None:
        return None
    config = [path / "config.json"] if with_config and (path / "config.json").is_file() else []
    others = {file for pattern in also for file in path.glob(pattern) if file.is_file()} - {*weights, *config}
    return _hash(_state(config), _state(weights), _state(sorted(others)), whole_bytes)


def weights_revision(folder: str | Path) -> str | None:
    """Return how a store names the version of a model by its weights; None where a folder has no safetensors files.

    Of weight files beyond 64 MiB some thousand blocks are read, so that a model of hundreds of gigabytes takes seconds.
    Training, which moves every tensor, is always noticed; an edit of a few megabytes of one tensor may not be.
    """
    # Sources are loaded from safetensors files only, so other weights in the folder do not count.
    has_weights = any(Path(folder).glob("*.safetensors"))
    weights = checkpoint_fingerprint(folder, whole_bytes=SOURCE_WHOLE_BYTES) if has_weights else None
    return f"weights:{weights[:32]}" if weights else None


_Files = tuple[tuple[Path, int, int], ...]


def _state(files: Sequence[Path]) -> _Files:
    """Return path, size and modification time (ns) of each file: the key of the cache."""
    return tuple((file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


# The order and form of what is hashed must not change: stores and scored folders keep the result, and a run with
# another one may not add to them.
@lru_cache(maxsize=64)
def _hash(config: _Files, weights: _Files, others: _Files, whole_bytes: int | None) -> str:
    digest = hashlib.sha256()
    for path, _, _ in config:
        digest.update(path.read_bytes())
    blocks = max(LEAST_BLOCKS, SAMPLED_BLOCKS // len(weights))
    for path, size, _ in weights + others:
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as stream:
            if whole_bytes is None or size <= whole_bytes:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                continue
            if path.suffix == ".safetensors":
                # It begins with the length of its header, which names each tensor, its dtype, shape and place.
                header_bytes = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(header_bytes, whole_bytes)))
            for number in range(blocks):
                stream.seek(number * (size - BLOCK_BYTES) // (blocks - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
