"""VaRM: merge tuned models of one base, weighted by how much each of them changed it.

A unit ``m`` holds the parameters that share one merge weight: a tensor, by default. For each tuned model ``j``, with
``delta[j] = tuned[j] - base``::

    value[j, m]  = mean over the elements of m of delta[j] ** 2          (measure "square"; "abs": of |delta[j]|)
    weight[j, m] = prior[j] * value[j, m] / sum_l prior[l] * value[l, m] (normalize "ratio")
    merged       = base + sum_j weight[j, m] * delta[j]

The weights of a unit sum to 1, except where no model changed anything: then they are 0 and the base stays as it is.
Only ratios matter, so deltas of 1e-7 are weighted like deltas of 1e-1. Differences are taken in float32 or better and
summed in float64 (:mod:`fusion_plugins.core.merging.deltas`); the result is rounded once, to the dtype of the base.

``compat="fusechat"`` reproduces the released code for comparison, with what we consider its defects: modules and layers
add the means of their tensors regardless of size, tensors outside the layers get equal weights at layer granularity, a
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
    require_weights,
)
from fusion_plugins.errors import ConfigError, MergeError

#: What shares one weight per model: parts of a tensor, a tensor (``matrix``), or several tensors. A new name goes into
#: one of the two tuples and needs a branch, in `_rows` (parts; mergekit/methods.py records them too) or in `unit_of`.
WITHIN_TENSOR = ("row", "element")
ACROSS_TENSORS = ("module", "layer", "model")
GRANULARITIES = ("matrix", *WITHIN_TENSOR, *ACROSS_TENSORS)
NORMALIZATIONS = ("ratio", "softmax")
COMPATIBILITIES = (None, "fusechat")
#: The released code's floor under the sum over models, element granularity.
FUSECHAT_ELEMENT_FLOOR = 1e-13
#: The first purely numeric part of a parameter's name is its layer: ``model.layers.3.mlp.up_proj.weight``.
_LAYER = re.compile(r"^(?:.*?\.)??\d+(?=\.)")

#: Models with the same parameters: name -> (the base's tensor, the tensors of the J tuned models).
_Tensors = Mapping[str, tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class VarmRule:
    """How the changes of the models become weights.

    Attributes:
        granularity: what shares one weight per model: ``matrix`` (a tensor), ``row`` (a row of a tensor with two or
            more axes, the whole of any other), ``module`` (attention, feed-forward, each norm, embeddings, head),
            ``layer``, ``model`` or ``element``.
        measure: ``square`` or ``abs`` of the differences.
        normalize: ``ratio`` divides by the sum over models; ``softmax`` takes exp(value / temperature) first. Mean
            squares are tiny, so softmax needs a temperature of their size to differ from equal weights.
        temperature: of the softmax, in units of the measure.
        prior: (J,) non-negative factors, one per tuned model; ``None`` means all equal.
        compat: ``None``, or ``fusechat`` for the released code's statistics.
    """

    granularity: str = "matrix"
    measure: str = "square"
    normalize: str = "ratio"
    temperature: float = 1.0
    prior: Sequence[float] | None = None
    compat: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected one of {', '.join(map(str, allowed))}; got {getattr(self, name)!r}"
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


def layer_of(name: str) -> str | None:
    """Return the layer that a parameter belongs to (``model.layers.3``), or None outside the layers."""
    found = _LAYER.match(name)
    return found.group(0) if found else None


def unit_of(name: str, granularity: str) -> str:
    """Return the unit that a parameter belongs to.

    Args:
        name: dotted name of a parameter.
        granularity: one of :data:`GRANULARITIES`; ``row`` and ``element`` subdivide the unit ``matrix``.

    Raises:
        ConfigError: the granularity is unknown.

    Example:
        >>> unit_of("model.layers.3.mlp.up_proj.weight", "module")
        'model.layers.3.mlp'
        >>> unit_of("lm_head.weight", "layer")
        'lm_head'
    """
    if granularity == "model":
        return "model"
    if granularity in ("matrix", *WITHIN_TENSOR):
        return name
    if granularity not in ("module", "layer"):
        raise ConfigError(f"granularity: expected one of {', '.join(GRANULARITIES)}; got {granularity!r}")
    layer = layer_of(name)
    if layer is None:
        return name.rpartition(".")[0] or name
    return layer if granularity == "layer" else f"{layer}.{name[len(layer) + 1 :].partition('.')[0]}"


def unit_values(sums: Sequence[Tensor], sizes: Sequence[int], rule: VarmRule, name: str = "") -> Tensor:
    """Turn the sums of a unit's tensors into the unit's values.

    Args:
        sums: (J,) float64 per tensor, from :func:`~fusion_plugins.core.merging.deltas.delta_sums`.
        sizes: number of elements per tensor.
        rule: the settings.
        name: of one parameter of the unit; the released code gives a parameter outside the layers equal values at
            layer granularity.

    Returns:
        (J,) float64: the mean over all elements of the unit, or under ``compat="fusechat"`` the sum of the means of the
        tensors (``module``, ``layer``).
    """
    if rule.compat == "fusechat" and rule.granularity == "layer" and layer_of(name) is None:
        return torch.ones_like(sums[0])
    if rule.compat == "fusechat" and rule.granularity in ("module", "layer"):
        return torch.stack([total / max(size, 1) for total, size in zip(sums, sizes, strict=True)]).sum(dim=0)
    return torch.stack(list(sums)).sum(dim=0) / max(sum(sizes), 1)


def unit_weights(values: Tensor, rule: VarmRule) -> Tensor:
    """Turn the values of units into weights of models.

    Args:
        values: (J, ...) float64, non-negative, one column per unit.
        rule: the settings; under ``compat="fusechat"`` also its treatment of zeros.

    Returns:
        (J, ...) float64; each column sums to 1, or is 0 where no model with a positive prior changed (``ratio``).

    Raises:
        ConfigError: there are not as many priors as models.
    """
    if rule.compat == "fusechat" and rule.granularity in ("matrix", "module"):
        # In the released code one value of 0 makes all values of the unit equal.
        values = torch.where((values == 0).any(dim=0, keepdim=True), torch.ones_like(values), values)
    shares = torch.softmax(values / rule.temperature, dim=0) if rule.normalize == "softmax" else values
    if rule.prior is not None:
        if len(rule.prior) != len(values):
            raise ConfigError(f"prior: expected {len(values)} values, one per tuned model; got {len(rule.prior)}")
        shares = shares * values.new_tensor(list(rule.prior)).reshape((-1,) + (1,) * (values.ndim - 1))
    total = shares.sum(dim=0, keepdim=True)
    if rule.compat == "fusechat" and rule.granularity == "element":
        return shares / total.clamp(min=FUSECHAT_ELEMENT_FLOOR)
    return shares / torch.where(total == 0, 1.0, total)  # NaN comes through, and is refused by the caller


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
    kept = [torch.zeros(len(tuned), 0, dtype=torch.float64)]
    value_sums = torch.zeros(len(tuned), dtype=torch.float64)
    # A row is complete within its chunk, so its weight is known in the same pass that merges it.
    for where, (anchor, *others) in chunks(views, whole_rows=True):
        deltas = [other - anchor for other in others]
        measures = (measured(delta, rule.measure) for delta in deltas)
        # Of a single element per row no mean is computed: torch is slow at it.
        values = torch.stack([each.squeeze(1) if each.shape[1] == 1 else each.mean(dim=1) for each in measures])
        value_sums += values.sum(dim=1).cpu()
        # Weights of rows are few and computed in float64; weights of elements are as many as the elements.
        weights = unit_weights(values if by_element else values.cpu().double(), rule).to(anchor)  # (J, rows)
        total = anchor.clone()
        if by_element and rule.compat == "fusechat":
            # The released code adds up weight * (base + delta), so that weights of 0 give 0 in place of the base.
            total *= weights.sum(dim=0).unsqueeze(1)
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
        granularity: see :class:`VarmRule`, as are the next five.
        measure: ``square`` or ``abs``.
        normalize: ``ratio`` or ``softmax``.
        temperature: of the softmax.
        prior: (J,) non-negative factors.
        compat: ``None`` or ``fusechat``.

    Returns:
        name -> float64 weights: (J,); (J, rows) for ``row``; (J, *shape) for ``element``.

    Raises:
        ConfigError: a setting is wrong.
        MergeError: names or shapes differ, a tensor holds codes in place of weights, or a value is NaN or infinite.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> varm_weights(base, [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0]) * 3**0.5}])["w"]
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    rule = VarmRule(granularity, measure, normalize, temperature, prior, compat)
    tensors = _paired(base, tuned)
    if granularity in WITHIN_TENSOR:
        return {name: _row_weights(name, *pair, rule) for name, pair in tensors.items()}
    return _shared_weights(tensors, rule)


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
    rule = VarmRule(granularity, measure, normalize, temperature, prior, compat)
    tensors = _paired(base, tuned)
    if granularity not in WITHIN_TENSOR:
        weights = _shared_weights(tensors, rule)
        return {name: combine(*pair, weights[name]) for name, pair in tensors.items()}
    merged: dict[str, Tensor] = {}
    for name, (anchor, others) in tensors.items():
        result = merge_rows(anchor, others, rule)
        require_finite(result.values, name, _labelled(anchor, others))
        merged[name] = result.merged
    return merged


def _paired(base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]]) -> _Tensors:
    """Put the tensors of one name together; refuse models that do not have the parameters of the base."""
    if not tuned:
        raise MergeError("VaRM: expected one tuned model or more, got none")
    for index, model in enumerate(tuned):
        odd = sorted(set(base) ^ set(model))
        if odd:
            raise MergeError(
                f"tuned[{index}]: expected the parameters of the base, got {len(odd)} that are only in one of the two: "
                f"{odd[:5]}. VaRM merges tuned models of one base."
            )
        for name, anchor in base.items():
            if model[name].shape != anchor.shape:
                raise MergeError(
                    f"tensor {name!r} of tuned[{index}]: expected the base's shape {tuple(anchor.shape)}, got "
                    f"{tuple(model[name].shape)}. VaRM merges tuned models of one base."
                )
    for name, anchor in base.items():
        require_weights(name, _labelled(anchor, [model[name] for model in tuned]))
    return {name: (anchor, [model[name] for model in tuned]) for name, anchor in base.items()}


def _shared_weights(tensors: _Tensors, rule: VarmRule) -> dict[str, Tensor]:
    """Return name -> (J,) weights, for units of whole tensors."""
    units: dict[str, list[str]] = {}
    sums: dict[str, Tensor] = {}
    for name, (base, tuned) in tensors.items():
        units.setdefault(unit_of(name, rule.granularity), []).append(name)
        sums[name] = delta_sums(base, tuned, rule.measure)
        require_finite(sums[name], name, _labelled(base, tuned))
    weights: dict[str, Tensor] = {}
    for names in units.values():
        sizes = [tensors[name][0].numel() for name in names]
        values = unit_values([sums[name] for name in names], sizes, rule, names[0])
        weights |= dict.fromkeys(names, unit_weights(values, rule))
    return {name: weights[name] for name in tensors}  # in the order of the base


def _row_weights(name: str, base: Tensor, tuned: Sequence[Tensor], rule: VarmRule) -> Tensor:
    """(J, rows) or (J, *shape), without chunks: the weights of elements are as large as the tensors anyway."""
    dtype = compute_dtype((base, *tuned))
    views = [_rows(tensor, rule.granularity).to(dtype) for tensor in (base, *tuned)]
    values = torch.stack([measured(other - views[0], rule.measure).mean(dim=1) for other in views[1:]])
    require_finite(values, name, _labelled(base, tuned))
    weights = unit_weights(values, rule).cpu().double()
    return weights.reshape(len(tuned), *base.shape) if rule.granularity == "element" else weights


def _rows(tensor: Tensor, granularity: str) -> Tensor:
    """View as (units, elements per unit)."""
    if granularity == "element":
        return tensor.reshape(-1, 1)
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _labelled(base: Tensor, tuned: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"base": base, **{f"tuned[{index}]": tensor for index, tensor in enumerate(tuned)}}
