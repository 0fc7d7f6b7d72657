"""Limits of a program, and what it and all that it has started use together, as /proc tells it; Linux only."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_plugins.errors import ConfigError

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    Attributes:
        cpu_seconds: processor time per test, of all its processes; does not depend on how busy the machine is.
        wall_seconds: time per test, which ends programs that sleep.
        total_seconds: time for all tests of one program.
        memory: bytes per test: of address space of one process, and in use by all of them.
        disk: bytes in /tmp, which each test has for itself and which is gone afterwards.
        file_size: bytes per file.
        processes: processes and threads at one time, including the four that the sandbox needs.
        open_files: file descriptors per process.

    Raises:
        ConfigError: a limit is not above 0.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    total_seconds: float = 60.0
    memory: int = 512 << 20
    disk: int = 32 << 20
    file_size: int = 16 << 20
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        wrong = [name for name, value in asdict(self).items() if value <= 0]
        if wrong:
            given = ", ".join(f"{name}: {getattr(self, name)}" for name in wrong)
            raise ConfigError(f"scorers.code: expected limits above 0, got {given}; leave a limit out for its default")


def usage(process: int) -> tuple[int, float]:
    """Return bytes of memory in use and CPU seconds of all descendants below the first of a process.

    Memory is what no file backs; pages that processes share since a fork are counted once, those that they share on
    purpose in each.
    """
    memory, seconds = 0, 0.0
    # The first child is the warm interpreter, of which every other process begins as a copy.
    first = children(process)
    copied = sum(_memory(child) for child in first)
    for descendant in _descendants(first):
        memory += max(0, _memory(descendant) - copied)
        seconds += cpu_seconds(descendant)
    return memory, seconds


def can_be_watched(process: int) -> bool:
    """Return whether this kernel tells what :func:`usage` reads."""
    below = children(process)
    return bool(below) and all(map(_memory, below))


def _descendants(processes: list[int]) -> list[int]:
    found: list[int] = []
    for process in processes:
        below = children(process)
        found += [*below, *_descendants(below)]
    return found


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that have not ended."""
    tasks = Path(f"/proc/{process}/task")
    try:
        names = os.listdir(tasks)
    except OSError:
        return []
    return [int(child) for name in names for child in _read(tasks / name / "children").split()]


def _memory(process: int) -> int:
    """Return the bytes that no file backs."""
    fields = dict(line.partition(":")[::2] for line in _read(Path(f"/proc/{process}/status")).splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields)


def cpu_seconds(process: int) -> float:
    """Return the seconds of a process and of the children that it has waited for."""
    # Behind the name, which may hold anything: state is field 3, utime, stime, cutime and cstime are 14 to 17.
    fields = _read(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def _read(path: Path) -> str:
    """Return a file of /proc; nothing where its process has ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
