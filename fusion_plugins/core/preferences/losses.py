"""Preference losses of model fusion, one value per pair, from log-ratios ``log pi(y | x) - log ref(y | x)``.

``pi`` is the model that is trained, ``ref`` the reference; the log-probabilities are sums over the tokens of an answer,
its end of turn included. ``|y|`` is the number of those tokens. Everything here is differentiable in the log-ratios.

:func:`dpo`, :func:`dpo_per_token`, :func:`ipo` and :func:`hinge` are TRL's losses ``sigmoid``, ``sigmoid_norm``,
``ipo`` and ``hinge``, here one value per pair, so that pairs can be weighted (:mod:`.weights`). :func:`wrpo` has three
answers. :func:`fused_reference` is what InfiFPO puts in the place of the reference's log-probabilities.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import logsigmoid

Array = npt.NDArray[np.float64]
#: how the sources become one reference
ReferenceRule = Literal["max_margin", "mean"]


def dpo(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the logistic loss ``-(1 - s) log sigma(m) - s log sigma(-m)`` (Rafailov et al., 2023; s: Mitchell, 2023).

    Args:
        margin: (B,) ``beta * (ratio of the chosen answer - ratio of the rejected one)``.
        label_smoothing: ``s``, the share of pairs that are taken to be the wrong way round.

    Returns:
        (B,) losses; log 2 where the margin is 0.

    Example:
        >>> import torch
        >>> dpo(torch.tensor([0.0, 2.0], dtype=torch.float64)).tolist()
        [0.6931471805599453, 0.1269280110429725]
    """
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def wrpo(
    source: Tensor, own: Tensor, rejected: Tensor, *, beta: float, alpha: float, label_smoothing: float = 0.0
) -> Tensor:
    """Return the loss of WRPO (arXiv 2412.03187), Weighted-Reward Preference Optimization.

    ``-log sigma(beta * (alpha * r(y_source) + (1 - alpha) * r(y_own) - r(y_rejected)))``

    With ``alpha`` 0 it is :func:`dpo` on the target's own pair, with 1 the chosen answer is the source's.

    Args:
        source: (B,) log-ratio of the best answer of a source.
        own: (B,) log-ratio of the target's own best answer.
        rejected: (B,) log-ratio of the target's own worst answer.
        beta: strength of the reference.
        alpha: weight of the source's answer, in [0, 1].
        label_smoothing: as for :func:`dpo`.

    Returns:
        (B,) losses.
    """
    return dpo(beta * (alpha * source + (1 - alpha) * own - rejected), label_smoothing)


def wrpo_alpha(final: float, step: int, steps: int) -> float:
    """Return the weight of the source's answer at a step: ``final * step / steps``, from 0 on (WRPO's own schedule).

    Args:
        final: the weight at the end of the training.
        step: optimiser steps that are done.
        steps: optimiser steps of the whole training.

    Example:
        >>> [wrpo_alpha(0.1, step, 4) for step in (0, 2, 4, 5)]
        [0.0, 0.05, 0.1, 0.1]
    """
    return final * min(1.0, step / max(1, steps))


def _logistic(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], beta: float) -> Tensor:
    return dpo(beta * (chosen - rejected))


def dpo_per_token(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Return length-normalised DPO, ``-log sigma(beta * (r_w / |y_w| - r_l / |y_l|))``, TRL's ``sigmoid_norm``.

    Args:
        chosen: (B,) log-ratios ``r_w``.
        rejected: (B,) log-ratios ``r_l``.
        lengths: tokens of the chosen and of the rejected answers, (B,) each.
        beta: strength of the reference; about 10, because a mean per token is small.
    """
    return dpo(beta * (chosen / lengths[0] - rejected / lengths[1]))


def ipo(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Return ``(r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2`` (Azar et al., 2023; per token, as TRL has it)."""
    return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """Return ``max(0, 1 - beta * (r_w - r_l))`` (SLiC)."""
    return (1 - beta * (chosen - rejected)).relu()


#: TRL's name of a loss -> one value per pair, from log-ratios, lengths and beta
PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, tuple[Tensor, Tensor], float], Tensor]] = {
    "sigmoid": _logistic,
    "sigmoid_norm": dpo_per_token,
    "ipo": ipo,
    "hinge": hinge,
}


def fused_reference(
    sources: Array, target: Array | None, *, rule: ReferenceRule = "max_margin", clip: bool = True
) -> Array:
    """Return the reference of InfiFPO (arXiv 2505.13878): one log-probability per answer out of those of all sources.

    All log-probabilities are means over a model's own tokens of the whole answer, so the models need no common
    vocabulary. InfiFPO's loss is :func:`dpo_per_token` with ``ref(y) = fused(y)`` and ``log ref = fused * |y|``.

    * **Clipping**: a source counts only as far as it agrees with the preference more than the untrained target. For the
      chosen answer its value is raised to the target's, for the rejected one lowered to it.
    * **mean**: the mean over the sources, the logarithm of a product with equal exponents that sum to 1.
    * **max_margin**: per pair the one source that is farthest from the target, by the sum of both absolute differences;
      the first of several. After clipping that is the source with the widest margin between the two answers.

    Args:
        sources: (S, P, 2) of S sources, for P pairs: of the chosen answer, then of the rejected one.
        target: (P, 2) of the untrained target; None where neither clipping nor ``max_margin`` of several
            sources needs it.
        rule: ``max_margin`` or ``mean``.
        clip: whether to clip.

    Returns:
        (P, 2) mean log-probabilities per token.

    Example:
        >>> target = np.array([[-1.0, -1.0]])
        >>> sources = np.array([[[-0.5, -0.75]], [[-0.75, -2.0]]])
        >>> fused_reference(sources, target).tolist(), fused_reference(sources, target, rule="mean").tolist()
        ([[-0.75, -2.0]], [[-0.625, -1.5]])
    """
    if clip:
        assert target is not None
        sources = np.stack([np.maximum(sources[..., 0], target[:, 0]), np.minimum(sources[..., 1], target[:, 1])], -1)
    if rule == "mean" or len(sources) == 1:
        return sources.mean(0)
    assert target is not None
    farthest = np.abs(sources - target).sum(-1).argmax(0)  # (P,)
    return sources[farthest, np.arange(sources.shape[1])]
