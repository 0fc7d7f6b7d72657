"""The runs of the papers in hours, gigabytes and memory, from measured rates; prints the tables of `docs/scale.md`.

    python benchmarks/paper_runs.py

The rates are in ``rates.py``. ``engine_simulation.py`` simulates the same runs on one node, with Ray and with Slurm.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from engine_simulation import ENGINES, Engine, Outcome, Work, simulate_all
from rates import (
    CHECKSUM_SPEED,
    DECODE_SHARE,
    INDEX_BYTES,
    JOIN,
    MANIFEST_BYTES_PER_SHARD,
    MANIFEST_LIMIT,
    MODEL_WAITED,
    MODEL_WAITS,
    PEAK,
    PREFILL_SHARE,
    PREPARED_ROWS,
    PREPARED_STORES,
    READER,
    RESPONSE_BYTES,
    SAMPLED,
    SHARD_TOKENS,
    STORE_BYTES,
    WRITER,
)


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
#: FuseLLM's three sources, the same texts with one large source, and FuseChat-3.0's prompts, as they are simulated
WORKS = (
    Work("FuseLLM, 3 sources of 7B", 1.8e9, 7e9, PREFILL_SHARE, sources=3),
    Work("the same texts, one source of 70B", 1.8e9, 70e9, PREFILL_SHARE, gpus=4),
    Work(
        "FuseChat-3.0, one source of 72B",
        158_667 * 5 * 500,
        72e9,
        DECODE_SHARE,
        gpus=4,
        pack=SAMPLED / 500,
        stored=RESPONSE_BYTES,
        sent=RESPONSE_BYTES,
    ),
)
#: of the simulation
SEEDS = range(9)


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


def engine_table() -> str:
    """What the runs take per engine: medians over seeds, and the longest time."""
    rows = [_engine_row(work, engine) for work in WORKS for engine in ENGINES]
    header = ["run", "engine", "wall-clock (longest)", "GPU hours held", "disk", "between machines"]
    return markdown([*header, "busiest"], rows)


def _engine_row(work: Work, engine: Engine) -> list[str]:
    found = [simulate_all(work, engine, seed) for seed in SEEDS]
    walls = [outcome.wall for outcome in found]
    busiest, share = busiest_of(found)
    return [
        work.name,
        engine.name,
        f"{hours(median(walls))} ({hours(max(walls))})",
        f"{median(outcome.gpu_seconds for outcome in found) / 3600:,.0f}",
        size(found[0].stored),
        size(median(outcome.network for outcome in found)) if engine.nodes > 1 else "nothing",
        f"{busiest}, {share:.0%}",
    ]


def busiest_of(found: list[Outcome]) -> tuple[str, float]:
    """Return the resource that is busy for the largest share of the time, and that share."""
    shares = {name: median(outcome.busy[name] for outcome in found) for name in found[0].busy}
    return max(shares.items(), key=lambda item: item[1])


def main() -> None:
    """Print all tables."""
    for table in (capture_table(), sample_table(), engine_table(), limits_table()):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
