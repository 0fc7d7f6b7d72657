"""What a model is worth: held-out bits per byte in each domain, and the share of held-out problems that it solves.

Nothing here uses the code of the package to turn texts into tokens, so that an error there cannot hide itself. Only the
verdict on an answer comes from the package's verifier.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fusion_demo.data import read_rows
from fusion_plugins.scoring.math_scorer import MathScorer

__all__ = ["answer", "bits_per_byte", "evaluate", "load"]

BATCH_TOKENS = 2048
BATCH_PROMPTS = 50
ANSWER_TOKENS = 120


def load(folder: Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) for evaluation in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _measured(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int, int]:
    """(token ids, first measured token, measured bytes): the whole of a text; of a dialogue, the answer."""
    if "text" in row:
        return [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id], 1, len(row["text"].encode())
    question, reply = row["messages"]
    ids = tokenizer.apply_chat_template([question, reply], return_dict=False)
    start = len(tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False))
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids[:end], start, len(reply["content"].encode())


def _batches(items: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Items of like length together, at most ``BATCH_TOKENS`` with padding."""
    batch: list[tuple[list[int], int]] = []
    for item in sorted(items, key=lambda item: -len(item[0])):
        if batch and len(batch[0][0]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def _nats(model: Any, batch: Sequence[tuple[list[int], int]]) -> float:
    """Summed negative log-likelihood of the measured tokens of a batch."""
    width = max(len(ids) for ids, _ in batch)
    inputs = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    mask = torch.zeros_like(inputs)
    for row, (ids, start) in enumerate(batch):
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = torch.tensor(ids[start:])
        mask[row, : len(ids)] = 1
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()


def bits_per_byte(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Domain -> bits the model needs per byte of text (end of text or of turn included), and ``mean`` over domains."""
    items, n_bytes = defaultdict(list), defaultdict(int)
    for row in rows:
        ids, start, size = _measured(tokenizer, row)
        items[row["domain"]].append((ids, start))
        n_bytes[row["domain"]] += size
    bits = {
        domain: sum(_nats(model, batch) for batch in _batches(items[domain])) / math.log(2) / n_bytes[domain]
        for domain in sorted(items)
    }
    return bits | {"mean": sum(bits.values()) / len(bits)}


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
    """The most probable answers (greedy) to the prompts, in their order."""
    stop = tokenizer.eos_token_id
    config = GenerationConfig(max_new_tokens=ANSWER_TOKENS, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    texts = []
    for start in range(0, len(prompts), BATCH_PROMPTS):
        encoded = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts[start : start + BATCH_PROMPTS]
        ]
        width = max(map(len, encoded))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        output = model.generate(ids, attention_mask=mask, generation_config=config)
        texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def _verdicts(problems: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[bool]:
    """Whether each answer is the gold one; only an answer after ``####`` counts, as in the solutions."""
    scorer = MathScorer(workers=1, marked_only=True)
    rows = [
        {"prompt": problem["messages"], "response": text, "domain": "math", "reference": problem["reference"]}
        for problem, text in zip(problems, answers, strict=True)
    ]
    try:
        return [score.correct is True for score in scorer.score(rows)]
    finally:
        scorer.close()


def evaluate(folder: Path, data: Path) -> dict[str, Any]:
    """Measure the model in ``folder`` on the held-out files of ``data``.

    Returns:
        ``bits_per_byte`` (domain -> bits), ``accuracy`` (share of problems solved), ``problems`` (how many).
    """
    model, tokenizer = load(folder)
    bits = bits_per_byte(model, tokenizer, read_rows(data / "heldout.jsonl"))
    problems = read_rows(data / "heldout_problems.jsonl")
    answers = answer(model, tokenizer, [problem["messages"] for problem in problems])
    verdicts = _verdicts(problems, answers)
    return {"bits_per_byte": bits, "accuracy": sum(verdicts) / len(verdicts), "problems": len(problems)}
