"""What is known of the steps of a chain: what each was started with, and whether it has ended well.

One small file per step, written whole or not at all, so kill -9 loses nothing. The lock of a chain is inherited by the
programs that it starts: a step that outlives its killed runner still keeps a second run out.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fusion_plugins.chain.settings import Chain, Step, digest_of
from fusion_plugins.errors import ChainError
from fusion_plugins.page import PAGE_NAME
from fusion_plugins.redaction import without_credentials
from fusion_plugins.store.files import make_folder, write_atomic

FOLDER = ".fusion_run"
#: ``env`` of a record that an earlier version wrote, which did not note it
UNKNOWN = "unknown"
#: bytes of a file or folder up to which its content counts; of larger ones, the sizes and times of their files
READ_BYTES = 64 << 20


@dataclass(frozen=True)
class Record:
    """One run of a step.

    Attributes:
        done: whether it has ended well.
        command: program and arguments.
        variables: environment variables that the file gave it; of secrets a digest.
        inputs: path -> state of what it read, when it started; see :func:`state_of`.
        env: folder or URL of its environment, without what a URL keeps secret; None for that of the runner.
        pid: its process, which leads a group of its own.
        started: when, in seconds since 1970.
        seconds: how long it took.
    """

    done: bool
    command: list[str]
    variables: dict[str, str]
    inputs: dict[str, str | None]
    env: str | None = None
    pid: int = 0
    started: float = 0.0
    seconds: float = 0.0

    def difference(self, other: "Record") -> str | None:
        """Say what is not the same in another run; None where both had the same command and inputs."""
        if self.command != other.command:
            return "its command has changed"
        if not _same_variables(self.variables, other.variables):
            return "its environment variables have changed"
        if self.env not in (other.env, UNKNOWN):
            return "its environment (env) has changed"
        changed = [
            path
            for path in self.inputs.keys() | other.inputs.keys()
            if path not in self.inputs or path not in other.inputs or self.inputs[path] != other.inputs[path]
        ]
        return f"{min(changed)} has changed" if changed else None


def _same_variables(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether they have the same values: an earlier version took other names for those of secrets."""

    def same(value: str, others: str) -> bool:
        return value == others or digest_of(value) == others or value == digest_of(others)

    return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())


class Records:
    """The records of a chain.

    Attributes:
        folder: where they are.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.folder = chain.home / FOLDER / chain.path.stem

    def planned(self, step: Step) -> Record:
        """Return what a run of the step would be, if it started now."""
        inputs = {path: state_of(Path(path)) for path in self._chain.reads(step)}
        # A step that writes nothing is known by its last run.
        for name in step.needs:
            if not self._chain.writes(self._chain.steps[name]):
                record = self.load(name)
                inputs[f"step {name}"] = None if record is None else str(record.started)
        where = self._chain.where(step)
        env = where and without_credentials(where)
        return Record(False, step.words, dict(self._chain.known_variables(step)), inputs, env)

    def load(self, name: str) -> Record | None:
        """Return the last run of a step; None where there is none."""
        try:
            return Record(**{"env": UNKNOWN} | json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ChainError(
                f"{self.folder / name}.json: expected the record of a step, got {error}. Remove it; the step then "
                "runs again."
            ) from None

    def save(self, name: str, record: Record) -> None:
        """Keep the last run of a step."""
        write_atomic(self.folder / f"{name}.json", json.dumps(asdict(record), indent=1) + "\n")

    def due(self, step: Step, planned: Record | None = None) -> str | None:
        """Say why a step has to run; None where it has run with what is there now.

        Args:
            step: the step.
            planned: what a run of it would be, where that is known already.
        """
        record = self.load(step.name)
        if record is None:
            return "has not run"
        if difference := record.difference(planned or self.planned(step)):
            return difference
        if not record.done:
            return "was stopped"
        missing = [path for path in self._chain.writes(step) if not os.path.lexists(path)]
        return f"{missing[0]} is missing" if missing else None

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep every other run of the chain out; yields the file that the programs of the steps inherit.

        Raises:
            ChainError: another run, or a step of one that was killed, is at work, or the file system has no locks.
        """
        make_folder(self.folder)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ChainError(
                    f"{self._chain.path} is being run{self._at_work()}. Wait until it has ended, or end it, then run "
                    "the same command again."
                ) from None
            except OSError as error:
                raise ChainError(
                    f"the file system of {self.folder} gives no locks ({error.strerror or error}), so that nothing "
                    "would keep a second run out. Put the file of the chain into a folder on a local disk."
                ) from None
            # A program that was started by a step need not have inherited the lock.
            for name, record in self._undone().items():
                if _outlives_its_leader(record.pid):
                    raise ChainError(
                        f"{self._chain.path}: processes that the step {name} started in a run that was killed are "
                        f"still at work. Wait until they have ended, or end them (kill -- -{record.pid}), then run "
                        "the same command again."
                    )
            yield descriptor
        finally:
            os.close(descriptor)

    def _undone(self) -> dict[str, Record]:
        records = {name: self.load(name) for name in self._chain.steps}
        return {name: record for name, record in records.items() if record is not None and not record.done}

    def _at_work(self) -> str:
        started = [f"{name} (process {record.pid})" for name, record in self._undone().items()]
        return f", or steps of a run that was killed still are: {', '.join(started)}" if started else ""


def _outlives_its_leader(group: int) -> bool:
    """Return whether our processes of a group are left whose leader has gone; a leader that is there may be another."""
    if not group:  # the run was killed before it had started the process; the kernel's threads are of group 0
        return False
    alive = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if file.stat().st_uid != os.getuid():
                continue
            # The name in brackets may hold anything.
            state, _, its_group = file.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                alive.add(int(file.parent.name))
    return bool(alive) and group not in alive


def state_of(path: Path) -> str | None:
    """Return a digest of a file or folder: of its content up to :data:`READ_BYTES`, else of sizes and times.

    Names that begin with a dot (locks, caches), ``__pycache__`` and the page of ``fusion report`` in a folder do not
    count. A link counts as what it names.

    Returns:
        Hex digits; None where there is nothing.
    """
    digest = hashlib.sha256()
    files = list(_files(path))
    if not os.path.exists(path):
        return None
    small = sum(size for _, _, size, _ in files) <= READ_BYTES
    for name, file, size, time in files:
        digest.update(f"{name}\0{size}\0{'' if small else time}\0".encode(errors="surrogateescape"))
        if small:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path, int, int]]:
    """Yield name, place, size (bytes) and time (ns) of a file, or of the files of a folder in a fixed order."""
    if path.is_file():
        found = path.stat()
        yield "", path, found.st_size, found.st_mtime_ns
        return
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        # A link may lead to a folder that has been looked at, or to one above it.
        with suppress(FileNotFoundError):
            there = os.stat(folder)
            if (there.st_dev, there.st_ino) in seen:
                folders.clear()
                continue
            seen.add((there.st_dev, there.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(name for name in names if not name.startswith(".") and name != PAGE_NAME):
            file = Path(folder, name)
            with suppress(FileNotFoundError):  # a link to nothing
                found = file.stat()
                if stat.S_ISREG(found.st_mode):
                    yield os.path.relpath(file, path), file, found.st_size, found.st_mtime_ns
