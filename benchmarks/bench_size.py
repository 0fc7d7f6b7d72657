"""Memory and time of every step by the number of texts, prompts, responses and shards: what grows, and how fast.

    python benchmarks/bench_size.py                                  # 1,000 and 10,000, a minute or two
    python benchmarks/bench_size.py --counts 1000 10000 100000 1000000   # most of an hour

Files, stores and folders are real; the source answers at once (`counting_source.py`), so that everything else is seen.
Each step runs in a process of its own; seconds are processor time, as other work on the machine does not count. Bytes
per item are the growth of its own memory at its peak from the count before to this one; pages of mapped files, which
the system takes back when it needs them, are in the peak alone. Exits 1 when that growth is more than 100 at a million
(below, the buffers of three batches and of one shard fill up, which are larger than any index), or when a commit takes
longer the more shards there are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "support"), str(Path(__file__).parent)]

BUDGET = 100  # bytes per item
LEAST_COUNT = 1_000_000  # from which on the budget is held against the measurement
MOST_GROWTH = 2.0  # of the time of a commit, from few shards to many
SHARDS = (100, 2_000)


def make_inputs(folder: Path, count: int) -> None:
    """Write texts and prompts."""
    with (folder / "texts.jsonl").open("w") as texts, (folder / "prompts.jsonl").open("w") as prompts:
        for number in range(count):
            texts.write(
                json.dumps({"id": f"text-{number}", "text": f"The number {number} and what follows it."}) + "\n"
            )
            prompts.write(json.dumps({"id": f"prompt-{number}", "text": f"What follows {number}?"}) + "\n")


def capture(folder: Path) -> None:
    """All texts into a store; the second time nothing is missing."""
    from fusion_plugins.sources.capture import capture_texts
    from fusion_plugins.sources.capture_config import CaptureConfig

    out, texts = str(folder / "stores" / "a"), str(folder / "texts.jsonl")
    report = capture_texts(CaptureConfig(model=str(folder / "model"), texts=texts, out=out, top_k=8))
    assert report.captured + report.present == _lines(folder / "texts.jsonl")


def sample(folder: Path) -> None:
    """Two responses to every prompt; the second time nothing is missing."""
    from fusion_plugins.sources.sample import sample_prompts
    from fusion_plugins.sources.sample_config import SampleConfig

    source = {"name": "a", "model": str(folder / "model"), "max_tokens": 8, "template": "plain"}
    prompts, out = str(folder / "prompts.jsonl"), str(folder / "responses")
    report = sample_prompts(SampleConfig(prompts=prompts, out=out, n=2, sources=[source], batch_requests=2048))
    assert report.drawn + report.present == 2 * _lines(folder / "prompts.jsonl")


def score(folder: Path) -> None:
    """Every response through `fusion score`, without a scorer for its domain; the second time nothing is missing."""
    from fusion_plugins.scoring.score import ScoreConfig, score_responses

    responses, out = str(folder / "responses"), str(folder / "scored")
    score_responses(ScoreConfig(responses=responses, out=out, scorers={"math": {}}, batch_rows=2048))


def doctor(folder: Path) -> None:
    """One store against another one: the same under a second name, which is opened and read on its own."""
    from fusion_plugins.doctor.examine import examine
    from fusion_plugins.doctor.sides import open_side

    again = folder / "stores" / "b"
    if not again.exists():
        again.symlink_to("a")
    a, b = (open_side(str(folder / "stores" / name), None) for name in ("a", "b"))
    examine(a, [b], limit=50)


def merge(folder: Path) -> None:
    """A store into a folder of its own: all that is large is linked."""
    from fusion_plugins.store.maintain import merge as run

    run([folder / "stores" / "a"], folder / "stores" / "merged")


#: name -> what runs, and its items per text: two responses to every prompt, a record in each of the doctor's two stores
STEPS: dict[str, tuple[Callable[[Path], None], float]] = {
    "capture": (capture, 1),
    "capture again": (capture, 1),
    "sample": (sample, 2),
    "sample again": (sample, 2),
    "score": (score, 2),
    "score again": (score, 2),
    "doctor": (doctor, 2),
    "merge": (merge, 1),
}


def commits(folder: Path) -> dict[int, float]:
    """Number of shards -> milliseconds of processor time per commit, when there are that many full shards."""
    from store_samples import manifest, record, table

    from fusion_plugins.store import StoreWriter

    found = {}
    with StoreWriter(folder, manifest(), table(), flush_records=1) as writer:
        for number in range(max(SHARDS) + 50):
            if number - 50 in SHARDS:
                found[number - 50] = (time.process_time() - started) * 1000 / 50  # noqa: F821 - set 50 commits ago
            if number in SHARDS:
                started = time.process_time()
            writer.write(record(number, n_tokens=3))
        found[max(SHARDS)] = (time.process_time() - started) * 1000 / 50
    return found


def run_step(name: str, folder: Path) -> None:
    """Run one step in this process and print its time as JSON."""
    from fusion_plugins.core.fusion import pipeline
    from fusion_plugins.sources.backends import base
    from fusion_plugins.sources.loading import load_tokenizer
    from fusion_plugins.store import packed

    base.BACKENDS["transformers"] = "counting_source"
    # Imports are no part of a step, and neither is the first compilation of kernels, which takes ten seconds.
    load_tokenizer(base.SourceSettings(model=str(folder / "model")))
    pipeline.warm_up()
    packed.warm_up()
    started = time.process_time()
    STEPS[name][0](folder)
    print(json.dumps({"seconds": time.process_time() - started}))


def memory(process: int) -> dict[str, int]:
    """Return bytes of memory of a process: ``own`` now, and ``peak``, which has the pages of mapped files too.

    Empty when the process has ended. `getrusage` would count what the parent had.
    """
    names = {"RssAnon": "own", "VmHWM": "peak"}
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {names[line[0][:-1]]: 1024 * int(line[1]) for line in lines if line[0][:-1] in names}


def measured(name: str, folder: Path) -> dict[str, float]:
    """Run a step in a process of its own; its memory is looked at fifty times a second."""
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder)]
    most = {"own": 0, "peak": 0}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        step = subprocess.Popen(command, stdout=said, stderr=errors)
        while step.poll() is None:
            most |= {kind: max(most[kind], size) for kind, size in memory(step.pid).items()}
            time.sleep(0.02)
        said.seek(0)
        errors.seek(0)
        if step.returncode:
            sys.exit(f"{name}: {errors.read()[-2000:]}")
        return json.loads(said.read().splitlines()[-1]) | most


def table(counts: list[int], steps: list[str], work: Path) -> list[str]:
    """Print the table; return what is worse than promised."""
    import source_checks

    source_checks.checkpoint(work / "model")
    before: dict[str, tuple[int, float]] = {}
    broken = []
    print(
        f"{'items':>10}  {'step':16}{'CPU s':>10}{'us per item':>13}{'peak MB':>10}{'own MB':>10}{'bytes per item':>16}"
    )
    for count in counts:
        folder = work / str(count)
        folder.mkdir()
        (folder / "model").symlink_to(work / "model")
        make_inputs(folder, count)
        for name in steps:
            found = measured(name, folder)
            items = int(count * STEPS[name][1])
            fewer, less = before.get(name, (items, found["own"]))
            before[name] = items, found["own"]
            per_item = (found["own"] - less) / (items - fewer) if items > fewer else float("nan")
            print(
                f"{items:10,}  {name:16}{found['seconds']:10.1f}{found['seconds'] / items * 1e6:13.0f}"
                f"{found['peak'] / 1e6:10.0f}{found['own'] / 1e6:10.0f}{per_item:16.0f}",
                flush=True,
            )
            if count >= LEAST_COUNT and per_item > BUDGET:
                broken.append(f"{name}: {per_item:.0f} bytes per item at {items:,}, promised {BUDGET}")
    return broken


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--step", choices=list(STEPS), help="run one step in this process (used by the script itself)")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.step:
        run_step(arguments.step, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as work:
        broken = table(arguments.counts, arguments.steps, Path(work))
        found = commits(Path(work) / "commits")
    for shards, milliseconds in found.items():
        print(f"a commit to a folder of {shards:,} shards: {milliseconds:.2f} ms")
    growth = found[max(SHARDS)] / found[min(SHARDS)]
    print(f"growth of a commit from {min(SHARDS):,} to {max(SHARDS):,} shards: {growth:.2f} (at most {MOST_GROWTH})")
    if growth > MOST_GROWTH:
        broken.append(f"a commit takes {growth:.1f} times as long with {max(SHARDS):,} shards")
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
