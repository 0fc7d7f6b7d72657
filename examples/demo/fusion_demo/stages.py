"""Run stages that depend on each other: several at a time, each in a process of its own, finished ones passed over.

A stage is finished when its stamp holds the key that it would get today. The key covers its command, the files of code
that it names and the keys of the stages before it, so that a change runs again what it can change and nothing else.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["Spent", "Stage", "StageFailed", "keys_of", "run_stages"]

POLL_SECONDS = 0.25


class StageFailed(Exception):
    """A stage ended with an error or without its outputs; the message says where its log is."""


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: unique.
        title: what it does, for people.
        command: program and arguments; it runs in the work folder, so paths are relative to that.
        outputs: files or folders that it makes, relative to the work folder; removed before it runs.
        needs: names of the stages before it.
        code: files or folders whose content decides the result.
        facts: whatever else decides the result, for example settings and versions.
    """

    name: str
    title: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    code: tuple[Path, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)


class Spent(NamedTuple):
    """What a stage took: seconds on the clock, and seconds of one CPU core (the processes that it started included)."""

    wall: float
    cpu: float


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    since: float


def _content(paths: Sequence[Path]) -> str:
    """Digest of files, and of the Python and YAML files of folders."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in {".py", ".yml"})
        for file in files:
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def keys_of(stages: Sequence[Stage]) -> dict[str, str]:
    """Stage name -> key; the stages stand after the ones that they need."""
    keys: dict[str, str] = {}
    for stage in stages:
        before = [keys[name] for name in stage.needs]
        # The program's own path says where it is installed, not what it does.
        parts = [stage.command[1:], stage.outputs, _content(stage.code), dict(stage.facts), before]
        keys[stage.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return keys


class _Runner:
    def __init__(self, stages: Sequence[Stage], work: Path, logs: Path, jobs: int) -> None:
        self.stages, self.work, self.logs, self.jobs = stages, work, logs, jobs
        self.keys = keys_of(stages)
        self.stamps = work / "stamps"
        for folder in (self.stamps, logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.spent: dict[str, Spent] = {}
        self.cached: set[str] = set()
        self.running: dict[str, _Running] = {}
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
            "RAYON_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
        }

    def _stamp(self, stage: Stage) -> Path:
        return self.stamps / f"{stage.name}.json"

    def adopt_finished(self) -> None:
        """Take over what an earlier run finished."""
        for stage in self.stages:
            stamp = self._stamp(stage)
            found = json.loads(stamp.read_text()) if stamp.exists() else {}
            present = all((self.work / output).exists() for output in stage.outputs)
            if found.get("key") == self.keys[stage.name] and present:
                self.spent[stage.name] = Spent(found["wall"], found["cpu"])
                self.cached.add(stage.name)

    def _ready(self) -> Iterator[Stage]:
        for stage in self.stages:
            started = stage.name in self.spent or stage.name in self.running
            if not started and all(name in self.spent for name in stage.needs):
                yield stage

    def start_ready(self) -> list[Stage]:
        """Start as many stages as may run; returns them."""
        started = []
        for stage in self._ready():
            if len(self.running) >= self.jobs:
                break
            self._stamp(stage).unlink(missing_ok=True)
            for output in stage.outputs:
                _remove(self.work / output)
            log = (self.logs / f"{stage.name}.log").open("wb")
            process = subprocess.Popen(
                stage.command,
                cwd=self.work,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running[stage.name] = _Running(stage, process, log, time.monotonic())
            started.append(stage)
        return started

    def collect(self) -> list[Stage]:
        """Take in the stages that have ended; returns them.

        Raises:
            StageFailed: one of them failed.
        """
        ended = []
        for run in list(self.running.values()):
            pid, status, usage = os.wait4(run.process.pid, os.WNOHANG)
            if not pid:
                continue
            run.process.returncode = os.waitstatus_to_exitcode(status)
            run.log.close()
            del self.running[run.stage.name]
            self._check(run)
            wall, cpu = time.monotonic() - run.since, usage.ru_utime + usage.ru_stime
            self.spent[run.stage.name] = spent = Spent(round(wall, 1), round(cpu, 1))
            stamp = {"key": self.keys[run.stage.name], **spent._asdict()}
            self._stamp(run.stage).write_text(json.dumps(stamp))
            ended.append(run.stage)
        return ended

    def _check(self, run: _Running) -> None:
        log = self.logs / f"{run.stage.name}.log"
        if run.process.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise StageFailed(f"stage {run.stage.name} ended with status {run.process.returncode}; {log}:\n{tail}")
        missing = [output for output in run.stage.outputs if not (self.work / output).exists()]
        if missing:
            raise StageFailed(f"stage {run.stage.name} ended well, but made no {', '.join(missing)}; see {log}")

    def stop(self) -> None:
        """End what still runs, with the processes that it started."""
        for run in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGTERM)
        for run in self.running.values():
            run.process.wait()
            run.log.close()

    def last_words(self, name: str) -> str:
        """The newest line of a stage's log, for the display."""
        try:
            with (self.logs / f"{name}.log").open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 2000))
                lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def view(self) -> Group:
        """What the terminal shows while the stages run."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for column in ("state", "stage", "seconds"):
            table.add_column(column, no_wrap=True)
        table.add_column("log", no_wrap=True, overflow="ellipsis", ratio=1, style="dim")
        for stage in self.stages:
            if stage.name in self.running:
                seconds = time.monotonic() - self.running[stage.name].since
                table.add_row("[cyan]>", stage.title, f"{seconds:.0f} s", Text(self.last_words(stage.name)))
            elif stage.name in self.spent:
                note = "from an earlier run" if stage.name in self.cached else ""
                table.add_row("[green]+", f"[dim]{stage.title}", f"[dim]{self.spent[stage.name].wall:.0f} s", note)
            else:
                table.add_row("[dim].", f"[dim]{stage.title}", "", "")
        return Group(table, ProgressBar(total=len(self.stages), completed=len(self.spent)))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_stages(stages: Sequence[Stage], work: Path, logs: Path, *, jobs: int, console: Console) -> dict[str, Spent]:
    """Run all stages that are not finished yet, ``jobs`` at a time.

    Returns:
        Stage name -> what it took, now or in the earlier run that finished it.

    Raises:
        StageFailed: a stage failed; the others that ran are ended and run again next time.
    """
    runner = _Runner(stages, work, logs, jobs)
    runner.adopt_finished()
    try:
        with Live(runner.view(), console=console, refresh_per_second=2, transient=True) as live:
            while len(runner.spent) < len(stages):
                for stage in runner.start_ready():
                    _say(console, f"start  {stage.title}")
                for stage in runner.collect():
                    _say(console, f"done   {stage.title}: {runner.spent[stage.name].wall:.0f} s")
                live.update(runner.view())
                time.sleep(POLL_SECONDS)
    finally:
        runner.stop()
    return runner.spent


def _say(console: Console, line: str) -> None:
    """One line per event where there is no terminal to redraw."""
    if not console.is_terminal:
        console.print(line, markup=False, highlight=False)
