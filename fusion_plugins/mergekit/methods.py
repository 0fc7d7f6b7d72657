"""The merge methods that stock mergekit gets: ``varm`` and ``fusechat_sce``.

A method here unpacks mergekit's group of tensors, calls :mod:`fusion_plugins.core` and hands the result back. Values of
parameters are checked when mergekit plans the merge, with messages that name the parameter.
"""

from types import ModuleType
from typing import Annotated, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    InputContract,
    PerInputValues,
    PerNonBase,
    TensorGroup,
)
from mergekit.merge_methods.easy_define import merge_method
from pydantic import BeforeValidator

from fusion_plugins.core import varm as core
from fusion_plugins.errors import ConfigError, MergeError

__all__ = ["METHODS", "register_methods", "varm"]


def _choice(method: str, name: str, allowed: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ConfigError(f"{method}: parameter {name!r}: expected one of {', '.join(allowed)}; got {value!r}")
        return value

    return BeforeValidator(check)


def _number(method: str, name: str, low: float, *, above: bool = False, high: float = float("inf")) -> BeforeValidator:
    wanted = f"a number {'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")

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
)
def varm(
    group: TensorGroup,
    granularity: Annotated[str, _choice("varm", "granularity", core.GRANULARITIES)] = "matrix",
    measure: Annotated[str, _choice("varm", "measure", core.MEASURES)] = "square",
    normalize: Annotated[str, _choice("varm", "normalize", core.NORMALIZATIONS)] = "ratio",
    temperature: Annotated[float, _number("varm", "temperature", 0, above=True)] = 1.0,
    compat: Annotated[str, _choice("varm", "compat", core.COMPATIBILITIES)] = "none",
    weight: PerNonBase[Annotated[float, _number("varm", "weight", 0)]] = 1.0,  # type: ignore[assignment]
) -> torch.Tensor:
    """Merge the group with VaRM.

    Args:
        group: base and tuned tensors of one output tensor.
        granularity: see :class:`fusion_plugins.core.varm.VarmRule`, as are the next four.
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
        prior=_prior(weight, group),
        compat=compat,
    )
    base, tuned = group.base.tensor, [entry.tensor for entry in group.non_base]
    name = group.metadata.name or "(unnamed)"
    if granularity in ("row", "element"):
        merged, weights = core.merge_rows(base, tuned, rule)
        if not bool(torch.isfinite(weights).all()):
            core.require_finite(name, _labelled(group))
        return merged
    if granularity != "matrix":
        raise MergeError(f"varm: granularity {granularity!r} needs a whole checkpoint")
    sums = core.delta_sums(base, tuned, measure)
    if not bool(torch.isfinite(sums).all()):
        core.require_finite(name, _labelled(group))
    weights = core.unit_weights(core.unit_values([sums], [base.numel()], rule, name), rule)
    return core.combine(base, tuned, weights)


METHODS = (varm,)


def register_methods(registry: ModuleType) -> None:
    """Register our methods in mergekit's registry module, which may still be importing."""
    for method in METHODS:
        registry.register(method)


def _prior(weight: PerInputValues[float], group: TensorGroup) -> tuple[float, ...]:
    return tuple(weight.values_for(group.non_base))


def _labelled(group: TensorGroup) -> dict[str, torch.Tensor]:
    return {str(entry.id): entry.tensor for entry in group.entries}
