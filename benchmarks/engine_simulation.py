"""How long a capture or a sampling takes on one node, on a Ray cluster and as a Slurm array: a small simulation.

Workers (each with the GPUs of one copy of the source) take units of work, compute, and hand the answers to a thread
that packs them, which hands them to the disk; each worker is one unit ahead of its writer, as in this package. Nodes
fail and come back; what was not stored is done again. A source is as fast as calculated in ``rates.py``, packing and
records are as measured there, and everything else is an assumption that :data:`ENGINES` names.

    >>> work = Work("toy", tokens=4e6, parameters=1e9, share=0.4, pack=0)
    >>> node = Engine("node", nodes=1, gpus=2, mean_wait=0, start=0, failure_every=1e12, disk=1e12, spread=0)
    >>> outcome = simulate(work, node, seed=0)
    >>> round(outcome.gpu_seconds * work.rate / work.tokens, 2), outcome.failures
    (1.0, 0)
"""

import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from rates import CHECKSUM_SPEED, MODEL_WAITS, PEAK, SHARD_TOKENS, STORE_BYTES, WRITER

#: tokens that are committed together here: a kill costs at most two such units, more than it does
UNIT_TOKENS = 2 * SHARD_TOKENS
#: bytes of a token's answer between a Ray actor and the process that writes: 64 ids and log-probabilities
ANSWER_BYTES = 64 * 8
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Work:
    """What one source has to do.

    Attributes:
        name: what it is.
        tokens: that it reads or generates.
        parameters: of the source.
        share: of the peak of its GPUs that it reaches.
        gpus: of one copy of the source.
        sources: how many such sources there are, one after the other.
        pack: microseconds of one core per token to pack and commit the answers.
        stored: bytes per token on the disk.
        sent: bytes per token between two processes, before they are packed.
    """

    name: str
    tokens: float
    parameters: float
    share: float
    gpus: int = 1
    sources: int = 1
    pack: float = WRITER
    stored: float = STORE_BYTES
    sent: float = ANSWER_BYTES

    @property
    def rate(self) -> float:
        """Tokens per second of one copy, its own waits for the writer's thread included."""
        return 1 / (2 * self.parameters / (PEAK * self.share * self.gpus) + MODEL_WAITS / 1e6)


@dataclass(frozen=True)
class Engine:
    """Where it runs. All but ``writers`` and ``own_parts`` are assumptions.

    Attributes:
        name: what it is.
        nodes: machines.
        gpus: of one machine.
        writers: processes that tokenize, pack and write for all workers together, as with the backend `ray`; None: each
            worker for itself.
        own_parts: every worker has a part of its own (`--shard i/n`), joined by `fusion store merge`, and gives its
            GPUs back at its end if ``gives_back``; else the next free worker takes the next unit.
        gives_back: as Slurm does with a task that has ended.
        mean_wait: mean seconds in a queue before a worker starts, each time.
        start: seconds from the start of a process to its first token, without reading weights.
        failure_every: mean seconds between two failures of one node.
        repair: seconds until a node that failed is there again.
        disk: bytes per second of the disk that all nodes share.
        spread: standard deviation of the logarithm of a worker's speed.
    """

    name: str
    nodes: int
    gpus: int = 8
    writers: int | None = None
    own_parts: bool = True
    gives_back: bool = False
    mean_wait: float = 0.0
    start: float = 120.0
    failure_every: float = 30 * 86_400.0
    repair: float = 600.0
    disk: float = 2e9
    spread: float = 0.05


ENGINES = (
    Engine("one node, 8 GPUs, `--shard i/8` each", 1, disk=3e9),
    Engine("Ray, 4 nodes of 8 GPUs, one run", 4, writers=1, own_parts=False),
    Engine("Ray, the same, 8 runs with `--shard i/8`", 4, writers=8),
    Engine("Slurm array, 32 GPUs, preempted twice a day", 4, gives_back=True, mean_wait=600, failure_every=43_200),
)


@dataclass(frozen=True)
class Outcome:
    """What it took.

    Attributes:
        wall: seconds from the first start to the joined store.
        gpus: of all workers.
        gpu_seconds: that GPUs were held.
        network: bytes between machines, weights included; 0 on one node.
        stored: bytes on the disk.
        failures: of nodes.
        busy: resource -> share of the time in which it was busy; of the GPUs, those that held the run up longest.
    """

    wall: float
    gpus: int
    gpu_seconds: float
    network: float
    stored: float
    failures: int
    busy: dict[str, float]


@dataclass
class _Worker:
    node: int
    speed: float
    units: deque[int]
    life: int = 0
    under_way: dict[int, bool] = field(default_factory=dict)  # unit -> whether it is still computed
    waits: bool = False
    begun: float | None = None
    held: float = 0.0


class _Server:
    """A resource that does one thing after the other."""

    def __init__(self) -> None:
        self.free = self.worked = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Return when something that arrives now is done."""
        self.free, self.worked = max(self.free, now) + seconds, self.worked + seconds
        return self.free


class _Run:
    """One source on one engine: a queue of events, and what they do."""

    def __init__(self, work: Work, engine: Engine, seed: int) -> None:
        self.work, self.engine, self.random = work, engine, random.Random(seed)
        self.unit_tokens = work.tokens / max(round(work.tokens / UNIT_TOKENS), 1)
        self.units = max(round(work.tokens / UNIT_TOKENS), 1)
        self.copies = engine.gpus // work.gpus
        total = engine.nodes * self.copies
        common: deque[int] = deque(range(self.units))
        parts = [deque(range(first, self.units, total)) for first in range(total)]
        self.workers = [
            _Worker(
                number // self.copies,
                self.random.lognormvariate(0, engine.spread),
                parts[number] if engine.own_parts else common,
            )
            for number in range(total)
        ]
        servers = [_Server() for _ in range(engine.writers or total)]
        self.writers = [servers[number % len(servers)] for number in range(total)]
        self.disk = _Server()
        self.events: list[tuple[float, int, str, int, int, int]] = []
        self.order = count()
        self.failures = self.done = 0
        self.network = self.computed = self.now = 0.0

    def at(self, time: float, what: str, who: int, unit: int = -1) -> None:
        life = self.workers[who].life if what != "fail" else 0
        heapq.heappush(self.events, (time, next(self.order), what, who, unit, life))

    def go(self) -> None:
        """Run until every unit is stored."""
        for number in range(len(self.workers)):
            self.at(self._wait(), "start", number)
        for node in range(self.engine.nodes):
            self.at(self.random.expovariate(1 / self.engine.failure_every), "fail", node)
        while self.done < self.units:
            self.now, _, what, who, unit, life = heapq.heappop(self.events)
            if what == "fail" or life == self.workers[who].life:
                getattr(self, f"_{what}")(who, unit)

    def _wait(self) -> float:
        return self.random.expovariate(1 / self.engine.mean_wait) if self.engine.mean_wait else 0.0

    def _start(self, who: int, _: int) -> None:
        worker = self.workers[who]
        worker.begun = self.now
        weights = WEIGHT_BYTES * self.work.parameters / self.copies  # the copies of a node share what was read
        self._send(weights)
        self.at(self.disk.take(self.now, weights / self.engine.disk) + self.engine.start, "ready", who)

    def _ready(self, who: int, _: int) -> None:
        """Take the next unit, unless two are under way."""
        worker = self.workers[who]
        worker.waits = len(worker.under_way) > 1
        if worker.waits:
            return
        if not worker.units:
            if not worker.under_way:
                self._end(worker)
            return
        unit = worker.units.popleft()
        worker.under_way[unit] = True
        seconds = self.unit_tokens / (self.work.rate * worker.speed)
        self.computed += seconds
        self.at(self.now + seconds, "packs", who, unit)

    def _packs(self, who: int, unit: int) -> None:
        worker = self.workers[who]
        worker.under_way[unit] = False
        if self.engine.writers is not None:
            self._send(self.unit_tokens * self.work.sent)
        self.at(self.writers[who].take(self.now, self.unit_tokens * self.work.pack / 1e6), "writes", who, unit)
        self.at(self.now, "ready", who)

    def _writes(self, who: int, unit: int) -> None:
        n_bytes = self.unit_tokens * self.work.stored
        self._send(n_bytes)
        self.at(self.disk.take(self.now, n_bytes / self.engine.disk), "stored", who, unit)

    def _stored(self, who: int, unit: int) -> None:
        worker = self.workers[who]
        del worker.under_way[unit]
        self.done += 1
        if worker.waits or not worker.units:
            self.at(self.now, "ready", who)

    def _fail(self, node: int, _: int) -> None:
        self.failures += 1
        self.at(self.now + self.random.expovariate(1 / self.engine.failure_every), "fail", node)
        back = self.now + self.engine.repair
        for who, worker in enumerate(self.workers):
            if worker.node != node or (not worker.units and not worker.under_way):
                continue
            worker.life += 1
            worker.units.extendleft(worker.under_way)
            worker.under_way = {}
            self._end(worker)
            self.at(back + self._wait(), "start", who)

    def _end(self, worker: _Worker) -> None:
        if worker.begun is not None:
            worker.held += self.now - worker.begun
            worker.begun = None

    def _send(self, n_bytes: float) -> None:
        self.network += n_bytes if self.engine.nodes > 1 else 0.0


def simulate(work: Work, engine: Engine, seed: int) -> Outcome:
    """Return what one source takes; the same seed gives the same."""
    run = _Run(work, engine, seed)
    run.go()
    for worker in run.workers:
        run._end(worker)
    stored = work.tokens * work.stored
    wall = run.now + (stored / CHECKSUM_SPEED if engine.own_parts else 0.0)
    gpus = len(run.workers) * work.gpus
    held = sum(worker.held for worker in run.workers) * work.gpus if engine.gives_back else run.now * gpus
    packed = max(writer.worked for writer in run.writers)
    busy = {
        "the GPUs": run.computed / (run.now * len(run.workers)),
        "the process that writes" if engine.writers == 1 else "the writers": packed / run.now,
        "the disk": run.disk.worked / run.now,
    }
    return Outcome(wall, gpus, held, run.network, stored, run.failures, busy)


def simulate_all(work: Work, engine: Engine, seed: int) -> Outcome:
    """Return what all sources of a work take, one after the other."""
    found = list(_outcomes(work, engine, seed))
    busy = {name: sum(outcome.busy[name] for outcome in found) / len(found) for name in found[0].busy}
    total = {name: sum(getattr(outcome, name) for outcome in found) for name in _SUMS}
    return Outcome(gpus=found[0].gpus, busy=busy, **total)  # type: ignore[arg-type]


_SUMS = ("wall", "gpu_seconds", "network", "stored", "failures")


def _outcomes(work: Work, engine: Engine, seed: int) -> Iterator[Outcome]:
    for source in range(work.sources):
        yield simulate(work, engine, 1000 * seed + source)
