"""Which modules are one call in a graph, whatever their forward does."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from passes.graph.nodes import LAYERS
from passes.graph.opset import Kind, base_operation, operation_of_layer
from passes.graph.weights import makes_weight
from passes.graph.within import Within
from passes.refusal import Reason, Refusal

__all__ = [
    "SCRIPT", "has_hooks", "inherits_forward", "is_based_on_layer", "leaf_refusal", "library_leaves", "without_hooks",
]  # fmt: skip

_INHERITED = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR, Kind.NORM)


def inherits_forward(module: nn.Module) -> bool:
    """Whether a subclass of torch's convolutions, linear layers or norms computes just what its base computes."""
    operation = operation_of_layer(module)
    return operation is not None and operation.kind in _INHERITED


def is_based_on_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution, linear layer or norm of torch, or of a class derived from one."""
    operation = base_operation(module)
    return operation is not None and operation.kind in _INHERITED


def has_hooks(module: nn.Module) -> bool:
    """Whether user code runs around this module's forward or backward.

    What torch computes a weight by is none, nor what counts calls while a run of this package goes on.
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name, {}).values()]
    return not all(makes_weight(hook) or getattr(hook, "__module__", None) in _OURS for hook in hooks)


_OURS = frozenset(("passes.proof.run", "passes.proof.locate"))


def without_hooks(module: nn.Module) -> nn.Module:
    """The layer itself if it has no hooks of a person, else one without that holds the very same tensors."""
    if not has_hooks(module):
        return module
    bare = object.__new__(type(module))  # a parametrized layer refuses copy.copy
    tables = {name: value for name, value in vars(module).items() if isinstance(value, (dict, set))}
    own = {name: copy.copy(table) for name, table in tables.items()}
    for name, table in own.items():
        if isinstance(table, dict) and name.endswith("_hooks"):
            for key in [key for key, hook in table.items() if not makes_weight(hook)]:
                del table[key]
    bare.__dict__ = {**vars(module), **own}
    return bare


def library_leaves(which: str) -> list[Any]:
    """Timm's own list of what FX must not enter, when timm is loaded; a timm model implies that it is."""
    fx_module = sys.modules.get("timm.layers._fx")
    return list(getattr(fx_module, which)()) if fx_module is not None else []


SCRIPT = "it is a script of torch.jit, whose code is not read: collapse the model first, then script the result"


def leaf_refusal(module: nn.Module, leaf_types: tuple[type, ...]) -> Refusal | None:
    """Why a module is one call in the graph; without a message for layers that the laws know."""
    plain = type(module) in LAYERS or inherits_forward(module)
    if has_hooks(module):
        told = Reason.HOOK.value if plain else "compiled on its own: it has a hook"
        return Refusal(Reason.HOOK, told)
    if plain:
        return Refusal(Reason.UNTRACEABLE, "")
    if isinstance(module, Within) and module.inside is not None:
        return Refusal(Reason.UNTRACEABLE, f"a block inside the forward of {type(module.around).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        return Refusal(Reason.UNTRACEABLE, SCRIPT)
    if isinstance(module, leaf_types) and not is_based_on_layer(module):
        # A norm that activates or a conv that standardises its weight is read through.
        return Refusal(Reason.UNTRACEABLE, "compiled on its own: its library says that it cannot be traced")
    return None
