"""What a model is measured by: bits per byte of held-out texts, and greedy answers to held-out problems."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fusion_lab.pretrain import encode, pad
from fusion_lab.problems import Problem, Score, score

__all__ = ["answers", "bits_per_byte", "load", "solve"]

#: tokens of the longest right solution of any tokenizer here, and some more
ANSWER_TOKENS = 34


def load(folder: Path, tokenizer: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32 and its tokenizer (or that of another folder)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(tokenizer or folder)


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch: int = 32
) -> float:
    """Return the cross-entropy of texts, or of the answers of chats, in bits per byte of them (EOS is counted in)."""
    examples = sorted((encode(tokenizer, row) for row in rows), key=lambda example: len(example[0]))
    nats = 0.0
    for start in range(0, len(examples), batch):
        inputs = pad(examples[start : start + batch], tokenizer.pad_token_id)
        labels = inputs.pop("labels")[:, 1:]
        logprobs = model(**inputs).logits[:, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nats -= float(chosen[labels >= 0].double().sum())
    texts = (row["text"] if "text" in row else row["messages"][-1]["content"] for row in rows)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], batch: int = 256
) -> list[str]:
    """Return the greedy answer to each question."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    settings = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = [""] * len(prompts)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(prompts[index]) for index in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        for row, index in enumerate(part):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
        lengths = torch.tensor([[len(prompts[index])] for index in part])
        mask = (torch.arange(width) >= width - lengths).long()
        out = model.generate(ids, attention_mask=mask, generation_config=settings)
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            found[index] = text
    return found


def solve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> Score:
    """Score the greedy answers to problems."""
    return score(problems, answers(model, tokenizer, [problem.question for problem in problems]))
