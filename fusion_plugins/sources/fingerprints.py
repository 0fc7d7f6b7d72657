"""What decides which numbers and words a source gives; known from its files, before any weights are loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fusion_plugins.sources.backends.base import Sampling, SourceSettings
from fusion_plugins.sources.loading import chat_template_hash, load_config

__all__ = ["numeric_options", "revision_of", "sampling_fingerprint", "stored_dtype", "weights_fingerprint"]

#: files of up to so many bytes are hashed as a whole
WHOLE_BYTES = 1 << 26
#: blocks that are hashed of larger ones, all together, and at least of each
SAMPLED_BLOCKS, LEAST_BLOCKS = 8192, 64
BLOCK_BYTES = 16_384

#: arguments of vllm.LLM that change speed and memory, and numbers in their last bits at most; all others count
HARMLESS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "dtype",  # counts by itself
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_logprobs",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "seed",
        "swap_space",
        "tensor_parallel_size",
    }
)


def numeric_options(settings: SourceSettings) -> dict[str, Any]:
    """Return the options of the backend that change its answers: quantization and the like, ``extra_body``.

    Example:
        >>> engine = {"quantization": "fp8", "tensor_parallel_size": 2}
        >>> numeric_options(SourceSettings(model="m", backend="vllm", options={"engine": engine}))
        {'quantization': 'fp8'}
    """
    if settings.backend == "openai":
        return {"extra_body": settings.options["extra_body"]} if settings.options.get("extra_body") else {}
    engine = _engine(settings)
    return {key: engine[key] for key in sorted(engine) if key not in HARMLESS and engine[key] is not None}


def _engine(settings: SourceSettings) -> dict[str, Any]:
    """The arguments of vLLM's engine, in this process or in Ray's actors."""
    inner = settings.options.get("options") if settings.backend == "ray" else settings.options
    engine = inner.get("engine") if isinstance(inner, dict) else None
    return engine if isinstance(engine, dict) else {}


def stored_dtype(settings: SourceSettings, config: Any) -> str:
    """Return the dtype that a local source runs in: what was asked for, or the checkpoint's.

    Args:
        settings: the source.
        config: its model's text configuration.
    """
    asked = str(_engine(settings).get("dtype") or settings.dtype)
    return str(getattr(config, "dtype", None) or "auto").removeprefix("torch.") if asked == "auto" else asked


def revision_of(settings: SourceSettings, commit: str | None) -> str | None:
    """Return what tells one state of a model from the next: of the weights in a folder, or the hub's commit."""
    weights = weights_fingerprint(settings.model)
    return f"weights:{weights[:32]}" if weights else commit or settings.revision


def weights_fingerprint(folder: str | Path) -> str | None:
    """Return a sha256 (hex) that changes when a local model is trained on or replaced; None where there is no folder.

    ``config.json``, and of each safetensors file its name, its size, its header and its content are hashed. Of files
    beyond 64 MiB only some thousand evenly spaced blocks are read, so that a model of hundreds of gigabytes takes
    seconds: training, which moves every tensor, is always noticed, an edit of a few megabytes of one tensor may not be.
    """
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    config = Path(folder) / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    blocks = max(LEAST_BLOCKS, SAMPLED_BLOCKS // len(files))
    for file in files:
        _hash_weights(file, blocks, digest)
    return digest.hexdigest()


def _hash_weights(file: Path, blocks: int, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}:{size};".encode())
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        # The file begins with the length of its header, which names each tensor, its dtype, shape and place.
        header = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header, WHOLE_BYTES)))
        for block_number in range(blocks):
            stream.seek(block_number * (size - BLOCK_BYTES) // (blocks - 1))
            digest.update(stream.read(BLOCK_BYTES))


def sampling_fingerprint(settings: SourceSettings, sampling: Sampling, tokenizer: Any) -> str:
    """Name everything that decides what is drawn, but for the prompt and the seed.

    Args:
        settings: the source.
        sampling: how it draws.
        tokenizer: of a local source; None for a server, whose template and dtype are its own.
    """
    facts: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "template": chat_template_hash(tokenizer),
        "sampling": sampling.model_dump(mode="json"),
        "options": numeric_options(settings),
    }
    if settings.backend != "openai":
        config = load_config(settings)
        facts["revision"] = revision_of(settings, getattr(config, "_commit_hash", None))
        facts["dtype"] = stored_dtype(settings, config)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
