"""``fusion capture --dry-run``: capture a few texts, keep none, and estimate what all will take."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from fusion_plugins.core.key_set import KeySet
from fusion_plugins.errors import DataError
from fusion_plugins.inputs import Unusable, open_texts
from fusion_plugins.sources.batches import plan_batches
from fusion_plugins.sources.capture import (
    CaptureJob,
    OpenedCapture,
    open_capture,
    size_of,
    texts_of_run,
    unusable_texts,
)
from fusion_plugins.sources.capture_config import CaptureConfig
from fusion_plugins.store import Manifest, StoreWriter
from fusion_plugins.texts import Text

#: what a dry run captures to measure speed and size: bytes in one round, of the first texts, in about this time
PROBE_BYTES = 32_768
PROBE_TEXTS = 1024
PROBE_SECONDS = 30.0


def estimate_capture(config: CaptureConfig) -> dict[str, float]:
    """Capture a few texts into a temporary folder and estimate what all of them will take.

    Rounds grow, from one short text on, while they should end within :data:`PROBE_SECONDS`. The speed is that of the
    last round, so that the start of the model does not count.

    Returns:
        ``texts``, ``tokens``, ``bytes`` (of the store), ``hours``, ``tokens_per_second``; all but the first are
        estimates.

    Raises:
        DataError, SourceError: as :func:`~fusion_plugins.sources.capture.capture_texts`; or no text can be captured.
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    texts = open_texts(config.texts, unusable=unusable, selection=config.selection)
    skipped = dict(unusable or {})
    whole = config.limit is None and config.shard is None
    total = texts.n_bytes if whole else sum(map(size_of, texts_of_run(config, texts)))
    first = list(islice(texts_of_run(config, texts), PROBE_TEXTS))
    with tempfile.TemporaryDirectory() as folder:
        with (
            open_capture(config, texts, Path(folder)) as opened,
            StoreWriter(folder, opened.manifest, opened.table) as store,
        ):
            n_bytes, n_tokens, speed = _probe(config, opened, store, first, skipped)
        shards = Manifest.load(Path(folder)).shards
    if not n_tokens:
        reason = next(iter(skipped.values()), "there is none")
        raise DataError(f"{config.texts}: expected at least one text that can be captured, got none: {reason}")
    tokens = n_tokens * total / n_bytes
    largest = max(shards, key=lambda shard: shard.tokens)  # every file has a part that does not grow
    return {
        "texts": len(texts) if whole else sum(1 for _ in texts_of_run(config, texts)),
        "tokens": tokens,
        "bytes": tokens * largest.bytes / largest.tokens,
        "hours": tokens / speed / 3600,
        "tokens_per_second": speed,
    }


def _probe(
    config: CaptureConfig, opened: OpenedCapture, store: StoreWriter, texts: Sequence[Text], skipped: dict[str, str]
) -> tuple[int, int, float]:
    """Capture some of the texts in growing rounds; return their bytes and tokens, and the last round's tokens/s."""
    # The first round is the shortest text, so that it ends soon even where a model is slow; then in order.
    first = min(range(len(texts)), key=lambda number: texts[number].n_bytes, default=0)
    waiting = [*texts[first : first + 1], *texts[:first], *texts[first + 1 :]]
    n_bytes = n_tokens = 0
    speed, budget, left = 0.0, 1, PROBE_SECONDS
    while waiting and left > 0:
        part = next(plan_batches(waiting, size_of, budget))
        skipped |= unusable_texts(config, opened, part, KeySet())
        usable = [text for text in part if text.id not in skipped]
        _, progress = CaptureJob(config, opened, store, partial(iter, usable), skipped, "probe").run()
        waiting = waiting[len(part) :]
        if progress.tokens:
            captured = sum(text.n_bytes for text in usable if text.id not in skipped)
            n_bytes, n_tokens = n_bytes + captured, n_tokens + progress.tokens
            seconds = max(progress.seconds, 1e-9)
            speed, left = progress.tokens / seconds, left - seconds
            budget = int(min(8 * captured, PROBE_BYTES - n_bytes, captured / seconds * left))
            # A text that is longer than the budget would be a round of its own.
            waiting = [text for text in waiting if text.n_bytes <= budget]
    return n_bytes, n_tokens, speed
