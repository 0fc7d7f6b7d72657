"""Third step: train the models from scratch. The sources are given to fusion; they are no part of it."""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fusion_demo.data import read_rows
from fusion_demo.models import make_model
from fusion_demo.settings import DOMAINS, SOURCES, Settings

__all__ = ["encode", "pretrain", "shares_of"]

BLOCK, BATCH = 512, 4
#: Train in bfloat16 where the CPU has instructions for it.
HALF_PRECISION = torch.cpu._is_avx512_bf16_supported()
MUON_RATE, ADAM_RATE = 0.02, 4e-3
#: Share of the steps that warm up, and the last rate relative to the peak.
WARM_UP, LAST_RATE = 0.05, 0.1


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """Token ids of one row: BOS, text, EOS; or the rendered dialogue."""
    if "text" in row:
        return [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    ids: list[int] = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    return ids


def shares_of(name: str, settings: Settings) -> dict[str, float]:
    """Domain -> share of the training tokens of ``name``: a source knows one domain best, the target all alike."""
    if name not in SOURCES:
        return dict.fromkeys(DOMAINS, 1 / len(DOMAINS))
    rest = (1 - settings.source_share) / (len(DOMAINS) - 1)
    return {domain: settings.source_share if domain == name else rest for domain in DOMAINS}


def _token_stream(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], shares: dict[str, float], seed: int
) -> Iterator[int]:
    """Documents one after the other; each domain keeps its share of the tokens and starts anew when it is used up."""
    rng = random.Random(seed)
    pools = {domain: [row for row in rows if row["domain"] == domain] for domain in shares}
    queues: dict[str, list[dict[str, Any]]] = {domain: [] for domain in shares}
    used = dict.fromkeys(shares, 0)
    while True:
        domain = min(shares, key=lambda d: used[d] / shares[d])
        if not queues[domain]:
            queues[domain] = rng.sample(pools[domain], len(pools[domain]))
        ids = encode(tokenizer, queues[domain].pop())
        used[domain] += len(ids)
        yield from ids


def _rate(step: int, steps: int) -> float:
    """Learning rate relative to its peak: linear warm-up, then a cosine."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases.

    With a few hundred steps to go, Muon brings the models much further than AdamW alone; but it multiplies in bfloat16,
    which a CPU without instructions for it does too slowly.
    """
    if not HALF_PRECISION:
        return [torch.optim.AdamW(model.parameters(), lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers." not in name]
    return [
        torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=0.1),
        torch.optim.AdamW(outer, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _train(model: PreTrainedModel, stream: Iterator[int], steps: int) -> float:
    """Train on ``steps`` batches; returns the mean loss of the last tenth, nats/token."""
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    losses = []
    model.train()
    for step in range(steps):
        ids = torch.tensor([next(stream) for _ in range(BATCH * BLOCK)]).view(BATCH, BLOCK)
        with torch.autocast("cpu", torch.bfloat16, enabled=HALF_PRECISION):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def pretrain(name: str, data: Path, tokenizers: Path, folder: Path, settings: Settings) -> float:
    """Train model ``name`` and save it with its tokenizer to ``folder``; returns the last training loss, nats/token."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers / name)
    model = make_model(name, tokenizer)
    tokens = settings.target_tokens if name == "target" else settings.source_tokens
    steps = max(1, tokens // (BATCH * BLOCK))
    stream = _token_stream(tokenizer, read_rows(data / "pretrain.jsonl"), shares_of(name, settings), settings.seed)
    loss = _train(model, stream, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
