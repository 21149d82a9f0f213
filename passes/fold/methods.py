"""What the other methods of a class use of a module, read from their code.

A rewritten forward needs fewer children than before. One that ``forward_features`` or ``extract_feat`` calls itself has
to stay; one that only a method of re-parameterisation looks at (``switch_to_deploy``, ``get_equivalent_kernel``) has
nothing left to do there.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from passes.edits.rewritten import plain_class

__all__ = ["needed_elsewhere"]

_LOADS = {"LOAD_ATTR", "LOAD_METHOD"}


def needed_elsewhere(module: nn.Module, called: set[str], read: set[str]) -> dict[str, set[str]]:
    """What other methods than ``forward`` need of the children ``called`` and the tensors ``read``, by method.

    A method needs the children that it calls itself, and one to which ``forward`` hands its work on all that it uses;
    with them the tensors that it reads.
    """
    methods = _methods(plain_class(module))
    reached: set[str] = set()
    todo = ["forward"] if "forward" in methods else []
    while todo:
        for name in (_used(methods[todo.pop()])[0] & methods.keys()) - reached:
            reached.add(name)
            todo.append(name)
    found = {}
    for name, function in methods.items():
        loads, calls = _used(function)
        needed = called & (loads if name in reached else calls)
        if needed and name != "forward":
            found[name] = needed | (read & loads)
    return found


def _methods(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The functions of a class and its bases, torch's own left out."""
    found: dict[str, FunctionType] = {}
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules"):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and (name == "forward" or not name.startswith("__")):
                found.setdefault(name, value)
    return found


@functools.lru_cache(maxsize=4096)
def _used(function: FunctionType) -> tuple[set[str], set[str]]:
    """Attributes of its own object that a method reads, and those of them that it calls."""
    loads: set[str] = set()
    calls: set[str] = set()
    whole = inspect.unwrap(function).__code__
    own = whole.co_varnames[0] if whole.co_argcount else "self"
    for code in _codes(whole):
        before: Any = None
        for step in dis.get_instructions(code):
            if step.opname in _LOADS and (before == own or (isinstance(before, tuple) and before[-1:] == (own,))):
                name = str(step.argval)
                loads.add(name)
                if step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (step.arg or 0) & 1):
                    calls.add(name)
            before = step.argval
    return loads, calls


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
