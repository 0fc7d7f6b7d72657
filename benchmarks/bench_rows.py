"""From stores to batches: bytes and microseconds per token of a prepared dataset, beside axolotl without fusion.

    python benchmarks/bench_rows.py [--tokens 60000] [--widths 10 64]

The stores and texts are those of bench_preprocess.py, three sources, texts of about 2,000 tokens. Four ways:

- plain: axolotl's own `completion`, rows as Python lists, axolotl's collator;
- rows: `fusion.prepared: rows`, rows as arrays, our collator;
- stores: `fusion.prepared: stores`, the loader reads the records of the source that is taken and fuses them;
- lists: what rows were before: int32 and float32 as Python lists.

`prepare` is the preparation in this process, less its start, as it is in a large dataset: one text in ten is counted in
the report; `read` takes a batch of rows from the dataset, `collate`
makes tensors of it. All are processor time, the best of several runs that take turns. The lower bound of the last two
is a copy of the batch. Exits 1 when `rows` takes more than twice the time of plain to read and collate.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import axolotl_runs as runs
import numpy as np
import tiny
from axolotl.utils.collators import DataCollatorForSeq2Seq
from bench_preprocess import NAMES, Material, make_material
from datasets import Features, List, Value

from fusion_plugins.axolotl import fused
from fusion_plugins.axolotl.args import FusionBlock
from fusion_plugins.axolotl.collator import FUSED_IDS, FUSED_LOGPROBS, FusionCollator
from fusion_plugins.axolotl.text_rows import text_fuser

BATCH = 8
RUNS = 5


def settings_of(material: Material, folder: Path, share: str, block: dict[str, Any] | None) -> dict[str, Any]:
    """Return axolotl's settings of a share of the texts: fused, or plain where there is no block."""
    changes: dict[str, Any] = {"fusion": block} if block else {"fusion": None, "plugins": None}
    data = material.data(share)
    return runs.config(
        runs.Material(material.folder, material.target, data, data),
        folder,
        datasets=[{"path": str(data), "type": runs.FUSED if block else "completion"}],
        sequence_len=8192,
        shuffle_merged_datasets=False,
        **changes,
    )


def prepare(material: Material, folder: Path, share: str, block: dict[str, Any] | None) -> tuple[Any, float]:
    """Prepare a share of the texts; return the rows and the processor seconds."""
    settings = settings_of(material, folder, share, block)
    start = time.process_time()
    _, rows = runs.prepare(settings, folder)
    return rows, time.process_time() - start


def size(folder: Path) -> int:
    """Return the bytes of the prepared rows."""
    return sum(path.stat().st_size for path in (folder / "prepared").glob("*/data-*.arrow"))


def best(actions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the processor seconds of each action, the best of several runs that take turns."""
    found = dict.fromkeys(actions, float("inf"))
    for _ in range(RUNS):
        for name, action in actions.items():
            start = time.process_time()
            action()
            found[name] = min(found[name], time.process_time() - start)
    return found


def bench(material: Material, folder: Path, width: int) -> bool:
    """Print the table for one K; return whether the goal was met."""
    sources = [{"name": name, "store": str(material.folder / name), "is_target": name == "own"} for name in NAMES]
    blocks: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "rows": {"sources": sources, "top_k": width},
        "stores": {"sources": sources, "top_k": width, "prepared": "stores"},
    }
    rows, seconds = {}, {}
    fused.REPORTED = max(
        1, len(material.data("all").read_text().splitlines()) // 10
    )  # of a large dataset, 1,000 texts are counted
    for name, block in blocks.items():
        if name != "plain":  # pays for maps and kernels
            prepare(material, folder / f"{name}-warm", "few", block)
        _, start = prepare(material, folder / f"{name}-few", "few", block)
        rows[name], whole = prepare(material, folder / name, "all", block)
        seconds[name] = whole - start
    lists = {name: List(Value(kind)) for name, kind in ((FUSED_IDS, "int32"), (FUSED_LOGPROBS, "float32"))}
    rows["lists"] = rows["rows"].cast(Features({**rows["rows"].features, **lists}))
    tokenizer = tiny.mistral_v1()
    tokenizer.pad_token = "<unk>"
    collators = {
        "plain": DataCollatorForSeq2Seq(tokenizer),
        "rows": FusionCollator(tokenizer, inner=DataCollatorForSeq2Seq),
        "stores": FusionCollator(
            tokenizer,
            inner=DataCollatorForSeq2Seq,
            fuser=partial(text_fuser, block=FusionBlock(**blocks["stores"] or {})),
        ),
        "lists": FusionCollator(tokenizer, inner=DataCollatorForSeq2Seq),
    }
    # As the trainer reads them.
    read = {name: data if name in ("plain", "lists") else data.with_format("numpy") for name, data in rows.items()}
    places = list(range(BATCH))
    tokens = sum(len(read["rows"][place]["input_ids"]) for place in places)
    batches = {name: collators[name](data.__getitems__(places)) for name, data in read.items()}
    reading = best({name: partial(data.__getitems__, places) for name, data in read.items()})
    held = {name: data.__getitems__(places) for name, data in read.items()}
    collating = best({name: lambda name=name: collators[name]([dict(row) for row in held[name]]) for name in read})
    copies = best({name: lambda name=name: [np.array(t, copy=True) for t in batches[name].values()] for name in read})
    print(f"\nK = {width}; {material.tokens['all']:,} tokens prepared, batches of {BATCH} texts, {tokens:,} tokens\n")
    print("| way | bytes/token | prepare, us/token | read | collate | both | against plain | copy |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    plain = reading["plain"] + collating["plain"]
    for name in read:
        both = reading[name] + collating[name]
        prepared = f"{size(folder / name) / material.tokens['all']:.1f}" if name in blocks else f"{9 + 8 * width}"
        made = f"{1e6 * seconds[name] / material.tokens['all']:.1f}" if name in blocks else ""
        micro = [f"{1e6 * value / tokens:.2f}" for value in (reading[name], collating[name], both)]
        cells = [name, prepared, made, *micro, f"{both / plain:.1f}x", f"{1e6 * copies[name] / tokens:.2f}"]
        print(f"| {' | '.join(cells)} |")
    return (reading["rows"] + collating["rows"]) / plain <= 2


def main() -> int:
    """Measure every K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60_000, help="tokens of the target")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 64])
    options = parser.parse_args()
    os.environ |= runs.ENVIRONMENT
    good = True
    for width in options.widths:
        with tempfile.TemporaryDirectory() as folder:
            material = make_material(Path(folder), options.tokens, width)
            good = bench(material, Path(folder) / "runs", width) and good
    print("\nreached" if good else "\nNOT reached")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
