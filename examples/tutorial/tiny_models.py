"""Models for the tutorials: three Llamas of some tens of thousands of parameters, trained here in seconds.

    python examples/tutorial/tiny_models.py make FOLDER          # texts, chats, prompts and models
    python examples/tutorial/tiny_models.py measure MODEL ...    # how well models know the two subjects

There are two subjects, sums and sentences. One source has seen nearly only sums, the other nearly only sentences, and
the target little of either. All three have tokenizers of their own.
"""

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

#: model -> tokens of its vocabulary, whether it splits numbers into digits, share of sums in its training, steps
MODELS = {
    "target": (340, False, 0.5, 70),
    "sums": (320, True, 0.9, 500),
    "sentences": (300, False, 0.1, 250),
}
BATCH, LENGTH, RATE = 16, 48, 6e-3
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
DIGITS = r" ?\p{L}+| |\p{N}|[^\s\p{L}\p{N}]+|\s+"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}A: {{ m['content'] }}<|end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def make_sum(rng: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and the number alone."""
    left, right = rng.randint(1, 9), rng.randint(1, 9)
    return f"What is {left} + {right}?", f"{left} + {right} = {left + right}\n#### {left + right}", str(left + right)


def make_sentence(rng: random.Random) -> tuple[str, str, str]:
    """A question, its answer, and nothing to verify it with."""
    animal, place = rng.choice("fox dog cat hare crow".split()), rng.choice("garden wood barn field".split())
    kind, food = rng.choice("small brown quick old".split()), rng.choice("plum nut bean fig".split())
    return f"Where is the {animal}?", f"The {kind} {animal} eats a {food} in the {place}.", ""


def make_chat(rng: random.Random, sums: float) -> list[dict[str, str]]:
    """A question and its answer; about a sum with the probability ``sums``."""
    question, answer, _ = (make_sum if rng.random() < sums else make_sentence)(rng)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def as_text(chat: list[dict[str, str]]) -> str:
    """The contents of a chat as a plain text."""
    return " ".join(message["content"] for message in chat)


def make_tokenizer(size: int, digits: bool) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on both subjects."""
    rng = random.Random(size)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(DIGITS if digits else WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator((as_text(make_chat(rng, 0.5)) for _ in range(2000)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def stream(tokenizer: PreTrainedTokenizerFast, sums: float, seed: int) -> Iterator[int]:
    """Token ids of chats and plain texts without end."""
    rng = random.Random(seed)
    while True:
        chat = make_chat(rng, sums)
        if rng.random() < 0.5:
            yield from tokenizer.apply_chat_template(chat, return_dict=False)
        else:
            yield from tokenizer(as_text(chat))["input_ids"]
            yield tokenizer.eos_token_id


def train(name: str, folder: Path) -> None:
    """Train one of :data:`MODELS` and save it with its tokenizer."""
    size, digits, sums, steps = MODELS[name]
    tokenizer = make_tokenizer(size, digits)
    torch.manual_seed(size)
    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=1, **sizes
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    ids = stream(tokenizer, sums, seed=size)
    for _ in range(steps):
        batch = torch.tensor([[next(ids) for _ in range(LENGTH)] for _ in range(BATCH)])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    print(f"{folder / name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path) -> None:
    """Write everything that the tutorials start from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    chats = [make_chat(rng, 0.5) for _ in range(100)]
    write_lines(folder / "texts.jsonl", [{"id": f"t{i}", "text": as_text(chat)} for i, chat in enumerate(chats)])
    write_lines(folder / "chats.jsonl", [{"id": f"c{i}", "messages": chat} for i, chat in enumerate(chats)])
    prompts = {question: gold for question, _, gold in (make_sum(rng) for _ in range(400))}
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": question}], "domain": "math", "reference": gold}
        for i, (question, gold) in enumerate(prompts.items())
    ]
    write_lines(folder / "prompts.jsonl", rows)
    for name in MODELS:
        if not (folder / name / "tokenizer.json").exists():  # written last
            train(name, folder)


def encode(tokenizer: Any, chat: list[dict[str, str]], as_chat: bool) -> tuple[list[int], int, int]:
    """Token ids, how many of them are not measured, and the bytes of what is: the answer of a chat, or a whole text."""
    if not as_chat:
        text = as_text(chat)
        return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id], 0, len(text.encode())
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    question = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    return ids, len(question), len(chat[1]["content"].encode())


@torch.no_grad()
def measure(path: Path, chats: bool) -> dict[str, float]:
    """Bits per byte of held-out texts (or answers) of each subject, and the share of sums that the model solves."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = {}
    for subject, sums in (("sums", 1.0), ("sentences", 0.0)):
        rng = random.Random(99)
        nats, total = 0.0, 0
        for ids, hidden, size in (encode(tokenizer, make_chat(rng, sums), chats) for _ in range(60)):
            labels = torch.tensor([[-100] * hidden + ids[hidden:]])
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
            nats += loss * (len(ids) - max(hidden, 1))
            total += size
        found[subject] = nats / math.log(2) / total
    solved = sum(_solves(model, tokenizer, *make_sum(random.Random(seed))) for seed in range(60)) / 60
    return {**found, "solved": solved}


def _solves(model: Any, tokenizer: Any, question: str, answer: str, gold: str) -> bool:
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).endswith(f"#### {gold}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "measure"))
    parser.add_argument("--chats", action="store_true", help="measure the answers of chats, not plain texts")
    parser.add_argument("--json", action="store_true", help="print what is measured as JSON")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # models this small lose more to a second thread than they gain
    for path in arguments.paths:
        if arguments.command == "make":
            make(path)
        else:
            found = measure(path, arguments.chats)
            said = (
                f"{found['sums']:.3f} bits/byte sums, {found['sentences']:.3f} sentences, {found['solved']:.0%} solved"
            )
            print(json.dumps(found) if arguments.json else f"{path}: {said}")


if __name__ == "__main__":
    main()
