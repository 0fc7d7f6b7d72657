"""The ``transformers`` backend: any causal model on this machine's CPU or GPU, and the reference for the others."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from pydantic import Field
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusion_plugins.config import Settings, validate
from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.asked import AskedText
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import SourceError
from fusion_plugins.model_names import reason_of
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
    least,
)
from fusion_plugins.sources.backends.topk import topk_and_asked, with_last_position
from fusion_plugins.sources.loading import load_tokenizer, local_response, split_prompts, vocabulary_size

#: logits that are normalised at a time, in float32 and float64: few enough to stay in a CPU's cache
SCRATCH = 1 << 22


class TransformersOptions(Settings):
    """Keys of ``options`` for this backend."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    batch_tokens: int = Field(4096, ge=1, description="tokens of one forward pass, padding included")
    batch_prompts: int = Field(16, ge=1, description="responses drawn at a time")
    attn_implementation: str | None = Field(None, description="eager, sdpa, flash_attention_2, ...")


def open_source(settings: SourceSettings, purpose: Purpose) -> "TransformersSource":
    """Load the model and its tokenizer; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return TransformersSource(settings)


class TransformersSource:
    """One causal language model in this process."""

    whole_batches = True
    asks_ids = True

    def __init__(self, settings: SourceSettings) -> None:
        where = f"options of source {settings.source_name!r}"
        self._options = validate(TransformersOptions, settings.options, where=where)
        self.tokenizer = load_tokenizer(settings)
        self._model = _load_model(settings, self._options)
        config = self._model.config.get_text_config()
        self.max_length = least(settings.max_length, getattr(config, "max_position_embeddings", None))
        self._vocab_size = vocabulary_size(self.tokenizer)
        self._stop_ids = _stop_ids(self._model, self.tokenizer)
        self.facts: dict[str, Any] = {
            "engine": "transformers",
            "engine_version": transformers.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "logits_width": self._model.get_output_embeddings().weight.shape[0],
            "revision": getattr(self._model.config, "_commit_hash", None) or settings.revision,
        }

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK]]:
        """Yield the top-k of each text; texts of similar length share a forward pass, padded on the right."""
        return in_turn(batches, lambda texts: self._capture(texts, top_k))

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses; each has its own random numbers, so batching does not change what is drawn."""
        return in_turn(batches, self._sample)

    def close(self) -> None:
        """Drop the model."""
        del self._model

    def _capture(self, texts: Sequence[TokenizedText], top_k: int) -> Iterator[tuple[int, TopK]]:
        """Yield index and top-k; the results of a forward pass are waited for while the next one runs."""
        before: tuple[list[int], _OnItsWay] | None = None
        for group in _groups([len(text.input_ids) for text in texts], self._options.batch_tokens):
            launched = group, self._forward([texts[i] for i in group], top_k)
            if before is not None:
                yield from zip(before[0], before[1].wait(), strict=True)
            before = launched
        if before is not None:
            yield from zip(before[0], before[1].wait(), strict=True)

    def _sample(self, requests: Sequence[SampleRequest]) -> Iterator[tuple[int, Response | Refusal]]:
        rows = self._model.get_input_embeddings().weight.shape[0]
        prompts, refused = split_prompts(self.tokenizer, requests, self.max_length, rows)
        yield from refused.items()
        by_sampling: dict[str, list[int]] = {}
        for index in prompts:
            by_sampling.setdefault(requests[index].sampling.model_dump_json(), []).append(index)
        for indices in by_sampling.values():
            sampling = requests[indices[0]].sampling
            indices.sort(key=lambda index: (len(prompts[index]), index))
            for start in range(0, len(indices), self._options.batch_prompts):
                group = indices[start : start + self._options.batch_prompts]
                seeds = [requests[index].seed for index in group]
                yield from zip(group, self._generate([prompts[i] for i in group], seeds, sampling), strict=True)

    @torch.inference_mode()
    def _forward(self, texts: list[TokenizedText], top_k: int) -> "_OnItsWay":
        lengths = [len(text.input_ids) for text in texts]
        ids_and_mask = np.zeros((2, len(texts), max(lengths)), np.int64)
        for row, text in enumerate(texts):
            ids_and_mask[0, row, : lengths[row]] = text.input_ids
            ids_and_mask[1, row, : lengths[row]] = 1
        ids, mask = torch.from_numpy(ids_and_mask).to(self._model.device)
        logits = self._model(ids, attention_mask=mask, use_cache=False).logits
        found = [
            topk_of_logits(logits[row, : length - 1], ids[row, 1:length], top_k, self._vocab_size)
            for row, length in enumerate(lengths)
        ]
        asked = [text.asked[:-1] for text in texts if isinstance(text, AskedText)]
        said = [_logprobs_at(logits[row, : len(wanted)], wanted) for row, wanted in enumerate(asked)]
        return _OnItsWay(found, [length - 1 for length in lengths], asked, said, self._vocab_size)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Response | Refusal]:
        width = max(map(len, prompts))
        # Padding repeats the prompt's own first token, so that a repetition penalty sees no token that is not there.
        ids = torch.tensor([prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # argmax; what is drawn is decided by the noise of _SeededNoise
            eos_token_id=self._stop_ids,
            pad_token_id=self._stop_ids[0] if self._stop_ids else 0,
            stop_strings=list(sampling.stop) or None,
        )
        # generate() would otherwise take the checkpoint's own sampling settings where ours are at their defaults.
        self._model.generation_config = GenerationConfig()
        output = self._model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([drawn := _Drawn(), *_processors(sampling, seeds)]),
            tokenizer=self.tokenizer if sampling.stop else None,
        )
        generated = output[:, width:].tolist()
        logprobs = drawn.logprobs(output[:, -1]).tolist()
        return [
            self._response(prompt, tokens, own, sampling.stop)
            for prompt, tokens, own in zip(prompts, generated, logprobs, strict=True)
        ]

    def _response(
        self, prompt: list[int], tokens: list[int], logprobs: list[float], stop: tuple[str, ...]
    ) -> Response | Refusal:
        # Responses that end before the longest of their group are padded. The end token itself was generated.
        end = next((position for position, token in enumerate(tokens) if token in self._stop_ids), len(tokens))
        given: dict[str, Any] = {"generated": tokens[: end + 1], "logprobs": logprobs[: end + 1]}
        return local_response(self.tokenizer, prompt, tokens[:end], stop, ended=end < len(tokens), **given)


def topk_of_logits(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the k most probable ids at each position, by descending probability, ties by lowest id.

    The normaliser is over all W logits, in float32. Ids from ``vocab_size`` on (padding of the output matrix) are never
    returned.

    Args:
        logits: (N, W) of any float dtype.
        token_ids: (N,) int64 ids whose log-probabilities are asked for.
        k: entries per position, at most ``vocab_size``.
        vocab_size: ids that the tokenizer knows, perhaps more than W.

    Returns:
        ids (N, k) int32 (-1 where W is below k), logprobs (N, k) float32 nats, logprobs of ``token_ids`` (N,) float32;
        on the device of the logits. Nothing waits for the device.
    """
    # In chunks: the log-probabilities of a whole text over a large vocabulary take gigabytes, and leave the cache.
    step = max(1, SCRATCH // logits.shape[-1])
    chunks = zip(logits.split(step), token_ids.split(step), strict=True)
    parts = [_topk_of_chunk(chunk, ids, k, vocab_size) for chunk, ids in chunks]
    ids, logprobs, token_logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, logprobs, token_logprobs


def _topk_of_chunk(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    known = min(vocab_size, logits.shape[-1])
    token_logprobs = logprobs.gather(-1, token_ids[:, None])[:, 0]
    # torch.topk leaves the order of ties open. A float32 that is converted to float64 ends in 29 zero bits. With the id
    # in them, the lower id is the larger of two equal negative numbers, so that one topk sorts by both.
    keys = logprobs[:, :known].clamp(min=torch.finfo(torch.float32).min).double()
    keys.view(torch.int64).bitwise_or_(torch.arange(known, device=logits.device))
    ids = keys.topk(min(k, known), dim=-1).indices
    values, empty = logprobs.gather(-1, ids), (0, k - ids.shape[-1])
    return pad(ids.to(torch.int32), empty, value=-1), pad(values, empty, value=-torch.inf), token_logprobs


def _logprobs_at(logits: torch.Tensor, ids: IntArray) -> torch.Tensor:
    """Return the (N, J) float32 log-probabilities of given ids, any value where an id is below 0."""
    wanted = torch.from_numpy(np.maximum(ids, 0)).long().to(logits.device)
    step = max(1, SCRATCH // logits.shape[-1])
    parts = zip(logits.split(step), wanted.split(step), strict=True)
    return torch.cat([torch.log_softmax(part.float(), dim=-1).gather(-1, at) for part, at in parts])


class _OnItsWay:
    """The results of one forward pass, on their way from the device to this machine's memory as one array.

    Args:
        found: ids, log-probabilities and next tokens' log-probabilities of each text, as :func:`topk_of_logits` gives.
        lengths: positions of each text.
        asked: (N, J) ids that were asked for, of each text; empty where none were.
        said: (N, J) their log-probabilities.
        vocab_size: ids that the tokenizer knows.
    """

    def __init__(
        self,
        found: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        lengths: list[int],
        asked: Sequence[IntArray],
        said: Sequence[torch.Tensor],
        vocab_size: int,
    ) -> None:
        rows = [
            torch.cat([ids, logprobs.view(torch.int32), token_logprobs[:, None].view(torch.int32)], dim=-1)
            for ids, logprobs, token_logprobs in found
        ]
        if said:
            rows = [torch.cat([row, own.view(torch.int32)], dim=-1) for row, own in zip(rows, said, strict=True)]
        packed = torch.cat(rows)  # (N, 2 K + 1 + J)
        self._asked, self._vocab_size = asked, vocab_size
        self._lengths, self._arrived = lengths, None
        if packed.device.type == "cuda":
            # A copy in the order of the kernels: it ends before the next forward pass, which is started meanwhile.
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.current_stream(packed.device).record_event()
        else:
            self._packed = packed.cpu()

    def wait(self) -> Iterator[TopK]:
        """Yield the top-k of each text."""
        if self._arrived is not None:
            self._arrived.synchronize()
        packed = self._packed.numpy()
        width = self._asked[0].shape[1] if self._asked else 0
        k = (packed.shape[1] - width) // 2
        start = 0
        for number, length in enumerate(self._lengths):
            rows = packed[start : start + length]
            floats = rows[:, k:].view(np.float32)
            entries = rows[:, :k], floats[:, :k], floats[:, k]
            if self._asked:
                asked = self._asked[number], floats[:, k + 1 :]
                yield topk_and_asked(*entries, asked, k + width, self._vocab_size)
            else:
                yield with_last_position(*entries)
            start += length


class _Drawn(LogitsProcessor):
    """Keeps how probable the model itself finds each token that is drawn; the first processor, which changes nothing.

    A step learns from the next one what was drawn. To keep the logits of all steps would take gigabytes.
    """

    def __init__(self) -> None:
        self._before: torch.Tensor | None = None
        self._found: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._take(input_ids[:, -1])
        self._before = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def logprobs(self, last: torch.Tensor) -> torch.Tensor:
        """Return (B, T) log-probabilities of all T drawn tokens; ``last`` are the (B,) last ones."""
        self._take(last)
        return torch.stack(self._found, dim=1)

    def _take(self, drawn: torch.Tensor) -> None:
        if self._before is not None:
            self._found.append(self._before.gather(-1, drawn[:, None].to(self._before.device))[:, 0])


class _SeededNoise(LogitsProcessor):
    """Adds Gumbel noise from one generator per response: the argmax of the result is a sample of the input."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log().to(scores.device)


def _processors(sampling: Sampling, seeds: list[int]) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:  # before the others, as in vLLM
        processors.append(MinPLogitsWarper(float(sampling.min_p)))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    processors.append(_SeededNoise(seeds))
    return processors


def _load_model(settings: SourceSettings, options: TransformersOptions) -> Any:
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    extra = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            dtype=settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            **extra,
        ).to(device)
    except Exception as error:
        raise SourceError(
            f"source {settings.source_name!r}: cannot load {settings.model!r} (weights must be safetensors): "
            f"{reason_of(error)}. Check the name, the network and `trust_remote_code`."
        ) from error
    return model.eval()


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of the model's generation config (chat models have several) and of the tokenizer."""
    ids = model.generation_config.eos_token_id
    found = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(tokenizer.eos_token_id)
    return found


def _groups(lengths: list[int], budget: int) -> list[list[int]]:
    """Group indices by length so that count times longest stays within the budget (a long text has its own group)."""
    groups: list[list[int]] = []
    # The longest first, so that the first of a group is as wide as its forward pass.
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
