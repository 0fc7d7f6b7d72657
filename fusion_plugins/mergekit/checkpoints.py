"""What can be known about a model without loading it: its configuration, the shapes of its tensors, its tokenizer."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import is_zipfile

import torch
from mergekit.common import ModelReference
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from fusion_plugins.errors import MergeError

#: safetensors' name of a dtype -> torch's
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
SAMPLED_TENSORS = 64
SAMPLED_BYTES = 1 << 14


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor, and its safetensors file if that is on this machine.

    Attributes:
        shape: as stored.
        dtype: torch's name; that of safetensors if torch has none.
        file: the safetensors file that holds the tensor, or None.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes on disk; an unknown dtype counts as two bytes per element."""
        return self.elements * getattr(torch, self.dtype, torch.float16).itemsize


@dataclass(frozen=True)
class Stored:
    """What the weights of a model are stored in.

    Attributes:
        index: mergekit's, which says in which file a tensor is.
        tensors: name -> shape and dtype, in the file that the index names.
        config: content of the ``config.json`` beside the files; empty if there is none.
        shadowed: name -> other files of the index that hold a tensor of this name, too.
    """

    index: ShardedTensorIndex
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    shadowed: Mapping[str, list[Path]]


@dataclass(frozen=True)
class Checkpoint:
    """A model that takes part in a merge.

    Attributes:
        name: as the merge configuration calls it.
        config: transformers' configuration.
        tensors: name -> shape and dtype.
        tokenizer: transformers' tokenizer, None if there is none that can be read.
        adapter: of a LoRA on top, or None.
        stored: the same tensors with their files; None for a model that is only on the hub.
        tokenizer_error: why a tokenizer that is there cannot be read, or None.
    """

    name: str
    config: Any
    tensors: Mapping[str, TensorInfo]
    tokenizer: Any | None
    adapter: str | None
    stored: Stored | None = None
    tokenizer_error: str | None = None


def read_checkpoint(reference: ModelReference, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read what describes a model; of a model that is only on the hub, fetch the headers and no weights.

    Raises:
        MergeError: the model, or its adapter, is not there or has no readable weights.
    """
    folder = _local_folder(reference.model.path, reference.model.revision)
    config = read_config(reference, trust_remote_code=trust_remote_code)
    stored = read_folder(folder) if folder is not None else None
    tensors = stored.tensors if stored is not None else _from_hub(reference)
    tokenizer, tokenizer_error = _read_tokenizer(reference, trust_remote_code)
    _require_adapter(reference)
    adapter = str(reference.lora) if reference.lora is not None else None
    return Checkpoint(str(reference), config, tensors, tokenizer, adapter, stored, tokenizer_error)


def read_config(reference: ModelReference, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' configuration of a model.

    Raises:
        MergeError: there is none, or transformers cannot read it.
    """
    try:
        return reference.config(trust_remote_code=trust_remote_code)
    except Exception as error:
        file = Path(reference.model.path) / "config.json"
        if file.is_file():
            raise MergeError(
                f"{file}: expected the configuration of a model, got one that transformers cannot read "
                f"({first_line(error)}). Save or download the model again."
            ) from error
        raise MergeError(
            f"{reference.model}: expected a folder with config.json or the name of a model on the hub, got no model "
            f"there ({first_line(error)}). Correct the path or the name; for the hub, check network and access token."
        ) from error


def read_folder(folder: Path) -> Stored:
    """Read the headers of the files that mergekit would read.

    Raises:
        MergeError: there are no weights, or a file is missing or damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (folder / name, folder / f"{name}.index.json"):
            if file.exists() and not file.is_file():  # opening a pipe would wait for ever
                raise MergeError(f"{file}: expected a file, got something else. Remove it, or name another folder.")
    try:
        index = ShardedTensorIndex.from_disk(str(folder))
    except SafetensorError as error:  # mergekit opens a safetensors file here only if it is the only one
        raise _damaged(folder / "model.safetensors", error) from error
    except Exception as error:
        raise MergeError(
            f"{folder}: expected model.safetensors or pytorch_model.bin (or shards with an index), got "
            f"{first_line(error)}. Save or download the model again."
        ) from error
    return read_index(index)


def read_file(file: Path) -> Stored:
    """Read the header of a single file of weights, as ``mergekit-pytorch`` merges them.

    Raises:
        MergeError: the file is missing or damaged.
    """
    if not file.is_file():
        raise MergeError(f"{file}: expected a file of weights, got no such file. Correct the path.")
    try:
        index = ShardedTensorIndex.from_file(str(file))
    except Exception as error:
        raise _damaged(file, error) from error
    return read_index(index)


def read_index(index: ShardedTensorIndex) -> Stored:
    """Read the headers of the files of an index.

    Raises:
        MergeError: a file is missing or damaged, or lacks a tensor that the index places there.
    """
    folder = Path(index.base_path)
    names: list[Any] = [shard.filename for shard in index.shards]  # as they stand in the file, numbers for instance
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise MergeError(
            f"{folder}: expected an index with names of files in this folder, got {outside[0]!r}. Download the model "
            "again from a source that you trust."
        )
    missing = [shard.filename for shard in index.shards if not (folder / shard.filename).is_file()]
    if missing:
        raise MergeError(
            f"{folder}: expected every shard that the index names; missing: {', '.join(missing)}. Download the model "
            "again."
        )
    tensors: dict[str, TensorInfo] = {}
    shadowed: dict[str, list[Path]] = {}
    read = _read_header if index.is_safetensors else _read_pickle
    for shard in index.shards:
        found = read(folder / shard.filename)
        absent = [name for name in shard.contained_keys if name not in found]
        if absent:
            raise MergeError(
                f"{folder / shard.filename}: expected the tensors that the index places there, got none called "
                f"{absent[0]!r}. The index belongs to other files: download or save the model again."
            )
        for name, info in found.items():
            if index.tensor_paths.get(name) == shard.filename:
                tensors[name] = info
            elif name in index.tensor_paths:
                shadowed.setdefault(name, []).append(folder / shard.filename)
    return Stored(index, tensors, _read_json(folder / "config.json"), shadowed)


class IndexedLoader(LazyTensorLoader):
    """Reads every tensor from the file that the index names.

    mergekit's own loader takes a tensor from the file that happens to be open, if that has one of the same name. So a
    shard in which an older copy was left would be merged, depending on the order of reading.
    """

    def __init__(self, index: ShardedTensorIndex, lazy_unpickle: bool = True) -> None:
        super().__init__(index, lazy_unpickle)
        self._turn = Lock()
        self._open: str | None = None

    def get_tensor(self, key: str, *arguments: Any, **options: Any) -> torch.Tensor | None:
        """Return a tensor; arguments and errors are those of mergekit's loader."""
        with self._turn:
            file = self.index.tensor_paths.get(key)
            if file != self._open:
                self.flush()
                self._open = file
            tensor = super().get_tensor(key, *arguments, **options)
        return None if tensor is None else tensor.detach()  # a state dict may hold parameters, which want gradients


def read_tensor(stored: Stored, name: str) -> torch.Tensor:
    """Return one tensor from its file."""
    tensor = IndexedLoader(stored.index, lazy_unpickle=False).get_tensor(name)
    assert tensor is not None
    return tensor


def stale_copies(stored: Stored) -> Iterator[tuple[str, Path]]:
    """Yield (tensor, file) for every copy that the index does not mean and that differs from the one it means."""
    for name, files in sorted(stored.shadowed.items()):
        for file in files:
            copy = read_tensor(read_index(ShardedTensorIndex.from_file(str(file))), name)
            meant = read_tensor(stored, name)
            if copy.dtype != meant.dtype or not torch.equal(copy, meant):
                yield name, file


def sample_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return about 16 kB from the start of up to 64 tensors as vectors, to tell how far apart two checkpoints are.

    The result is empty for a checkpoint that is not here as safetensors, or has a dtype that torch cannot read.
    """
    sampled = {}
    names = sorted(checkpoint.tensors)
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        info = checkpoint.tensors[name]
        if info.file is None or not hasattr(torch, info.dtype):
            return {}
        with safe_open(info.file, framework="pt") as file:
            if info.shape:  # whole rows: a slice reads no more than it returns
                rows = -(-SAMPLED_BYTES * info.shape[0] // max(info.size, 1))
                tensor = file.get_slice(name)[:rows]
            else:
                tensor = file.get_tensor(name)
        sampled[name] = tensor.reshape(-1)
    return sampled


def _local_folder(path: str, revision: str | None) -> Path | None:
    """Return the folder of a model that is on this machine, also in the hub's cache; else None."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        return None
    # Whoever loaded only a tokenizer or a configuration has a folder without weights in the cache.
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="pt") as opened:
            lazy = {name: opened.get_slice(name) for name in opened.keys()}
            return {
                name: TensorInfo(tuple(tensor.get_shape()), DTYPES.get(tensor.get_dtype(), tensor.get_dtype()), file)
                for name, tensor in lazy.items()
            }
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _read_pickle(file: Path) -> dict[str, TensorInfo]:
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
        if not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
            raise TypeError("no plain mapping of names to dense tensors")
    except Exception as error:
        raise MergeError(
            f"{file}: expected a state dict of tensors, got a file that mergekit cannot read ({first_line(error)}). "
            "Download the model again, or save its state dict as safetensors."
        ) from error
    return {name: TensorInfo(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for name, each in state.items()}


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _damaged(file: Path, error: Exception) -> MergeError:
    return MergeError(
        f"{file}: expected a complete file of weights, got one that cannot be read ({first_line(error)}). "
        "Download or save the model again."
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    """Return the content of a configuration, or nothing if it is missing or broken: transformers complains about it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_tokenizer(reference: ModelReference, trust_remote_code: bool) -> tuple[Any | None, str | None]:
    """Return transformers' tokenizer, or None and, if there is one that cannot be read, the reason."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference.model.path, revision=reference.model.revision, trust_remote_code=trust_remote_code
        )
        tokenizer.get_vocab()
    except Exception as error:  # transformers raises many types, also for a tokenizer that is not there
        folder = Path(reference.model.path)
        there = any((folder / name).exists() for name in TOKENIZER_FILES)
        return None, first_line(error) if there else None
    return tokenizer, None


def _from_hub(reference: ModelReference) -> dict[str, TensorInfo]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(reference.model.path, revision=reference.model.revision)
    except Exception as error:
        raise MergeError(
            f"{reference.model}: expected a model on this machine or on the hub, got no headers from either "
            f"({first_line(error)}). Check the name, network and access token."
        ) from error
    return {
        name: TensorInfo(tuple(info.shape), DTYPES.get(info.dtype, info.dtype))
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


def _require_adapter(reference: ModelReference) -> None:
    lora = reference.lora
    if lora is None or (Path(lora.path) / "adapter_config.json").exists():
        return
    from huggingface_hub import file_exists

    try:
        found = not Path(lora.path).exists() and file_exists(lora.path, "adapter_config.json", revision=lora.revision)
    except Exception:
        found = False
    if not found:
        raise MergeError(
            f"{lora}: expected an adapter (a folder or a name on the hub with adapter_config.json), got none there. "
            "Correct the path or the name."
        )


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, in at most 160 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
