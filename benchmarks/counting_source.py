"""A source in place of the transformers backend that answers at once, so that a benchmark sees everything else."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fusion_plugins.core.fusion.types import TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.sources.backends.base import (
    Batches,
    Place,
    Purpose,
    Response,
    SampleRequest,
    SourceSettings,
    in_turn,
)
from fusion_plugins.sources.loading import load_tokenizer, vocabulary_size


def open_source(settings: SourceSettings, purpose: Purpose) -> "CountingSource":
    """See :func:`fusion_plugins.sources.backends.base.open_source`."""
    return CountingSource(settings)


class CountingSource:
    """Gives descending log-probabilities of ids that follow each other, and the seed as the response."""

    whole_batches = True
    max_length = None

    def __init__(self, settings: SourceSettings) -> None:
        self.tokenizer = load_tokenizer(settings)
        self._size = vocabulary_size(self.tokenizer)
        self.facts: dict[str, Any] = {"engine": "counting", "engine_version": "1", "dtype": "float32"}

    def capture(self, batches: Batches[TokenizedText], top_k: int) -> Iterator[tuple[Place, TopK]]:
        """Yield the same distributions for texts of the same tokens."""
        steps = np.arange(1, top_k + 1, dtype=np.float32)
        logprobs = -steps - np.float32(np.log(np.exp(-steps).sum()))

        def answer(texts: Any) -> Iterator[tuple[int, TopK]]:
            for index, text in enumerate(texts):
                ids = (text.input_ids[:, None] + np.arange(top_k, dtype=np.int32)) % self._size
                found = np.broadcast_to(logprobs, ids.shape).copy()
                yield index, TopK(ids.astype(np.int32), found, np.full(len(ids), -2.0, np.float32))

        return in_turn(batches, answer)

    def sample(self, batches: Batches[SampleRequest]) -> Iterator[tuple[Place, Response]]:
        """Yield a short answer to every request."""
        return in_turn(
            batches,
            lambda requests: (
                (index, Response(f"It is {one.seed}.", "stop", 5, 8)) for index, one in enumerate(requests)
            ),
        )

    def close(self) -> None:
        """Do nothing."""
