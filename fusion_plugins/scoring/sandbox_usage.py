"""What a process and all its descendants use together, as /proc tells it; Linux only."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def usage(process: int) -> tuple[int, float]:
    """Return bytes of memory in use and CPU seconds of all descendants below the first of a process.

    Memory is what no file backs; pages that processes share since a fork are counted once, those that they share on
    purpose in each.
    """
    memory, cpu_seconds = 0, 0.0
    # The first child is the warm interpreter, of which every other process begins as a copy.
    first = _children(process)
    copied = sum(_memory(child) for child in first)
    for descendant in _descendants(first):
        memory += max(0, _memory(descendant) - copied)
        cpu_seconds += _cpu_seconds(descendant)
    return memory, cpu_seconds


def _descendants(processes: list[int]) -> list[int]:
    found: list[int] = []
    for process in processes:
        children = _children(process)
        found += [*children, *_descendants(children)]
    return found


def _children(process: int) -> list[int]:
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


def _cpu_seconds(process: int) -> float:
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
