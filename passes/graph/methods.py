"""Calls of a module's own methods while its forward is traced: ``forward_features``, ``forward_head`` and the like.

Only what runs is noted: which operations a method made, of what it was given, and what it gave back. A fold that lies
in one method is then an edit of that method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from torch import fx, nn

from passes.graph.structures import structure

__all__ = ["MethodCall", "handed_on", "methods_of", "noting_methods"]


@dataclass(frozen=True, eq=False)
class MethodCall:
    """One call of a method: its name, what it was given and gave, and the nodes that were made meanwhile."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    nodes: frozenset[fx.Node]


@contextmanager
def noting_methods(module: nn.Module, calls: list[MethodCall], graph: Callable[[], fx.Graph]) -> Iterator[None]:
    """Note in ``calls`` the methods that the module's forward hands its work on to; the innermost come first."""
    own, kind = vars(module), cast(Any, type(module))
    names = [name for name in handed_on(kind) if name not in own]
    for name in names:
        own[name] = _noted(name, getattr(module, name), calls, graph)
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)


def methods_of(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The functions of a class and its bases, torch's own and Python's left out."""
    found: dict[str, FunctionType] = {}
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.modules"):
            continue
        for name, value in vars(base).items():
            if inspect.isfunction(value) and (name == "forward" or not name.startswith("__")):
                found.setdefault(name, value)
    return found


@functools.lru_cache(maxsize=4096)
def handed_on(kind: Any) -> tuple[str, ...]:
    """Methods that the forward mentions, and those that they mention."""
    methods = methods_of(kind)
    found: list[str] = []
    todo = ["forward"]
    while todo:
        function = methods.get(todo.pop())
        for name in () if function is None else inspect.unwrap(function).__code__.co_names:
            if name in methods and name != "forward" and name not in found:
                found.append(name)
                todo.append(name)
    return tuple(found)


def _noted(name: str, method: Callable[..., Any], calls: list[MethodCall], graph: Callable[[], fx.Graph]) -> Any:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = next(iter(reversed(graph().nodes)), None)
        given = _nodes(args), _nodes(kwargs)
        out = method(*args, **kwargs)
        made = []
        for node in reversed(graph().nodes):
            if node is before:
                break
            made.append(node)
        calls.append(MethodCall(name, *given, _nodes(out), frozenset(made)))
        return out

    return run


def _nodes(value: Any) -> Any:
    """A structure with nodes for the values that stand for them."""
    return structure(value, lambda each: each.node if isinstance(each, fx.Proxy) else each)
