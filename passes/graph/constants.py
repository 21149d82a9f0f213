"""Values that depend on parameters only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from passes.graph.capture import Unit
from passes.graph.copies import deep_copy
from passes.graph.nodes import may_draw
from passes.graph.opset import Operation
from passes.graph.weights import computed_weight
from passes.refusal import Reason, RefusalError

__all__ = ["Constants", "find_constants", "holder_tensors"]


def find_constants(
    unit: Unit, operations: Mapping[fx.Node, Operation], held: Mapping[fx.Node, Any], written: set[fx.Node]
) -> set[fx.Node]:
    """Nodes whose value is the same in every call.

    ``held`` is what ``get_attr`` nodes read, ``written`` are values that the forward changes itself.

    What the model has kept from an earlier call is not, since it may be of other weights. Random numbers are not, and
    what code does that nobody knows may be anything.
    """
    constant: set[fx.Node] = set()
    for node in unit.graph.nodes:
        operation = operations.get(node)
        if node in written or node in unit.memos or node.op in ("placeholder", "output") or may_draw(node, operation):
            continue
        if node.op == "get_attr":
            if isinstance(held[node], Tensor):
                constant.add(node)
        elif all(n in constant for n in node.all_input_nodes):
            opaque = node.op == "call_module" and str(node.target) in unit.opaque
            if not opaque and (node.all_input_nodes or node.op == "call_module"):
                constant.add(node)
    return constant


class Constants:
    """Values that depend on parameters only: in ``dtype`` for folding, meta tensors (``None``) for planning."""

    def __init__(self, flow: Any, dtype: torch.dtype | None) -> None:
        self.flow = flow
        self.dtype = dtype
        self._values: dict[fx.Node, Any] = {}
        self._shapes: dict[torch.Size, Tensor] = {}

    def value(self, node: fx.Node) -> Any:
        """Value of a constant node."""
        if node not in self._values:
            self._values[node] = self._compute(node)
        return self._values[node]

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """A layer's weight; one that is computed on each access is computed in float64, or differentiably."""
        plain = module._parameters.get(name, module._buffers.get(name))
        if plain is not None and self.dtype is None and plain.is_floating_point():
            return self._of_shape(plain.shape)
        if plain is not None or name in module._parameters or name in module._buffers:
            return None if plain is None else self._cast(plain)
        exact = module if torch.is_grad_enabled() else deep_copy(module).double()
        value = computed_weight(exact, name)
        return None if value is None else self._cast(value)

    def _of_shape(self, shape: torch.Size) -> Tensor:
        """What stands for a layer's weight in planning, where laws only look at it: one for all of the same shape."""
        if shape not in self._shapes:
            self._shapes[shape] = torch.empty(shape, dtype=torch.float64, device="meta")
        return self._shapes[shape]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = self.flow.unit.attribute(str(node.target))  # as it is now: parameters may have been swapped
            value = self._cast(held)
            # An expression may work in place; the model's own weight must never be what it works on.
            return value.clone() if isinstance(value, Tensor) and _share_memory(value, held) else value
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        if changed := self.flow.memory.written.get(node):  # older names of what it changes keep their values
            place = {value: self.value(value).clone() for value in changed if isinstance(self.value(value), Tensor)}
            args = fx.map_arg(node.args, lambda n: place.get(n, self.value(n)))
            kwargs = fx.map_arg(node.kwargs, lambda n: place.get(n, self.value(n)))
        try:
            if node.op == "call_module":
                module = self.flow.modules[node]
                real = Constants(self.flow, self.dtype or torch.float64)
                args = fx.map_arg(node.args, real.value)
                module = module if torch.is_grad_enabled() else deep_copy(module).double()
                return self._cast(module(*args, **fx.map_arg(node.kwargs, real.value)))
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        # User code on constants may fail in any way, on meta tensors above all; then the weight is not known.
        except Exception as error:
            if self.dtype is None:  # masks and indices are real, and do not mix
                return self._cast(Constants(self.flow, torch.float64).value(node))
            raise RefusalError(Reason.NOT_AFFINE, f"weight expression failed: {error}".splitlines()[0]) from error

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not torch.is_grad_enabled():
            value = value.detach()
        if not value.is_floating_point():
            return value
        if self.dtype is None:
            return torch.empty(value.shape, dtype=torch.float64, device="meta")
        if value.device.type == "mps":  # no float64 there
            value = value.cpu()
        return value.to(self.dtype)


def holder_tensors(held: Any) -> list[Tensor]:
    """Floating-point parameters and buffers of a layer, or a tensor that is read by itself."""
    if type(held) is nn.Identity:  # what it holds only answers questions (passes.edits.apply)
        return []
    tensors: list[Any] = [*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else [held]
    return [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those that hold none do not."""
    if a.device.type == "meta" or isinstance(a, FakeTensor):
        return False
    return a.data_ptr() == b.data_ptr()
