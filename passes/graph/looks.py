"""What code does with a local variable, such as a layer that it is handed, read from its instructions."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from passes.graph.attributes import is_plain
from passes.graph.methods import methods_of

__all__ = ["LOADS", "Step", "Used", "attributes_asked", "only_loads", "takes_apart", "used_by"]

Step = dis.Instruction


def attributes_asked(function: Any, place: int | str, module: nn.Module) -> frozenset[str] | None:
    """The plain attributes that a function asks of a layer in that place of its arguments; None if it may do more.

    What pads by the kernel and the stride of a convolution that its caller runs does no more than that.
    """
    if not isinstance(function, FunctionType) or inspect.unwrap(function) is not function:
        return None
    code, asked = function.__code__, set[str]()
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if isinstance(place, int):
        names = names[place : place + 1] if place < code.co_argcount else ()
    name = names[0] if isinstance(place, int) and names else place
    if name not in names:
        return None

    def plain(step: Step, _: Step) -> bool:
        asked.add(str(step.argval))
        return step.opname == "LOAD_ATTR" and is_plain(vars(module).get(str(step.argval), module))

    return frozenset(asked) if only_loads(code, str(name), plain) else None


def only_loads(code: CodeType, name: str, allowed: Callable[[Step, Step], bool]) -> bool:
    """Whether a local variable is only loaded, each time for two instructions that are allowed."""
    steps = _steps(code)
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


@functools.lru_cache(maxsize=4096)
def _steps(code: CodeType) -> tuple[Step, ...]:
    return tuple(s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL"))


_LOCAL = ("_FAST", "_FAST_BORROW", "_FAST_CHECK", "_FAST_AND_CLEAR", "_FAST_MAYBE_NULL")


def takes_apart(module: nn.Module, name: str) -> bool:
    """Whether the methods of a module use this child without ever calling it: they call what is in it, or iterate."""
    used = [used_by(function) for function in methods_of(type(module)).values()]
    return any(name in each.own for each in used) and not any(name in each.called for each in used)


LOADS = {"LOAD_ATTR", "LOAD_METHOD"}


@dataclass(frozen=True)
class Used:
    """Attributes that a method reads of its own object, those of them that it calls, and those it reads of others."""

    own: frozenset[str]
    called: frozenset[str]
    others: frozenset[str]


@functools.lru_cache(maxsize=4096)
def used_by(function: FunctionType) -> Used:
    """What a function uses, its first argument being its own object."""
    own: set[str] = set()
    called: set[str] = set()
    others: set[str] = set()
    whole = inspect.unwrap(function).__code__
    me = whole.co_varnames[0] if whole.co_argcount else "self"
    for code in _codes(whole):
        before: Any = None
        for step in dis.get_instructions(code):
            if step.opname in LOADS:
                mine = before == me or (isinstance(before, tuple) and before[-1:] == (me,))
                (own if mine else others).add(str(step.argval))
                if mine and (step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and (step.arg or 0) & 1)):
                    called.add(str(step.argval))
            before = step.argval
    return Used(frozenset(own), frozenset(called), frozenset(others))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
