"""Work beside the model: what is written runs in a thread of its own, and what is read is made one step ahead.

Compression, the disk, numpy and tokenizers let other threads run, and so does a model on a GPU. So a source goes on
while the batch before is written and the next one is tokenized.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

from fusion_plugins.store.files import interrupts_deferred

Item = TypeVar("Item")


class Background:
    """Runs jobs in their order in one thread. One job runs while the caller goes on; a second one waits for its end.

    The error of a job is raised by the next call of :meth:`check` or :meth:`submit`, or at the end of the ``with``
    block; nothing is run after it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fusion-writer")
        self._running: Future[None] | None = None
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job once the one before has ended."""
        self._join()
        if not self._failed:
            self._running = self._thread.submit(job)

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        if self._running is not None and self._running.done():
            self._join()

    def _join(self) -> None:
        if self._running is None:
            return
        try:
            self._running.result()
        except KeyboardInterrupt:  # of the caller, who waits: the job goes on
            raise
        except BaseException:
            self._running, self._failed = None, True
            raise
        self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever owns what the jobs write may close it after this, also when Ctrl-C is pressed a second time.
        with interrupts_deferred():
            self._thread.shutdown(wait=True)
            if kind is None:
                self._join()


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items, each made in a thread while the one before is being used."""
    end = object()
    source = iter(items)
    with ThreadPoolExecutor(1, "fusion-reader") as thread:
        coming: Future[Item | object] = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]  # all but the end are items
