"""The ``vllm`` backend: vLLM's offline engine in this process.

It imports nothing of the training hosts, so that it runs in an environment of its own (``make vllm-env``).
"""

import inspect
import os
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from fusion_plugins.config import Settings, validate
from fusion_plugins.core.fusion.asked import AskedText
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import SourceError
from fusion_plugins.sources.backends.base import (
    Batches,
    Place,
    Purpose,
    Refusal,
    Response,
    SampleRequest,
    Sampling,
    SourceSettings,
    in_turn,
)
from fusion_plugins.sources.backends.topk import spare_entries, topk_and_asked, topk_of_entries
from fusion_plugins.sources.batches import plan_batches
from fusion_plugins.sources.fingerprints import numeric_options, stored_dtype
from fusion_plugins.sources.loading import load_config, load_tokenizer, local_response, split_prompts, vocabulary_size

try:
    from vllm.exceptions import VLLMClientError
except ImportError:  # older versions raise a ValueError instead
    VLLMClientError = ValueError

#: bytes of scratch per scheduled token and id of the vocabulary: logits as computed, in float32, and log-probabilities
SCRATCH_BYTES = 12
#: entries that wait in Python lists at a time (about 100 bytes each)
ENTRIES_IN_FLIGHT = 1 << 22
#: entries of one text, at most: about 6 GB
MOST_ENTRIES = 1 << 26


class VllmOptions(Settings):
    """Keys of ``options`` for this backend."""

    logits_gib: float = Field(2.0, gt=0, description="memory that the log-probabilities of one step may take (capture)")
    engine: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of vllm.LLM: tensor_parallel_size, gpu_memory_utilization, quantization, ...; they win",
    )


def open_source(settings: SourceSettings, purpose: Purpose) -> "VllmSource":
    """Start the engine; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return VllmSource(settings, purpose)


def scheduled_tokens(logits_width: int, gib: float) -> int:
    """Return how many tokens one step may schedule so that their log-probabilities fit into ``gib`` GiB.

    For prompts whose log-probabilities are asked for, vLLM computes the whole (tokens, vocabulary) matrix, in memory
    that it has not planned for. With its own defaults, long prompts run a GPU out of memory.

    Example:
        >>> scheduled_tokens(151_936, 2.0)
        1177
    """
    return max(64, min(8192, int(gib * 2**30 / (SCRATCH_BYTES * logits_width))))


class VllmSource:
    """One vLLM engine."""

    whole_batches = True

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        self._name = settings.source_name
        where = f"options of source {self._name!r}"
        self._options = validate(VllmOptions, settings.options, where=where)
        self.tokenizer = load_tokenizer(settings)
        self._vocab_size = vocabulary_size(self.tokenizer)
        self._llm = _start(settings, self._options, purpose)
        model = self._llm.llm_engine.model_config
        # vLLM needs room for one generated token after every prompt, also when only the prompt is asked for.
        self.max_length: int | None = model.max_model_len - (purpose == "capture")
        self._width = model.get_vocab_size()
        self.asks_ids = _asks_ids(self._llm)
        self.facts: dict[str, Any] = {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "options": numeric_options(settings),
            "logits_width": self._width,
            "revision": getattr(model.hf_config, "_commit_hash", None) or settings.revision,
        }

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield the top-k of each text."""
        return in_turn(batches, lambda texts: self._capture(texts, top_k))

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses; each request has its own seed."""
        return in_turn(batches, self._sample)

    def close(self) -> None:
        """Stop the engine and its process."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _capture(self, texts: Sequence[TokenizedText], top_k: int) -> Iterator[tuple[int, TopK | Refusal]]:
        asked = min(top_k + spare_entries(self._width, self._vocab_size), self._width)
        # The cheapest request: flat lists of ids and numbers instead of a dict per position, and no text for any entry.
        plain = partial(
            SamplingParams, max_tokens=1, temperature=0.0, prompt_logprobs=asked, flat_logprobs=True, detokenize=False
        )
        params = [plain(**_wanted(text)) for text in texts]
        sizes = [len(text.input_ids) * (asked + 1) for text in texts]
        for index, size in enumerate(sizes):
            if size > MOST_ENTRIES:
                yield index, Refusal(_too_large(len(texts[index].input_ids), asked))
        possible = [index for index, size in enumerate(sizes) if size <= MOST_ENTRIES]
        for group in plan_batches(possible, sizes.__getitem__, ENTRIES_IN_FLIGHT):
            prompts = [texts[index].input_ids.tolist() for index in group]
            for index, output in zip(group, self._generate(prompts, [params[index] for index in group]), strict=True):
                if isinstance(output, Refusal):
                    yield index, output
                else:
                    yield index, self._topk(output, texts[index], top_k)

    def _sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Response | Refusal]]:
        prompts, refused = split_prompts(self.tokenizer, requests, self.max_length)
        yield from refused.items()
        params = [_sampling_params(requests[index].sampling, requests[index].seed) for index in prompts]
        for index, output in zip(prompts, self._generate(list(prompts.values()), params), strict=True):
            if isinstance(output, Refusal):
                yield index, output
                continue
            answer = output.outputs[0]
            of_drawn = zip(answer.logprobs, answer.token_ids, strict=True)
            if answer.finish_reason not in ("stop", "length"):
                raise SourceError(
                    f"source {self._name!r}: expected vLLM to end a response with 'stop' or 'length', got "
                    f"{answer.finish_reason!r}. Run the same command again."
                )
            yield (
                index,
                local_response(
                    self.tokenizer,
                    prompts[index],
                    answer.token_ids,
                    requests[index].sampling.stop,
                    ended=answer.finish_reason == "stop",
                    generated=answer.token_ids,
                    logprobs=[place[token].logprob for place, token in of_drawn],
                ),
            )

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        """Ask for all at once; when vLLM refuses one of them, ask one by one, to find out which."""
        if not prompts:
            return []
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            return self._llm.generate(asked, params, use_tqdm=False)
        except EngineDeadError as error:
            raise SourceError(
                f"source {self._name!r}: expected vLLM's engine to answer, but its process ended: {error}. If it ran "
                "out of memory, lower options.logits_gib or options.engine.gpu_memory_utilization; then run the same "
                "command again."
            ) from error
        except (ValueError, VLLMClientError) as error:
            if len(prompts) == 1:
                return [Refusal(f"vLLM refuses it: {error}")]
        return [self._generate([ids], [param])[0] for ids, param in zip(prompts, params, strict=True)]

    def _topk(self, output: Any, text: TokenizedText, top_k: int) -> TopK:
        logprobs, n_tokens = output.prompt_logprobs, len(text.input_ids)
        # vLLM lists the distribution over token t at position t, so the first is empty. Every other one begins with the
        # token itself, whatever its rank, and continues with the most probable ones.
        shape = (n_tokens - 1, len(logprobs.token_ids) // max(n_tokens - 1, 1))
        # An array of Python's own takes a list of numbers faster than numpy does.
        ids = np.frombuffer(array("i", logprobs.token_ids), np.int32).reshape(shape)
        values = np.frombuffer(array("f", logprobs.logprobs), np.float32).reshape(shape)
        token_logprobs = values[:, 0] if n_tokens > 1 else np.empty(0, np.float32)
        own = topk_of_entries(ids[:, 1:], values[:, 1:], token_logprobs, top_k, self._vocab_size)
        if not isinstance(text, AskedText):
            return own
        answered = output.prompt_token_id_logprobs if n_tokens > 1 else ()
        said = np.asarray(answered, np.float32).reshape(n_tokens - 1, text.asked.shape[1])
        asked, k = (text.asked[:-1], said), top_k + text.asked.shape[1]
        return topk_and_asked(own.ids[:-1], own.logprobs[:-1], token_logprobs, asked, k, self._vocab_size)


def _asks_ids(llm: LLM) -> bool:
    """Whether this vLLM says what it gives to given ids at each position of a prompt: later versions, on a GPU."""
    known = "prompt_logprob_token_ids" in inspect.signature(SamplingParams).parameters
    return known and bool(getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False))


def _wanted(text: TokenizedText) -> dict[str, Any]:
    """Return what a request asks for besides the top k: the row of a position is about its next token.

    vLLM takes no array without a row, which the only token of a text would have.
    """
    if isinstance(text, AskedText) and len(text.input_ids) > 1:
        return {"prompt_logprob_token_ids": text.asked[:-1]}
    return {}


def _too_large(n_tokens: int, asked: int) -> str:
    return (
        f"vLLM hands {n_tokens} tokens x {asked} log-probabilities over as Python numbers, about "
        f"{n_tokens * asked * 100 / 1e9:.0f} GB; lower top_k, cut the texts shorter, or use the transformers backend"
    )


def _sampling_params(sampling: Sampling, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        logprobs=0,  # of the drawn tokens alone
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
        # Where a request sets nothing, vLLM's own defaults count, not the checkpoint's sampling settings.
        "generation_config": "vllm",
        "load_format": "safetensors",
    }
    try:
        config = load_config(settings)
        # vLLM's own "auto" would load a float32 checkpoint in bfloat16.
        arguments["dtype"] = stored_dtype(settings, config)
        if purpose == "capture":
            arguments["max_num_batched_tokens"] = scheduled_tokens(config.vocab_size, options.logits_gib)
            arguments["enable_chunked_prefill"] = True
            arguments["enable_prefix_caching"] = False
        elif current_platform.is_cpu():
            # vLLM's CPU engine dies of a request with its own seed whose prompt is cut into chunks.
            arguments["enable_chunked_prefill"] = False
        if current_platform.is_cpu():
            # On a CPU this is the share of the machine's memory that must be free; vLLM's 0.92 suits accelerators.
            arguments["gpu_memory_utilization"] = 0.5
        if settings.max_length is not None:
            context = getattr(config, "max_position_embeddings", None) or settings.max_length + 1
            arguments["max_model_len"] = min(settings.max_length + (purpose == "capture"), context)
        return LLM(settings.model, **(arguments | options.engine))
    except (OSError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise SourceError(
            f"source {settings.source_name!r}: vLLM cannot start {settings.model!r}: {error}. Give arguments of the "
            "engine under `options: {engine: {...}}`; for data parallelism use the ray backend or several servers."
        ) from error
