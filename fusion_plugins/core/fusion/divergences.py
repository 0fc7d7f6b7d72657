"""Divergences of the trained model's distributions from the fused ones, as functions of the K stored entries alone.

Each takes the student's log-probabilities at the stored ids, the fused log-probabilities and a mask, all (..., K), and
returns one value per position, nats. A registered loss has the same form.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from fusion_plugins.errors import ConfigError, PluginError

Divergence: TypeAlias = Callable[..., Tensor]

#: Probability that a bucket holds at least; keeps log(0) and its gradient out of the two-sided divergences.
FLOOR = 1e-7
#: The two-sided divergences raise the student's log-probabilities to at least this, because 0 * -inf is NaN.
LOWEST = -1e4


def cross_entropy(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """Cross-entropy ``-sum p log q`` over the stored entries, nats; mass outside them weighs nothing.

    Args:
        student_logprobs: (..., K) log-probabilities of the trained model at the stored ids, 0 where masked.
        fused_logprobs: (..., K) fused log-probabilities, 0 where masked.
        fused_mask: (..., K) bool, which entries hold a probability.

    Returns:
        (...) one value per position.
    """
    return -(_probabilities(fused_logprobs, fused_mask) * student_logprobs).sum(-1)


def forward_kl(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """``sum p (log p - log q)`` over the stored entries: the gradient of :func:`cross_entropy`, another value."""
    return (_probabilities(fused_logprobs, fused_mask) * (fused_logprobs - student_logprobs)).sum(-1)


def reverse_kl(student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """``sum q (log q - log p)`` over the stored entries and one bucket for everything else.

    Without the bucket the model could lower the value by moving its mass off the stored entries. The bucket's
    probability in the fused distribution is at least :data:`FLOOR`, so the value is finite where it has no mass there.
    """
    student_logprobs = student_logprobs.clamp_min(LOWEST)
    q = _probabilities(student_logprobs, fused_mask)
    inside = (q * (student_logprobs - fused_logprobs)).sum(-1)
    q_rest, p_rest = _rest(q), _rest(_probabilities(fused_logprobs, fused_mask))
    return inside + q_rest * (q_rest.log() - p_rest.log())


def jensen_shannon(
    student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor, *, beta: float = 0.5
) -> Tensor:
    """``beta KL(p | m) + (1 - beta) KL(q | m)`` with ``m = beta p + (1 - beta) q``, and one bucket for the rest.

    Exact when the fused distribution has no mass outside its entries; at most log 2 between the ends. Divided by beta,
    or by 1 - beta, it tends to ``KL(p | q)`` at 0 and to ``KL(q | p)``, :func:`reverse_kl`, at 1. These are its values
    there.

    Args:
        student_logprobs: (..., K), q.
        fused_logprobs: (..., K), p.
        fused_mask: (..., K).
        beta: weight of p in the middle, in [0, 1].

    Raises:
        ConfigError: another beta.

    References:
        GKD, arXiv 2306.13649, equation 1.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta: expected a number from 0 to 1, got {beta!r}")
    if beta == 1:
        return reverse_kl(student_logprobs, fused_logprobs, fused_mask)
    student_logprobs = student_logprobs.clamp_min(LOWEST)
    p, q = _probabilities(fused_logprobs, fused_mask), _probabilities(student_logprobs, fused_mask)
    p_rest, q_rest = _rest(p), _rest(q)
    if beta == 0:
        return (p * (fused_logprobs - student_logprobs)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    middle = (beta * p + (1 - beta) * q).clamp_min(FLOOR**2).log()
    middle_rest = (beta * p_rest + (1 - beta) * q_rest).log()
    inside = (beta * p * (fused_logprobs - middle) + (1 - beta) * q * (student_logprobs - middle)).sum(-1)
    return inside + beta * p_rest * (p_rest.log() - middle_rest) + (1 - beta) * q_rest * (q_rest.log() - middle_rest)


LOSSES: dict[str, Divergence] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
}


def divergence(kind: str | Divergence, known: Mapping[str, Divergence] = LOSSES) -> Divergence:
    """Return the divergence of a name, or the function itself; raises ConfigError for an unknown name."""
    if callable(kind):
        return kind
    if kind not in known:
        raise ConfigError(f"unknown loss {kind!r}; expected one of {', '.join(known)}, or a function")
    return known[kind]


def values_of(loss: Divergence, student_logprobs: Tensor, fused_logprobs: Tensor, fused_mask: Tensor) -> Tensor:
    """Return a divergence of n positions (n,), whose entries are (n, K).

    A value of another shape would be spread over the other positions and count many times, and one without a gradient
    would leave out the fusion loss; neither would be noticed.

    Raises:
        PluginError: the function returns anything but one value per position, or no gradient flows through it.
    """
    found = loss(student_logprobs, fused_logprobs, fused_mask)
    name, shape = getattr(loss, "__name__", type(loss).__name__), tuple(student_logprobs.shape[:-1])
    if not isinstance(found, Tensor) or found.shape != shape:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise PluginError(
            f"loss {name}: expected one value per position, a tensor of shape {shape} for entries of shape "
            f"{tuple(student_logprobs.shape)}; got {got}. Correct the function, or take another loss."
        )
    if student_logprobs.requires_grad and not found.requires_grad:
        raise PluginError(
            f"loss {name}: expected values through which gradients flow to student_logprobs, got values without a "
            "gradient: nothing would be learnt from the fused distributions. Correct the function (detach, item and "
            "no_grad end a gradient)."
        )
    return found


def _probabilities(logprobs: Tensor, mask: Tensor) -> Tensor:
    return logprobs.exp() * mask


def _rest(probabilities: Tensor) -> Tensor:
    return (1 - probabilities.sum(-1)).clamp_min(FLOOR)
