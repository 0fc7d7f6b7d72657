"""Speed of the real `axolotl preprocess` with fused targets, against the same command without and the published path.

    python benchmarks/bench_preprocess.py [--tokens 1500000] [--width 10]

Stores of three sources (tekken twice and the target's own tokenizer; the rows are made up as in bench_project.py) over
Python files in texts of about 2,000 tokens; two workers. Every command is a process of its own with empty caches for
vocabulary maps and datasets; only the compiled kernels are kept on the disk. The published path (bench_project.py)
aligns whole texts on one core, for the two sources whose tokenizer is another; two workers are taken to be twice as
fast, and to need no start-up.

Prints a Markdown table. Wall seconds are those of a machine that does nothing else; core seconds, of all processes of
the command, change less with its load, and so they decide. Exits 1 when the command with fusion, start-up included,
takes more than a fiftieth of the core seconds of the published path, when a worker compiles a kernel, or when one
worker and two prepare different rows.
"""

import argparse
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import axolotl_runs as runs
import tiny
from bench_project import make_plan, make_record, published_rate
from compare_alignment import pieces

from fusion_plugins.core.fusion.pipeline import FusionPlan
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.text.content_id import content_id, texts_fingerprint
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.store import Manifest, StoreWriter

REACH = 50.0  # times as fast as the published path, start-up included, in core seconds
WORKERS = 2
CHARACTERS = 6_400  # of a text: about 2,000 tokens of the target
FEW, SOME = 2, 40  # texts that show the start-up, and that are prepared with one worker and with two
PUBLISHED_TEXTS = 2
NAMES = ("tekken-1", "tekken-2", "own")


@dataclass(frozen=True)
class Material:
    """A target's checkpoint, stores of all sources, and files with all, some and few of the texts."""

    folder: Path
    target: Path
    tokens: dict[str, int]

    def data(self, share: str) -> Path:
        """The file with a share of the texts."""
        return self.folder / f"{share}.jsonl"


@dataclass(frozen=True)
class Run:
    """One run of the command: wall seconds, core seconds of all its processes, prepared rows and printed output."""

    wall: float
    core: float
    prepared: Path
    output: str

    @property
    def compiled(self) -> int:
        """Kernels that were compiled, in any of its processes."""
        return self.output.count("[cache] data saved to")


def read_texts(characters: int = CHARACTERS) -> Iterator[str]:
    """Yield pieces of the Python files of the standard library and its packages."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "site-packages" not in file.parts:
            found = pieces(file.read_text(encoding="utf-8", errors="ignore"), characters)
            yield from (piece for piece in found if len(piece) > 0.8 * characters)


def choose_texts(n_tokens: int, characters: int = CHARACTERS) -> tuple[list[str], list[int]]:
    """Return texts of together at least ``n_tokens`` tokens of the target, no two the same, and their lengths."""
    tokenizer = tiny.mistral_v1()
    chosen: dict[str, int] = {}
    for text in read_texts(characters):
        chosen[text] = len(tokenizer(text)["input_ids"]) + 1
        if sum(chosen.values()) >= n_tokens and len(chosen) >= SOME:
            break
    return list(chosen), list(chosen.values())


def make_material(folder: Path, n_tokens: int, width: int, characters: int = CHARACTERS) -> Material:
    """Write checkpoint, texts and stores."""
    texts, lengths = choose_texts(n_tokens, characters)
    target = tiny.llama_checkpoint(
        folder / "target", tokenizer=tiny.mistral_v1(), vocab_size=32_000, max_position_embeddings=8192
    )
    shares = {"all": len(texts), "some": SOME, "few": FEW}
    for name, count in shares.items():
        runs.write_rows(folder / f"{name}.jsonl", [{"id": content_id(text), "text": text} for text in texts[:count]])
    for seed, name in enumerate(NAMES):
        write_store(folder / name, tiny.mistral_v1() if name == "own" else tiny.tekken(), texts, width, seed)
    return Material(folder, target, {name: sum(lengths[:count]) for name, count in shares.items()})


def write_store(folder: Path, tokenizer: Any, texts: list[str], width: int, seed: int) -> None:
    """Write the store of one source."""
    table = TokenTable.from_tokenizer(tokenizer)
    ids = [content_id(text) for text in texts]
    manifest = Manifest(
        model=folder.name,
        tokenizer_fingerprint=table.fingerprint,
        vocab_size=table.vocab_size,
        logits_width=table.vocab_size,
        top_k=width,
        dtype="float32",
        texts_fingerprint=texts_fingerprint(zip(ids, ids, strict=True)),
        engine="bench",
        engine_version="1",
    )
    with StoreWriter(folder, manifest, table) as writer:
        for index, (id, text) in enumerate(zip(ids, texts, strict=True)):
            record = make_record(tokenize(tokenizer, table, text), table, width, len(NAMES) * index + seed)
            writer.write(replace(record, id=id))
        writer.finish()


def preprocess(material: Material, share: str, width: int, *, workers: int = WORKERS, fused: bool = True) -> Run:
    """Run the command on a share of the texts.

    Raises:
        SystemExit: the command failed; with the end of its output.
    """
    out = Path(tempfile.mkdtemp(dir=material.folder))
    sources = [{"name": name, "store": str(material.folder / name), "is_target": name == "own"} for name in NAMES]
    changes: dict[str, Any] = {"fusion": {"sources": sources, "top_k": width}}
    kind = runs.FUSED
    if not fused:
        changes, kind = {"fusion": None, "plugins": None}, "completion"
    data = material.data(share)
    settings = runs.config(
        runs.Material(material.folder, material.target, data, data),
        out,
        datasets=[{"path": str(data), "type": kind}],
        sequence_len=8192,
        dataset_num_proc=workers,
        shuffle_merged_datasets=False,
        **changes,
    )
    config = runs.write_config(settings, out)
    wall, core = time.perf_counter(), core_seconds()
    done = runs.command("preprocess", str(config), cwd=out, XDG_CACHE_HOME=str(out / "cache"), NUMBA_DEBUG_CACHE="1")
    wall, core = time.perf_counter() - wall, core_seconds() - core
    if done.returncode:
        raise SystemExit(f"axolotl preprocess failed:\n{done.stdout[-3000:]}")
    (prepared,) = (path.parent for path in (out / "prepared").glob("*/state.json"))
    return Run(wall, core, prepared, done.stdout)


def core_seconds() -> float:
    """Return the core seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_rows(left: Path, right: Path) -> bool:
    """Whether two prepared datasets hold the same rows in the same order."""
    from datasets import load_from_disk

    a, b = load_from_disk(str(left)), load_from_disk(str(right))
    equal: bool = a.column_names == b.column_names and a.data.to_pydict() == b.data.to_pydict()
    return equal and len(a) == SOME


def published(plan: FusionPlan, tokenizers: list[Any], tables: list[TokenTable]) -> float:
    """Return tokens per core second of the published path, over whole texts."""
    seconds, tokens = 0.0, 0
    for text in islice(read_texts(), PUBLISHED_TEXTS):
        parts = [tokenize(tokenizer, table, text) for tokenizer, table in zip(tokenizers, tables, strict=True)]
        records: list[Record] = [
            make_record(part, table, plan.width, seed)
            for seed, (part, table) in enumerate(zip(parts, tables, strict=True))
        ]
        length = max(len(part.input_ids) for part in parts)
        seconds += len(parts[2].input_ids) / published_rate(plan, tokenizers, parts[2], records, length)
        tokens += len(parts[2].input_ids)
    return tokens / seconds


def print_table(tokens: dict[str, int], few: Run, fused: Run, without: Run, plain: float) -> None:
    """Print a line per way; ``plain`` is the rate of the published path on one core."""
    print("| way | wall s | tokens/s | ratio | core s | tokens/core s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    whole, rest = tokens["all"], tokens["all"] - tokens["few"]
    for name, count, wall, core in (
        ("`axolotl preprocess`, fused, start-up included", whole, fused.wall, fused.core),
        ("the same, less the start-up (2 texts)", rest, fused.wall - few.wall, fused.core - few.core),
        ("start-up: the same command on 2 texts", tokens["few"], few.wall, few.core),
        ("`axolotl preprocess`, the same texts without fusion", whole, without.wall, without.core),
        ("published alignment and transfer alone, extrapolated", whole, whole / plain / WORKERS, whole / plain),
    ):
        wall_rate, core_rate = count / wall, count / core
        ratios = wall_rate / plain / WORKERS, core_rate / plain
        cells = (
            f"{wall:,.1f} | {wall_rate:,.0f} | {ratios[0]:,.1f}x | {core:,.1f} | {core_rate:,.0f} | {ratios[1]:,.1f}x"
        )
        print(f"| {name} | {cells} |")


def main() -> int:
    """Prepare the texts in every way and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_500_000, help="tokens of the target")
    parser.add_argument("--width", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder), options.tokens, options.width)
        one = preprocess(material, "some", options.width, workers=1)
        two = preprocess(material, "some", options.width)
        same = same_rows(one.prepared, two.prepared)
        plain = published(*make_plan(options.width))
        few = preprocess(material, "few", options.width)
        fused = preprocess(material, "all", options.width)
        without = preprocess(material, "all", options.width, fused=False)
    tokens, load = material.tokens["all"], os.getloadavg()[0]
    print(f"{tokens:,} target tokens, {len(NAMES)} sources, K = {options.width}, {WORKERS} workers, load {load:.1f}\n")
    print_table(material.tokens, few, fused, without, plain)
    compiled = two.compiled + few.compiled + fused.compiled
    print(f"\nkernels compiled after the first command: {compiled}; one worker and two prepare the same rows: {same}")
    good = tokens / fused.core / plain >= REACH and same and not compiled
    print("reached" if good else "NOT reached")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
