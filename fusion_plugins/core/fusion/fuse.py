"""Several projected distributions per position -> one fused distribution.

``min_ce`` takes, per text, the distributions of the source with the lowest cross-entropy; ``avg_ce`` mixes the sources;
``token_min_ce`` chooses per position. A cross-entropy array has the sources on its first axis and then as many of the
axes of the positions as it distinguishes: (S,) per text, (S, B) per text of a batch, (S, T) or (S, B, T) per position.

References: FuseLLM (arXiv 2401.10491), section 3.3; the published AvgCE weights are ``softmax(exp(-CE))``, kept as
``compat="fusellm"``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import FloatArray, as_array
from fusion_plugins.core.fusion.types import SparseDistributions, has_entries
from fusion_plugins.core.jit import compiled
from fusion_plugins.errors import ConfigError

#: ``rule(distributions, cross_entropies, **options)``; what the hook ``register_fusion_rules`` takes. The S
#: distributions all have one shape (T, K). The cross-entropies are (S,), or (S, T) for a rule marked with
#: :func:`per_token`.
FusionRule = Callable[..., SparseDistributions]
CrossEntropies = npt.ArrayLike


def per_token(rule: FusionRule) -> FusionRule:
    """Mark a rule that takes the cross-entropies of the target's next tokens, (S, T), instead of one per text."""
    rule.per_token = True  # type: ignore[attr-defined]
    return rule


def _by_position(rule: FusionRule) -> FusionRule:
    """Mark a rule that treats every position alone, so that many texts can be given to it one after the other."""
    rule.by_position = True  # type: ignore[attr-defined]
    return rule


def _selects(rule: FusionRule) -> FusionRule:
    """Mark a rule that takes distributions as they are, so that they can be truncated before it."""
    rule.selects = True  # type: ignore[attr-defined]
    return rule


def by_cross_entropy(rule: FusionRule) -> FusionRule:
    """Mark a rule that prefers the source that finds the text most likely."""
    rule.by_cross_entropy = True  # type: ignore[attr-defined]
    return rule


def weighted(rule: FusionRule) -> FusionRule:
    """Mark a rule that takes the weights of the sources, its option ``weights``, from their entries."""
    rule.weighted = True  # type: ignore[attr-defined]
    return rule


def fuse(
    distributions: Sequence[SparseDistributions],
    cross_entropies: CrossEntropies,
    *,
    rule: str | FusionRule = "min_ce",
    **options: Any,
) -> SparseDistributions:
    """Fuse S distributions per position into one.

    Args:
        distributions: S sources over one target vocabulary, ids and logprobs (T, K) or (B, T, K). K may differ: the
            rule gets all of them padded to the largest.
        cross_entropies: (S,), or with more of the axes of the positions; lower is better, in any one unit. NaN (a text
            without supervised tokens) counts as infinite.
        rule: a name in :data:`RULES`, or a function of the same form.
        **options: keyword arguments of the rule.

    Raises:
        ConfigError: an unknown rule, or shapes that do not belong together.

    Example:
        >>> zeros = np.zeros((1, 1), np.float32)
        >>> sources = [SparseDistributions(np.array([[i]], np.int32), zeros, zeros[0]) for i in (7, 9)]
        >>> fuse(sources, [1.2, 0.8]).ids.tolist()
        [[9]]
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigError(f"unknown fusion rule {rule!r}; expected one of {', '.join(sorted(RULES))}")
        rule = RULES[rule]
    width = max((d.ids.shape[-1] for d in distributions), default=0)
    return rule([padded(d, width) for d in distributions], cross_entropies, **options)


@by_cross_entropy
@_by_position
@_selects
def min_ce(
    distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies, *, missing: str = "mask"
) -> SparseDistributions:
    """Take each text's distributions from the source with the lowest cross-entropy; the first of equals.

    Args:
        distributions: S sources of one shape, ids and logprobs (..., T, K).
        cross_entropies: as in :func:`fuse`.
        missing: what happens at a position where the chosen source has no distribution. ``mask`` (default): none is
            taken. ``next_best``: the best source that has one. (The published code takes the target model's own.)

    Raises:
        ConfigError: shapes that do not belong together, or an unknown value of ``missing``.
    """
    if missing not in ("mask", "next_best"):
        raise ConfigError(f"missing: expected 'mask' or 'next_best', got {missing!r}")
    costs = _per_position(distributions, cross_entropies)
    if missing == "next_best":
        # A distribution that gives its label no probability is still better than none: its cost is the highest number,
        # not infinity.
        costs = np.nan_to_num(costs, nan=float(np.finfo(np.float64).max))
        costs = np.where(np.stack([d.present for d in distributions]), costs, np.inf)
    return _select(distributions, min_ce_choice(costs))


@by_cross_entropy
@_by_position
@_selects
@per_token
def token_min_ce(distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies) -> SparseDistributions:
    """Take each position from the source with the lowest cross-entropy there, among those that have a distribution.

    Args:
        distributions: as in :func:`min_ce`.
        cross_entropies: (S, T) or (S, B, T): nats of the label under each source.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    if np.ndim(cross_entropies) != distributions[0].ids.ndim:
        raise ConfigError(
            f"token_min_ce expects one cross-entropy per source and position, an array of {distributions[0].ids.ndim} "
            f"axes; got {np.ndim(cross_entropies)} axes. Use min_ce for cross-entropies per text."
        )
    return min_ce(distributions, cross_entropies, missing="next_best")


@by_cross_entropy
@_by_position
def avg_ce(
    distributions: Sequence[SparseDistributions],
    cross_entropies: CrossEntropies,
    *,
    temperature: float = 1.0,
    compat: str | None = None,
) -> SparseDistributions:
    """Mix the sources' probabilities, ``P = sum_s w_s P_s``, with weights from :func:`avg_ce_weights`.

    A source without a distribution at a position does not take part there; the weights of the others are scaled to sum
    to 1.

    Args:
        distributions: as in :func:`min_ce`.
        cross_entropies: as in :func:`fuse`.
        temperature: divides the cross-entropies; higher is more even.
        compat: ``"fusellm"`` for the published weights.
    """
    costs = _per_position(distributions, cross_entropies)
    return _mixture(distributions, avg_ce_weights(costs, temperature=temperature, compat=compat))


@weighted
@_by_position
def fixed_weights(
    distributions: Sequence[SparseDistributions],
    cross_entropies: CrossEntropies,
    *,
    weights: Sequence[float] | None = None,
) -> SparseDistributions:
    """Mix the sources' probabilities by weights that do not depend on the text.

    A source without a distribution at a position does not take part there; the weights of the others are scaled to sum
    to 1.

    Args:
        distributions: as in :func:`min_ce`.
        cross_entropies: as in :func:`fuse`; only their shape counts.
        weights: (S,) not negative, not all 0; None for equal ones.

    Raises:
        ConfigError: weights of another number or kind.
    """
    given = np.asarray([1.0] * len(distributions) if weights is None else weights, np.float64)
    if given.shape != (len(distributions),) or not (np.isfinite(given) & (given >= 0)).all() or not given.any():
        raise ConfigError(
            f"fixed_weights: expected {len(distributions)} weights, one per source, not negative and not all 0, got "
            f"{given.tolist()}. Give each source a `weight`."
        )
    shape = _per_position(distributions, cross_entropies).shape
    return _mixture(distributions, np.broadcast_to(given.reshape(-1, *[1] * (len(shape) - 1)), shape))


def _mixture(distributions: Sequence[SparseDistributions], weights: npt.NDArray[np.float64]) -> SparseDistributions:
    """Mix the sources that have a distribution at a position, by weights (S, ..., T)."""
    weights = np.where(np.stack([d.present for d in distributions]), weights, 0.0)
    total = weights.sum(axis=0)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    ids = np.stack([d.ids for d in distributions])
    logprobs = np.stack([d.logprobs for d in distributions])
    n_sources, *lead, width = ids.shape
    out_ids, out_logprobs = _mix(
        ids.reshape(n_sources, -1, width), logprobs.reshape(n_sources, -1, width), weights.reshape(n_sources, -1)
    )
    leftover = (weights * np.stack([d.leftover for d in distributions])).sum(axis=0)
    leftover = np.where(total > 0, leftover, 1.0).astype(np.float32)
    kept = (weights * kept_mass(distributions)).sum(axis=0).astype(np.float32)
    alone = (weights > 0).sum(axis=0) == 1
    source = np.where(alone, weights.argmax(axis=0), -1).astype(np.int16)
    return SparseDistributions(out_ids.reshape(*lead, -1), out_logprobs.reshape(*lead, -1), leftover, kept, source)


def chooses_by_text(rule: FusionRule, options: Mapping[str, Any]) -> bool:
    """Whether a rule takes all of a text from the source with the lowest cross-entropy, whatever the others say."""
    return rule is min_ce and options.get("missing", "mask") == "mask"


def min_ce_choice(cross_entropies: CrossEntropies) -> npt.NDArray[np.intp]:
    """Return the index of the source with the lowest cross-entropy, over the first axis; the first of equals."""
    costs = np.asarray(cross_entropies, np.float64)
    return np.argmin(np.where(np.isnan(costs), np.inf, costs), axis=0)


def avg_ce_weights(
    cross_entropies: CrossEntropies, *, temperature: float = 1.0, compat: str | None = None
) -> npt.NDArray[np.float64]:
    """Return the weights of the sources, softmax over the first axis of ``-CE / temperature``.

    Args:
        cross_entropies: (S, ...) nats per token or byte.
        temperature: positive; ignored by ``compat``.
        compat: ``"fusellm"``: softmax of ``exp(-CE)``, which is nearly uniform because its inputs lie in (0, 1].

    Raises:
        ConfigError: a temperature that is not positive, or an unknown ``compat``.

    Example:
        >>> avg_ce_weights([1.0, 2.0, 3.0], compat="fusellm").round(4).tolist()
        [0.3968, 0.3145, 0.2887]
    """
    costs = np.asarray(cross_entropies, np.float64)
    costs = np.where(np.isnan(costs), np.inf, costs)
    if compat not in (None, "fusellm"):
        raise ConfigError(f"compat: expected None or 'fusellm', got {compat!r}")
    if not temperature > 0:
        raise ConfigError(f"temperature: expected a number above 0, got {temperature!r}")
    scores = np.exp(-costs) if compat else -costs / temperature
    top = scores.max(axis=0, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=0, keepdims=True)
    uniform = np.full_like(weights, 1.0 / len(weights))
    return np.divide(weights, total, out=uniform, where=total > 0)


def truncate(distributions: SparseDistributions, width: int, *, renormalize: bool) -> SparseDistributions:
    """Keep the ``width`` most probable entries of each position; pad with empty entries up to ``width``.

    Args:
        distributions: (..., K) entries.
        width: entries to keep, at least 1.
        renormalize: scale the kept entries to sum to 1 (leftover 0) instead of moving the rest to ``leftover``.
    """
    ids, logprobs = distributions.ids, as_array(distributions.logprobs, np.float32)
    *lead, entries = ids.shape
    if not (logprobs[..., 1:] <= logprobs[..., :-1]).all():  # a rule of another package may not sort them
        order = np.argsort(-logprobs, axis=-1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logprobs, order, axis=-1)
    ids, logprobs, held = _cut(
        as_array(ids, np.int32).reshape(-1, entries), logprobs.reshape(-1, entries), width, renormalize
    )
    ids, logprobs, held = ids.reshape(*lead, width), logprobs.reshape(*lead, width), held.reshape(lead)
    if not renormalize:
        leftover = np.clip(1.0 - held, 0.0, 1.0).astype(np.float32)
        return SparseDistributions(ids, logprobs, leftover, held.astype(np.float32), distributions.source)
    leftover = np.where(held > 0, 0.0, 1.0).astype(np.float32)
    kept = None if distributions.kept is None else (distributions.kept * held).astype(np.float32)
    return SparseDistributions(ids, logprobs, leftover, kept, distributions.source)


RULES: dict[str, FusionRule] = {
    "min_ce": min_ce,
    "avg_ce": avg_ce,
    "token_min_ce": token_min_ce,
    "fixed_weights": fixed_weights,
}
"""Name -> rule(distributions, cross_entropies, **options)."""


def _per_position(
    distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies
) -> npt.NDArray[np.float64]:
    """Give every position its sources' cross-entropies: (S, ..., T)."""
    if not distributions:
        raise ConfigError("expected at least one source to fuse, got none")
    *shape, _ = distributions[0].ids.shape
    for d in distributions:
        if d.ids.shape != distributions[0].ids.shape:
            raise ConfigError(
                f"expected distributions of one text in one shape, got {distributions[0].ids.shape} and {d.ids.shape}. "
                "Call the rule through `fuse`, which pads them, with sources that were aligned with one text."
            )
    costs = np.asarray(cross_entropies, np.float64)
    if costs.shape != (len(distributions), *shape[: costs.ndim - 1]):
        raise ConfigError(
            f"expected cross-entropies of shape (S,) = ({len(distributions)},), or with leading axes of the positions "
            f"{tuple(shape)} after it; got {costs.shape}"
        )
    costs = costs.reshape(costs.shape + (1,) * (len(shape) + 1 - costs.ndim))
    return np.broadcast_to(costs, (len(distributions), *shape))


def _select(distributions: Sequence[SparseDistributions], choice: npt.NDArray[np.intp]) -> SparseDistributions:
    """Take each position from the source that ``choice`` (..., T) names."""
    first = distributions[0]
    ids, logprobs, leftover = first.ids, first.logprobs, first.leftover
    if len(distributions) > 1:
        ids, logprobs, leftover = ids.copy(), logprobs.copy(), leftover.copy()
    for index, source in enumerate(distributions[1:], start=1):
        chosen = choice == index
        ids[chosen], logprobs[chosen] = source.ids[chosen], source.logprobs[chosen]
        leftover[chosen] = source.leftover[chosen]
    kept = np.take_along_axis(kept_mass(distributions), choice[None], axis=0)[0]
    return SparseDistributions(ids, logprobs, leftover, kept, np.where(has_entries(ids), choice, -1).astype(np.int16))


def kept_mass(distributions: Sequence[SparseDistributions]) -> FloatArray:
    """Return (S, ..., T) float32: the true probability of each source that its entries hold."""
    return np.stack([_own_kept(d) for d in distributions])


def _own_kept(distributions: SparseDistributions) -> FloatArray:
    if distributions.kept is not None:
        return distributions.kept
    held: FloatArray = np.exp(distributions.logprobs.astype(np.float64)).sum(axis=-1).astype(np.float32)
    return held


def padded(distributions: SparseDistributions, width: int) -> SparseDistributions:
    """Return distributions with empty entries up to a width."""
    missing = width - distributions.ids.shape[-1]
    if missing <= 0:
        return distributions
    pad = [(0, 0)] * (distributions.ids.ndim - 1) + [(0, missing)]
    return replace(
        distributions,
        ids=np.pad(distributions.ids, pad, constant_values=-1),
        logprobs=np.pad(distributions.logprobs, pad, constant_values=-np.inf),
    )


@compiled
def _cut(ids, logprobs, width, renormalize):  # type: ignore[no-untyped-def]
    """Keep the first ``width`` entries of each position, perhaps scaled to sum to 1; also return their sum."""
    n_positions, n_kept = len(ids), min(width, ids.shape[1])
    out_ids = np.full((n_positions, width), -1, np.int32)
    out = np.full((n_positions, width), -np.inf, np.float32)
    held = np.zeros(n_positions)
    for t in range(n_positions):
        for k in range(n_kept):
            held[t] += np.exp(np.float64(logprobs[t, k]))
        log_held = np.float32(np.log(held[t]) if renormalize and held[t] > 0.0 else 0.0)
        for k in range(n_kept):
            out_ids[t, k], out[t, k] = ids[t, k], logprobs[t, k] - log_held
    return out_ids, out, held


@compiled
def _mix(ids, logprobs, weights):  # type: ignore[no-untyped-def]
    """Sum the weighted probabilities of equal ids, per position; sort by descending probability, then by id."""
    n_sources, n_positions, width = ids.shape
    out_ids = np.full((n_positions, n_sources * width), -1, np.int32)
    out = np.full((n_positions, n_sources * width), -np.inf, np.float32)
    found_ids = np.empty(n_sources * width, np.int32)
    for t in range(n_positions):
        n = 0
        for s in range(n_sources):
            for k in range(width):
                if ids[s, t, k] >= 0 and weights[s, t] > 0:
                    found_ids[n] = ids[s, t, k]
                    n += 1
        distinct = np.unique(found_ids[:n])
        mass = np.zeros(len(distinct))
        for s in range(n_sources):
            for k in range(width):
                if ids[s, t, k] >= 0 and weights[s, t] > 0:
                    mass[np.searchsorted(distinct, ids[s, t, k])] += weights[s, t] * np.exp(logprobs[s, t, k])
        order = np.argsort(-mass, kind="mergesort")
        for k in range(len(distinct)):
            out_ids[t, k], out[t, k] = distinct[order[k]], np.log(mass[order[k]])
    return out_ids, out
