"""What the tests of all backends share: tiny sources on disk, texts, and a plain reference of what capture stores."""

import json
from pathlib import Path

import numpy as np
import tiny
import torch
from transformers import AutoModelForCausalLM

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


def contents(store) -> dict[str, bytes]:
    """Id -> every stored number of the record, as bytes."""
    return {
        record.id: b"|".join(
            np.ascontiguousarray(value).tobytes() for name, value in sorted(vars(record).items()) if name != "id"
        )
        for record in store
    }
