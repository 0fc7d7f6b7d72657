"""What `axolotl preprocess` costs per token with fused targets, as a multiple of the same command without.

    python benchmarks/bench_prepare.py [--tokens 600000] [--widths 10 64] [--sources 1 3] [--characters 6400]

Texts and stores are those of bench_preprocess.py. Three ways take turns: plain (axolotl's `completion`), and the
dataset type of this package with `fusion.prepared: rows` and `stores`. All run the function behind the command, in one
process and without workers: to start a process takes ten core seconds and more, and varies by more than what is
measured here. Each way prepares two texts and then all of them; the difference is what a token costs, in processor
time, the best of all turns. The report counts one text in twenty, as in a dataset of five million tokens.

The bound is what rows cost at least beside plain: the stores of the sources are read and compared with their checksums,
the records of one source are unpacked, a lean loop (bench_project.py) projects them, and the columns are written
twice, because axolotl saves what its `map` has written. Each of these is measured alone.

Prints a Markdown table per number of entries. Exits 1 when rows cost more than twice plain, or more than 1.75 times the
bound where that alone is above twice plain; or when stores cost more than twice plain.
"""

import argparse
import gc
import hashlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import axolotl_runs as runs
import pyarrow as pa
from axolotl.cli.preprocess import do_cli
from bench_preprocess import CHARACTERS, NAMES, Material, make_material
from bench_project import lean_times, make_plan, make_records, read_texts
from bench_rows import settings_of, size

from fusion_plugins.axolotl import fused
from fusion_plugins.store import open_store
from fusion_plugins.store.schema import RecordCodec
from fusion_plugins.store.shards import read_packed

REACH, REACH_BOUND = 2.0, 1.75
LEAN_TEXTS = 20
#: every how many-th text the report counts
COUNTED = 20
Block = dict[str, Any] | None


def prepare(material: Material, folder: Path, share: str, block: Block) -> tuple[float, int]:
    """Preprocess a share of the texts; return the processor seconds, and the bytes of the prepared rows."""
    config = runs.write_config(settings_of(material, folder, share, block), folder)
    runs.forget_plugins()
    gc.collect()
    with redirect_stdout(io.StringIO()):
        seconds = timed(lambda: do_cli(str(config)))
    written = size(folder)
    shutil.rmtree(folder)
    return seconds, written


def timed(action: Callable[[], Any]) -> float:
    """Return the processor seconds of an action."""
    start = time.process_time()
    action()
    return time.process_time() - start


def ways(material: Material, width: int, sources: list[int]) -> dict[str, Block]:
    """Return the `fusion:` block of each way."""
    entries = [{"name": name, "store": str(material.folder / name), "is_target": name == "own"} for name in NAMES]
    found: dict[str, Block] = {"plain": None}
    for count in sources:
        block = {"sources": entries[:count], "top_k": width}
        found[f"rows, {count} sources"] = block
        found[f"stores, {count} sources"] = block | {"prepared": "stores"}
    return found


def bound(material: Material, width: int, count: int, size: int, folder: Path) -> dict[str, float]:
    """Return the processor seconds of what must be done for rows of ``count`` sources that take ``size`` bytes."""
    stores = [open_store(material.folder / name) for name in NAMES[:count]]
    files = [store.path / shard.name for store in stores for shard in store.manifest.shards]
    codec, first = RecordCodec(stores[0].manifest), stores[0]
    records = [record for shard in first.manifest.shards for record in read_packed(first.path, shard, codec)]
    columns = pa.py_buffer(bytes(size))

    def write() -> None:
        with pa.OSFile(str(folder / "columns"), "wb") as file:
            file.write(columns)

    plan, tokenizers, tables = make_plan(width)
    rows = [make_records(tokenizers, tables, text, width, seed) for seed, text in enumerate(read_texts(LEAN_TEXTS))]
    _, lean, _ = lean_times(plan.sources[0].projector, rows)
    return {
        "checksums": timed(lambda: [hashlib.sha256(file.read_bytes()) for file in files]),
        "unpacking": timed(lambda: [record.unpack() for record in records]),
        "projection": lean * material.tokens["all"] / sum(len(text.input_ids) for text, _ in rows),
        "writing": timed(lambda: [write(), write()]),
    }


def bench(material: Material, width: int, sources: list[int], turns: int) -> bool:
    """Print the table for one K; return whether the goal was met."""
    blocks = ways(material, width, sources)
    folder = material.folder
    for block in blocks.values():  # loads modules and kernels, makes vocabulary maps
        prepare(material, folder / "run", "few", block)
    gc.freeze()
    fused.REPORTED = max(1, material.data("all").read_text(encoding="utf-8").count("\n") // COUNTED)
    seconds: dict[tuple[str, str], float] = {}
    sizes: dict[str, int] = {}
    for _ in range(turns):
        for name, block in blocks.items():
            for share in ("few", "all"):
                spent, sizes[name] = prepare(material, folder / "run", share, block)
                seconds[name, share] = min(seconds.get((name, share), float("inf")), spent)
    tokens = material.tokens["all"] - material.tokens["few"]
    cost = {name: (seconds[name, "all"] - seconds[name, "few"]) / tokens * 1e6 for name in blocks}
    print(f"\nK = {width}; {material.tokens['all']:,} tokens, load {os.getloadavg()[0]:.1f}\n")
    print("| way | two texts, s | all, s | us/token | of plain | bytes/token |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in blocks:
        took = f"{seconds[name, 'few']:.2f} | {seconds[name, 'all']:.2f} | {cost[name]:.2f}"
        print(f"| {name} | {took} | {cost[name] / cost['plain']:.2f}x | {sizes[name] / material.tokens['all']:.0f} |")
    good = True
    for count in sources:
        parts = bound(material, width, count, sizes[f"rows, {count} sources"], folder)
        least = cost["plain"] + sum(parts.values()) / material.tokens["all"] * 1e6
        named = ", ".join(f"{name} {value / material.tokens['all'] * 1e6:.2f}" for name, value in parts.items())
        print(f"| bound, {count} sources: plain and {named} | | | {least:.2f} | {least / cost['plain']:.2f}x | |")
        allowed = REACH_BOUND * least if least > REACH * cost["plain"] else REACH * cost["plain"]
        good &= cost[f"rows, {count} sources"] <= allowed
        good &= cost[f"stores, {count} sources"] <= REACH * cost["plain"]
    return good


def main() -> int:
    """Measure every K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600_000, help="tokens of the target")
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 64])
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of a text; three are about a token")
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    sys.argv[1:] = []  # the command reads them, too
    os.environ |= runs.ENVIRONMENT
    logging.disable(logging.WARNING)  # axolotl's log shows whole texts
    good = True
    for width in options.widths:
        with tempfile.TemporaryDirectory() as folder:
            material = make_material(Path(folder), options.tokens, width, options.characters)
            good = bench(material, width, options.sources, options.turns) and good
    print("\nreached" if good else "\nNOT reached")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
