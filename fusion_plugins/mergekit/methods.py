"""The merge methods that stock mergekit gets: ``varm`` and ``fusechat_sce``.

A method here unpacks mergekit's group of tensors, calls :mod:`fusion_plugins.core` and hands the result back. Values of
parameters are checked when mergekit plans the merge, with messages that name the parameter.
"""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import BasePolicy, InputContract, OptionalTensorPolicy, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method
from pydantic import BeforeValidator

from fusion_plugins.core.merging import varm as core
from fusion_plugins.core.merging.deltas import MEASURES, combine, delta_sums, require_finite
from fusion_plugins.core.merging.sce import VARIANTS, sce
from fusion_plugins.errors import ConfigError, MergeError
from fusion_plugins.mergekit.record import current_merge

__all__ = ["METHODS", "fusechat_sce", "register_methods", "varm"]


def _choice(method: str, name: str, allowed: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ConfigError(f"{method}: parameter {name!r}: expected one of {', '.join(allowed)}; got {value!r}")
        return value

    return BeforeValidator(check)


def _number(method: str, name: str, low: float, *, above: bool = False, high: float = 1e308) -> BeforeValidator:
    upper = f" and at most {high:g}" if high < 1e308 else ""
    wanted = f"a number {'above' if above else 'of at least'} {low:g}{upper}"

    def check(value: Any) -> Any:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(value, bool) or not (number > low if above else number >= low) or not number <= high:
            raise ConfigError(f"{method}: parameter {name!r}: expected {wanted}; got {value!r}")
        return number

    return BeforeValidator(check)


@merge_method(
    name="varm",
    pretty_name="VaRM",
    reference_url="https://arxiv.org/abs/2402.16107",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)
def varm(
    group: TensorGroup,
    granularity: Annotated[str, _choice("varm", "granularity", core.GRANULARITIES)] = "matrix",
    measure: Annotated[str, _choice("varm", "measure", MEASURES)] = "square",
    normalize: Annotated[str, _choice("varm", "normalize", core.NORMALIZATIONS)] = "ratio",
    temperature: Annotated[float, _number("varm", "temperature", 0, above=True)] = 1.0,
    compat: Annotated[str, _choice("varm", "compat", core.COMPATIBILITIES)] = "none",
    weight: PerNonBase[Annotated[float, _number("varm", "weight", 0)]] = 1.0,  # type: ignore[assignment]
) -> torch.Tensor:
    """Merge the group with VaRM.

    Args:
        group: base and tuned tensors of one output tensor.
        granularity: see :class:`fusion_plugins.core.merging.varm.VarmRule`, as are the next four.
        measure: square or abs.
        normalize: ratio or softmax.
        temperature: of the softmax.
        compat: none or fusechat.
        weight: prior factor per tuned model.

    Returns:
        The merged tensor, in the dtype of the base.

    Raises:
        MergeError: a checkpoint holds NaN or infinity.
    """
    rule = core.VarmRule(
        granularity=granularity,
        measure=measure,
        normalize=normalize,
        temperature=temperature,
        prior=_prior(weight.values_for(group.non_base)),
        compat=compat,
    )
    if granularity in ("row", "element"):
        return _merge_rows(group, rule)
    sums, sizes = _unit_sums(group, rule)
    values = core.unit_values(sums, sizes, rule, _name(group))
    weights = core.unit_weights(values, rule)
    _report(group, weights, values, unit=core.unit_of(_name(group), granularity))
    return combine(_base(group), _tuned(group), weights, dtype=_result_dtype())


@merge_method(
    name="fusechat_sce",
    pretty_name="SCE (FuseChat)",
    reference_url="https://arxiv.org/abs/2408.07990",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)
def fusechat_sce(
    group: TensorGroup,
    select_topk: Annotated[float, _number("fusechat_sce", "select_topk", 0, high=1)] = 1.0,
    variant: Annotated[str, _choice("fusechat_sce", "variant", VARIANTS)] = "paper",
) -> torch.Tensor:
    """Merge the group with SCE.

    Args:
        group: base and tuned tensors of one output tensor.
        select_topk: share of the elements to select.
        variant: paper, fusechat or mergekit; see :mod:`fusion_plugins.core.merging.sce`.

    Returns:
        The merged tensor, in the dtype of the base.

    Raises:
        MergeError: a checkpoint holds NaN or infinity.
    """
    result = sce(_base(group), _tuned(group), select_topk=select_topk, variant=variant, dtype=_result_dtype())
    _check(group, result.weights)
    _report(group, result.weights, result.values, unit=_name(group), selected=result.selected)
    return result.merged


METHODS = (varm, fusechat_sce)


def register_methods(registry: ModuleType) -> None:
    """Register those of our methods that mergekit's registry module does not have yet.

    Raises:
        ValueError: another package's method has one of their names.
    """
    for method in METHODS:
        if method not in registry.registered_methods():
            registry.register(method)


def _merge_rows(group: TensorGroup, rule: core.VarmRule) -> torch.Tensor:
    result = core.merge_rows(_base(group), _tuned(group), rule, dtype=_result_dtype())
    _check(group, result.values)
    details = {}
    if rule.granularity == "row" and result.weights.shape[1] > 1:
        ranges = zip(result.weights.amin(dim=1).tolist(), result.weights.amax(dim=1).tolist(), strict=True)
        details["rows"] = dict(zip(_models(group), map(list, ranges), strict=True))
    _report(group, result.weights.mean(dim=1), result.values, unit=_name(group), **details)
    return result.merged


def _unit_sums(group: TensorGroup, rule: core.VarmRule) -> tuple[Sequence[torch.Tensor], Sequence[int]]:
    """The sums of this tensor, or of its whole unit, which only the plan of a merge knows."""
    if rule.granularity == "matrix":
        sums = delta_sums(_base(group), _tuned(group), rule.measure)
        _check(group, sums)
        return [sums], [_base(group).numel()]
    current = current_merge()
    if current is None or current.sums is None or current.sizes is None:
        raise MergeError(
            f"varm: granularity {rule.granularity!r} needs a planned merge of whole checkpoints (mergekit-yaml, "
            "mergekit-multi, mergekit-pytorch); a single tensor does not tell how its unit moved. In memory, use "
            "fusion_plugins.core.merging.varm.varm_merge, or granularity matrix, row or element."
        )
    return current.sums, current.sizes


def _check(group: TensorGroup, numbers: torch.Tensor) -> None:
    """Refuse NaN and infinity in the inputs; they show in whatever was summed over the inputs."""
    if not bool(torch.isfinite(numbers).all()):
        require_finite(_name(group), {str(entry.id): entry.tensor for entry in group.entries})


def _report(group: TensorGroup, weights: torch.Tensor, values: torch.Tensor, **details: Any) -> None:
    current = current_merge()
    if current is not None:
        models = _models(group)
        shares = dict(zip(models, weights.tolist(), strict=True))
        measures = dict(zip(models, values.tolist(), strict=True))
        current.record.add(_name(group), shares, measures, elements=_base(group).numel(), **details)


def _prior(weights: list[float]) -> list[float] | None:
    return None if all(weight == 1 for weight in weights) else weights


def _result_dtype() -> torch.dtype | None:
    """The configured dtype where the plan left the inputs narrower; else None, for the dtype of the base."""
    current = current_merge()
    return current.dtype if current is not None else None


def _base(group: TensorGroup) -> torch.Tensor:
    if group.base is None:
        raise MergeError(f"tensor {_name(group)!r}: no base tensor; set base_model to the model that was fine-tuned")
    return group.base.tensor


def _tuned(group: TensorGroup) -> list[torch.Tensor]:
    return [entry.tensor for entry in group.non_base]


def _models(group: TensorGroup) -> list[str]:
    return [str(entry.id) for entry in group.non_base]


def _name(group: TensorGroup) -> str:
    return group.metadata.name or "(unnamed)"


# Whoever imports this module before mergekit gets the methods all the same.
if "mergekit.merge_methods.registry" in sys.modules:
    register_methods(sys.modules["mergekit.merge_methods.registry"])
