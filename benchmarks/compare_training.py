"""What the settings of the ``fusion:`` block are worth after training, over several seeds, with controls.

Takes the models, stores and texts that ``make demo`` leaves in ``demo_out/cpu``, continues the target on the
same texts once per variant and seed, and measures held-out bits per byte per domain. The rows come from the package's
own path (settings -> plan -> fused rows -> loss); only the training loop is a plain one, so that a run costs seconds.
The seed decides the order of the texts. Prints a Markdown table; lower is better, +- is the standard deviation over
seeds.

Controls: continued training without fusion; the same with as many more steps as the capture of all sources costs;
label smoothing; and the target's own rows alone (self-distillation).

    python benchmarks/compare_training.py demo_out/cpu --seeds 3 --texts 0.5
"""

import argparse
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "lab"))

from fusion_lab.measure import bits_per_byte, load
from fusion_lab.world import DOMAINS, read_rows

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.counting import count_texts
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.losses import fusion_loss
from fusion_plugins.core.fusion.pipeline import fuse_text
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.store import open_store

SOURCES = ("numbers", "digits", "docs")
BATCH, PEAK_RATE, IGNORED = 8, 1e-3, -100
#: batches whose examples are sorted by length together
WINDOW = 20
#: capturing with three sources and the target is four forward passes: 4/3 of the cost of training on the same texts
EQUAL_COMPUTE = 1 + 4 / 3

#: name -> changes of the settings; keys with a dot go into that block. None: no fusion.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "CLM": None,
    "CLM, equal compute": None,
    "CLM, label smoothing 0.1": None,
    "control: target's own rows alone": {"sources": ()},
    "defaults, lambda 0.5": {},
    "defaults, lambda 0.9 (paper)": {"lm_loss_weight": 0.9},
    "without chain": {"projection.chain": False},
    "min_mass 0": {"projection.min_mass": 0.0},
    "min_mass 0.3": {"projection.min_mass": 0.3},
    "one_to_many": {"projection.vocabulary_map": "one_to_many"},
    "min_edit": {"projection.vocabulary_map": "min_edit"},
    "min_edit, without chain": {"projection.vocabulary_map": "min_edit", "projection.chain": False},
    "exact, without chain": {"projection.vocabulary_map": "exact", "projection.chain": False},
    "offsets_strict": {"alignment.method": "offsets_strict"},
    "fallback next_label": {"projection.fallback": "next_label"},
    "tail bucket": {"projection.tail": "bucket"},
    "metric per token (published)": {"metric": "token"},
    "avg_ce": {"rule": "avg_ce"},
    "token_min_ce": {"rule": "token_min_ce"},
    "top_k 10": {"top_k": 10},
}


def settings(changes: dict[str, Any], work: Path) -> FusionBlock:
    """Return the block of a variant."""
    values: dict[str, Any] = {"lm_loss_weight": 0.5, "top_k": 64, "alignment": {}, "projection": {}}
    chosen = (*changes.get("sources", SOURCES), "target")
    values["sources"] = [
        {"name": name, "store": str(work / "stores" / name), "is_target": name == "target"} for name in chosen
    ]
    for key, value in changes.items():
        group, dot, inner = key.partition(".")
        if dot:
            values[group][inner] = value
        elif key != "sources":
            values[key] = value
    return FusionBlock.model_validate(values)


@cache
def texts_of(work: Path, share: float) -> list[dict[str, Any]]:
    """Return the first part of the common texts."""
    rows = read_rows(work / "world" / "data" / "common.jsonl")
    random.Random(0).shuffle(rows)  # the file has one domain after the other
    return rows[: int(share * len(rows))]


def examples(name: str, work: Path, share: float) -> tuple[list[dict[str, Any]], float]:
    """Return (tokens, labels and fused rows of every text; weight of the language-model loss)."""
    changes = VARIANTS[name]
    block = settings(changes or {}, work)
    _, tokenizer = load(work / "world" / "models" / "target")
    target = TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {})
    rows = texts_of(work, share)
    encoded = [target.encode(row.get("text") or row["messages"]) for row in rows]
    made: list[dict[str, Any]] = [{"ids": text.tokens.input_ids, "labels": text.labels} for text in encoded]
    if changes is None:
        return made, 1.0
    stores = [open_store(source.store) for source in block.sources]
    pairs = ((row["id"], text.tokens) for row, text in zip(rows, encoded, strict=True))
    plan = make_plan(block, stores, target, partial(count_texts, pairs, target.table))
    for row, text, example in zip(rows, encoded, made, strict=True):
        fused, _ = fuse_text(plan, text.tokens, [store[row["id"]] for store in stores])
        example |= {"target_ids": fused.ids, "target_logprobs": fused.logprobs}
    return made, block.lm_loss_weight


def batches(data: list[dict[str, Any]], steps: int, rng: random.Random) -> list[list[dict[str, Any]]]:
    """Batches of examples of like length, in random order, until there are enough."""
    found: list[list[dict[str, Any]]] = []
    while len(found) < steps:
        shuffled = rng.sample(data, len(data))
        for start in range(0, len(data), WINDOW * BATCH):
            window = sorted(shuffled[start : start + WINDOW * BATCH], key=lambda example: len(example["ids"]))
            cut = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
            found += rng.sample(cut, len(cut))
    return found[:steps]


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad a batch on the right."""
    width = max(len(example["ids"]) for example in batch)

    def stack(key: str, fill: float) -> torch.Tensor:
        arrays = [torch.as_tensor(example[key]) for example in batch]
        out = torch.full((len(batch), width, *arrays[0].shape[1:]), fill, dtype=arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    tensors = {"ids": stack("ids", 0).long(), "labels": stack("labels", IGNORED).long()}
    tensors["mask"] = (torch.arange(width) < torch.tensor([[len(example["ids"])] for example in batch])).long()
    if "target_ids" in batch[0]:
        tensors |= {
            "target_ids": stack("target_ids", -1).long(),
            "target_logprobs": stack("target_logprobs", -torch.inf),
        }
    return tensors


def loss_of(logits: torch.Tensor, batch: dict[str, torch.Tensor], weight: float, smoothing: float) -> torch.Tensor:
    """Return lambda * LM + (1 - lambda) * fusion, both as means over the supervised positions."""
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    lm = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)
    if "target_ids" not in batch:
        return lm
    keep = labels != IGNORED
    total = fusion_loss(
        logits,
        batch["target_ids"].clamp(min=0),
        batch["target_logprobs"],
        batch["target_ids"] >= 0,
        keep,
        reduction="sum",
    )
    return weight * lm + (1 - weight) * total / keep.sum()


def train(name: str, seed: int, work: Path, share: float) -> dict[str, float]:
    """Continue the target once and return held-out bits per byte."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, tokenizer = load(work / "world" / "models" / "target")
    data, weight = examples(name, work, share)
    epochs = EQUAL_COMPUTE if name == "CLM, equal compute" else 1.0
    smoothing = 0.1 if "smoothing" in name else 0.0
    steps = int(epochs * len(data)) // BATCH
    stream = batches(data, steps, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.05)
    model.train()
    for examples_of_step in stream:
        batch = collate(examples_of_step)
        logits = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits.float()
        loss_of(logits, batch, weight, smoothing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    rows = read_rows(work / "world" / "data" / "heldout.jsonl")
    model.eval()
    bits = {d: bits_per_byte(model, tokenizer, [row for row in rows if row["domain"] == d]) for d in DOMAINS}
    return bits | {"mean": sum(bits.values()) / len(bits)}


def main() -> None:
    """Run every variant with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="work folder of the demonstration")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=float, default=1.0, help="share of the common texts to train on")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    jobs = list(product(range(arguments.seeds), arguments.only))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.only}
    with ProcessPoolExecutor(arguments.workers) as pool:
        futures = [pool.submit(train, name, seed, arguments.work, arguments.texts) for seed, name in jobs]
        for (seed, name), future in zip(jobs, futures, strict=True):
            found[name].append(future.result())
            print(f"{name}, seed {seed}: {found[name][-1]['mean']:.4f}", file=sys.stderr, flush=True)
    domains = [*sorted(set(found[arguments.only[0]][0]) - {"mean"}), "mean"]
    print("| variant | " + " | ".join(domains) + " |")
    print("|---|" + "---|" * len(domains))
    for name, scores in found.items():
        cells = []
        for domain in domains:
            values = [score[domain] for score in scores]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
