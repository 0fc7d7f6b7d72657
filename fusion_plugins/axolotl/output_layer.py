"""The output layer of the trained model: what it is, what the model does to its output, and losses in its place.

While the model runs, its output layer returns the sums of both losses instead of logits, so that the logits of a whole
batch are never held, and sharded weights (ZeRO-3, FSDP) are present. The few numbers then go through whatever the model
does to its logits. A probe measures that before the first step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusion_plugins.core.fusion.logit_change import LogitChange, measured_change, probe_values

Forward: TypeAlias = Callable[[Tensor], Tensor]

#: A cap bends what goes through it, but not near 0: losses become this much smaller before, and larger after it.
NEAR_ZERO = 2.0**-40


def innermost(layer: Any) -> Any:
    """Return the layer whose forward pass makes the logits: the trained copy where PEFT wraps the layer."""
    while isinstance(layer, ModulesToSaveWrapper) and not layer.disable_adapters and layer.active_adapters:
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer


@contextmanager
def replaced(layer: Any, replacement: Forward) -> Iterator[None]:
    """Within the context, ``replacement`` is the layer's forward pass."""
    own = vars(layer).get("forward")
    layer.forward = replacement
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


class Probe:
    """A forward pass that returns known numbers (1, 1, V), to see what the model makes of them.

    Attributes:
        given: (V,) the numbers, None before the layer ran.
        vocabulary: V.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.given: Tensor | None = None
        self.vocabulary = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the numbers. The layer runs all the same: sharded ones expect as many calls on every rank."""
        self.vocabulary = self._forward(hidden[:1, :1]).shape[-1]
        self.given = probe_values(self.vocabulary, hidden.device)
        # From here on gradients would show a change that is trained, and so is another one at every step.
        torch.set_grad_enabled(True)
        return self.given.view(1, 1, -1)

    def change(self, logits: Tensor) -> LogitChange | None:
        """Return what the model does to its logits; None where it is nothing that the losses can take with them."""
        if self.given is None or logits.requires_grad or logits.shape[:-1] != (1, 1):
            return None
        return measured_change(self.given, logits.detach().flatten())


def carried(sums: Sequence[Tensor], change: LogitChange) -> Tensor:
    """Return sums (each ()) as logits (1, 1, n) that the change of a model leaves whole."""
    values = torch.stack([one.to(sums[0].dtype) for one in sums]).view(1, 1, -1)
    return values if change.is_none else values * NEAR_ZERO


def received(logits: Tensor, change: LogitChange) -> Tensor:
    """Return the sums (n,) that :func:`carried` made logits of, behind the change of the model."""
    values = logits.flatten()
    return values if change.is_none else values / (NEAR_ZERO * change.scale)


def linear_factors(
    layer: Any, hidden: Tensor
) -> tuple[tuple[Tensor, Tensor | None], list[tuple[Tensor, Tensor]]] | None:
    """Return weight and bias of a linear layer, and states and matrix of each adapter of low rank on it.

    None where the layer computes anything else (a quantised or a split layer, DoRA): its own forward pass must run.

    Args:
        layer: as :func:`innermost` returns it.
        hidden: (B, T, H) its input.
    """
    if not isinstance(layer, LoraLinear):
        alone = _plain(layer)
        return (alone, []) if alone else None
    base = layer.base_layer
    adapters = [] if layer.disable_adapters or layer.merged else _adapters(layer)
    # An adapter's layers gather sharded weights in forward passes of their own, which would not run.
    if type(layer) is not LoraLinear or adapters is None or "forward" in vars(base) or hasattr(base.weight, "ds_id"):
        return None
    whole = _plain(base)
    return (whole, [_low_rank(layer, name, hidden) for name in adapters]) if whole else None


def _plain(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    if type(layer) is not nn.Linear or isinstance(layer.weight, DTensor):
        return None
    return layer.weight, layer.bias


def _adapters(layer: Any) -> list[str] | None:
    """Names of the active adapters, None where one of them is more than a product of low rank."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.fan_in_fan_out or _hooks(layer.base_layer):
        return None
    for name in names:
        parts = (layer.lora_A[name], layer.lora_B[name])
        plain = all(type(part) is nn.Linear and not _hooks(part) for part in parts)
        if not plain or name in layer.lora_variant or layer.lora_bias.get(name) or isinstance(parts[1].weight, DTensor):
            return None
    return names


def _low_rank(layer: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    inputs = layer._cast_input_dtype(hidden, layer.lora_A[name].weight.dtype)
    states = layer.lora_A[name](layer.lora_dropout[name](inputs)) * layer.scaling[name]
    return states, layer.lora_B[name].weight


def _hooks(layer: Any) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
