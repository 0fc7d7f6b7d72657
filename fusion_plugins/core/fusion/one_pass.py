"""Both losses of a linear output layer, and their gradients, in one pass over the vocabulary.

Every loss of this package depends on the logits z of a position only through ``l_k = z[id_k] - logsumexp(z)`` at the K
stored ids and the label. With ``c = dL/dl`` (K + 1 numbers) the gradient is

    dL/dz_v = sum_k c_k [v = id_k] - (sum_k c_k) softmax(z)_v

so each chunk of positions needs one product with the output layer's weight, a log-normaliser, a gather, the K + 1
coefficients (autograd on a small leaf, so that a registered loss works too), and two products back. Nothing runs again
in the backward pass, which multiplies what the forward pass has made by the incoming scalar.

Letters as in :mod:`fusion_plugins.core.fusion.losses`: N positions, V vocabulary, H hidden size, K entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusion_plugins.core.fusion.losses import Divergence, FusedEntries, divergence, kept_positions

#: Logits held at once: 2**28 bfloat16 numbers are 512 MB. Chunks have a multiple of ROWS positions, for the products.
CHUNK_ELEMENTS = 2**28
ROWS = 128


@dataclass(frozen=True)
class WeightedLosses:
    """What :func:`weighted_losses` returns, summed over the positions.

    Attributes:
        total: () ``lm_weight * lm + fusion_weight * fusion``, nats; it alone has a gradient.
        lm: () sum of the cross-entropies of the labels, nats.
        fusion: () sum of the divergences from the fused distributions, nats.
    """

    total: Tensor
    lm: Tensor
    fusion: Tensor


def weighted_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    fused: tuple[Tensor, Tensor],
    *,
    lm_weight: float,
    kind: str | Divergence = "ce",
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> WeightedLosses:
    """``lm_weight * LM + (1 - lm_weight) * fusion`` of a batch whose output layer is linear.

    The same as :func:`fusion_plugins.core.fusion.losses.token_losses` with ``head = x @ weight.T + bias``, in value and
    gradients, without running the output layer twice.

    Args:
        hidden: (B, T, H) last hidden states. Under autocast the products run in its dtype. Log-normalisers, losses, and
            the sum of the weight's gradient over the chunks are float32 (float64 for float64 states).
        weight: (V, H) of the output layer.
        bias: (V,) or None.
        labels: (B, T) token ids, -100 where not supervised; not shifted.
        fused: ids (B, T, K), -1 for an empty entry, and log-probabilities (B, T, K).
        lm_weight: weight of the language-model loss, in [0, 1].
        kind: divergence, a name or a function of that form.
        temperature: of the fused distributions.
        chunk_size: positions per chunk; by default as many as :data:`CHUNK_ELEMENTS` logits allow.

    Raises:
        ConfigError: unknown kind, or a temperature that is not positive.
        DataError: shapes that do not belong together.
    """
    kept, following, entries = kept_positions(hidden, labels, fused, temperature)
    rows = chunk_size or max(1, CHUNK_ELEMENTS // weight.shape[0] // ROWS) * ROWS
    weights = (lm_weight, 1 - lm_weight)
    return WeightedLosses(
        *_WeightedLosses.apply(
            hidden[kept], weight, bias, following, entries, divergence(kind), weights, rows, torch.is_grad_enabled()
        )
    )


class _WeightedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        fused: FusedEntries,
        loss: Divergence,
        weights: tuple[float, float],
        rows: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        inputs, products = states.to(dtype), weight.to(dtype)
        offsets = None if bias is None else bias.to(dtype)
        wanted = tuple(needed and differentiable for needed in ctx.needs_input_grad[:3])
        gradients = (
            torch.empty_like(inputs) if wanted[0] else None,
            torch.zeros(weight.shape, dtype=sums, device=weight.device) if wanted[1] else None,
            torch.zeros(weight.shape[:1], dtype=sums, device=weight.device) if wanted[2] else None,
        )
        lm, fusion = (torch.zeros((), dtype=sums, device=states.device) for _ in range(2))
        # Autocast would cast the small tensors of the losses too.
        with torch.autocast(device, enabled=False):
            for start in range(0, inputs.shape[0], rows):
                part = slice(start, start + rows)
                logits = torch.nn.functional.linear(inputs[part], products, offsets).to(sums)
                ids = torch.cat([fused.ids[part], labels[part].unsqueeze(-1)], -1)
                logprobs, mass = _logprobs_at(logits, ids)
                terms, slopes = _terms(logprobs, fused[part], loss, weights, any(wanted))
                lm += terms[0]
                fusion += terms[1]
                if any(wanted):
                    # dL/dz: the exponentials over their sum are the probabilities.
                    slope = logits.mul_(slopes.sum(-1, keepdim=True).neg_().div_(mass)).scatter_add_(-1, ids, slopes)
                    _add_products(gradients, slope.to(dtype), inputs, products, part)
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        ctx.wanted = wanted
        ctx.dtypes = (states.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(lm, fusion)
        return weights[0] * lm + weights[1] * fusion, lm, fusion

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        made = [next(saved) if wanted else None for wanted in ctx.wanted]
        scaled = [
            None if one is None else (one * gradient).to(dtype) for one, dtype in zip(made, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)


def _logprobs_at(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (n, K + 1) at some ids, and the sums (n, 1) of the exponentials.

    The exponentials replace the logits.

    In place, and with one exponential per logit: that is most of the time beside the products.
    """
    highest = logits.amax(-1, keepdim=True)
    at = logits.gather(-1, ids) - highest
    mass = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    return at - mass.log(), mass


def _terms(
    logprobs: Tensor, fused: FusedEntries, loss: Divergence, weights: tuple[float, float], with_slopes: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the two sums of a chunk, and the slopes dL/dl (n, K + 1)."""
    with torch.enable_grad():
        leaf = logprobs.requires_grad_(with_slopes)
        entries = leaf[:, :-1].masked_fill(~fused.mask, 0.0)
        fusion = loss(entries, fused.logprobs.to(leaf.dtype), fused.mask).sum()
        lm = -leaf[:, -1].sum()
        slopes = leaf
        if with_slopes:
            (slopes,) = torch.autograd.grad(weights[0] * lm + weights[1] * fusion, leaf)
    return (lm.detach(), fusion.detach()), slopes.detach()


def _add_products(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    slope: Tensor,
    inputs: Tensor,
    weight: Tensor,
    part: slice,
) -> None:
    of_states, of_weight, of_bias = gradients
    if of_states is not None:
        torch.mm(slope, weight, out=of_states[part])
    if of_weight is not None:
        if slope.dtype == of_weight.dtype:
            of_weight.addmm_(slope.t(), inputs[part])
        elif slope.is_cuda:
            of_weight += torch.mm(slope.t(), inputs[part], out_dtype=of_weight.dtype)
        else:
            of_weight += torch.mm(slope.t(), inputs[part])
    if of_bias is not None:
        of_bias += slope.sum(0, dtype=of_bias.dtype)
