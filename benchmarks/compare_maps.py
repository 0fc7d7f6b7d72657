"""Which vocabulary map keeps a source's probability on the right next token of the target?

Takes the models and stores that ``make demo`` leaves in ``demo_out/cpu`` and judges the projected rows in two
ways, on real text of each source's own domain. Prints a Markdown table per source.

- **By the text.** Bits of the target's true next token under the projected row, and how often it is on top.
- **By brute force.** What the source really says about the target's next token is estimated without any map: the
  source continues the text a few hundred times, the target's tokenizer reads each continuation, and the first token
  after the row is counted. Continuations over which the target does not end a token at the row are left out. ``KL`` is
  the divergence of the projected row from these counts (entropy after Miller and Madow).

Mass that no entry holds counts as spread evenly over the rest of the vocabulary, at least ``FLOOR`` of it.

    python benchmarks/compare_maps.py demo_out/cpu --rows 60 --samples 256
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "lab"))

from fusion_lab.measure import load
from fusion_lab.world import read_rows

from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.counting import count_texts
from fusion_plugins.axolotl.plan import make_plan
from fusion_plugins.axolotl.target_tokenizer import TargetTokenizer
from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.pipeline import FusionPlan, fuse_text
from fusion_plugins.core.fusion.types import Record, SparseDistributions
from fusion_plugins.core.text.token_table import Role, TokenTable
from fusion_plugins.core.text.tokenize import tokenize_content
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store import Store, open_store

#: source -> the domain that it knows
SOURCES = {"numbers": "sums", "digits": "sums", "docs": "docs"}
MAPS = ("exact", "min_edit", "first_token", "statistics", "one_to_many")
#: smallest share of a row that counts as not held by any entry
FLOOR = 1e-3
#: source tokens of a continuation, and the longest text before it
CONTINUED, CONTEXT = 8, 256


class Case(NamedTuple):
    """A row of a text that source and target share.

    Attributes:
        row: of the target.
        counts: target id -> number of continuations that begin with it.
    """

    id: str
    row: int
    counts: Counter[int]


@torch.inference_mode()
def continuations(model: Any, ids: list[int], count: int) -> torch.Tensor:
    """Sample (count, CONTINUED) token ids that follow ``ids``."""
    state = model(input_ids=torch.tensor([ids]), use_cache=True)
    cache = state.past_key_values
    cache.batch_repeat_interleave(count)
    logits = state.logits[:, -1].expand(count, -1)
    steps = []
    for _ in range(CONTINUED):
        steps.append(torch.multinomial(logits.softmax(-1), 1))
        logits = model(input_ids=steps[-1], past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.cat(steps, dim=1)


def next_token(before: bytes, after: bytes, ended: bool, target: TargetTokenizer) -> int | None:
    """Return the target's first token behind ``before``; None if it has no boundary there or ``after`` is cut short."""
    if ended and not after:
        return target.table.id_of_role(Role.END_OF_TURN)
    text, _ = tokenize_content(target.tokenizer, target.table, (before + after).decode(errors="ignore"))
    rows = np.flatnonzero((text.ends == len(before)) & text.exact)
    if not len(rows) or rows[-1] + 1 == len(text.ends):
        return None
    return int(text.input_ids[rows[-1] + 1])


def count_next(
    model: Any, store: Store, record: Record, row: int, target: TargetTokenizer, samples: int
) -> Counter[int]:
    """Count the target's next tokens over continuations of the source's row."""
    start = max(int(s) for s, _ in record.text.spans if s <= record.text.ends[row])
    inside = np.flatnonzero((record.text.ends > start) & (record.text.ends <= record.text.ends[row]))
    before = b"".join(store.table.bytes_of(i) for i in record.text.input_ids[inside[inside <= row]].tolist())
    counts: Counter[int] = Counter()
    for ids in continuations(model, record.text.input_ids[: row + 1].tolist(), samples).tolist():
        plain = [store.table.role_of(i) is None for i in ids]
        end = plain.index(False) if False in plain else len(ids)
        after = b"".join(store.table.bytes_of(i) for i in ids[:end])
        found = next_token(before, after, end < len(ids), target)
        if found is not None:
            counts[found] += 1
    return counts


def read(row: dict[str, Any], target: TargetTokenizer) -> TokenizedText:
    """Return the target's tokens of a text or a dialogue."""
    return target.encode(row.get("text") or row["messages"]).tokens


def cases(
    name: str, work: Path, store: Store, target: TargetTokenizer, rows: list[dict[str, Any]], options: Any
) -> Iterator[Case]:
    """Choose rows that both read and ask the source what comes next."""
    model, _ = load(work / "world" / "models" / name)
    rng = random.Random(0)
    while True:
        text = rng.choice(rows)
        record, tokens = store[text["id"]], read(text, target)
        shared = align_texts(record.text, tokens).source_positions
        usable = [t for t in np.flatnonzero(shared >= 0).tolist() if shared[t] < CONTEXT and t + 1 < len(shared)]
        if usable:
            row = rng.choice(usable)
            yield Case(text["id"], row, count_next(model, store, record, int(shared[row]), target, options.samples))


def plan_of(name: str, work: Path, target: TargetTokenizer, method: str, chain: bool, texts: Any) -> FusionPlan:
    """Return the package's plan for one source."""
    block = FusionBlock.model_validate(
        {
            "sources": [{"name": name, "store": str(work / "stores" / name)}],
            "projection": {"vocabulary_map": method, "chain": chain, "tail": "bucket", "min_mass": 0.0},
            "top_k": 1024,
        }
    )
    return make_plan(
        block, [open_store(work / "stores" / name)], target, partial(count_texts, texts, target.table.packed)
    )


def spread(fused: SparseDistributions, row: int, vocab_size: int) -> np.ndarray:
    """Return a projected row as (V,) probabilities."""
    ids = fused.ids[row][fused.ids[row] >= 0]
    held = np.exp(fused.logprobs[row][: len(ids)].astype(np.float64))
    left = max(1.0 - held.sum(), FLOOR)
    out = np.full(vocab_size, left / max(vocab_size - len(ids), 1))
    out[ids] = held * (1.0 - left) / held.sum()
    return out


def divergence(counts: Counter[int], row: np.ndarray) -> float:
    """KL in bits of a distribution from counts; the entropy of the counts is corrected after Miller and Madow."""
    n = counts.total()
    shares = np.array(list(counts.values())) / n
    entropy = -(shares * np.log2(shares)).sum() + (len(shares) - 1) / (2 * n * np.log(2))
    return float(-(shares * np.log2(row[list(counts)])).sum() - entropy)


def judge(plan: FusionPlan, store: Store, tokens: dict[str, TokenizedText], chosen: list[Case]) -> list[float]:
    """Return used, mass kept, bits of the true token, on top, and KL, as means over the rows that are used."""
    fused = {case.id: fuse_text(plan, tokens[case.id], [store[case.id]])[0] for case in chosen}
    figures = []
    for case in chosen:
        rows, gold = fused[case.id], int(tokens[case.id].input_ids[case.row + 1])
        if not rows.present[case.row]:
            continue
        row = spread(rows, case.row, len(plan.sources[0].projector.target_bytes.special))
        kept = float(np.exp(rows.logprobs[case.row]).sum())
        figures.append([kept, -np.log2(row[gold]), rows.ids[case.row, 0] == gold, divergence(case.counts, row)])
    return [len(figures) / len(chosen), *np.mean(figures, axis=0).tolist()]


def compare(name: str, work: Path, options: argparse.Namespace) -> None:
    """Print the table of one source."""
    _, tokenizer = load(work / "world" / "models" / "target")
    target = TargetTokenizer(tokenizer, TokenTable.from_tokenizer(tokenizer), {})
    store = open_store(work / "stores" / name)
    common = read_rows(work / "world" / "data" / "common.jsonl")
    rows = [r for r in common if r["domain"] == SOURCES[name] and r["id"] in store]
    found = cases(name, work, store, target, rows, options)
    chosen = [case for case in (next(found) for _ in range(options.rows)) if case.counts.total() > options.samples / 2]
    tokens = {r["id"]: read(r, target) for r in rows}
    print(f"\n{name}: {len(chosen)} rows, {options.samples} continuations each, {store.manifest.top_k} entries\n")
    print("| map | chain | rows used | mass kept | bits of the next token | on top | KL, bits |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for method, chain in product(MAPS, (False, True)):
        plan = plan_of(name, work, target, method, chain, tokens.items())
        used, kept, bits, top, kl = judge(plan, store, tokens, chosen)
        word = "yes" if chain else "no"
        print(f"| {method} | {word} | {used:.1%} | {kept:.3f} | {bits:.2f} | {top:.1%} | {kl:.2f} |", flush=True)


def main() -> None:
    """Compare the maps for every source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="work folder of the demonstration")
    parser.add_argument("--rows", type=int, default=60, help="rows per source")
    parser.add_argument("--samples", type=int, default=256, help="continuations per row")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in SOURCES:
        compare(name, options.work, options)


if __name__ == "__main__":
    main()
