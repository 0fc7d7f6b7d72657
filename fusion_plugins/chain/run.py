"""Run a chain: finished steps are passed over, independent ones run side by side, a failure starts nothing new."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import FrameType

from fusion_plugins.chain.process import (
    POLL_SECONDS,
    Running,
    by_hand,
    check_programs,
    start,
    stop,
    sweep,
    tail,
)
from fusion_plugins.chain.records import Record, Records
from fusion_plugins.chain.settings import Chain, Step
from fusion_plugins.chain.show import Display
from fusion_plugins.errors import ChainError, ConfigError
from fusion_plugins.progress import duration

#: lines of a log that the message about a failure repeats
SHOWN_LINES = 15
#: ending of the name of what an earlier run wrote for other inputs
OLD = ".old"


@dataclass(frozen=True)
class Planned:
    """What a run would do with a step.

    Attributes:
        step: the step.
        due: why it has to run; None where it is done.
        waits: steps that have to run before it, so that more cannot be said yet.
    """

    step: Step
    due: str | None
    waits: tuple[str, ...]


@dataclass
class _Run:
    chain: Chain
    records: Records
    display: Display
    lock: int
    running: list[Running] = field(default_factory=list)
    plans: dict[str, Record] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def begin(self, name: str) -> bool:
        """Start a step; return False where it is done already."""
        step = self.chain.steps[name]
        plan, before = self.records.planned(step), self.records.load(name)
        if self.records.due(step, plan) is None:
            self.display.passed(name, before.seconds if before else 0.0)
            return False
        plan = replace(plan, started=time.time())
        if missing := [path for path, state in plan.inputs.items() if state is None and os.path.isabs(path)]:
            raise ChainError(f"step {name}: expected {missing[0]}, which it reads, got nothing of that name")
        if not step.keeps and (before is None or before.difference(plan) is not None):
            for path in self.chain.writes(step):
                self._move_away(path)
        self.records.save(name, plan)
        process = start(self.chain, step, self.lock)
        self.plans[name] = replace(plan, pid=process.process.pid)
        self.running.append(process)
        self.records.save(name, self.plans[name])
        self.display.started(process)
        return True

    def _move_away(self, path: str) -> None:
        if not os.path.lexists(path) or Path(path).is_dir() and not any(Path(path).iterdir()):
            return
        # Nothing is ever deleted: what has the name may be the user's own.
        names = (f"{path}{OLD}{number or ''}" for number in count())
        old = next(name for name in names if not os.path.lexists(name))
        os.rename(path, old)
        self.display.say(f"{path} was written for another command or other inputs; it is {old} now")

    def ended(self) -> Iterator[str]:
        """Yield the steps that have ended well since the last look."""
        for each in [each for each in self.running if each.process.poll() is not None]:
            self.running.remove(each)
            name, status = each.step.name, each.process.returncode
            missing = [path for path in self.chain.writes(each.step) if not os.path.lexists(path)]
            if status != 0:
                sweep(each)
            if status == 0 and not missing:
                self.records.save(name, replace(self.plans[name], done=True, seconds=each.seconds))
                self.display.done(name, each.seconds)
                yield name
            else:
                reason = f"ended with status {status}" if status else f"ended well, but there is no {missing[0]}"
                self.display.failed(name, each.seconds)
                self.failures.append(self._failure(each, reason))

    def _failure(self, failed: Running, reason: str) -> str:
        log = os.path.relpath(failed.log)
        lines = [f"    {line}" for line in tail(failed, SHOWN_LINES)]
        return "\n".join(
            [
                f"step {failed.step.name} {reason} after {duration(failed.seconds)}. The last lines of {log}:",
                *lines,
                "It alone again:",
                f"    {by_hand(self.chain, failed.step)}",
            ]
        )


def run_chain(
    chain: Chain, *, names: Iterable[str] = (), jobs: int = 1, prepare: Callable[[], None] = lambda: None
) -> None:
    """Run the steps of a chain that are not done.

    Args:
        chain: what to run.
        names: only these steps, and what they need; all without a name.
        jobs: steps that may run at the same time.
        prepare: called before the first step, when nothing else is at work in the chain.

    Raises:
        ConfigError: an environment, a program or something that a step reads is not there.
        ChainError: a step failed (those at work with it are left to end), or the chain is already being run.
    """
    chosen = chain.with_needed(names or chain.steps)
    check_reads(chain, chosen)
    check_programs(chain, (chain.steps[name] for name in chosen))
    records = Records(chain)
    with records.locked() as lock, Display(chosen) as display, _ended_by_signals():
        prepare()
        run = _Run(chain, records, display, lock)
        try:
            _work(run, chosen, jobs)
        finally:
            stop(run.running)
    if run.failures:
        done = f"{len(display.finished)} of {len(chosen)} steps are done"
        raise ChainError("\n".join([*run.failures, f"{done}. Repair what is wrong, then run the same command again."]))


def _work(run: _Run, chosen: list[str], jobs: int) -> None:
    order = run.chain.sorter(chosen)
    order.prepare()
    ready: list[str] = []
    while order.is_active() and (run.running or not run.failures):
        ready += order.get_ready()
        while ready and len(run.running) < jobs and not run.failures:
            name = ready.pop(0)
            try:
                if not run.begin(name):
                    order.done(name)
                    ready += order.get_ready() if order.is_active() else ()
            except ChainError as error:
                run.display.failed(name, 0.0)
                run.failures.append(str(error))
        for name in run.ended():
            order.done(name)
        run.display.refresh()
        if run.running:
            time.sleep(POLL_SECONDS)


def plan_chain(chain: Chain, names: Iterable[str] = ()) -> list[Planned]:
    """Return what a run would do, in its order."""
    chosen = chain.with_needed(names or chain.steps)
    check_reads(chain, chosen)
    records = Records(chain)
    due: dict[str, Planned] = {}
    for name in chain.sorter(chosen).static_order():
        step = chain.steps[name]
        waits = tuple(other for other in chain.needs(step) if due[other].due is not None)
        reason = records.due(step)
        due[name] = Planned(step, reason or (f"after {', '.join(waits)}" if waits else None), waits)
    return list(due.values())


def check_reads(chain: Chain, names: Iterable[str]) -> None:
    """Look for everything that steps read and no step writes.

    Raises:
        ConfigError: something is not there.
    """
    for step in (chain.steps[name] for name in names):
        made = [path for name in chain.needs(step) for path in chain.writes(chain.steps[name])]
        for path in chain.reads(step):
            if not os.path.exists(path) and not any(Path(path).is_relative_to(other) for other in made):
                raise ConfigError(
                    f"{chain.path}: step {step.name} reads {path}, which is not there, and no step writes it. Correct "
                    "the path, or name the step that makes it under `writes`."
                )


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a polite request to end (by a batch system, for instance) end the steps too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    # What is ignored stays so: `nohup` asks for that.
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before: Mapping[signal.Signals, object] = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
