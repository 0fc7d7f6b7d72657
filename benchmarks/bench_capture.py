"""Tokens per second of capture, by backend, and of vLLM as it comes (prompt_logprobs with its default settings).

    python benchmarks/bench_capture.py                                # transformers
    python benchmarks/bench_capture.py --backend ray                  # the same in one actor of Ray Data
    .venv-vllm/bin/python benchmarks/bench_capture.py --backend vllm  # vLLM offline, ours and default, and its server

The model is tiny: the comparison is of how the numbers get out of the engine. A CPU with a vocabulary of 32,000
(``--vocabulary 32000``) spends most of the time on the log-probabilities themselves; with 4,096 the time goes where it
goes on a GPU. Then the processor time that capture costs beside the model, by stage (`capture_stages.py`). Exits 1 when
ours is less than three times as fast as vLLM's default settings with 4,096, or when the model waits for more than a
quarter of what it waited for when all stages were in its thread.
"""

import argparse
import inspect
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import source_checks
import tiny
import vllm_checks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.sources.backends.base import Source, SourceSettings, open_source

LEAST_RATIO = 3.0
LEAST_OVERLAP = 4.0
CONTEXT = 2048


def make_texts(count: int) -> list[str]:
    """Python source and prose of the standard library, in pieces of about 2,000 characters."""
    lines = inspect.getsource(argparse) + inspect.getsource(textwrap) + inspect.getsource(inspect)
    return [lines[start : start + 2000] for start in range(0, 2000 * count, 2000)]


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sources of the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    files = sorted(Path(inspect.__file__).parent.glob("*.py"))[:80]
    tokenizer.train_from_iterator((file.read_text(errors="replace") for file in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def best_of(runs: int, work: Any) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def consume(results: Iterator[Any]) -> None:
    """Take all results."""
    for _ in results:
        pass


def default_vllm(source: Any, texts: list[TokenizedText], top_k: int) -> None:
    """What a user writes first: a dict of objects per position, and text for every entry."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": text.input_ids.tolist()} for text in texts]
    outputs = source._llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=top_k), use_tqdm=False)
    for output in outputs:
        [[entry.logprob for entry in position.values()] for position in output.prompt_logprobs[1:]]


def measure(source: Source, texts: list[TokenizedText], top_k: int, runs: int) -> float:
    """Tokens per second of ``source.capture``."""
    tokens = sum(len(text.input_ids) for text in texts)
    return tokens / best_of(runs, lambda: consume(source.capture([texts], top_k)))


def bench_vllm(model: Path, texts: list[TokenizedText], top_k: int, runs: int) -> dict[str, float]:
    """Offline, ours and default, on one engine; then its server."""
    os.environ.update(vllm_checks.ENVIRONMENT)
    options = {"engine": vllm_checks.ENGINE}
    source: Any = open_source(SourceSettings(model=str(model), backend="vllm", options=options), "capture")
    tokens = sum(len(text.input_ids) for text in texts)
    speeds = {"vllm": measure(source, texts, top_k, runs)}
    speeds["vllm, default settings"] = tokens / best_of(runs, lambda: default_vllm(source, texts, top_k))
    source.close()
    server = vllm_checks.Server(model, model.parent / "server.log")
    server.start()
    try:
        server.wait()
        options = {"base_url": server.url, "concurrency": 8}
        settings = SourceSettings(model="served", tokenizer=str(model), backend="openai", options=options)
        speeds["openai (vLLM's server)"] = measure(open_source(settings, "capture"), texts, top_k, runs)
    finally:
        server.kill()
    return speeds


def main() -> int:
    """Print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["transformers", "ray", "vllm"], default="transformers")
    parser.add_argument("--vocabulary", type=int, choices=[4096, 32_000], default=4096)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--stage-tokens", type=int, default=10_000, help="tokens of the table of stages")
    arguments = parser.parse_args()
    small = arguments.vocabulary == 4096
    tokenizer = train_tokenizer(4096) if small else tiny.mistral_v1()
    table = TokenTable.from_tokenizer(tokenizer)
    texts = [tokenize_content(tokenizer, table, text)[0] for text in make_texts(arguments.texts)]
    with tempfile.TemporaryDirectory() as folder:
        model = source_checks.checkpoint(
            Path(folder) / "model", tokenizer=tokenizer, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT
        )
        if arguments.backend == "vllm":
            speeds = bench_vllm(model, texts, arguments.top_k, arguments.runs)
        else:
            source = open_source(SourceSettings(model=str(model), backend=arguments.backend), "capture")
            speeds = {arguments.backend: measure(source, texts, arguments.top_k, arguments.runs)}
            source.close()
    tokens = sum(len(text.input_ids) for text in texts)
    print(f"{tokens:,} tokens, K = {arguments.top_k}, vocabulary {len(tokenizer):,}, {os.cpu_count()} CPUs")
    for name, speed in speeds.items():
        print(f"{name:28}{speed:12,.0f} tokens/s")
    if "vllm" not in speeds:
        import capture_stages

        overlap = capture_stages.print_table(arguments.stage_tokens, arguments.top_k)
        print(f"the model waits {overlap:.1f} times less than before (at least {LEAST_OVERLAP:.0f})")
        return int(overlap < LEAST_OVERLAP)
    ratio = speeds["vllm"] / speeds["vllm, default settings"]
    print(f"vllm / default settings: {ratio:.1f} (at least {LEAST_RATIO:.0f})")
    return int(small and ratio < LEAST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
