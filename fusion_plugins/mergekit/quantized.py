"""Finds quantized checkpoints: their tensors hold codes, and the average of codes is noise.

mergekit reads stored tensors as they are and dequantizes nothing. Where ``dtype`` is set it even casts the codes to
floats, so that a method no longer sees what they were. So this looks at what is stored: the configuration, the names
and the dtypes.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from fusion_plugins.core.merging.deltas import DEQUANTIZE, WEIGHT_DTYPES
from fusion_plugins.errors import MergeError
from fusion_plugins.mergekit.checkpoints import Stored, TensorInfo, read_tensor

WEIGHTS = tuple(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
#: What may also be a buffer that all models share: positions, counters, masks.
BUFFERS = ("int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32", "uint64")
#: Names that quantizers give to scales and codes: FP8 and compressed-tensors, GPTQ and AWQ, bitsandbytes, MXFP4, HQQ,
#: quanto, AQLM.
MARKED = re.compile(
    r"[._](?:weight_scale|scale_inv|input_scale|weight_zero_point|weight_packed|weight_global_scale)$"
    r"|\.weight_scale(?:s|_inv|_2)$|\.qweight$|\.qzeros$|\.g_idx$|\.SCB$|\.weight_format$"
    r"|\.(?:nested_)?(?:absmax|quant_map)$|\.quant_state(?:\.|$)|\.W_q$|\.codebooks$|\._data$"
)
#: Integers with such a name (in its last two parts) are codes, not a buffer.
CODED = re.compile(r"weight|_blocks$|_scales$")
KEYS = ("quantization_config", "compression_config")


def quantization_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return what shows that a checkpoint is quantized, or None.

    Args:
        config: content of its ``config.json``.
        tensors: what is stored, by name.
    """
    for name, info in sorted(tensors.items()):
        codes = info.dtype in BUFFERS and CODED.search(".".join(name.split(".")[-2:]))
        if codes or info.dtype not in (*WEIGHTS, *BUFFERS):
            return f"tensor {name!r} is {info.dtype}"
    for name in sorted(tensors):
        if MARKED.search(name):
            return f"tensor {name!r} belongs to quantized weights"
    method = _configured(config)
    return f"its config.json has {method}" if method else None


def unmergeable(models: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """Yield (problem, cure) for every model that is quantized.

    Args:
        models: name -> what is stored.
    """
    for name, model in models.items():
        reason = quantization_of(model.config, model.tensors)
        if reason is not None:
            yield (
                f"{name} is quantized ({reason}), and codes cannot be averaged",
                f"{DEQUANTIZE}, without quantization_config in its config.json",
            )


def different_integers(models: Mapping[str, Stored], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (problem, cure) for integers that are not the same in all models that have them.

    Args:
        models: name -> what is stored.
        names: of the tensors that are merged.
    """
    for tensor in sorted(names):
        holders = [name for name, model in models.items() if tensor in model.tensors]
        if not any(models[name].tensors[tensor].dtype in BUFFERS for name in holders):
            continue
        first = read_tensor(models[holders[0]], tensor)
        for other in holders[1:]:
            second = read_tensor(models[other], tensor)
            if first.dtype != second.dtype or not torch.equal(first, second):
                yield (
                    f"tensor {tensor!r} holds integers that differ between {holders[0]} and {other} and cannot be "
                    "averaged",
                    f"make them equal; if they are codes of a quantized checkpoint, {DEQUANTIZE}",
                )
                break


def require_mergeable(models: Mapping[str, Stored]) -> None:
    """Refuse quantized models.

    Raises:
        MergeError: names the model, the tensor and the cure.
    """
    for problem, cure in unmergeable(models):
        raise MergeError(f"{problem}: {cure}.")


def _configured(config: Any) -> str | None:
    """Return how a configuration, or a part of it such as ``text_config``, sets a quantization."""
    if not isinstance(config, Mapping):
        return None
    for key in KEYS:
        if config.get(key):
            settings = config[key]
            method = settings.get("quant_method") if isinstance(settings, Mapping) else None
            return f"{key} ({method})" if method else key
    return next((found for part in config.values() if (found := _configured(part))), None)
