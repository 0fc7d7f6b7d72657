"""The ``ray`` backend: Ray Data maps batches over actors that each hold one local source.

The actors run the ``transformers`` or the ``vllm`` backend, on this machine or on a cluster. This process tokenizes,
hands out batches and commits the results. Ray's dataset holds tickets instead of texts, and a feeder holds the few
batches that are under way, so that a corpus is never in memory as a whole.
"""

import asyncio
import logging
import os
import pickle
from collections import deque
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, Literal

# Otherwise Ray builds another environment for its workers when this process was started through uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import ray
import ray.data
from pydantic import Field

from fusion_plugins.config import Settings, validate
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import FusionError, SourceError
from fusion_plugins.sources.backends import base
from fusion_plugins.sources.backends.base import (
    Batches,
    Place,
    Purpose,
    Refusal,
    Response,
    SampleRequest,
    SourceSettings,
    least,
)
from fusion_plugins.sources.fingerprints import numeric_options, stored_dtype
from fusion_plugins.sources.loading import load_config, load_tokenizer

START_ATTEMPTS = 3
#: batches per actor that are tokenized and wait, are worked on, or are on their way back
BATCHES_PER_ACTOR = 4


class RayOptions(Settings):
    """Keys of ``options`` for this backend."""

    backend: Literal["transformers", "vllm"] = Field("transformers", description="what each actor runs")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that backend")
    actors: int = Field(1, ge=1, description="sources that run at the same time")
    num_cpus: float = Field(
        0.25, gt=0, description="CPUs that Ray reserves per actor; whole ones can starve its readers on small machines"
    )
    num_gpus: float = Field(0.0, ge=0, description="GPUs per actor")
    address: str | None = Field(None, description="of a running cluster, or 'auto'; default: a local one for this run")


def open_source(settings: SourceSettings, purpose: Purpose) -> "RaySource":
    """Connect to Ray; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return RaySource(settings, purpose)


class _Feeder:
    """Holds the batches under way. A ticket gets the next one, and the same one again when its actor was lost."""

    def __init__(self) -> None:
        self._batches: dict[int, bytes] = {}
        self._waiting: deque[int] = deque()
        self._taken: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def put(self, number: int, batch: bytes) -> None:
        async with self._changed:
            self._batches[number] = batch
            self._waiting.append(number)
            self._changed.notify_all()

    async def take(self, ticket: int) -> tuple[int, bytes | None]:
        async with self._changed:
            while ticket not in self._taken:
                if self._waiting:
                    self._taken[ticket] = self._waiting.popleft()
                else:
                    await self._changed.wait()
            number = self._taken[ticket]
            return number, self._batches.get(number)

    async def drop(self, number: int) -> None:
        self._batches.pop(number, None)


class _Worker:
    """What an actor runs: one source that is asked for one batch at a time."""

    def __init__(self, settings: dict[str, Any], purpose: Purpose, top_k: int, feeder: Any) -> None:
        self._source = base.open_source(SourceSettings(**settings), purpose)
        self._purpose, self._top_k, self._feeder = purpose, top_k, feeder

    def __call__(self, tickets: dict[str, Any]) -> dict[str, Any]:
        number, packed = ray.get(self._feeder.take.remote(int(tickets["ticket"][0])))
        # Ray may run a ticket again although its results have arrived; the batch is dropped by then.
        batch = pickle.loads(packed) if packed is not None else []
        return {"number": np.array([number]), "result": np.array([pickle.dumps(self._work(batch))], dtype=object)}

    def _work(self, batch: list[Any]) -> Any:
        try:
            if self._purpose == "capture":
                answers: Any = self._source.capture([batch], self._top_k)
            else:
                answers = self._source.sample([batch])
            return [(index, answer) for (_, index), answer in answers]
        except FusionError as error:
            return error  # raised here, it would arrive as an error of Ray's, without its type


class RaySource:
    """Several actors with the same model."""

    whole_batches = True

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        self._name = settings.source_name
        where = f"options of source {self._name!r}"
        self._options = validate(RayOptions, settings.options, where=where)
        inner = {"backend": self._options.backend, "options": self._options.options}
        self._settings = settings.model_dump(include=set(SourceSettings.model_fields)) | inner
        self._purpose = purpose
        self.tokenizer = load_tokenizer(settings)
        config = load_config(settings)
        context = getattr(config, "max_position_embeddings", None)
        room = self._options.backend == "vllm" and purpose == "capture"
        self.max_length = least(settings.max_length, context and context - room)
        self.facts: dict[str, Any] = {
            "engine": f"ray:{self._options.backend}",
            "engine_version": f"ray {ray.__version__}, {_version(self._options.backend)}",
            "dtype": stored_dtype(settings, config),
            "options": numeric_options(settings),
            "logits_width": config.vocab_size,
            "revision": getattr(config, "_commit_hash", None) or settings.revision,
        }
        self._started = not ray.is_initialized()
        if self._started:
            connect(self._options.address)

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield the top-k of each text, batch by batch as the actors finish them."""
        return self._map(batches, top_k)

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses, batch by batch as the actors finish them."""
        return self._map(batches, 0)

    def close(self) -> None:
        """Stop the local cluster if this source has started it."""
        if self._started:
            ray.shutdown()

    def _map(self, batches: Batches[Any], top_k: int) -> Iterator[tuple[Place, Any]]:
        count = len(batches)
        if not count:
            return
        actors = min(self._options.actors, count)
        feeder: Any = ray.remote(_Feeder).options(num_cpus=0).remote()
        packed = ((number, pickle.dumps(list(batch))) for number, batch in enumerate(batches))
        # One block per ticket: a block is what Ray gives to an actor, and gives again when the actor is lost.
        tickets = ray.data.from_items([{"ticket": ticket} for ticket in range(count)], override_num_blocks=count)
        results = tickets.map_batches(
            _Worker,
            fn_constructor_args=(self._settings, self._purpose, top_k, feeder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=self._options.num_cpus,
            num_gpus=self._options.num_gpus or None,
        )
        try:
            _feed(feeder, islice(packed, BATCHES_PER_ACTOR * actors))
            for row in results.iter_rows():
                number, result = int(row["number"]), pickle.loads(row["result"])
                if isinstance(result, FusionError):
                    raise result
                for index, answer in result:
                    yield (number, index), answer
                feeder.drop.remote(number)
                _feed(feeder, islice(packed, 1))
        except ray.exceptions.RayError as error:
            raise SourceError(
                f"source {self._name!r}: expected results from {actors} Ray actors, got: "
                f"{str(error).strip().splitlines()[-1]}. Check the cluster's logs (`ray logs`) and the actors' memory; "
                "finished batches are kept, run the same command again."
            ) from error
        finally:
            ray.kill(feeder)


def _feed(feeder: Any, packed: Iterator[tuple[int, bytes]]) -> None:
    for number, batch in packed:
        feeder.put.remote(number, batch)


def connect(address: str | None) -> None:
    """Connect to the cluster at ``address``, or start a local one.

    Raises:
        SourceError: it does not answer.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            return
        except Exception as error:  # Ray raises a bare Exception when a busy machine does not start it in 30 s
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise SourceError(
                    f"cannot connect to Ray at {address or 'this machine'}: {error}. Check `options.address` and, on a "
                    "cluster, `ray status`."
                ) from error


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
