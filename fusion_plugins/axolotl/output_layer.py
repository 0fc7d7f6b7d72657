"""The output layer of the trained model: what it is, what the model does to its output, and losses in its place.

While the model runs, its output layer returns the sums of both losses instead of logits, so that the logits of a whole
batch are never held, and sharded weights (ZeRO-3, FSDP) are present. The few numbers then go through whatever the model
does to its logits. A probe measures that before the first step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fusion_plugins.core.fusion.logit_change import LogitChange, measured_change, probe_values

Forward: TypeAlias = Callable[[Tensor], Tensor]

#: A cap bends what goes through it, but not near 0: losses become this much smaller before, and larger after it.
NEAR_ZERO = 2.0**-40


def innermost(layer: Any) -> Any:
    """Return the layer whose forward pass makes the logits: the trained copy where PEFT wraps the layer."""
    while isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if not layer.disable_adapters]
        if not active or active[0] not in layer.modules_to_save:
            break
        layer = layer.modules_to_save[active[0]]
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
    # No view: FSDP2 hangs its hooks on what a model returns.
    values = torch.cat([one.to(sums[0].dtype).view(1, 1, 1) for one in sums], -1)
    return values if change.is_none else values * NEAR_ZERO


def received(logits: Tensor, change: LogitChange) -> Tensor:
    """Return the sums (n,) that :func:`carried` made logits of, behind the change of the model."""
    values = logits.flatten()
    return values if change.is_none else values / (NEAR_ZERO * change.scale)


class Part(NamedTuple):
    """A linear layer and its input (B, T, H): one of those whose products add up to the logits."""

    layer: nn.Linear
    states: Tensor


def linear_parts(layer: Any, hidden: Tensor) -> list[Part] | None:
    """Return the linear layers that an output layer is made of: itself, or its base and its adapters of low rank.

    None where it computes anything else (a quantised or a split layer, DoRA): its own forward pass must run.

    Args:
        layer: as :func:`innermost` returns it; its forward pass runs.
        hidden: (B, T, H) its input.
    """
    if not isinstance(layer, LoraLinear):
        return [Part(layer, hidden)] if _is_linear(layer) else None
    base = layer.base_layer
    # Merged weights need no adapter; switched off, PEFT would first take the adapter out of them.
    adapters = ([] if not layer.disable_adapters else None) if layer.merged else _adapters(layer)
    # ZeRO-3 gathers the parts of a layer in hooks that are no different from others.
    if _kind(layer) is not LoraLinear or adapters is None or "forward" in vars(base) or hasattr(base.weight, "ds_id"):
        return None
    return [Part(base, hidden), *(_low_rank(layer, name, hidden) for name in adapters)] if _is_linear(base) else None


def with_weights(layer: Any, parts: Sequence[Part], compute: Callable[[Sequence[Part]], Tensor]) -> Tensor:
    """Return what ``compute`` makes of the parts of a layer, called where their weights are whole.

    FSDP gathers a weight that it has sharded by itself in the forward pass of its layer alone, and reduces its gradient
    when that has gone through the input of the layer. So the forward passes of all parts run, one within the other.

    Args:
        layer: the output layer, whose forward pass runs already.
        parts: of it, as :func:`linear_parts` returns them.
        compute: gets the parts with their inputs as the layers got them.
    """
    return compute(parts) if parts[0].layer is layer else _inside(parts, compute, ())


def _inside(rest: Sequence[Part], compute: Callable[[Sequence[Part]], Tensor], entered: tuple[Part, ...]) -> Tensor:
    if not rest:
        return compute(entered)
    layer, states = rest[0]
    with replaced(layer, lambda given: _inside(rest[1:], compute, (*entered, Part(layer, given)))):
        found: Tensor = layer(states)
    return found


def _kind(layer: Any) -> type:
    """The class of a layer; FSDP2 puts one of its own before it."""
    bases = [base for base in type(layer).__bases__ if base is not FSDPModule]
    return bases[0] if isinstance(layer, FSDPModule) else type(layer)


def _is_linear(layer: Any) -> bool:
    """Whether a layer is a product and a bias, of tensors that are whole in its forward pass."""
    whole = isinstance(layer, FSDPModule) or not isinstance(getattr(layer, "weight", None), DTensor)
    return _kind(layer) is nn.Linear and whole


def _adapters(layer: Any) -> list[str] | None:
    """Names of the active adapters, None where one of them is more than a product of low rank."""
    names = [name for name in layer.active_adapters if name in layer.lora_A and not layer.disable_adapters]
    if layer.fan_in_fan_out or _hooks(layer.base_layer):
        return None
    for name in names:
        parts = (layer.lora_A[name], layer.lora_B[name])
        plain = all(_is_linear(part) and not _hooks(part) for part in parts)
        if not plain or name in layer.lora_variant or layer.lora_bias.get(name):
            return None
    return names


def _low_rank(layer: Any, name: str, hidden: Tensor) -> Part:
    inputs = layer._cast_input_dtype(hidden, layer.lora_A[name].weight.dtype)
    return Part(layer.lora_B[name], layer.lora_A[name](layer.lora_dropout[name](inputs)) * layer.scaling[name])


def _hooks(layer: Any) -> bool:
    """Whether something may change what goes into a layer or comes out; FSDP2 gathers the weights there."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp") for hook in hooks)


class BehindModel:
    """Keeps the logits as a model returns them, before FSDP2 rounds its outputs to the dtype of the products.

    Attributes:
        logits: of the last forward pass; None for a model that FSDP2 has not sharded.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self._watched: Any = None

    def watch(self, model: nn.Module) -> None:
        """Look at what a model returns from now on, if FSDP2 has sharded it."""
        if isinstance(model, FSDPModule) and model is not self._watched:
            model.register_forward_hook(self._keep, prepend=True)
            self._watched = model

    def _keep(self, _model: Any, _inputs: Any, outputs: Any) -> None:
        self.logits = outputs.get("logits") if isinstance(outputs, Mapping) else None

    def taken(self, outputs: Any) -> Tensor:
        """Return the logits of the forward pass that has returned ``outputs``, and keep them no longer."""
        kept, self.logits = self.logits, None
        found: Tensor = outputs["logits"] if kept is None else kept
        return found
