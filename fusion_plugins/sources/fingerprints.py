"""Fingerprints of what decides a source's numbers and responses; computed from its files, before weights are loaded."""

import hashlib
import json
from typing import Any

from fusion_plugins.checkpoint_fingerprint import weights_revision
from fusion_plugins.sources.backends.base import Sampling, SourceSettings
from fusion_plugins.sources.loading import chat_template_hash, load_config

#: arguments of vllm.LLM that change speed and memory, and numbers in their last bits at most; all others count: an
#: argument that a later vLLM adds must not pass unnoticed
HARMLESS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "data_parallel_size",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "dtype",  # recorded by itself
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
    """Return the options of the backend that change its answers: quantization and the like, or ``extra_body``.

    Example:
        >>> engine = {"quantization": "fp8", "tensor_parallel_size": 2}
        >>> numeric_options(SourceSettings(model="m", backend="vllm", options={"engine": engine}))
        {'quantization': 'fp8'}
    """
    if settings.backend == "openai":
        return {"extra_body": settings.options["extra_body"]} if settings.options.get("extra_body") else {}
    engine = _engine_arguments(settings)
    return {key: engine[key] for key in sorted(engine) if key not in HARMLESS and engine[key] is not None}


def _engine_arguments(settings: SourceSettings) -> dict[str, Any]:
    """Return the arguments of vLLM's engine, in this process or in Ray's actors."""
    inner = settings.options.get("options") if settings.backend == "ray" else settings.options
    engine = inner.get("engine") if isinstance(inner, dict) else None
    return engine if isinstance(engine, dict) else {}


def stored_dtype(settings: SourceSettings, config: Any) -> str:
    """Return the dtype that a local source runs in: the one that is set, or the checkpoint's.

    Args:
        settings: the source.
        config: its model's text configuration.
    """
    asked = str(_engine_arguments(settings).get("dtype") or settings.dtype)
    return str(getattr(config, "dtype", None) or "auto").removeprefix("torch.") if asked == "auto" else asked


def revision_of(settings: SourceSettings, commit: str | None) -> str | None:
    """Return the version of a model: a fingerprint of the weights in its folder, or the commit on the hub."""
    return weights_revision(settings.model) or commit or settings.revision


def _facts_of(sampling: Sampling) -> dict[str, Any]:
    """Return the settings in the form that they had in the first version: responses of then can be added to."""
    facts = sampling.model_dump(mode="json") | {"top_k": max(sampling.top_k, 0)}
    later = ("min_p", "chat_template_kwargs")
    return {name: value for name, value in facts.items() if value or name not in later}


def sampling_fingerprint(settings: SourceSettings, sampling: Sampling, tokenizer: Any) -> str:
    """Return a hash (hex) of everything that decides a response, except the prompt and the seed.

    Args:
        settings: the source.
        sampling: how it draws.
        tokenizer: of a local source; None for a server, which decides template and dtype itself.
    """
    facts: dict[str, Any] = {
        "model": settings.model,
        "revision": settings.revision,
        "template": chat_template_hash(tokenizer),
        "sampling": _facts_of(sampling),
        "options": numeric_options(settings),
    }
    if settings.backend != "openai":
        config = load_config(settings)
        facts["revision"] = revision_of(settings, getattr(config, "_commit_hash", None))
        facts["dtype"] = stored_dtype(settings, config)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
