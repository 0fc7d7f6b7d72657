"""``fusion capture`` and ``fusion sample`` in processes that can be killed at any point.

``python source_jobs.py MODEL`` imports everything, also what transformers imports late, and then forks a process for
each line of its input, ``KILL_AT LOG ARGUMENTS...``. It runs ``fusion ARGUMENTS...`` and kills itself (SIGKILL) at its
KILL_AT-th call or return of a function after the model was loaded; 0 lets it live, -1 lets it interrupt itself (Ctrl-C)
once two batches are done. How much a source is asked for is appended to LOG. The answer is a line ``STATUS CALLS``.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch

from fusion_plugins import cli
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.sources import capture, sample
from fusion_plugins.sources.backends import transformers_local
from fusion_plugins.sources.backends.base import SampleRequest, Sampling, SourceSettings
from fusion_plugins.store import packed

torch.set_num_threads(1)  # threads do not survive a fork


class Logged:
    """A source that notes what it is asked for, in a file that outlives it."""

    def __init__(self, source: transformers_local.TransformersSource, log: str, interrupt: bool) -> None:
        self._source, self._log, self._interrupt = source, log, interrupt

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def _note(self, count: int) -> None:
        with open(self._log, "a") as file:
            file.write(f"{count}\n")
        if self._interrupt and len(Path(self._log).read_text().split()) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    def capture(self, batches, top_k):
        return self._source.capture(self._noted(batches), top_k)

    def sample(self, batches):
        return self._source.sample(self._noted(batches))

    def _noted(self, batches):
        for batch in batches:
            self._note(len(batch))
            yield batch


def run(kill_at: int, log: str, arguments: list[str]) -> int:
    """Run the command and return how many calls and returns it took."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def open_logged(settings, purpose):
        source = Logged(transformers_local.open_source(settings, purpose), log, interrupt=kill_at == -1)
        # Batches are written and read ahead in threads of their own: a kill may hit those too.
        threading.setprofile(on_event if kill_at >= 0 else None)
        sys.setprofile(on_event if kill_at >= 0 else None)
        return source

    capture.open_source = sample.open_source = open_logged
    sys.argv = ["fusion", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    return count


def child(kill_at: int, log: str, arguments: list[str], send: int) -> None:
    with open(f"{log}.err", "w") as errors:
        os.dup2(errors.fileno(), 2)
        try:
            os.write(send, str(run(kill_at, log, arguments)).encode())
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(99)
        os._exit(0)


def serve() -> None:
    for line in sys.stdin:
        kill_at, log, *arguments = line.split()
        receive, send = os.pipe()
        process = os.fork()
        if process == 0:
            child(int(kill_at), log, arguments, send)
        os.close(send)
        _, status = os.waitpid(process, 0)
        calls = os.read(receive, 100).decode() or "0"
        os.close(receive)
        print(os.waitstatus_to_exitcode(status), calls, flush=True)  # noqa: T201


def warm_up(model: str) -> None:
    """Import what transformers imports late, and load what unpacks records."""
    packed.warm_up()
    source = transformers_local.open_source(SourceSettings(model=model), "sample")
    list(source.sample([[SampleRequest("a", Sampling(max_tokens=2), 0)]]))
    source.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    TokenTable.from_tokenizer(source.tokenizer)
    tokenize(source.tokenizer, TokenTable.from_tokenizer(source.tokenizer), "a")


if __name__ == "__main__":
    warm_up(sys.argv[1])
    serve()
