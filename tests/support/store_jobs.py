"""What the fault tests run in processes of their own.

``python store_jobs.py JOB FOLDER ...`` runs one job. ``python store_jobs.py serve`` forks a process for each line of
its input, ``KILL_AT JOB FOLDER ...``, and answers with a line ``STATUS CALLS FILE_CALLS``: a process kills itself
(SIGKILL) at its KILL_AT-th call or return of a function, of Python or of C, so that every point between two calls can
be hit; at the KILL_AT-th call or return of one that changes files if KILL_AT begins with ``f``. Nothing heavier than
numba is imported.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import numpy as np
import pyarrow as pa
from store_samples import manifest, record, table

from fusion_plugins.errors import FusionError
from fusion_plugins.store import RowManifest, RowWriter, StoreWriter
from fusion_plugins.store.maintain import merge
from fusion_plugins.store.packed import warm_up

N_ITEMS = 24
CHANGES_FILES = {"open", "write", "flush", "close", "fsync", "replace", "unlink", "mkdir"}
BATCH = 3
COLUMNS = {"prompt_id": "string", "index": "int64", "response": "string", "extra": "json"}


def rows_manifest() -> RowManifest:
    return RowManifest(stage="responses", columns=COLUMNS, key=("prompt_id", "index"))


def row(number: int) -> dict[str, object]:
    return {"prompt_id": f"p{number // 4}", "index": number % 4, "response": "text " * number, "extra": {"n": number}}


def write_store(folder: str, start: str = "0", stop: str = str(N_ITEMS), pause: str = "0") -> None:
    """Write the records that are not there yet, a batch per shard, as capture does."""
    with StoreWriter(folder, manifest(), table()) as writer:
        todo = [number for number in range(int(start), int(stop)) if not writer.holds(f"text-{number:04d}")]
        for place in range(0, len(todo), BATCH):
            for number in todo[place : place + BATCH]:
                writer.write(record(number))
            writer.flush()
            if pause != "0":
                print(place, flush=True)  # noqa: T201 - the test waits for it
                time.sleep(float(pause))
        writer.finish()


def write_rows(folder: str, n_items: int = N_ITEMS) -> None:
    with RowWriter(folder, rows_manifest()) as writer:
        todo = [number for number in range(n_items) if not writer.holds((f"p{number // 4}", number % 4))]
        for place in range(0, len(todo), BATCH):
            for number in todo[place : place + BATCH]:
                writer.write(row(number))
            writer.flush()
        writer.finish()


def fill_disk(folder: str, limit: str) -> None:
    """Write as write_store does, where no file can grow beyond a limit: the kernel's answer is that of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    write_store(folder)


def run(job: str, folder: str, *rest: str) -> None:
    if job == "merge":
        merge([Path(part) for part in rest], folder)
    else:
        {"write_store": write_store, "write_rows": write_rows, "fill_disk": fill_disk}[job](folder, *rest)


def run_until(kill_at: str, arguments: list[str]) -> str:
    """Run a job and return how many calls and returns it took, of any function and of those that change files."""
    count = file_count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count, file_count
        count += 1
        file_count += getattr(argument, "__name__", "") in CHANGES_FILES
        if kill_at in (str(count), f"f{file_count}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(on_event)
    run(*arguments)
    sys.setprofile(None)
    return f"{count} {file_count}"


def serve() -> None:
    # So that what pyarrow imports and numba compiles on first use is no part of a job.
    pa.array(np.zeros(1))
    warm_up()
    for line in sys.stdin:
        kill_at, *arguments = line.split()
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(send, run_until(kill_at, arguments).encode())
            os._exit(0)
        os.close(send)
        _, status = os.waitpid(child, 0)
        calls = os.read(receive, 100).decode() or "0 0"
        os.close(receive)
        print(os.waitstatus_to_exitcode(status), calls, flush=True)  # noqa: T201


if __name__ == "__main__":
    try:
        serve() if sys.argv[1] == "serve" else run(*sys.argv[1:])
    except FusionError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
