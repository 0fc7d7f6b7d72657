"""``make soak``: every job is killed, doubled and starved of space, a server fails in eleven ways, bytes are flipped.

After each fault the same command is run again, and what it leaves is compared with what an undisturbed run left. The
table at the end has a line per check; the exit status is 1 if a line has anything wrong. A line without anything wrong
is not done again by a second run with the same ``--out``.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support"), str(HERE.parents[1])]

from soak_jobs import JOBS, Job, Material  # noqa: E402

from fusion_plugins.errors import FusionError  # noqa: E402

#: eleven kinds of failure, as `tests/support/fake_server.py` names them
FAILURES = ("overloaded", "broken", "half", "unfinished", "empty", "no_json", "dropped", "aborted", "failed")
FAILURES += ("no_message", "no_text")


@dataclass
class Line:
    """One line of the table.

    Attributes:
        check: what was done to what.
        faults: how often it was done.
        wrong: what went wrong, one text each.
        seconds: how long it took.
        note: what else there is to say, such as why it could not be done.
    """

    check: str
    faults: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""


class Worker:
    """A process that has imported what a job needs and runs its commands in forks."""

    def __init__(self, modules: Iterable[str], folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.environment = os.environ | {
            "PYTHONPATH": str(HERE.parents[1]),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "AXOLOTL_DATASET_NUM_PROC": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "soak_worker.py"), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )

    def _ask(self, **request: Any) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, command: list[str], limit: int | None = None, log: str = "log") -> int:
        return self._ask(run=command, folder=str(self.folder), limit=limit, log=str(self.folder / log))

    def wait(self, process: int) -> int:
        return self._ask(wait=process)

    def run(self, command: list[str], limit: int | None = None, kill_after: float | None = None) -> int:
        process = self.start(command, limit)
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self.wait(process)

    def said(self, log: str = "log") -> str:
        return (self.folder / log).read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Trial:
    """One job with its worker, its material, and what an undisturbed run leaves."""

    def __init__(self, name: str, job: Job, folder: Path, seed: int) -> None:
        self.name, self.job, self.folder = name, job, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.random = random.Random(f"{seed} {name}")
        self.material = Material(folder)
        self.worker = Worker(job.modules, folder)
        self._count = 0
        out, command = self.fresh()
        self.worker.run(command)  # imports what is imported late, in every library but this process's forks
        out, command = self.fresh()
        started = time.monotonic()
        if self.worker.run(command):
            raise RuntimeError(f"{name}: the undisturbed run fails: {self.worker.said()[-2000:]}")
        self.seconds = time.monotonic() - started
        self.expected = job.result(out)

    def fresh(self) -> tuple[Path, list[str]]:
        """Return a path to write that nothing was written to, and the command that writes it."""
        self._count += 1
        out = self.folder / f"out-{self._count}"
        self.job.start(self.material, out)
        return out, self.job.command(self.material, out)

    def finish(self, out: Path, command: list[str]) -> str | None:
        """Run the command again, undisturbed; return what is wrong with what it leaves, or None."""
        status = self.worker.run(command)
        already = self.job.done is not None and self.job.done in self.worker.said()
        if status and not already:
            return f"the next run ends with {status}: {self.worker.said()[-400:]}"
        try:
            found = self.job.result(out)
        except Exception as error:
            return f"the result cannot be read: {error!r:.300}"
        finally:
            self.remove(out)
        return None if found == self.expected else "another result than that of an undisturbed run"

    def remove(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if out.is_file():
            out.unlink()


def kills(trial: Trial, count: int) -> Line:
    """Kill the job at random times, some of them twice."""
    line = Line(f"kill -9: {trial.name}")
    for _ in range(20 * count):
        if line.faults >= count:
            return line
        out, command = trial.fresh()
        hit = trial.worker.run(command, kill_after=trial.random.uniform(0, trial.seconds)) == -signal.SIGKILL
        if hit and trial.random.random() < 0.3:
            trial.worker.run(command, kill_after=trial.random.uniform(0, trial.seconds / 2))
        problem = trial.finish(out, command)
        line.faults += hit
        line.wrong += [problem] if problem else []
    line.note = f"only {line.faults} of {count} kills hit"
    line.wrong += [line.note]
    return line


def two_writers(trial: Trial, count: int) -> Line:
    """Start the job twice at once; one of the two may be refused."""
    line = Line(f"two writers: {trial.name}")
    for _ in range(count):
        out, command = trial.fresh()
        both = [trial.worker.start(command, log=f"log-{number}") for number in (1, 2)]
        statuses = [trial.worker.wait(process) for process in both]
        said = [trial.worker.said(f"log-{number}") for number in (1, 2)]
        line.faults += 1
        if any(status not in (0, 1) for status in statuses) or "Traceback" in "".join(said):
            line.wrong.append(f"ended with {statuses}: {''.join(said)[-300:]}")
        problem = trial.finish(out, command)
        line.wrong += [problem] if problem else []
    return line


def full_disk(trial: Trial, count: int) -> Line:
    """Let no file grow beyond a random size, which the kernel answers as it answers a full disk."""
    line = Line(f"full disk: {trial.name}")
    out, command = trial.fresh()
    trial.worker.run(command)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    trial.remove(out)
    ours, short = command[0] == "fusion", 0
    for _ in range(count):
        out, command = trial.fresh()
        limit = int(2 ** trial.random.uniform(4, max(5, largest.bit_length() - 0.5)))
        status = trial.worker.run(command, limit=limit)
        line.faults += 1
        short += status != 0
        if ours and (status not in (0, 1) or "Traceback" in trial.worker.said()):
            line.wrong.append(f"{limit} bytes: ended with {status}: {trial.worker.said()[-300:]}")
        problem = trial.finish(out, command)
        line.wrong += [f"{limit} bytes: {problem}"] if problem else []
    line.note = f"{short} ran out of space"
    return line


SMALL_DISK = """
set -e
mount -t tmpfs -o size=$1 tmpfs disk
if [ -e before ]; then cp -a before disk/out; fi
status=0
"$2" -c 'import sys; from fusion_plugins.cli import main; sys.argv = sys.argv[1:]; main()' "${@:3}" || status=$?
echo ended with $status
mount -o remount,size=256m disk
cp -a disk/out after
"""


def small_disk(trial: Trial, count: int) -> Line:
    """Run the job on a real file system that has too little room; it is private to the process and needs no root."""
    line = Line(f"small disk: {trial.name}")
    able = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    if able.returncode or trial.job.modules[0] != "fusion_plugins.cli":
        line.note = "SKIPPED: no file system of its own" if able.returncode else "SKIPPED: takes an engine"
        return line
    short = 0
    for _ in range(count):
        folder = trial.folder / "small"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "disk").mkdir(parents=True)
        out = folder / "disk" / "out"
        trial.job.start(trial.material, folder / "before")
        size = 4096 * int(2 ** trial.random.uniform(0, 6))
        if (folder / "before").exists():
            size += sum(4096 + path.stat().st_size for path in (folder / "before").iterdir())
        command = trial.job.command(trial.material, out)
        script = ["unshare", "-Urm", "bash", "-c", SMALL_DISK, "soak", str(size), sys.executable, *command]
        ran = subprocess.run(script, cwd=folder, capture_output=True, text=True, env=trial.worker.environment)
        line.faults += 1
        short += "with 1" in ran.stdout
        if "Traceback" in ran.stderr or not ran.stdout.strip().endswith(("with 0", "with 1")):
            line.wrong.append(f"{size} bytes: {ran.stdout[-200:]} {ran.stderr[-300:]}")
        shutil.move(folder / "after", out)
        problem = trial.finish(out, command)
        line.wrong += [f"{size} bytes: {problem}"] if problem else []
    line.note = f"{short} ran out of space"
    return line


def server(prompts: int, answers: int, folder: Path, seed: int) -> Line:
    """Sample from a server that fails in a tenth of its answers; every answer must be there once, and right."""
    import source_checks
    from fake_server import running

    from fusion_plugins.sources.sample import sample_prompts
    from fusion_plugins.store import open_rows

    line = Line(f"server: {prompts} prompts x {answers} answers")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dice = random.Random(seed)
    failed: Counter[str] = Counter()

    def trouble(number: int, body: dict) -> str | None:
        if dice.random() >= 0.1:
            return None
        kind = dice.choice(FAILURES)
        failed[kind] += 1
        return kind

    path = source_checks.prompts(folder / "prompts.jsonl", prompts)
    with running(trouble) as one, running(trouble) as other:
        settings = source_checks.server_config(
            path, folder / "out", one, other, n=answers, concurrency=32, patience=300
        )
        sample_prompts(settings)
    found = Counter((row["prompt_id"], row["index"]) for row in open_rows(folder / "out"))
    expected = {(f"p{number}", index) for number in range(prompts) for index in range(answers)}
    line.faults = sum(failed.values())
    line.wrong += [f"{len(expected - set(found))} answers are lost"] if expected - set(found) else []
    line.wrong += [f"{count} times: {key}" for key, count in found.items() if count > 1]
    for row in open_rows(folder / "out"):
        number = int(row["prompt_id"][1:])
        if row["response"] != f"What is {number} + 30?"[::-1]:
            line.wrong.append(f"another answer: {row['prompt_id']}")
    line.note = ", ".join(f"{kind} {count}" for kind, count in sorted(failed.items()))
    return line


def flips(count: int, folder: Path, seed: int) -> Iterable[Line]:
    """Change single bytes of every file of a store and of a folder of rows: noticed, or without effect."""
    import store_jobs
    from store_contents import make_store, record_bytes

    from fusion_plugins.store import open_rows, open_store
    from fusion_plugins.store.maintain import verify

    def whole_store(path: Path) -> Any:
        store = open_store(path)
        return store.manifest.identity(), store.table, [record_bytes(item) for item in store]

    def whole_rows(path: Path) -> Any:
        rows = open_rows(path)
        return rows.manifest.identity(), list(rows)

    shutil.rmtree(folder, ignore_errors=True)
    make_store(folder / "store", range(6))
    store_jobs.write_rows(str(folder / "rows"), 12)
    kinds: dict[str, Callable[[Path], Any]] = {"store": whole_store, "rows": whole_rows}
    for kind, read in kinds.items():
        expected = read(folder / kind)
        for path in sorted(path for path in (folder / kind).iterdir() if path.name != ".lock"):
            line = Line(f"byte flips: {kind}/{path.name}")
            started, data = time.monotonic(), path.read_bytes()
            dice = random.Random(f"{seed} {path.name}")
            for place in dice.choices(range(len(data)), k=count):
                path.write_bytes(data[:place] + bytes([data[place] ^ dice.randrange(1, 256)]) + data[place + 1 :])
                line.faults += 1
                try:
                    if read(folder / kind) != expected and not verify(folder / kind).problems:
                        line.wrong.append(f"byte {place}: other content, unnoticed")
                except FusionError:
                    pass
                except Exception as error:
                    line.wrong.append(f"byte {place}: {error!r:.200}")
            path.write_bytes(data)
            line.seconds = time.monotonic() - started
            yield line


def timed(check: Callable[[], Line]) -> Line:
    """Run a check and note how long it took; a check that cannot run at all is wrong."""
    started = time.monotonic()
    try:
        line = check()
    except Exception as error:
        line = Line("?", wrong=[f"{error!r:.500}"])
    line.seconds = time.monotonic() - started
    return line


def show(lines: Iterable[Line], console: Console) -> None:
    """Print the table."""
    table = Table(title="soak: every fault, then the same command again, against an undisturbed run")
    for heading in ("check", "faults", "right", "wrong", "seconds", "note"):
        table.add_column(heading, justify="left" if heading in ("check", "note") else "right")
    for line in lines:
        right = max(0, line.faults - len(line.wrong))
        color = "red" if line.wrong else "green"
        note = "; ".join(filter(None, [line.note, *line.wrong[:1]]))
        table.add_row(
            line.check,
            str(line.faults),
            str(right),
            f"[{color}]{len(line.wrong)}[/]",
            f"{line.seconds:.0f}",
            note[:300],
        )
    console.print(table)


def main() -> int:
    """Run what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default=",".join(JOBS), help="names of jobs, with commas; default: all ten")
    parser.add_argument("--kills", type=int, default=20, help="kills per job")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of writers per job")
    parser.add_argument("--disks", type=int, default=8, help="full disks per job")
    parser.add_argument("--prompts", type=int, default=2000, help="prompts for the failing server, eight answers each")
    parser.add_argument("--flips", type=int, default=1000, help="flips per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak_out"), help="folder; lines that are done there are kept")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "lines.json"
    lines = [Line(**line) for line in json.loads(kept.read_text())] if kept.exists() else []
    console = Console(width=180 if not sys.stdout.isatty() else None)

    def add(line: Line) -> None:
        lines.append(line)
        kept.write_text(json.dumps([asdict(line) for line in lines], indent=1))
        console.print(
            f"{line.check}: {line.faults} faults, {len(line.wrong)} wrong, {line.seconds:.0f} s", markup=False
        )

    done = {line.check for line in lines if not line.wrong}
    lines = [line for line in lines if not line.wrong]
    checks = {
        "kill -9": (kills, options.kills),
        "two writers": (two_writers, options.pairs),
        "full disk": (full_disk, options.disks),
        "small disk": (small_disk, options.disks),
    }
    for name in filter(None, options.jobs.split(",")):
        todo = {check: run for check, run in checks.items() if run[1] and f"{check}: {name}" not in done}
        if not todo:
            continue
        try:
            trial = Trial(name, JOBS[name], out / name, options.seed)
        except Exception as error:
            add(Line(f"kill -9: {name}", wrong=[f"{error!s:.500}"]))
            continue
        for check, (run, count) in todo.items():
            line = timed(partial(run, trial, count))
            line.check = f"{check}: {name}"
            add(line)
        trial.worker.close()
    if options.prompts and not any(check.startswith("server") for check in done):
        line = timed(partial(server, options.prompts, 8, out / "server", options.seed))
        line.check = f"server: {options.prompts} prompts x 8 answers"
        add(line)
    if options.flips and not any(check.startswith("byte flips") for check in done):
        for line in flips(options.flips, out / "flips", options.seed):
            add(line)
    show(lines, console)
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main())
