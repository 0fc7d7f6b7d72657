"""The ``ray`` backend: actors that each hold one reward model, on the GPUs of this machine or of a cluster."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.util import ActorPool

from fusion_plugins.config import validate
from fusion_plugins.errors import FusionError, ScoringError
from fusion_plugins.scoring.reward_backends.base import Encoded, RewardModel, RewardSettings, open_reward_model
from fusion_plugins.sources.backends.ray_data import RayOptions, connect

#: parts of a batch per actor: few, so that engines get many rows at once; several, so that no actor waits long
PARTS_PER_ACTOR = 2


def open_model(settings: RewardSettings) -> "RayRewardModel":
    """Connect to Ray; see :func:`fusion_plugins.scoring.reward_backends.base.open_reward_model`."""
    return RayRewardModel(settings)


class _Actor:
    """One reward model in a process of its own."""

    def __init__(self, backend: str, settings: dict[str, Any]) -> None:
        self._model: RewardModel | None = None
        self._error: FusionError | None = None
        try:
            self._model = open_reward_model(backend, RewardSettings(**settings))
        except FusionError as error:
            self._error = error  # raised here, it would arrive as an error of Ray's, without its type

    def describe(self) -> Any:
        if self._model is None:
            return self._error
        return self._model.facts, self._model.max_length, self._model.embedding_rows

    def rewards(self, part: list[list[int]]) -> Any:
        if self._model is None:
            return self._error
        try:
            return self._model.rewards([Encoded(ids) for ids in part])
        except FusionError as error:
            return error


class RayRewardModel:
    """Several actors with the same reward model."""

    reads_texts = False

    def __init__(self, settings: RewardSettings) -> None:
        self._model = settings.model
        options = validate(RayOptions, settings.options, where="scorers.reward.options")
        self._started = not ray.is_initialized()
        if self._started:
            connect(options.address)
        actor: Any = ray.remote(_Actor).options(  # type: ignore[attr-defined]  # what ray adds to a class
            num_cpus=options.num_cpus, num_gpus=options.num_gpus or None, max_restarts=2, max_task_retries=2
        )
        inner = asdict(replace(settings, options=options.options))
        self._actors: list[Any] = [actor.remote(options.backend, inner) for _ in range(options.actors)]
        self._pool = ActorPool(self._actors)
        described = [self._checked(actor.describe.remote()) for actor in self._actors]
        facts, self.max_length, self.embedding_rows = described[0]
        self.facts: dict[str, Any] = {"engine": f"ray:{options.backend}", **facts}

    def rewards(self, rows: Sequence[Encoded]) -> list[float | str]:
        """Return the raw rewards; the parts of a batch are dealt out to the actors."""
        if not rows:
            return []
        count = min(len(rows), len(self._actors) * PARTS_PER_ACTOR)
        # Each part has long and short rows, so that all take about as long.
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        parts = [order[start::count] for start in range(count)]
        found: list[float | str] = [math.nan] * len(rows)
        try:
            results = list(
                self._pool.map(lambda actor, part: actor.rewards.remote([rows[place].ids for place in part]), parts)
            )
        except ray.exceptions.RayError as error:
            raise self._lost(error) from error
        for part, result in zip(parts, results, strict=True):
            if isinstance(result, FusionError):
                raise result
            for place, reward in zip(part, result, strict=True):
                found[place] = reward
        return found

    def close(self) -> None:
        """End the actors, and the local cluster if this model has started it."""
        for actor in self._actors:
            ray.kill(actor)
        if self._started:
            ray.shutdown()

    def _checked(self, reference: Any) -> Any:
        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            raise self._lost(error) from error
        if isinstance(result, FusionError):
            raise result
        return result

    def _lost(self, error: BaseException) -> ScoringError:
        return ScoringError(
            f"reward model {self._model!r}: expected rewards from {len(self._actors)} Ray actors, got: "
            f"{str(error).strip().splitlines()[-1]}. Check the cluster's logs (`ray logs`) and the actors' memory; "
            "finished batches are kept, run the same command again."
        )
