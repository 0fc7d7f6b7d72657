"""The merge methods that stock mergekit gets: ``varm`` and ``fusechat_sce``.

A method unpacks mergekit's group of tensors, calls :mod:`fusion_plugins.core.merging` and returns the result. The
values of parameters are checked when mergekit plans the merge, with messages that name the parameter.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    MergeMethod,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
)
from mergekit.merge_methods.easy_define import merge_method
from pydantic import BeforeValidator, InstanceOf

from fusion_plugins.core.merging import varm as core
from fusion_plugins.core.merging.deltas import MEASURES, combine, delta_sums, require_finite, require_weights
from fusion_plugins.core.merging.sce import VARIANTS, sce
from fusion_plugins.errors import ConfigError, MergeError
from fusion_plugins.mergekit.record import MergeRecord


@dataclass(frozen=True)
class UnitSums:
    """The statistics of a unit that is larger than a tensor.

    Attributes:
        sums: (J,) float64 per tensor, in the order of the tuned models of the plan.
        sizes: number of elements per tensor.
    """

    sums: list[torch.Tensor]
    sizes: list[int]


@dataclass(frozen=True, eq=False)
class Planned:
    """What only the plan of a merge knows about a tensor.

    Attributes:
        record: where the method reports the weights.
        unit: the statistics of the tensor's unit, where the unit is larger than a tensor.
        dtype: of the result, where the configuration says one.
    """

    record: MergeRecord
    unit: UnitSums | None = None
    dtype: torch.dtype | None = None


def _method(name: str, pretty_name: str, reference_url: str) -> Callable[[Callable[..., torch.Tensor]], MergeMethod]:
    """Make a function a merge method whose argument ``planned`` is no parameter of the YAML.

    mergekit passes what a planned task holds as ``parameters`` on to the function without looking it up in the
    specification. So :class:`~fusion_plugins.mergekit.plan.FusionMergeTask` can add ``planned`` to them, while for
    configurations, messages and calls without a plan the parameter does not exist.
    """

    def decorate(function: Callable[..., torch.Tensor]) -> MergeMethod:
        method = merge_method(
            name=name,
            pretty_name=pretty_name,
            reference_url=reference_url,
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
            optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        )(function)
        settings = tuple(parameter for parameter in method.spec.parameters if parameter.name != "planned")
        method.spec = replace(method.spec, parameters=settings)
        return method

    return decorate


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
        # Negated, so that NaN fails too; True would pass as 1.
        if isinstance(value, bool) or not (number > low if above else number >= low) or not number <= high:
            raise ConfigError(f"{method}: parameter {name!r}: expected {wanted}; got {value!r}")
        return number

    return BeforeValidator(check)


def _fusechat_or_nothing(value: Any) -> Any:
    if value not in core.COMPATIBILITIES:
        raise ConfigError(
            f"varm: parameter 'compat': expected 'fusechat' or no such parameter; got {value!r}. Remove 'compat' from "
            "the parameters to merge as the paper says."
        )
    return value


@_method("varm", "VaRM", "https://arxiv.org/abs/2402.16107")
def varm(
    group: TensorGroup,
    granularity: Annotated[str, _choice("varm", "granularity", core.GRANULARITIES)] = "matrix",
    measure: Annotated[str, _choice("varm", "measure", MEASURES)] = "square",
    normalize: Annotated[str, _choice("varm", "normalize", core.NORMALIZATIONS)] = "ratio",
    temperature: Annotated[float, _number("varm", "temperature", 0, above=True)] = 1.0,
    compat: Annotated[Literal["fusechat"] | None, BeforeValidator(_fusechat_or_nothing)] = None,
    weight: PerNonBase[Annotated[float, _number("varm", "weight", 0)]] = 1.0,  # type: ignore[assignment]
    planned: InstanceOf[Planned] | None = None,
) -> torch.Tensor:
    """Merge the group with VaRM.

    Args:
        group: base and tuned tensors of one output tensor.
        granularity: see :class:`fusion_plugins.core.merging.varm.VarmRule`, as are the next four.
        measure: square or abs.
        normalize: ratio or softmax.
        temperature: of the softmax.
        compat: fusechat or None.
        weight: prior per tuned model: multiplies its value, or the exponential of it, before the division.
        planned: what the plan knows; None outside a planned merge.

    Returns:
        The merged tensor, in the dtype of the base or of the plan.

    Raises:
        MergeError: a checkpoint holds codes in place of weights, NaN or infinity, or the unit is larger than a tensor
            and there is no plan.
    """
    prior = weight.values_for(group.non_base)
    rule = core.VarmRule(
        granularity=granularity,
        measure=measure,
        normalize=normalize,
        temperature=temperature,
        prior=None if all(factor == 1 for factor in prior) else prior,
        compat=compat,
    )
    if granularity in core.WITHIN_TENSOR:
        return _merge_rows(group, rule, planned)
    name, base, tuned = _unpacked(group)
    if granularity == "matrix":
        sums = delta_sums(base, tuned, measure)
        _require_finite(sums, group)
        unit = UnitSums([sums], [base.numel()])
    elif planned is not None and planned.unit is not None:
        unit = planned.unit
    else:
        raise MergeError(
            f"tensor {name!r}: expected a planned merge of whole checkpoints for varm with granularity "
            f"{granularity!r}, got a single tensor, which does not tell how its unit changed. Use mergekit-yaml, "
            "mergekit-multi or mergekit-pytorch; in memory, use fusion_plugins.core.varm_merge, or "
            "granularity matrix, row or element."
        )
    values = core.unit_values(unit.sums, unit.sizes, rule, name)
    weights = core.unit_weights(values, rule)
    _report(planned, group, weights, values, unit=core.unit_of(name, granularity))
    return combine(base, tuned, weights, dtype=planned.dtype if planned else None)


@_method("fusechat_sce", "SCE (FuseChat)", "https://arxiv.org/abs/2408.07990")
def fusechat_sce(
    group: TensorGroup,
    select_topk: Annotated[float, _number("fusechat_sce", "select_topk", 0, high=1)] = 1.0,
    variant: Annotated[str, _choice("fusechat_sce", "variant", VARIANTS)] = "paper",
    planned: InstanceOf[Planned] | None = None,
) -> torch.Tensor:
    """Merge the group with SCE.

    Args:
        group: base and tuned tensors of one output tensor.
        select_topk: share of the elements to select.
        variant: paper, fusechat or mergekit; see :mod:`fusion_plugins.core.merging.sce`.
        planned: what the plan knows; None outside a planned merge.

    Returns:
        The merged tensor, in the dtype of the base or of the plan.

    Raises:
        MergeError: a checkpoint holds codes in place of weights, NaN or infinity.
    """
    name, base, tuned = _unpacked(group)
    dtype = planned.dtype if planned else None
    result = sce(base, tuned, select_topk=select_topk, variant=variant, dtype=dtype)
    _require_finite(result.weights, group)
    _report(planned, group, result.weights, result.values, unit=name, selected=result.selected)
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


def _merge_rows(group: TensorGroup, rule: core.VarmRule, planned: Planned | None) -> torch.Tensor:
    name, base, tuned = _unpacked(group)
    result = core.merge_rows(base, tuned, rule, dtype=planned.dtype if planned else None)
    _require_finite(result.values, group)
    details = {}
    if rule.granularity == "row" and result.weights.shape[1] > 1:
        ranges = zip(result.weights.amin(dim=1).tolist(), result.weights.amax(dim=1).tolist(), strict=True)
        models = [str(entry.id) for entry in group.non_base]
        details["rows"] = dict(zip(models, map(list, ranges), strict=True))
    _report(planned, group, result.weights.mean(dim=1), result.values, unit=name, **details)
    return result.merged


def _unpacked(group: TensorGroup) -> tuple[str, torch.Tensor, list[torch.Tensor]]:
    """Return the name of the output tensor, the base's tensor and the tensors of the tuned models."""
    name = _name(group)
    if group.base is None:
        raise MergeError(f"tensor {name!r}: expected a base, got none. Set base_model to the model that was tuned.")
    require_weights(name, {str(entry.id): entry.tensor for entry in (group.base, *group.non_base)})
    return name, group.base.tensor, [entry.tensor for entry in group.non_base]


def _name(group: TensorGroup) -> str:
    return group.metadata.name or "(unnamed)"


def _require_finite(numbers: torch.Tensor, group: TensorGroup) -> None:
    require_finite(numbers, _name(group), {str(entry.id): entry.tensor for entry in group.entries})


def _report(
    planned: Planned | None, group: TensorGroup, weights: torch.Tensor, values: torch.Tensor, **details: Any
) -> None:
    if planned is None:
        return
    name, models = _name(group), [str(entry.id) for entry in group.non_base]
    planned.record.add(
        name,
        dict(zip(models, weights.tolist(), strict=True)),
        dict(zip(models, values.tolist(), strict=True)),
        layer=core.layer_of(name),
        module=core.unit_of(name, "module"),
        elements=group.tensors[0].numel(),
        **details,
    )


# If the imports above were the first to load mergekit's registry, the hook of _autoload found this module half imported
# and left it alone.
if "mergekit.merge_methods.registry" in sys.modules:
    register_methods(sys.modules["mergekit.merge_methods.registry"])
