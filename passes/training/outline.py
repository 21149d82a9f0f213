"""What code that was recorded from a block depends on: everything about the block but its numbers.

A block is an ordinary module, and people change it after it was built: another norm, another ``eps``, a bias more, a
pruned kernel, a hook. The code would go on computing what the block was; so each forward asks whether it still is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from passes.blocks.kit.layers import BranchSum
from passes.graph.leaf import has_hooks

__all__ = ["Outline", "can_record", "is_watched"]

_INTERNAL = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_AS_IT_RUNS = (
    "momentum", "track_running_stats", "process_group", "running_mean", "running_var", "num_batches_tracked",
)  # fmt: skip
"""What norms are asked for when the code runs."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Norms of which one may stand for another: they measure alike."""


class Outline:
    """The modules of a block's branches: their classes and plain attributes, and what they hold by which name."""

    def __init__(self, block: BranchSum) -> None:
        self._rows = tuple(map(_row, _inside(block)))

    def holds(self, block: BranchSum) -> bool:
        """Whether the block is still that but for its numbers."""
        inside = _inside(block)
        if len(inside) != len(self._rows):
            return False
        # Loops, which torch.compile follows; and nothing that asks a module for its tensors, which a trace would note.
        for module, (kind, children, makers, facts, tensors) in zip(inside, self._rows, strict=True):
            if type(module) is not kind and (kind is not None or type(module) not in _NORMS):
                return False
            if tuple(module._modules) != children or len(module._forward_pre_hooks) != makers:
                return False
            for name, value in facts:
                if getattr(module, name, module) != value:
                    return False
            for name, is_there in tensors:
                if _has(module, name) != is_there:
                    return False
        return True


def is_watched(block: BranchSum, *, by_anybody: bool = False) -> bool:
    """Whether somebody sees what runs inside, or has put other code there.

    Hooks that compute a weight are read along with its layer, and those by which this package counts calls change
    nothing; ``by_anybody`` counts them too, and hooks of all modules.
    """
    for module in _inside(block):
        hooks = (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        if hooks and (by_anybody or has_hooks(module)):
            return True
        # The compiler follows neither these nor hooks of all modules.
        if not torch.compiler.is_compiling() and "forward" in vars(module):
            return True
    return by_anybody and not torch.compiler.is_compiling() and _has_any_global_hook()


def can_record(block: BranchSum, x: Any = None) -> bool:
    """Whether code can be recorded in a call with ``x``.

    Not where all that runs is recorded or transformed itself, and not of a copy for another device, which has no
    parameters.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    real = all(type(t) in (Tensor, nn.Parameter) for t in (x, *block.parameters()) if t is not None)
    return real and next(block.parameters(), None) is not None and torch._C._functorch.peek_interpreter_stack() is None


def _has(module: nn.Module, name: str) -> bool:
    own = module.__dict__  # a copy for another device has tensors there
    found = own["_parameters"].get(name) is not None or own["_buffers"].get(name) is not None
    return found or own.get(name) is not None


def _inside(block: BranchSum) -> list[nn.Module]:
    return [module for branch in block.branches().values() for module in branch.modules()]


def _row(module: nn.Module) -> tuple[Any, ...]:
    own = module.__dict__
    names = [name for name in own if name not in _INTERNAL and name not in _AS_IT_RUNS]
    facts = tuple((name, copy.copy(own[name])) for name in names if _is_plain(own[name]))
    held = [*own["_parameters"].items(), *own["_buffers"].items()]
    tensors = tuple((name, tensor is not None) for name, tensor in held if name not in _AS_IT_RUNS)
    kind = None if type(module) in _NORMS else type(module)
    return kind, tuple(own["_modules"]), len(module._forward_pre_hooks), facts, tensors


def _is_plain(value: Any) -> bool:
    return all(isinstance(item, _PLAIN) for item in (value if isinstance(value, (tuple, list)) else (value,)))
