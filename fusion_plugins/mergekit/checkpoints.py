"""What can be known about a model without loading it: its configuration, the shapes of its tensors, its tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from safetensors import SafetensorError, safe_open

from fusion_plugins.errors import MergeError

#: safetensors' name of a dtype -> torch's
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
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
class Checkpoint:
    """A model that takes part in a merge.

    Attributes:
        name: as the merge configuration calls it.
        config: transformers' configuration.
        tensors: name -> shape and dtype.
        tokenizer: transformers' tokenizer, None if there is none.
        adapter: of a LoRA on top, or None.
    """

    name: str
    config: Any
    tensors: Mapping[str, TensorInfo]
    tokenizer: Any | None
    adapter: str | None


def read_checkpoint(reference: ModelReference, *, trust_remote_code: bool = False) -> Checkpoint:
    """Read what describes a model; of a model that is only on the hub, fetch the headers and no weights.

    Raises:
        MergeError: the model, or its adapter, is not there or has no readable weights.
    """
    from transformers import AutoTokenizer

    folder = _local_folder(reference.model.path, reference.model.revision)
    try:
        config = reference.config(trust_remote_code=trust_remote_code)
    except Exception as error:
        raise MergeError(
            f"{reference.model}: expected a folder with config.json or the name of a model on the hub, got no model "
            f"there ({_first_line(error)})"
        ) from error
    tensors = _from_folder(folder) if folder is not None else _from_hub(reference)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference.model.path, revision=reference.model.revision, trust_remote_code=trust_remote_code
        )
    except Exception:  # transformers raises many types for a tokenizer that is missing; the check warns about it
        tokenizer = None
    _require_adapter(reference)
    adapter = str(reference.lora) if reference.lora is not None else None
    return Checkpoint(str(reference), config, tensors, tokenizer, adapter)


def sample_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return about 16 kB from the start of up to 64 tensors, to tell whether two checkpoints hold the same weights.

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
        # Bytes, since NaN is not equal to itself; numpy has no bfloat16.
        sampled[name] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
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


def _from_folder(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of the files that mergekit would read."""
    try:
        index = ShardedTensorIndex.from_disk(str(folder))
    except SafetensorError as error:  # mergekit opens a safetensors file here only if it is the only one
        raise _damaged(folder / "model.safetensors", error) from error
    except Exception as error:
        raise MergeError(
            f"{folder}: expected model.safetensors or pytorch_model.bin (or shards with an index), got "
            f"{_first_line(error)}"
        ) from error
    files = [folder / shard.filename for shard in index.shards]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise MergeError(
            f"{folder}: expected every shard that the index names; missing: {', '.join(missing)}. Download the model "
            "again"
        )
    read = _read_header if index.is_safetensors else _read_pickle
    return {name: info for file in files for name, info in read(file).items()}


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
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise MergeError(
            f"{file}: expected a state dict of tensors, got a file that torch cannot read ({_first_line(error)})"
        ) from error
    return {name: TensorInfo(tuple(each.shape), str(each.dtype).removeprefix("torch.")) for name, each in state.items()}


def _damaged(file: Path, error: Exception) -> MergeError:
    return MergeError(
        f"{file}: expected a complete safetensors file, got one that cannot be read ({_first_line(error)})"
    )


def _from_hub(reference: ModelReference) -> dict[str, TensorInfo]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(reference.model.path, revision=reference.model.revision)
    except Exception as error:
        raise MergeError(
            f"{reference.model}: expected a model on this machine or on the hub, got no headers from either "
            f"({_first_line(error)})"
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
            f"{lora}: expected an adapter (a folder or a name on the hub with adapter_config.json), got none there"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
