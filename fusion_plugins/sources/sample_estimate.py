"""``fusion sample --dry-run``: draw a few responses of every source, keep none, and estimate what all will take."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fusion_plugins.errors import SourceError
from fusion_plugins.inputs import Unusable
from fusion_plugins.progress import meter
from fusion_plugins.sources.backends.base import Refusal, Response, SampleRequest, Source, open_source
from fusion_plugins.sources.parts import chosen
from fusion_plugins.sources.sample import Draw, open_asked, planned_draws
from fusion_plugins.sources.sample_config import SampleConfig, SampledSource

#: responses of the first round, and their longest length in tokens, so that it ends soon even where a source is slow;
#: further rounds have longer responses until none is cut, then four times as many
FIRST_ROUND, FIRST_TOKENS = 4, 32
#: a further round is drawn only if it should end within this time
ROUND_SECONDS = 20.0


@dataclass(frozen=True)
class _Size:
    """How large a response that was drawn is; of one that the dry run has cut, how large it can be at most."""

    domain: str
    tokens: float
    n_bytes: float


def estimate_samples(config: SampleConfig) -> dict[str, dict[str, float]]:
    """Draw some responses of each source, keep none, and estimate what all of them will take.

    Rounds grow up to the size of a batch, so that the speed is that of a real run. Where a source is so slow that
    responses had to be cut, they count as long as ``max_tokens`` allows.

    Returns:
        source -> ``responses``, ``tokens``, ``bytes``, ``hours``, ``tokens_per_second``; all but the first are
        estimates.

    Raises:
        SourceError: a source cannot be opened, or answers none of the prompts.
    """
    unusable: Unusable | None = None if config.on_unusable == "raise" else {}
    prompts = open_asked(config, unusable)
    estimates = {}
    for settings in config.chosen_sources:

        def draws(settings: SampledSource = settings) -> Iterator[Draw]:
            return planned_draws(config, settings, chosen(prompts, config.limit, config.shard))

        domains = Counter(draw.prompt.domain for draw in draws())
        if not domains:
            continue
        source = open_source(settings, "sample")
        try:
            sizes, speed = _probe(
                source, settings.source_name, _some(draws, domains, config.batch_requests), config.batch_requests
            )
        finally:
            source.close()
        tokens = _extrapolated(domains, [(size.domain, size.tokens) for size in sizes])
        estimates[settings.source_name] = {
            "responses": domains.total(),
            "tokens": tokens,
            "bytes": _extrapolated(domains, [(size.domain, size.n_bytes) for size in sizes]),
            "hours": tokens / max(speed, 1e-9) / 3600,
            "tokens_per_second": speed,
        }
    return estimates


def _probe(source: Source, name: str, order: Sequence[Draw], most: int) -> tuple[list[_Size], float]:
    """Return the sizes of what was drawn, and the tokens per second of the last round of at most ``most`` responses."""
    sizes: list[_Size] = []
    speed = 0.0
    start, count, longest = 0, max(FIRST_ROUND, len({draw.prompt.domain for draw in order})), FIRST_TOKENS
    while True:
        part = order[start : start + count]
        with meter(f"probe {name}", len(part), unit="responses") as progress:
            results = list(source.sample([[_cut(draw.request, longest) for draw in part]]))
            seconds = max(progress.seconds, 1e-9)
        drawn = [(part[index], response) for (_, index), response in results if isinstance(response, Response)]
        cut = any(_was_cut(draw, response, longest) for draw, response in drawn)
        speed = sum(response.n_tokens for _, response in drawn) / seconds or speed
        found = [_size(draw, response, longest) for draw, response in drawn]
        limit = max(draw.request.sampling.max_tokens for draw in part)
        # If the source answers one request after the other, four times as many take four times as long.
        growth = limit / longest if cut else 4.0
        if cut and growth * seconds > ROUND_SECONDS:
            sizes += found
            break
        if cut:  # the same prompts again, with responses as long as they want to be
            longest = limit
            continue
        sizes, start, longest = sizes + found, start + len(part), max(longest, limit)
        if start >= len(order) or growth * seconds > ROUND_SECONDS or len(part) >= most:
            break
        count = min(4 * count, most)
    if not sizes:
        reasons = [result.reason for _, result in results if isinstance(result, Refusal)]
        raise SourceError(f"source {name!r}: expected an answer to one of {start} prompts, got none: {reasons[0]}")
    return sizes, speed


def _cut(request: SampleRequest, longest: int) -> SampleRequest:
    most = min(longest, request.sampling.max_tokens)
    return replace(request, sampling=request.sampling.model_copy(update={"max_tokens": most}))


def _was_cut(draw: Draw, response: Response, longest: int) -> bool:
    return response.finish_reason == "length" and longest < draw.request.sampling.max_tokens


def _size(draw: Draw, response: Response, longest: int) -> _Size:
    stretch = draw.request.sampling.max_tokens / longest if _was_cut(draw, response, longest) else 1.0
    return _Size(draw.prompt.domain, stretch * response.n_tokens, stretch * len(response.text.encode()))


def _some(draws: Callable[[], Iterator[Draw]], domains: Counter[str], most: int) -> list[Draw]:
    """Return as many draws as the rounds take, in a random order that is always the same, one of each domain first."""
    count = domains.total()
    # Rounds grow fourfold up to `most`, and the last ends it.
    wanted = min(count, 2 * most + max(FIRST_ROUND, len(domains)))
    numbers = random.Random(0).sample(range(count), wanted)
    order = {number: place for place, number in enumerate(numbers)}
    first: dict[str, Draw] = {}
    chosen: dict[int, Draw] = {}
    for number, draw in enumerate(draws()):
        if first.setdefault(draw.prompt.domain, draw) is not draw and number in order:
            chosen[order[number]] = draw
    return [*first.values(), *(draw for _, draw in sorted(chosen.items()))]


def _extrapolated(domains: Counter[str], sizes: Sequence[tuple[str, float]]) -> float:
    """Return the summed size of all responses; each counts as the mean of its domain, or of all domains.

    Args:
        domains: domain -> number of all its responses.
        sizes: domain and size of those that were drawn.
    """
    by_domain = defaultdict(list)
    for domain, size in sizes:
        by_domain[domain].append(size)
    overall = fmean(size for _, size in sizes)
    means = {domain: fmean(values) for domain, values in by_domain.items()}
    return sum(count * means.get(domain, overall) for domain, count in domains.items())
