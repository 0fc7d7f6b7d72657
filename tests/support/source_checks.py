"""What the tests of all backends share: tiny sources, texts, settings, and a plain reference of what is stored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.sources.sample_config import SampleConfig
from fusion_plugins.store import open_rows

#: head_dim 32, the least that vLLM's attention on a CPU takes
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}


def checkpoint(folder: Path, **changes) -> Path:
    """A tiny Llama whose predictions are far from uniform (weights five times as large as at a fresh start)."""
    tiny.llama_checkpoint(folder, **(SIZES | {"initializer_range": 0.1} | changes))
    return folder


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, repeat: int = 1) -> Path:
    rows = [{"id": f"t{n}-{i}", "text": f"{text} {n}"} for n in range(repeat) for i, text in enumerate(tiny.TEXTS)]
    return write_rows(path, rows)


def chats(path: Path) -> Path:
    rows = [{"id": f"c{n}", "messages": [*tiny.CHAT[:-1], {"role": "assistant", "content": f"{n}!"}]} for n in range(3)]
    return write_rows(path, rows)


def prompts(path: Path, count: int = 6) -> Path:
    domains = ("instruction", "math", "code")
    rows = [
        {"id": f"p{n}", "text": f"What is {n} + 30?", "domain": domains[n % 3], "reference": str(n + 30)}
        for n in range(count)
    ]
    return write_rows(path, rows)


def reference_logprobs(model: Path, input_ids: np.ndarray) -> np.ndarray:
    """(T, W) float64 log-probabilities of one sequence alone, without padding."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = network(torch.from_numpy(input_ids.astype(np.int64))[None]).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def capture_config(model, texts, out, **changes) -> CaptureConfig:
    return CaptureConfig(**({"model": str(model), "texts": str(texts), "out": str(out), "top_k": 8} | changes))


def sample_config(models, prompts, out, **changes) -> SampleConfig:
    sources = [{"name": name, "model": str(model), "max_tokens": 6} for name, model in models.items()]
    return SampleConfig(**({"prompts": str(prompts), "out": str(out), "sources": sources, "n": 2} | changes))


def server_config(prompts, out, *servers, n=2, source=None, **options) -> SampleConfig:
    """Settings of a source on fake servers, or on URLs."""
    entry = {"name": "remote", "model": "served", "backend": "openai", **(source or {})}
    urls = [server if isinstance(server, str) else server.url for server in servers]
    entry["options"] = {"base_url": urls, "concurrency": 8, "patience": 20.0, "rest_seconds": 0.3, **options}
    return SampleConfig(prompts=str(prompts), out=str(out), n=n, sources=[entry])


def responses(out) -> dict[tuple[str, int], str]:
    """(prompt id, index) -> response of the one source in a folder; each is there once."""
    rows = list(open_rows(out))
    assert len({(row["prompt_id"], row["index"]) for row in rows}) == len(rows)
    return {(row["prompt_id"], row["index"]): row["response"] for row in rows}


def contents(store) -> dict[str, bytes]:
    """Id -> every stored number of the record, as bytes."""
    return {record.id: b"|".join(_numbers(record)) for record in store}


def _numbers(record: Record) -> list[bytes]:
    fields: dict[str, Any] = {**vars(record), **vars(record.text), **vars(record.topk)}
    values = [fields[name] for name in sorted(fields) if name not in ("id", "text", "topk")]
    return [np.ascontiguousarray(value).tobytes() for value in values]
