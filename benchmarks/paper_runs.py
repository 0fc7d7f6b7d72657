"""The runs of the papers in hours, gigabytes and memory, from measured rates; prints the tables of `docs/scale.md`.

    python benchmarks/paper_runs.py

Rates of this package are measured on one core of a small machine, by the benchmark that is named. There was no GPU:
what a model takes is calculated from its size, as floating point operations at a share of the peak of one H100, and
marked so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

#: microseconds of one core per token at K = 64 (`bench_capture.py`): the thread that drives the model, reader, writer
MODEL_WAITS, READER, WRITER = 3.3, 2.4, 6.9
#: of the writer's thread: to join small shards
JOIN = 0.3
#: the same as the first when all of it was in the model's thread
MODEL_WAITED = 24.2
#: bytes per token of a store at K = 64, of a real model's output (`real_store_size.py`)
STORE_BYTES = 164.5
#: tokens per shard at K = 64, and bytes of the manifest per shard
SHARD_TOKENS, MANIFEST_BYTES_PER_SHARD, MANIFEST_LIMIT = 2**24 // 64, 300, 2**26
#: bytes of memory per text, prompt or response (`bench_size.py` promises it)
INDEX_BYTES = 100
#: bytes per second that sha256 reads when a merge links shards
CHECKSUM_SPEED = 1.0e9
#: bytes per token of a prepared dataset with fused rows at K = 64 and ids of four bytes, and of one that names stores;
#: both with axolotl's own columns
PREPARED_ROWS, PREPARED_STORES = 397, 11
#: not measured: peak of an H100 in bfloat16, share of it that a forward pass reaches, and while tokens are generated
#: one by one for many requests
PEAK, PREFILL_SHARE, DECODE_SHARE = 989e12, 0.4, 0.1


@dataclass(frozen=True)
class CaptureRun:
    """Texts through one source.

    Attributes:
        name: what it is.
        tokens: of all texts.
        tokens_per_text: of one of them.
        parameters: of the source.
    """

    name: str
    tokens: float
    tokens_per_text: float
    parameters: float


@dataclass(frozen=True)
class SampleRun:
    """Prompts through one source, ``n`` times ``tokens`` per prompt."""

    name: str
    prompts: float
    n: int
    tokens: float
    parameters: float


#: FuseLLM (arXiv:2401.10491): 1.8 billion tokens in sequences of 2,048, sources of 7 billion parameters
CAPTURES = (
    CaptureRun("FuseLLM, one of 3 sources (7B)", 1.8e9, 2048, 7e9),
    CaptureRun("the same texts, a source of 70B", 1.8e9, 2048, 70e9),
    CaptureRun("the same texts, a source of 1B", 1.8e9, 2048, 1e9),
)
#: FuseChat-3.0 (arXiv:2503.04222): 158,667 prompts, five responses per prompt and source
SAMPLES = (
    SampleRun("FuseChat-3.0, a source of 27B", 158_667, 5, 500, 27e9),
    SampleRun("FuseChat-3.0, a source of 72B", 158_667, 5, 500, 72e9),
)


def hours(seconds: float) -> str:
    """Return a time in hours, or in minutes where that is short."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.0f} min"


def size(n_bytes: float) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.{1 if n_bytes < 10 * unit else 0}f} {name}"
    return f"{n_bytes / 1e3:,.0f} kB"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def capture_table() -> str:
    """What one pass over the texts takes, per source."""
    rows = []
    for run in CAPTURES:
        model = 2 * run.parameters * run.tokens / (PEAK * PREFILL_SHARE)
        waits, threads = MODEL_WAITS * run.tokens / 1e6, (READER + WRITER) * run.tokens / 1e6
        writer = max(READER, WRITER) * run.tokens / 1e6
        rows.append(
            [
                run.name,
                hours(model),
                hours(MODEL_WAITED * run.tokens / 1e6),
                hours(max(model + waits, writer) - model),
                hours(threads),
                size(STORE_BYTES * run.tokens),
                f"{run.tokens / SHARD_TOKENS:,.0f}",
                size(INDEX_BYTES * run.tokens / run.tokens_per_text),
            ]
        )
    header = ["capture", "model, one H100 (calculated)", "it waited, before", "it waits", "threads beside it", "store"]
    return markdown([*header, "shards", "index in memory"], rows)


def sample_table() -> str:
    """What all responses of a source take."""
    rows = []
    for run in SAMPLES:
        responses = run.prompts * run.n
        model = 2 * run.parameters * responses * run.tokens / (PEAK * DECODE_SHARE)
        rows.append([run.name, f"{responses:,.0f}", hours(model), size(INDEX_BYTES * (responses + run.prompts))])
    return markdown(["sample", "responses", "GPU hours of an H100 (calculated)", "index in memory"], rows)


def limits_table() -> str:
    """What ends first when a run grows."""
    merge = STORE_BYTES * 1.8e9 / CHECKSUM_SPEED
    rows = [
        ["the writer's thread of one process", f"{1e6 / WRITER:,.0f} tokens/s", "two processes with half of the texts"],
        ["the thread that drives vLLM", f"{1e6 / MODEL_WAITS:,.0f} tokens/s", "the same"],
        [
            "the manifest of one store",
            f"{MANIFEST_LIMIT / MANIFEST_BYTES_PER_SHARD * SHARD_TOKENS / 1e9:,.0f} billion tokens",
            "two stores",
        ],
        [
            "the disk: 3 sources, 1.8 billion tokens",
            size(3 * STORE_BYTES * 1.8e9),
            "a smaller `top_k`: 10 entries take a fifth",
        ],
        [
            "a prepared dataset with fused rows",
            size(PREPARED_ROWS * 1.8e9),
            f"`prepared: stores` takes {size(PREPARED_STORES * 1.8e9)}: see [Train with axolotl](axolotl.md)",
        ],
        ["`fusion store merge` of 1.8 billion tokens", hours(merge), "nothing: large shards are linked"],
        ["the same of small shards", hours(2 * merge + JOIN * 1.8e9 / 1e6), "nothing: packed records are copied"],
    ]
    return markdown(["what", "ends at, or takes", "then"], rows)


def main() -> None:
    """Print all tables."""
    for table in (capture_table(), sample_table(), limits_table()):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
