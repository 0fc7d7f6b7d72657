"""VaRM: merge fine-tuned copies of one base model, weighted by how much each of them moved.

For a unit ``m`` (a tensor, by default) and tuned model ``j``, with ``delta[j] = tuned[j] - base``::

    value[j, m]  = mean over the elements of m of delta[j] ** 2          (measure "square"; "abs": of |delta[j]|)
    weight[j, m] = prior[j] * value[j, m] / sum_l prior[l] * value[l, m] (normalize "ratio")
    merged       = base + sum_j weight[j, m] * delta[j]

The weights of a unit sum to 1, except where no model moved: then they are 0 and the base stays as it is. Only ratios
enter, so deltas of 1e-7 are weighed like deltas of 1e-1. Differences are taken in float32 or better and added up in
float64 (:mod:`fusion_plugins.core.merging.deltas`); the result is rounded once, to the dtype of the base.

``compat="fusechat"`` reproduces the released code for comparison, with what we take for its defects: modules and layers
add the means of their tensors without regard to size, tensors outside layers get equal weights at layer granularity, a
single unchanged model makes the weights of a tensor or module equal, and elements that no model changed become 0.

References:
    FuseChat: Knowledge Fusion of Chat Models, arXiv 2402.16107, equation 7 and section 3.3.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_plugins.core.merging.deltas import (
    MEASURES,
    chunks,
    combine,
    compute_dtype,
    delta_sums,
    measured,
    require_finite,
)
from fusion_plugins.errors import ConfigError, MergeError

__all__ = [
    "GRANULARITIES",
    "NORMALIZATIONS",
    "RowMerge",
    "VarmRule",
    "layer_of",
    "merge_rows",
    "unit_of",
    "unit_values",
    "unit_weights",
    "varm_merge",
    "varm_weights",
]

GRANULARITIES = ("matrix", "row", "module", "layer", "model", "element")
NORMALIZATIONS = ("ratio", "softmax")
COMPATIBILITIES = ("none", "fusechat")
#: The released code's floor under the sum over models, element granularity.
FUSECHAT_ELEMENT_FLOOR = 1e-13
#: The first purely numeric part of a parameter's name is its layer: ``model.layers.3.mlp.up_proj.weight``.
_LAYER = re.compile(r"^(?:.*?\.)??\d+(?=\.)")


@dataclass(frozen=True)
class VarmRule:
    """How the movement of the models becomes weights.

    Attributes:
        granularity: what shares one weight per model: ``matrix`` (a tensor), ``row`` (a row of a tensor of two or more
            axes, all of any other), ``module`` (attention, feed-forward, each norm, embeddings, head), ``layer``,
            ``model`` or ``element``.
        measure: ``square`` or ``abs`` of the differences.
        normalize: ``ratio`` divides by the sum over models; ``softmax`` takes exp(value / temperature) first. Mean
            squares are tiny, so softmax needs a temperature of their size to differ from equal weights.
        temperature: of the softmax, in units of the measure.
        prior: (J,) non-negative factors, one per tuned model; ``None`` means all equal.
        compat: ``none``, or ``fusechat`` for the released code's statistics.
    """

    granularity: str = "matrix"
    measure: str = "square"
    normalize: str = "ratio"
    temperature: float = 1.0
    prior: Sequence[float] | None = None
    compat: str = "none"

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}"
            for name, allowed in (
                ("granularity", GRANULARITIES),
                ("measure", MEASURES),
                ("normalize", NORMALIZATIONS),
                ("compat", COMPATIBILITIES),
            )
            if getattr(self, name) not in allowed
        ]
        if not self.temperature > 0:
            problems.append(f"temperature: expected a number above 0; got {self.temperature!r}")
        if self.prior is not None and not all(0 <= value < float("inf") for value in self.prior):
            problems.append(f"prior: expected finite numbers of 0 or more; got {list(self.prior)!r}")
        if problems:
            raise ConfigError("VaRM settings: " + "; ".join(problems))

    @property
    def within_tensor(self) -> bool:
        """Whether a unit never reaches beyond one tensor."""
        return self.granularity in ("matrix", "row", "element")


def layer_of(name: str) -> str | None:
    """Return the layer that a parameter belongs to (``model.layers.3``), or None outside the layers."""
    found = _LAYER.match(name)
    return found.group(0) if found else None


def unit_of(name: str, granularity: str) -> str:
    """Return the unit that a parameter belongs to.

    Args:
        name: dotted name of a parameter.
        granularity: one of :data:`GRANULARITIES`; ``row`` and ``element`` subdivide the unit ``matrix``.

    Example:
        >>> unit_of("model.layers.3.mlp.up_proj.weight", "module")
        'model.layers.3.mlp'
        >>> unit_of("lm_head.weight", "layer")
        'lm_head'
    """
    if granularity == "model":
        return "model"
    if granularity not in ("module", "layer"):
        return name
    layer = layer_of(name)
    if layer is None:
        return name.rpartition(".")[0] or name
    if granularity == "layer":
        return layer
    return f"{layer}.{name[len(layer) + 1 :].partition('.')[0]}"


def unit_weights(values: Tensor, rule: VarmRule) -> Tensor:
    """Turn the values of units into weights of models.

    Args:
        values: (J, ...) float64, non-negative, one column per unit.
        rule: the settings; under ``compat="fusechat"`` also its treatment of zeros.

    Returns:
        (J, ...) float64; each column sums to 1, or is 0 where no model with a positive prior moved (``ratio``).

    Raises:
        ConfigError: there are not as many priors as models.
    """
    if rule.compat == "fusechat":
        values = _fusechat_zeros(values, rule.granularity)
    shares = torch.softmax(values / rule.temperature, dim=0) if rule.normalize == "softmax" else values
    if rule.prior is not None:
        shares = shares * _prior(rule.prior, values)
    total = shares.sum(dim=0, keepdim=True)
    if rule.compat == "fusechat" and rule.granularity == "element":
        return shares / total.clamp(min=FUSECHAT_ELEMENT_FLOOR)
    return shares / torch.where(total == 0, 1.0, total)  # NaN comes through


@dataclass(frozen=True)
class RowMerge:
    """A tensor merged with one weight per row or element.

    Attributes:
        merged: in the shape of the base.
        weights: (J, rows) float64 on the CPU; for ``element`` the mean over the elements, (J, 1).
        values: (J,) float64, mean of the measure over the tensor; not finite if an input is not.
    """

    merged: Tensor
    weights: Tensor
    values: Tensor


def merge_rows(base: Tensor, tuned: Sequence[Tensor], rule: VarmRule, *, dtype: torch.dtype | None = None) -> RowMerge:
    """Merge with one weight per row or per element, in a single pass.

    Args:
        base: any shape, floating point.
        tuned: J tensors of the same shape.
        rule: granularity ``row`` or ``element``.
        dtype: of the result; the base's by default.
    """
    views = [_rows(tensor, rule.granularity) for tensor in (base, *tuned)]
    merged = torch.empty_like(views[0], dtype=dtype)
    by_element = rule.granularity == "element"
    published = by_element and rule.compat == "fusechat"
    kept = [torch.zeros(len(tuned), 0, dtype=torch.float64)]
    value_sums = torch.zeros(len(tuned), dtype=torch.float64)
    for where, (anchor, *others) in chunks(views, whole_rows=True):
        deltas = [other - anchor for other in others]
        values = torch.stack([_row_means(measured(delta, rule.measure)) for delta in deltas])
        value_sums += values.sum(dim=1).cpu()
        weights = unit_weights(values if by_element else values.cpu().double(), rule).to(anchor)  # (J, rows)
        total = anchor * weights.sum(dim=0).unsqueeze(1) if published else anchor.clone()
        for weight, delta in zip(weights, deltas, strict=True):
            total.addcmul_(weight.unsqueeze(1), delta)
        merged[where] = total
        kept.append((weights.sum(dim=1, keepdim=True) if by_element else weights).cpu().double())
    shares = torch.cat(kept, dim=1)
    if by_element:
        shares = shares.sum(dim=1, keepdim=True) / max(base.numel(), 1)
    return RowMerge(merged.reshape(base.shape), shares, value_sums / max(len(views[0]), 1))


def varm_weights(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    granularity: str = "matrix",
    measure: str = "square",
    normalize: str = "ratio",
    temperature: float = 1.0,
    prior: Sequence[float] | None = None,
    compat: str | None = None,
) -> dict[str, Tensor]:
    """Return the weight of every tuned model for every parameter.

    Args:
        base: name -> tensor.
        tuned: J such, with the same names and shapes.
        granularity: see :class:`VarmRule`, as are the next four.
        measure: ``square`` or ``abs``.
        normalize: ``ratio`` or ``softmax``.
        temperature: of the softmax.
        prior: (J,) non-negative factors.
        compat: ``"fusechat"`` for the released code's statistics; None (or ``"none"``) for ours.

    Returns:
        name -> float64 weights: (J,); (J, rows) for ``row``; (J, *shape) for ``element``.

    Raises:
        ConfigError: a setting is wrong.
        MergeError: names or shapes differ, or a value is NaN or infinite.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> varm_weights(base, [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0]) * 3**0.5}])["w"]
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    rule = VarmRule(granularity, measure, normalize, temperature, prior, compat or "none")
    _require_same(base, tuned)
    if rule.granularity in ("row", "element"):
        return {name: _row_weights(name, base[name], [model[name] for model in tuned], rule) for name in base}
    return _shared_weights(base, tuned, rule)


def varm_merge(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    granularity: str = "matrix",
    measure: str = "square",
    normalize: str = "ratio",
    temperature: float = 1.0,
    prior: Sequence[float] | None = None,
    compat: str | None = None,
) -> dict[str, Tensor]:
    """Merge whole state dicts in memory; the same arguments and errors as :func:`varm_weights`.

    Returns:
        name -> tensor, in the dtype of the base.
    """
    rule = VarmRule(granularity, measure, normalize, temperature, prior, compat or "none")
    _require_same(base, tuned)
    if rule.granularity not in ("row", "element"):
        weights = _shared_weights(base, tuned, rule)
        return {name: combine(base[name], [model[name] for model in tuned], weights[name]) for name in base}
    merged: dict[str, Tensor] = {}
    for name, anchor in base.items():
        others = [model[name] for model in tuned]
        result = merge_rows(anchor, others, rule)
        if not bool(torch.isfinite(result.values).all()):
            require_finite(name, _labelled(anchor, others))
        merged[name] = result.merged
    return merged


def unit_values(sums: Sequence[Tensor], sizes: Sequence[int], rule: VarmRule, name: str = "") -> Tensor:
    """Turn the sums of a unit's tensors into the unit's values.

    Args:
        sums: (J,) float64 per tensor, from :func:`delta_sums`.
        sizes: number of elements per tensor.
        rule: the settings.
        name: of one parameter of the unit; the released code gives a parameter outside the layers equal values at layer
            granularity.

    Returns:
        (J,) float64: the mean over all elements of the unit, or under ``compat="fusechat"`` the sum of the means of the
        tensors (``module``, ``layer``).
    """
    if rule.compat == "fusechat" and rule.granularity == "layer" and layer_of(name) is None:
        return torch.ones_like(sums[0])
    if rule.compat == "fusechat" and rule.granularity in ("module", "layer"):
        return torch.stack([total / max(size, 1) for total, size in zip(sums, sizes, strict=True)]).sum(dim=0)
    return torch.stack(list(sums)).sum(dim=0) / max(sum(sizes), 1)


def _shared_weights(
    base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], rule: VarmRule
) -> dict[str, Tensor]:
    """One weight per model for each unit of whole tensors."""
    sums, sizes = _all_sums(base, tuned, rule)
    units: dict[str, list[str]] = {}
    for name in base:
        units.setdefault(unit_of(name, rule.granularity), []).append(name)
    weights: dict[str, Tensor] = {}
    for names in units.values():
        shared = unit_weights(unit_values([sums[n] for n in names], [sizes[n] for n in names], rule, names[0]), rule)
        weights.update(dict.fromkeys(names, shared))
    return {name: weights[name] for name in base}


def _all_sums(
    base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], rule: VarmRule
) -> tuple[dict[str, Tensor], dict[str, int]]:
    sums: dict[str, Tensor] = {}
    for name, anchor in base.items():
        others = [model[name] for model in tuned]
        sums[name] = delta_sums(anchor, others, rule.measure)
        if not bool(torch.isfinite(sums[name]).all()):
            require_finite(name, _labelled(anchor, others))
    return sums, {name: tensor.numel() for name, tensor in base.items()}


def _row_weights(name: str, base: Tensor, tuned: Sequence[Tensor], rule: VarmRule) -> Tensor:
    """(J, rows) or (J, *shape), without chunks: the weights of elements are as large as the tensors anyway."""
    dtype = compute_dtype((base, *tuned))
    views = [_rows(tensor, rule.granularity).to(dtype) for tensor in (base, *tuned)]
    values = torch.stack([measured(other - views[0], rule.measure).mean(dim=1) for other in views[1:]])
    if not bool(torch.isfinite(values).all()):
        require_finite(name, _labelled(base, tuned))
    weights = unit_weights(values, rule).cpu().double()
    return weights.reshape(len(tuned), *base.shape) if rule.granularity == "element" else weights


def _labelled(base: Tensor, tuned: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"base": base, **{f"tuned[{index}]": tensor for index, tensor in enumerate(tuned)}}


def _require_same(base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]]) -> None:
    if not tuned:
        raise MergeError("VaRM: expected one tuned model or more; got none")
    for index, model in enumerate(tuned):
        odd = sorted(set(base) ^ set(model))
        if odd:
            raise MergeError(f"tuned[{index}] and the base do not have the same parameters; only in one: {odd[:5]}")
        for name, anchor in base.items():
            if model[name].shape != anchor.shape:
                raise MergeError(
                    f"tensor {name!r}: the base has shape {tuple(anchor.shape)}, tuned[{index}] has "
                    f"{tuple(model[name].shape)}; VaRM merges copies of one model only"
                )


def _prior(prior: Sequence[float], values: Tensor) -> Tensor:
    if len(prior) != values.shape[0]:
        raise ConfigError(f"prior: expected {values.shape[0]} values, one per tuned model; got {len(prior)}")
    return values.new_tensor(list(prior)).reshape((-1,) + (1,) * (values.ndim - 1))


def _fusechat_zeros(values: Tensor, granularity: str) -> Tensor:
    if granularity not in ("matrix", "module"):
        return values
    return torch.where((values == 0).any(dim=0, keepdim=True), torch.ones_like(values), values)


def _row_means(values: Tensor) -> Tensor:
    return values.squeeze(1) if values.shape[1] == 1 else values.mean(dim=1)


def _rows(tensor: Tensor, granularity: str) -> Tensor:
    """View as (units, elements per unit)."""
    if granularity == "element":
        return tensor.reshape(-1, 1)
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
