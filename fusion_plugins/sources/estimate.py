"""``fusion sample --dry-run``: draw a little of every source, keep nothing, and say what everything will take."""

import random
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean

from fusion_plugins.errors import SourceError
from fusion_plugins.inputs import read_prompts
from fusion_plugins.progress import meter
from fusion_plugins.sources.backends.base import Refusal, Response, Source, open_source
from fusion_plugins.sources.sample import Item, SampleConfig, SampledSource, chosen_sources, items_of, request_of

__all__ = ["estimate_samples"]

#: a dry run draws so many responses, then four times as many, ... while the next round ends within so many seconds
PROBE_REQUESTS, PROBE_SECONDS = 4, 20.0

Probed = list[tuple[Item, Response]]


def estimate_samples(config: SampleConfig) -> dict[str, dict[str, float]]:
    """Draw some responses of each source, keep none, and say what all of them will take.

    Rounds grow up to the width of a unit, so that the speed is that of a real run.

    Returns:
        source -> ``responses``, ``tokens``, ``bytes``, ``hours``, ``tokens_per_second``; estimates but for the first.
    """
    prompts = read_prompts(config.prompts, config.limit)
    estimates = {}
    for settings in chosen_sources(config):
        items = items_of(config, settings, prompts)
        if not items:
            continue
        source = open_source(settings, "sample")
        try:
            probed, speed = _probe(config, settings, source, items)
        finally:
            source.close()
        tokens = _extrapolated(items, probed, lambda response: response.n_tokens)
        estimates[settings.source_name] = {
            "responses": len(items),
            "tokens": tokens,
            "bytes": _extrapolated(items, probed, lambda response: len(response.text.encode())),
            "hours": tokens / max(speed, 1e-9) / 3600,
            "tokens_per_second": speed,
        }
    return estimates


def _probe(config: SampleConfig, settings: SampledSource, source: Source, items: list[Item]) -> tuple[Probed, float]:
    """Return what was drawn, and the tokens per second of the widest round."""
    order = _spread(items)
    domains = len({item.prompt.domain for item in items})
    probed: Probed = []
    speed, widest = 0.0, 0
    start, width = 0, max(PROBE_REQUESTS, domains)
    while True:
        part = order[start : start + width]
        with meter(f"probe {settings.source_name}", len(part)) as progress:
            results = list(source.sample([[request_of(config, settings, item) for item in part]]))
            seconds = progress.seconds
        drawn = [(part[index], response) for (_, index), response in results if isinstance(response, Response)]
        probed += drawn
        if len(part) > widest:
            speed, widest = sum(response.n_tokens for _, response in drawn) / max(seconds, 1e-9), len(part)
        start += width
        width = min(4 * width, config.unit_requests)
        # As if nothing ran side by side: the next round may take four times as long.
        if start >= len(order) or 4 * seconds > PROBE_SECONDS or len(part) >= config.unit_requests:
            break
    if not probed:
        reasons = [result.reason for _, result in results if isinstance(result, Refusal)]
        raise SourceError(f"source {settings.source_name!r} answers none of {start} prompts: {reasons[0]}")
    return probed, speed


def _spread(items: list[Item]) -> list[Item]:
    """Return the items at random, always in the same way, one of each domain first."""
    mixed = random.Random(0).sample(items, len(items))
    first = {item.prompt.domain: item for item in reversed(mixed)}
    chosen = {item.name for item in first.values()}
    return [*first.values(), *(item for item in mixed if item.name not in chosen)]


def _extrapolated(items: list[Item], probed: Probed, size: Callable[[Response], int]) -> float:
    """Sum of the sizes of all responses: those of a domain are as large as the drawn ones of it are on average."""
    sizes = defaultdict(list)
    for item, response in probed:
        sizes[item.prompt.domain].append(size(response))
    overall = fmean(value for values in sizes.values() for value in values) if sizes else 0.0
    means = {domain: fmean(values) for domain, values in sizes.items()}
    return sum(means.get(item.prompt.domain, overall) for item in items)
