"""What can be known about a model without loading it: its configuration, the shapes of its tensors, its tokenizer."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference

from fusion_plugins.errors import MergeError

__all__ = ["Checkpoint", "TensorInfo", "read_checkpoint", "sample_bytes"]

#: safetensors name of a dtype -> bytes per element; others are taken for two.
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SAMPLE_BYTES = 1 << 14
SAMPLED_TENSORS = 64


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor, and where its bytes are if the file is here."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    start: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.elements * WIDTHS.get(self.dtype, 2)


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
    """Read what describes a model; of a model on the hub that is not here yet, only the headers are fetched.

    Raises:
        MergeError: the model, or its adapter, is not there or has no readable weights.
    """
    from transformers import AutoTokenizer

    folder = _local_folder(reference.model.path, reference.model.revision)
    try:
        config = reference.config(trust_remote_code=trust_remote_code)
    except Exception as error:
        raise MergeError(
            f"{reference.model}: no model there ({_first_line(error)}); expected a folder with config.json or the name "
            "of a model on the hub"
        ) from error
    tensors = _from_folder(folder) if folder is not None else _from_hub(reference)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            reference.model.path, revision=reference.model.revision, trust_remote_code=trust_remote_code
        )
    except Exception:
        tokenizer = None
    adapter = str(reference.lora) if reference.lora is not None else None
    if reference.lora is not None:
        _require_adapter(reference)
    return Checkpoint(str(reference), config, tensors, tokenizer, adapter)


def sample_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the first bytes of up to 64 tensors, to tell whether two checkpoints hold the same weights."""
    sampled = {}
    names = sorted(checkpoint.tensors)
    for name in names[:: max(1, len(names) // SAMPLED_TENSORS)]:
        info = checkpoint.tensors[name]
        if info.file is None:
            return {}
        with info.file.open("rb") as file:
            file.seek(info.start)
            sampled[name] = file.read(min(info.size, SAMPLE_BYTES))
    return sampled


def _local_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a model that is on this machine, also in the hub's cache; else None."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except Exception:
        return None
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def _from_folder(folder: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        tensors |= _read_header(file)
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        tensors |= _read_pickle(file)
    if not tensors:
        raise MergeError(f"{folder}: no weights there; expected *.safetensors or pytorch_model*.bin")
    missing = _missing_shards(folder)
    if missing:
        raise MergeError(
            f"{folder}: incomplete; the index names {', '.join(missing)}, which is not there. Download again."
        )
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """A safetensors file starts with the length of its header and the header, which is JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (struct.error, ValueError, MemoryError) as error:
        raise MergeError(f"{file}: not a readable safetensors file ({error}); download or save it again") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != file.stat().st_size:
        raise MergeError(f"{file}: expected {end} bytes, came {file.stat().st_size}; download or save it again")
    return {
        name: TensorInfo(tuple(entry["shape"]), entry["dtype"], file, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _read_pickle(file: Path) -> dict[str, TensorInfo]:
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    try:
        state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:
        raise MergeError(f"{file}: cannot be read ({_first_line(error)}); save the model as safetensors") from error
    return {
        name: TensorInfo(tuple(value.shape), names.get(value.dtype, str(value.dtype))) for name, value in state.items()
    }


def _missing_shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    return sorted(
        {name for name in json.loads(index.read_text())["weight_map"].values() if not (folder / name).exists()}
    )


def _from_hub(reference: ModelReference) -> dict[str, TensorInfo]:
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(reference.model.path, revision=reference.model.revision)
    except Exception as error:
        raise MergeError(
            f"{reference.model}: neither on this machine nor readable on the hub ({_first_line(error)}); check the "
            "name, the network, or the access token"
        ) from error
    return {
        name: TensorInfo(tuple(info.shape), info.dtype)
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
        raise MergeError(f"{lora}: no adapter there; expected a folder or hub name with adapter_config.json")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
