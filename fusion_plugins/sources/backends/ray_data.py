"""The ``ray`` backend: Ray Data maps units of work over actors that each hold one local source.

The actors run the ``transformers`` or the ``vllm`` backend, on this machine or on a cluster. This process only
tokenizes, hands units out and commits what comes back: the data set is one of tickets, and a feeder holds the few units
that are under way, so that a corpus is never in memory as a whole.
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

# Ray would otherwise make an environment of its own for the workers when the driver was started through uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import ray
import ray.data
from pydantic import BaseModel, ConfigDict, Field

from fusion_plugins.config import validate
from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import FusionError, SourceError
from fusion_plugins.sources.backends import base
from fusion_plugins.sources.backends.base import (
    Place,
    Purpose,
    Refusal,
    Response,
    SampleRequest,
    SourceSettings,
    Units,
    least,
)
from fusion_plugins.sources.fingerprints import numeric_options, stored_dtype
from fusion_plugins.sources.loading import load_config, load_tokenizer

__all__ = ["RayOptions", "RaySource", "connect", "open_source"]

START_ATTEMPTS = 3
#: units per actor that are tokenized and wait, are worked on, or come back
UNITS_PER_ACTOR = 4


class RayOptions(BaseModel):
    """Keys of ``options`` for this backend."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["transformers", "vllm"] = Field("transformers", description="what each actor runs")
    options: dict[str, Any] = Field(default_factory=dict, description="options of that backend")
    actors: int = Field(1, ge=1, description="sources that run at the same time")
    num_cpus: float = Field(
        0.25, gt=0, description="CPUs that Ray counts per actor; whole ones can starve its readers on small machines"
    )
    num_gpus: float = Field(0.0, ge=0, description="GPUs per actor")
    address: str | None = Field(None, description="of a running cluster, or 'auto'; default: a local one for this run")


def open_source(settings: SourceSettings, purpose: Purpose) -> "RaySource":
    """Connect to Ray; see :func:`fusion_plugins.sources.backends.base.open_source`."""
    return RaySource(settings, purpose)


class _Feeder:
    """Holds the units under way. A ticket is worth the next unit, and the same one again when its actor was lost."""

    def __init__(self) -> None:
        self._units: dict[int, bytes] = {}
        self._waiting: deque[int] = deque()
        self._taken: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def put(self, number: int, unit: bytes) -> None:
        async with self._changed:
            self._units[number] = unit
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
            return number, self._units.get(number)

    async def drop(self, number: int) -> None:
        self._units.pop(number, None)


class _Worker:
    """What an actor runs: one source, asked for one unit at a time."""

    def __init__(self, settings: dict[str, Any], purpose: Purpose, top_k: int, feeder: Any) -> None:
        self._source = base.open_source(SourceSettings(**settings), purpose)
        self._purpose, self._top_k, self._feeder = purpose, top_k, feeder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number, packed = ray.get(self._feeder.take.remote(int(batch["ticket"][0])))
        # Nothing is left of a unit whose results have come and whose ticket is worked off again all the same.
        unit = pickle.loads(packed) if packed is not None else []
        return {"number": np.array([number]), "result": np.array([pickle.dumps(self._work(unit))], dtype=object)}

    def _work(self, unit: list[Any]) -> Any:
        try:
            if self._purpose == "capture":
                answers: Any = self._source.capture([unit], self._top_k)
            else:
                answers = self._source.sample([unit])
            return [(index, answer) for (_, index), answer in answers]
        except FusionError as error:
            return error  # its type would be lost on the way


class RaySource:
    """Several actors with the same model."""

    whole_units = True

    def __init__(self, settings: SourceSettings, purpose: Purpose) -> None:
        where = f"options of source {settings.source_name!r}"
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

    def capture(self, units: Units[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK | Refusal]]:
        """Yield the rows of each text, unit by unit as the actors finish them."""
        return self._map(units, top_k)

    def sample(self, units: Units[SampleRequest]) -> Iterator[tuple[Place, Response | Refusal]]:
        """Yield the responses, unit by unit as the actors finish them."""
        return self._map(units, 0)

    def close(self) -> None:
        """End the local cluster, or leave the one that was there."""
        if self._started:
            ray.shutdown()

    def _map(self, units: Units[Any], top_k: int) -> Iterator[tuple[Place, Any]]:
        if not len(units):
            return
        actors = min(self._options.actors, len(units))
        feeder: Any = ray.remote(_Feeder).options(num_cpus=0).remote()
        packed = ((number, pickle.dumps(list(unit))) for number, unit in enumerate(units))
        try:
            _feed(feeder, islice(packed, UNITS_PER_ACTOR * actors))
            for row in self._tickets(len(units), actors, top_k, feeder).iter_rows():
                number, result = int(row["number"]), pickle.loads(row["result"])
                if isinstance(result, FusionError):
                    raise result
                for index, answer in result:
                    yield (number, index), answer
                feeder.drop.remote(number)
                _feed(feeder, islice(packed, 1))
        except ray.exceptions.RayError as error:
            raise SourceError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error
        finally:
            ray.kill(feeder)

    def _tickets(self, count: int, actors: int, top_k: int, feeder: Any) -> Any:
        # One block per ticket: a block is what Ray hands to an actor, and does again when the actor is lost.
        return ray.data.from_items(
            [{"ticket": ticket} for ticket in range(count)], override_num_blocks=count
        ).map_batches(
            _Worker,
            fn_constructor_args=(self._settings, self._purpose, top_k, feeder),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=self._options.num_cpus,
            num_gpus=self._options.num_gpus or None,
        )


def _feed(feeder: Any, packed: Iterator[tuple[int, bytes]]) -> None:
    for number, unit in packed:
        feeder.put.remote(number, unit)


def connect(address: str | None) -> None:
    """Join the cluster at ``address``, or start a local one.

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
        except Exception as error:  # Ray says with a bare Exception that a busy machine did not start it in 30 s
            ray.shutdown()
            if attempt + 1 == START_ATTEMPTS:
                raise SourceError(f"cannot connect to Ray at {address or 'this machine'}: {error}") from error


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
