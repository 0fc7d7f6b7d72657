"""Training of the models that fusion is given: the same optimizer in float32 on every CPU, one row per example."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["IGNORED", "Example", "encode", "pad", "train"]

IGNORED = -100
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 4e-3, 0.1
#: Share of the steps that warm up, and the last rate relative to the peak.
WARM_UP, LAST_RATE = 0.05, 0.1
#: token ids of a row, and how many of them at the start are not trained on
Example = tuple[list[int], int]


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Example:
    """Encode a row: BOS, text and EOS, all trained on; or a chat up to the end of the answer, which alone is."""
    if "text" in row:
        return [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id], 1
    chat = row["messages"]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    start = len(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False))
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids[:end], start


def pad(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right into (B, T) ids, mask and labels."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Muon(torch.optim.Optimizer):
    """Muon in float32. That of torch multiplies in bfloat16: slow, and another result, where a CPU has none."""

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move each matrix by its momentum, made nearly orthogonal."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                mean = state.setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest orthogonal matrix, roughly: five quintic Newton-Schulz steps (Jordan et al., 2024)."""
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.size(0) > x.size(1):
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.T if tall else x


def _optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers." not in name]
    return [
        Muon(inner, lr=MUON_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(outer, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, steps: int) -> float:
    """Learning rate relative to its peak: linear warm-up, then a cosine."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _batches(rows: dict[str, list[Example]], shares: dict[str, float], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of one domain each, so that little is padded; a domain's share is that of its batches."""
    rng = random.Random(seed)
    queues: dict[str, list[Example]] = {domain: [] for domain in shares}
    while True:
        domain = rng.choices(list(shares), weights=list(shares.values()))[0]
        if len(queues[domain]) < size:
            queues[domain] += rng.sample(rows[domain], len(rows[domain]))
        yield [queues[domain].pop() for _ in range(size)]


def train(
    model: PreTrainedModel,
    pad_id: int,
    rows: dict[str, list[Example]],
    *,
    shares: dict[str, float],
    steps: int,
    batch: int,
    seed: int,
) -> float:
    """Train on ``steps`` batches; return the mean loss of the last tenth, nats/token."""
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    batches, losses = _batches(rows, shares, batch, seed), []
    model.train()
    for _ in range(steps):
        loss = model(**pad(next(batches), pad_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
