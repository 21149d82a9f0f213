"""Which hooks of a convolution go on as those of the block in its place.

A block is called with what its convolution was called with and returns the same, as long as no norm moves in: so a hook
sees the same values. But the layer that it is handed is the block. A hook that looks at more of it than a block answers
as its convolution does, that reads or writes weights, or whose code cannot be read, stays where it is, and the
convolution with it.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from passes.blocks.kit.layers import GEOMETRY
from passes.graph.outside import speaks_of_weights
from passes.graph.weights import makes_weight
from passes.refusal import Reason, Refusal

__all__ = ["hook_refusal", "sees_result"]

_CALLED = {"_forward_hooks": 3, "_forward_pre_hooks": 2, "_backward_hooks": 3, "_backward_pre_hooks": 2}
"""Tables of hooks, and how many arguments theirs are called with, keywords of the call aside."""

_STATE = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")

_PLAIN = (bool, int, float, complex, str, type(None))


def hook_refusal(module: nn.Module) -> Refusal | None:
    """Why a layer's hooks could not go on as a block's; None also where there are none."""
    if any(not makes_weight(hook) for name in _STATE for hook in (vars(module).get(name) or {}).values()):
        told = "it has a hook on its state dict, where the names of a block are others: remove it first"
        return Refusal(Reason.HOOK, told)
    if vars(module).get("_backward_hooks") and vars(module).get("_is_full_backward_hook") is False:
        told = "its backward hook is of the old kind, which sees one operation: use register_full_backward_hook"
        return Refusal(Reason.HOOK, told)
    for table, count in _CALLED.items():
        for key, hook in (vars(module).get(table) or {}).items():
            named = key in (vars(module).get(f"{table}_with_kwargs") or {})
            if not makes_weight(hook) and (why := _why_not(hook, module, count + named)) is not None:
                name = getattr(getattr(hook, "func", hook), "__qualname__", type(hook).__name__)
                return Refusal(Reason.HOOK, f"its hook {name} {why}: register it after expand, on the block")
    return None


def sees_result(module: nn.Module) -> bool:
    """Whether a hook sees what the layer returns, or the gradient of that."""
    tables = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(name) for name in tables)


def _why_not(hook: Any, module: nn.Module, count: int) -> str | None:
    found = _code(hook)
    if found is None:
        return "cannot be read"
    code, first = found
    if speaks_of_weights(hook):
        return "speaks of weights"
    return None if _leaves_alone(code, first, count, module) else "looks at the layer itself"


def _code(hook: Any, first: int = 0) -> tuple[CodeType, int] | None:
    """The code that a hook runs, and which of its positional arguments is the layer."""
    if isinstance(hook, functools.partial):
        return _code(hook.func, first + len(hook.args))
    if isinstance(hook, MethodType):
        return _code(hook.__func__, first + 1)
    if isinstance(hook, FunctionType):
        inner = inspect.unwrap(hook)
        if inner is not hook and (hook.__globals__.get("__name__") or "").split(".")[0] == "torch":
            return _code(inner, first)  # torch.no_grad and its like pass on what they are given
        return hook.__code__, first
    call = vars(type(hook)).get("__call__")
    return _code(call, first + 1) if isinstance(call, FunctionType) else None


Step = dis.Instruction


def _leaves_alone(code: CodeType, first: int, count: int, module: nn.Module) -> bool:
    """Whether code does with its argument number ``first`` only what it could do with a block as well."""
    if first < code.co_argcount:
        return _only(code, code.co_varnames[first], lambda step, _: _is_harmless(step, module))
    if not code.co_flags & inspect.CO_VARARGS:
        return False
    # The tuple of all arguments may be asked for one by its number, if that is not the layer.
    layer, length = first - code.co_argcount, first - code.co_argcount + count
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
    return _only(code, name, lambda number, taking: _takes_another(number, taking, layer, length))


def _only(code: CodeType, name: str, allowed: Callable[[Step, Step], bool]) -> bool:
    """Whether a local variable is only loaded, each time for two instructions that are allowed."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL")]
    for i, step in enumerate(steps):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if name not in names or not step.opname.endswith(_LOCAL):
            continue
        # Where two are loaded at once, what follows is done to the last.
        if names[-1] != name or names.count(name) > 1 or not step.opname.startswith("LOAD_FAST") or i + 2 >= len(steps):
            return False
        if not allowed(steps[i + 1], steps[i + 2]):
            return False
    return name not in code.co_cellvars


_LOCAL = ("_FAST", "_FAST_BORROW", "_FAST_CHECK", "_FAST_AND_CLEAR", "_FAST_MAYBE_NULL")


def _is_harmless(step: Step, module: nn.Module) -> bool:
    """Whether this, done to a layer, reads what a block answers as its convolution does, or leaves a mark on it."""
    name = str(step.argval)
    if step.opname == "STORE_ATTR":
        return not hasattr(module, name)
    if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return False
    plain = not name.startswith("_") and isinstance(vars(module).get(name, module), _PLAIN)
    return name in GEOMETRY or plain or not hasattr(module, name)


def _takes_another(number: Step, taking: Step, layer: int, length: int) -> bool:
    index = number.argval
    taken = taking.opname == "BINARY_SUBSCR" or (taking.opname == "BINARY_OP" and taking.argrepr == "[]")
    constant = number.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and type(index) is int
    return taken and constant and index % length != layer
