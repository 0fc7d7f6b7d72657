"""The ``ray`` backend: Ray Data maps units of work over actors that each hold one local source.

The actors run the ``transformers`` or the ``vllm`` backend, on this machine or on a cluster. This process only
tokenizes, hands units out and commits what comes back.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

# Ray would otherwise make an environment of its own for the workers when the driver was started through uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import ray
import ray.data
from pydantic import BaseModel, ConfigDict, Field

from fusion_plugins.config import validate
from fusion_plugins.core.types import TokenizedText
from fusion_plugins.errors import FusionError, SourceError
from fusion_plugins.sources import base
from fusion_plugins.sources.base import Place, Purpose, Response, Rows, SampleRequest, SourceSettings
from fusion_plugins.sources.loading import load_config, load_tokenizer

__all__ = ["RayOptions", "RaySource", "connect", "open_source"]

START_ATTEMPTS = 3


class RayOptions(BaseModel):
    """Keys of ``options`` for this backend."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["transformers", "vllm"] = "transformers"
    options: dict[str, Any] = Field(default_factory=dict, description="options of that backend")
    actors: int = Field(1, ge=1, description="sources that run at the same time")
    num_cpus: float = Field(
        0.25, gt=0, description="CPUs that Ray counts per actor; whole ones can starve its readers on small machines"
    )
    num_gpus: float = Field(0.0, ge=0, description="GPUs per actor")
    address: str | None = Field(None, description="of a running cluster, or 'auto'; default: a local one for this run")


def open_source(settings: SourceSettings, purpose: Purpose) -> "RaySource":
    """Connect to Ray; see :func:`fusion_plugins.sources.base.open_source`."""
    return RaySource(settings, purpose)


class _Worker:
    """What an actor runs: one source, asked for one unit at a time."""

    def __init__(self, settings: dict[str, Any], purpose: Purpose, top_k: int) -> None:
        self._source = base.open_source(SourceSettings(**settings), purpose)
        self._purpose, self._top_k = purpose, top_k

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = pickle.loads(batch["unit"][0])
        try:
            if self._purpose == "capture":
                answers: Any = self._source.capture([unit], self._top_k)
            else:
                answers = self._source.sample([unit])
            result: Any = [(index, answer) for (_, index), answer in answers]
        except FusionError as error:
            result = error  # its type would be lost on the way
        return {"number": batch["number"], "result": np.array([pickle.dumps(result)], dtype=object)}


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
        self.max_length: int | None = settings.max_length or (context and context - room)
        stored = str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")
        self.facts: dict[str, Any] = {
            "engine": f"ray:{self._options.backend}",
            "engine_version": f"ray {ray.__version__}, {_version(self._options.backend)}",
            "dtype": stored if settings.dtype == "auto" else settings.dtype,
            "logits_width": config.vocab_size,
            "revision": getattr(config, "_commit_hash", None) or settings.revision,
        }
        self._started = not ray.is_initialized()
        if self._started:
            connect(self._options.address)

    def capture(self, units: Iterable[Sequence[TokenizedText]], top_k: int) -> Iterator[tuple[Place, Rows]]:
        """Yield the rows of each text, unit by unit as the actors finish them."""
        return self._map(units, top_k)

    def sample(self, units: Iterable[Sequence[SampleRequest]]) -> Iterator[tuple[Place, Response]]:
        """Yield the responses, unit by unit as the actors finish them."""
        return self._map(units, 0)

    def close(self) -> None:
        """End the local cluster, or leave the one that was there."""
        if self._started:
            ray.shutdown()

    def _map(self, units: Iterable[Sequence[Any]], top_k: int) -> Iterator[tuple[Place, Any]]:
        rows = [{"number": number, "unit": pickle.dumps(list(unit))} for number, unit in enumerate(units)]
        if not rows:
            return
        # One block per unit: a block is what Ray hands to an actor, and does again when the actor is lost.
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(self._settings, self._purpose, top_k),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self._options.actors, len(rows))),
            num_cpus=self._options.num_cpus,
            num_gpus=self._options.num_gpus or None,
        )
        try:
            for row in data.iter_rows():
                result = pickle.loads(row["result"])
                if isinstance(result, FusionError):
                    raise result
                for index, answer in result:
                    yield (int(row["number"]), index), answer
        except ray.exceptions.RayError as error:
            raise SourceError(f"Ray gave up: {str(error).strip().splitlines()[-1]}") from error


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
