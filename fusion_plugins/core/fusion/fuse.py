"""Several projected distributions per position -> one.

Fifth step of the way of the data: S projected sources and their cross-entropies -> one fused target.

``min_ce`` takes, per text, the rows of the source with the lowest cross-entropy; ``avg_ce`` mixes the sources' rows;
``token_min_ce`` chooses per position. A cross-entropy array has the sources on its first axis and then as many of the
rows' axes as it distinguishes: (S,) per text, (S, B) per text of a batch, (S, T) or (S, B, T) per position.

References: FuseLLM (arXiv 2401.10491), section 3.3; the published AvgCE weights are ``softmax(exp(-CE))``, kept as
``compat="fusellm"``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.fusion.types import SparseDistributions
from fusion_plugins.core.jit import compiled
from fusion_plugins.errors import AlignmentError, ConfigError

__all__ = ["RULES", "avg_ce", "avg_ce_weights", "fuse", "min_ce", "min_ce_choice", "token_min_ce", "truncate"]

Rule = Callable[..., SparseDistributions]
CrossEntropies = npt.ArrayLike


def fuse(
    distributions: Sequence[SparseDistributions],
    cross_entropies: CrossEntropies,
    *,
    rule: str | Rule = "min_ce",
    **options: Any,
) -> SparseDistributions:
    """Fuse S distributions per position into one.

    Args:
        distributions: S sources over one target vocabulary, ids and logprobs (T, K) or (B, T, K); widths may differ.
        cross_entropies: (S,), or with more of the rows' axes; lower is better, in any one unit. NaN (a text without
            supervised tokens) counts as infinite.
        rule: a name in :data:`RULES`, or a function of the same form.
        **options: what the rule takes besides.

    Raises:
        ConfigError: an unknown rule, or shapes that do not belong together.

    Example:
        >>> zeros = np.zeros((1, 1), np.float32)
        >>> rows = [SparseDistributions(np.array([[i]], np.int32), zeros, zeros[0]) for i in (7, 9)]
        >>> fuse(rows, [1.2, 0.8]).ids.tolist()
        [[9]]
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigError(f"unknown fusion rule {rule!r}; expected one of {', '.join(sorted(RULES))}")
        rule = RULES[rule]
    return rule(distributions, cross_entropies, **options)


def min_ce(
    distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies, *, missing: str = "mask"
) -> SparseDistributions:
    """Take each text's rows from the source with the lowest cross-entropy; the first of equals.

    Args:
        distributions: as in :func:`fuse`.
        cross_entropies: as in :func:`fuse`.
        missing: what becomes of a position where the chosen source has no row. ``mask`` (default): no target there.
            ``next_best``: the best source that has one. (The published code puts the target model's own row there.)

    Raises:
        ConfigError: shapes that do not belong together, or an unknown value of ``missing``.
    """
    if missing not in ("mask", "next_best"):
        raise ConfigError(f"missing must be 'mask' or 'next_best', not {missing!r}")
    costs = _per_row(distributions, cross_entropies)
    if missing == "next_best":
        # A row whose label has no probability is still a row: its cost is the highest number, not infinity.
        costs = np.nan_to_num(costs, nan=float(np.finfo(np.float64).max))
        costs = np.where(np.stack([d.rows for d in distributions]), costs, np.inf)
    return _select(distributions, min_ce_choice(costs))


def token_min_ce(distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies) -> SparseDistributions:
    """Take each position's row from the source with the lowest cross-entropy there, among those that have a row.

    Args:
        distributions: as in :func:`fuse`.
        cross_entropies: (S, T) or (S, B, T): nats of the label under each source.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    if np.ndim(cross_entropies) != distributions[0].ids.ndim:
        raise ConfigError(
            f"token_min_ce needs one cross-entropy per source and position; expected {distributions[0].ids.ndim} axes, "
            f"came {np.ndim(cross_entropies)}. Use min_ce for cross-entropies per text."
        )
    return min_ce(distributions, cross_entropies, missing="next_best")


def avg_ce(
    distributions: Sequence[SparseDistributions],
    cross_entropies: CrossEntropies,
    *,
    temperature: float = 1.0,
    compat: str | None = None,
) -> SparseDistributions:
    """Mix the sources' probabilities, ``P = sum_s w_s P_s``, with weights from :func:`avg_ce_weights`.

    A source without a row at a position does not take part there; the weights of the others are scaled to sum to 1.

    Args:
        distributions: as in :func:`fuse`.
        cross_entropies: as in :func:`fuse`.
        temperature: divides the cross-entropies; higher is more even.
        compat: ``"fusellm"`` for the published weights.
    """
    costs = _per_row(distributions, cross_entropies)
    weights = avg_ce_weights(costs, temperature=temperature, compat=compat)
    usable = np.stack([d.rows for d in distributions])
    weights = np.where(usable, weights, 0.0)
    total = weights.sum(axis=0)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    width = max(d.ids.shape[-1] for d in distributions)
    ids = np.stack([_padded(d, width).ids for d in distributions])
    logprobs = np.stack([_padded(d, width).logprobs for d in distributions])
    n_sources, lead = len(distributions), ids.shape[1:-1]
    out_ids, out_logprobs = _mix(
        ids.reshape(n_sources, -1, width), logprobs.reshape(n_sources, -1, width), weights.reshape(n_sources, -1)
    )
    leftover = (weights * np.stack([d.leftover for d in distributions])).sum(axis=0)
    leftover = np.where(total > 0, leftover, 1.0).astype(np.float32)
    return SparseDistributions(out_ids.reshape(*lead, -1), out_logprobs.reshape(*lead, -1), leftover)


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
        raise ConfigError(f"compat must be None or 'fusellm', not {compat!r}")
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, not {temperature!r}")
    scores = np.exp(-costs) if compat else -costs / temperature
    top = scores.max(axis=0, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=0, keepdims=True)
    uniform = np.full_like(weights, 1.0 / len(weights))
    return np.divide(weights, total, out=uniform, where=total > 0)


def truncate(distributions: SparseDistributions, width: int, *, renormalize: bool) -> SparseDistributions:
    """Keep the ``width`` most probable entries of each row; pad with empty entries up to ``width``.

    Args:
        distributions: (..., K), rows by descending probability.
        width: entries to keep, at least 1.
        renormalize: scale the kept entries to sum to 1 (leftover 0) instead of moving the rest to ``leftover``.
    """
    padded = _padded(distributions, width)
    ids, logprobs = padded.ids[..., :width], padded.logprobs[..., :width]
    kept = np.exp(logprobs.astype(np.float64)).sum(axis=-1)
    if not renormalize:
        return SparseDistributions(ids, logprobs, np.clip(1.0 - kept, 0.0, 1.0).astype(np.float32))
    log_kept = np.log(np.where(kept > 0, kept, 1.0)).astype(np.float32)
    return SparseDistributions(ids, logprobs - log_kept[..., None], np.where(kept > 0, 0.0, 1.0).astype(np.float32))


RULES: dict[str, Rule] = {"min_ce": min_ce, "avg_ce": avg_ce, "token_min_ce": token_min_ce}
"""Name -> rule(distributions, cross_entropies, **options)."""


def _per_row(distributions: Sequence[SparseDistributions], cross_entropies: CrossEntropies) -> npt.NDArray[np.float64]:
    """Give every row its sources' cross-entropies: (S, ..., T)."""
    if not distributions:
        raise ConfigError("fusion needs at least one source")
    shape = distributions[0].ids.shape[:-1]
    for d in distributions:
        if d.ids.shape[:-1] != shape:
            raise AlignmentError(f"sources of one text must have the same rows; came {shape} and {d.ids.shape[:-1]}")
    costs = np.asarray(cross_entropies, np.float64)
    if costs.shape != (len(distributions), *shape[: costs.ndim - 1]):
        raise ConfigError(
            f"expected cross-entropies of shape (S,) = ({len(distributions)},), or with leading axes of the rows "
            f"{shape} after it; came {costs.shape}"
        )
    costs = costs.reshape(costs.shape + (1,) * (len(shape) + 1 - costs.ndim))
    return np.broadcast_to(costs, (len(distributions), *shape))


def _select(distributions: Sequence[SparseDistributions], choice: npt.NDArray[np.intp]) -> SparseDistributions:
    """Take each row from the source that ``choice`` (..., T) names."""
    width = max(d.ids.shape[-1] for d in distributions)
    padded = [_padded(d, width) for d in distributions]
    ids, logprobs, leftover = padded[0].ids.copy(), padded[0].logprobs.copy(), padded[0].leftover.copy()
    for index, source in enumerate(padded[1:], start=1):
        rows = choice == index
        ids[rows], logprobs[rows], leftover[rows] = source.ids[rows], source.logprobs[rows], source.leftover[rows]
    return SparseDistributions(ids, logprobs, leftover)


def _padded(distributions: SparseDistributions, width: int) -> SparseDistributions:
    missing = width - distributions.ids.shape[-1]
    if missing <= 0:
        return distributions
    pad = [(0, 0)] * (distributions.ids.ndim - 1) + [(0, missing)]
    return SparseDistributions(
        np.pad(distributions.ids, pad, constant_values=-1),
        np.pad(distributions.logprobs, pad, constant_values=-np.inf),
        distributions.leftover,
    )


@compiled
def _mix(ids, logprobs, weights):  # type: ignore[no-untyped-def]
    """Sum the weighted probabilities of equal ids, row by row; sort by descending probability, then by id."""
    n_sources, n_rows, width = ids.shape
    out_ids = np.full((n_rows, n_sources * width), -1, np.int32)
    out = np.full((n_rows, n_sources * width), -np.inf, np.float32)
    row_ids = np.empty(n_sources * width, np.int32)
    for t in range(n_rows):
        n = 0
        for s in range(n_sources):
            for k in range(width):
                if ids[s, t, k] >= 0 and weights[s, t] > 0:
                    row_ids[n] = ids[s, t, k]
                    n += 1
        distinct = np.unique(row_ids[:n])
        mass = np.zeros(len(distinct))
        for s in range(n_sources):
            for k in range(width):
                if ids[s, t, k] >= 0 and weights[s, t] > 0:
                    mass[np.searchsorted(distinct, ids[s, t, k])] += weights[s, t] * np.exp(logprobs[s, t, k])
        order = np.argsort(-mass, kind="mergesort")
        for k in range(len(distinct)):
            out_ids[t, k], out[t, k] = distinct[order[k]], np.log(mass[order[k]])
    return out_ids, out
