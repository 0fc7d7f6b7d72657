"""The ``vllm`` backend: vLLM's offline engine in this process.

It imports nothing of the training hosts, so it runs in an environment of its own (``make vllm-env``).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from fusion_plugins.config import validate
from fusion_plugins.core.types import TokenizedText
from fusion_plugins.errors import SourceError
from fusion_plugins.sources.base import Place, Purpose, Response, Rows, SampleRequest, Sampling, SourceSettings, in_turn
from fusion_plugins.sources.entries import rows_of_entries, spare_entries
from fusion_plugins.sources.loading import load_config, load_tokenizer, prompt_ids, response_text, vocabulary_size
from fusion_plugins.sources.units import plan_units

__all__ = ["VllmOptions", "VllmSource", "capture_params", "open_source", "scheduled_tokens"]

#: bytes of scratch per scheduled token and vocabulary entry: logits as computed, in float32, and their logarithms
SCRATCH_BYTES = 12
#: log-probabilities that wait in Python lists at a time (about 100 bytes each)
ENTRIES_IN_FLIGHT = 1 << 22


class VllmOptions(BaseModel):
    """Keys of ``options`` for this backend."""

    model_config = ConfigDict(extra="forbid")

    logits_gib: float = Field(2.0, gt=0, description="memory that the log-probabilities of one step may take (capture)")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of vllm.LLM: tensor_parallel_size, gpu_memory_utilization, quantization, ...; they win",
    )


def open_source(settings: SourceSettings, purpose: Purpose) -> "VllmSource":
    """Start the engine; see :func:`fusion_plugins.sources.base.open_source`."""
    return VllmSource(settings, purpose)


def scheduled_tokens(logits_width: int, gib: float) -> int:
    """Return how many tokens one step may schedule so that their log-probabilities fit into ``gib``.

    vLLM computes the whole (tokens, vocabulary) matrix for prompts whose log-probabilities are asked for, outside of
    the memory that it plans with.

    Example:
        >>> scheduled_tokens(151_936, 2.0)
        1177
    """
    return max(64, min(8192, int(gib * 2**30 / (SCRATCH_BYTES * logits_width))))


def capture_params(top_k: int) -> SamplingParams:
    """Return the cheapest request for the top k of every prompt position.

    Flat lists of ids and numbers instead of a dict per position, and no text for any of them.
    """
    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False)


class VllmSource:
    """One vLLM engine."""

    whole_units = True

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        where = f"options of source {settings.source_name!r}"
        self._options = validate(VllmOptions, settings.options, where=where)
        self.tokenizer = load_tokenizer(settings)
        self._vocab_size = vocabulary_size(self.tokenizer)
        self._llm = _start(settings, self._options, purpose)
        model = self._llm.llm_engine.model_config
        # vLLM wants room for one generated token behind every prompt.
        self.max_length: int | None = model.max_model_len - (purpose == "capture")
        self._width = model.get_vocab_size()
        self.facts: dict[str, Any] = {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logits_width": self._width,
            "revision": getattr(model.hf_config, "_commit_hash", None) or settings.revision,
        }

    def capture(self, units: Iterable[Sequence[TokenizedText]], top_k: int) -> Iterator[tuple[Place, Rows]]:
        """Yield the rows of each text."""
        return in_turn(units, lambda texts: self._capture(texts, top_k))

    def sample(self, units: Iterable[Sequence[SampleRequest]]) -> Iterator[tuple[Place, Response]]:
        """Yield the responses; each request has its own seed."""
        return in_turn(units, self._sample)

    def close(self) -> None:
        """Stop the engine and its process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _capture(self, texts: Sequence[TokenizedText], top_k: int) -> Iterator[tuple[int, Rows]]:
        asked = min(top_k + spare_entries(self._width, self._vocab_size), self._width)
        groups = plan_units(range(len(texts)), lambda i: len(texts[i].input_ids) * (asked + 1), ENTRIES_IN_FLIGHT)
        for group in groups:
            prompts = [{"prompt_token_ids": texts[index].input_ids.tolist()} for index in group]
            outputs = self._llm.generate(prompts, capture_params(asked), use_tqdm=False)
            for index, output in zip(group, outputs, strict=True):
                yield index, self._rows(output.prompt_logprobs, len(texts[index].input_ids), top_k)

    def _sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Response]]:
        prompts = [
            prompt_ids(self.tokenizer, request.content, request.sampling, self.max_length) for request in requests
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [_sampling_params(request.sampling, request.seed) for request in requests],
            use_tqdm=False,
        )
        for index, output in enumerate(outputs):
            answer = output.outputs[0]
            text, _ = response_text(self.tokenizer, list(answer.token_ids), requests[index].sampling.stop)
            yield index, Response(text, answer.finish_reason, len(answer.token_ids), len(prompts[index]))

    def _rows(self, logprobs: Any, n_tokens: int, top_k: int) -> Rows:
        # Position 0 is empty; every other one lists the token itself, then the most probable ones.
        shape = (n_tokens - 1, len(logprobs.token_ids) // max(n_tokens - 1, 1))
        ids = np.array(logprobs.token_ids, np.int32).reshape(shape)
        values = np.array(logprobs.logprobs, np.float32).reshape(shape)
        gold = values[:, 0] if n_tokens > 1 else np.empty(0, np.float32)
        return rows_of_entries(ids[:, 1:], values[:, 1:], gold, top_k, self._vocab_size)


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        detokenize=bool(sampling.stop),  # only to find the stop strings
        seed=seed,
    )


def _start(settings: SourceSettings, options: VllmOptions, purpose: Purpose) -> LLM:
    arguments: dict[str, Any] = {
        "tokenizer": settings.tokenizer,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logprobs",
        # What the checkpoint says about sampling must not act beside what the user asked for.
        "generation_config": "vllm",
        "load_format": "safetensors",
    }
    try:
        config = load_config(settings)
        # vLLM's own "auto" turns float32 checkpoints into bfloat16.
        stored = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
        arguments["dtype"] = stored if settings.dtype == "auto" else settings.dtype
        if purpose == "capture":
            arguments["max_num_batched_tokens"] = scheduled_tokens(config.vocab_size, options.logits_gib)
            arguments["enable_chunked_prefill"] = True
            arguments["enable_prefix_caching"] = False
        elif current_platform.is_cpu():
            # A request with a seed of its own ends vLLM's CPU engine when its prompt is cut into chunks.
            arguments["enable_chunked_prefill"] = False
        if current_platform.is_cpu():
            # The share of the machine's memory that must be free; vLLM's 0.92 suits accelerators.
            arguments["gpu_memory_utilization"] = 0.5
        if settings.max_length is not None:
            context = getattr(config, "max_position_embeddings", None) or settings.max_length + 1
            arguments["max_model_len"] = min(settings.max_length + (purpose == "capture"), context)
        return LLM(settings.model, **(arguments | options.engine))
    except (OSError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise SourceError(
            f"source {settings.source_name!r}: vLLM cannot start {settings.model!r}: {error}. Arguments of the engine "
            "stand under `options: {engine: {...}}`; for data parallelism use the ray backend or several servers."
        ) from error
