"""One process that has imported the hosts once, and runs each command in a fork of itself.

A command goes through the real entry point that its console script calls. Importing torch and axolotl costs ten seconds
of CPU, a cell of an experiment as many; the fork has them at once, and leaves nothing behind in the parent. The parent
never computes, so that no thread of torch is running when it forks.
"""

import gc
import importlib
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CommandFailed", "Spent", "call", "command"]

ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "AXOLOTL_DATASET_NUM_PROC": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

#: what the commands import; the hosts import some of it late
PRELOADED = (
    *("axolotl.cli.main", "axolotl.cli.train", "axolotl.common.datasets", "axolotl.core.builders", "axolotl.train"),
    *("axolotl.cli.config", "axolotl.utils.trainer", "deepspeed", "einops", "mergekit.scripts.run_yaml"),
    *("fusion_plugins.axolotl.plugin", "fusion_plugins.axolotl.trainer", "fusion_plugins.sources.capture"),
    *("fusion_plugins.axolotl.fused", "fusion_plugins.axolotl.best_of_sources", "fusion_plugins.axolotl.collator"),
    *("fusion_plugins.axolotl.multi_source_dpo", "fusion_plugins.axolotl.preference_trainers"),
    *("fusion_plugins.sources.backends.transformers_local", "fusion_plugins.sources.sample"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt_neox", "llama", "mistral", "qwen2")),
)


class CommandFailed(Exception):
    """A command or a call ended badly; the message has the end of its log."""


class Spent(NamedTuple):
    """Seconds on the clock, and seconds of one core."""

    wall: float
    cpu: float


def _axolotl(arguments: Sequence[str]) -> None:
    from axolotl.cli.main import cli

    cli(list(arguments), standalone_mode=False)


def _fusion(arguments: Sequence[str]) -> None:
    from fusion_plugins.cli import main

    main(list(arguments))


def _mergekit_yaml(arguments: Sequence[str]) -> None:
    from mergekit.scripts.run_yaml import main

    main(list(arguments), standalone_mode=False)


#: console script -> what it calls
ENTRIES = {"axolotl": _axolotl, "fusion": _fusion, "mergekit-yaml": _mergekit_yaml}


@cache
def warm_up() -> None:
    """Import what the commands need, and keep the garbage collector off it."""
    os.environ.update(ENVIRONMENT)
    for module in PRELOADED:
        importlib.import_module(module)
    import torch

    from fusion_plugins.core.fusion.pipeline import warm_up as load_kernels

    torch.set_num_threads(1)
    load_kernels()
    gc.collect()
    gc.freeze()


def command(*arguments: str, folder: Path, log: Path) -> Spent:
    """Run a console script of :data:`ENTRIES` in a folder; its output goes to a log.

    Raises:
        CommandFailed: the status is not 0.
    """

    def run() -> None:
        sys.argv = list(arguments)
        ENTRIES[arguments[0]](arguments[1:])

    _, spent = _forked(run, folder, log, " ".join(arguments))
    return spent


def call(function: Callable[..., Any], *arguments: Any, log: Path) -> tuple[Any, Spent]:
    """Call a function in a fork; return its result, which must pickle, and what it took.

    Raises:
        CommandFailed: it raised an exception.
    """
    return _forked(lambda: function(*arguments), Path.cwd(), log, function.__name__)


def _forked(function: Callable[[], Any], folder: Path, log: Path, what: str) -> tuple[Any, Spent]:
    warm_up()
    since = time.monotonic()
    with tempfile.TemporaryFile() as result, log.open("ab") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os._exit(_child(function, folder, output.fileno(), result.fileno()))
        _, status, usage = os.wait4(pid, 0)
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise CommandFailed(f"{what} ended with status {os.waitstatus_to_exitcode(status)}; {log}:\n{tail}")
        result.seek(0)
        value = pickle.load(result)
    return value, Spent(round(time.monotonic() - since, 2), round(usage.ru_utime + usage.ru_stime, 2))


def _child(function: Callable[[], Any], folder: Path, output: int, result: int) -> int:
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        value = None
        try:
            value = function()
        except SystemExit as ended:
            if ended.code not in (0, None):
                return 1
        with os.fdopen(os.dup(result), "wb") as file:
            pickle.dump(value, file)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
