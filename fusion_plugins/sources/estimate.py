"""``fusion sample --dry-run``: draw a few responses of every source, keep none, and estimate what all will take."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from fusion_plugins.errors import SourceError
from fusion_plugins.inputs import read_prompts
from fusion_plugins.progress import meter
from fusion_plugins.sources.backends.base import Refusal, Response, Source, open_source
from fusion_plugins.sources.sample import Draw, SampleConfig, planned_draws

#: responses of the first round; each further round draws four times as many as the one before
FIRST_ROUND = 4
#: a further round is drawn only if it should end within this time
ROUND_SECONDS = 20.0

Probed = list[tuple[Draw, Response]]


def estimate_samples(config: SampleConfig) -> dict[str, dict[str, float]]:
    """Draw some responses of each source, keep none, and estimate what all of them will take.

    Rounds grow up to the size of a batch, so that the speed is that of a real run.

    Returns:
        source -> ``responses``, ``tokens``, ``bytes``, ``hours``, ``tokens_per_second``; all but the first are
        estimates.
    """
    prompts = read_prompts(config.prompts, config.limit)
    estimates = {}
    for settings in config.chosen_sources:
        draws = planned_draws(config, settings, prompts)
        if not draws:
            continue
        source = open_source(settings, "sample")
        try:
            probed, speed = _probe(source, settings.source_name, draws, config.batch_requests)
        finally:
            source.close()
        tokens = _extrapolated(draws, probed, lambda response: response.n_tokens)
        estimates[settings.source_name] = {
            "responses": len(draws),
            "tokens": tokens,
            "bytes": _extrapolated(draws, probed, lambda response: len(response.text.encode())),
            "hours": tokens / max(speed, 1e-9) / 3600,
            "tokens_per_second": speed,
        }
    return estimates


def _probe(source: Source, name: str, draws: Sequence[Draw], most: int) -> tuple[Probed, float]:
    """Return what was drawn, and the tokens per second of the largest round of at most ``most`` responses."""
    order = _shuffled(draws)
    probed: Probed = []
    speed, largest = 0.0, 0
    start, size = 0, max(FIRST_ROUND, len({draw.prompt.domain for draw in draws}))
    while True:
        part = order[start : start + size]
        with meter(f"probe {name}", len(part)) as progress:
            results = list(source.sample([[draw.request for draw in part]]))
            seconds = progress.seconds
        drawn = [(part[index], response) for (_, index), response in results if isinstance(response, Response)]
        probed += drawn
        if len(part) > largest:
            speed, largest = sum(response.n_tokens for _, response in drawn) / max(seconds, 1e-9), len(part)
        start += size
        size = min(4 * size, most)
        # If the source answers one request after the other, the next round takes four times as long.
        if start >= len(order) or 4 * seconds > ROUND_SECONDS or len(part) >= most:
            break
    if not probed:
        reasons = [result.reason for _, result in results if isinstance(result, Refusal)]
        raise SourceError(f"source {name!r}: expected an answer to one of {start} prompts, got none: {reasons[0]}")
    return probed, speed


def _shuffled(draws: Sequence[Draw]) -> list[Draw]:
    """Return the draws in a random order that is always the same, with one of each domain first."""
    mixed = random.Random(0).sample(draws, len(draws))
    first = {draw.prompt.domain: draw for draw in reversed(mixed)}
    chosen = {draw.key for draw in first.values()}
    return [*first.values(), *(draw for draw in mixed if draw.key not in chosen)]


def _extrapolated(draws: Sequence[Draw], probed: Probed, size: Callable[[Response], int]) -> float:
    """Return the summed size of all responses; one that was not drawn counts as the mean of its domain."""
    sizes = defaultdict(list)
    for draw, response in probed:
        sizes[draw.prompt.domain].append(size(response))
    overall = fmean(value for values in sizes.values() for value in values) if sizes else 0.0
    means = {domain: fmean(values) for domain, values in sizes.items()}
    return sum(means.get(draw.prompt.domain, overall) for draw in draws)
