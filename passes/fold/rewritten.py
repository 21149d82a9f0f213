"""Give one module a new forward, generated from a graph, and leave everything else about it alone.

The module keeps its attributes, hooks, other methods and state-dict names; ``isinstance`` with its class still holds,
as with ``torch.nn.utils.parametrize``, which also swaps the class. Copies and pickles keep the new forward.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Rewritten", "rewrite_forward"]


class Rewritten:
    """Mixed into the class of a module whose forward was rewritten."""

    _graph: fx.Graph
    _plain: type[nn.Module]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._plain, _carrier(self)), self.__dict__


def rewrite_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Replace ``module.forward`` by the code of ``graph``, whose targets are relative to the module."""
    plain = module._plain if isinstance(module, Rewritten) else type(module)
    # GraphModule generates the code and registers its source, so that tracebacks, torch.jit and torch.compile see it.
    _swap(module, plain, fx.GraphModule(module, graph))


def _swap(module: nn.Module, plain: type[nn.Module], body: fx.GraphModule) -> None:
    members = {
        "forward": type(body).forward,
        "_graph": body.graph,
        "_plain": plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    module.__class__ = type(plain.__name__, (Rewritten, plain), members)


def _carrier(module: Any) -> fx.GraphModule:
    """The graph in a form that torch knows how to pickle; its weights travel with the module, not with it."""
    empty = nn.Module()
    for node in module._graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _touch(empty, str(node.target), node.op == "call_module")
    return fx.GraphModule(empty, module._graph)


def _touch(root: nn.Module, target: str, is_module: bool) -> None:
    *path, last = target.split(".")
    for name in path:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if hasattr(root, last):
        return
    if is_module:
        root.add_module(last, nn.Identity())
    else:
        root.register_buffer(last, torch.empty(0))


def _restore(plain: type[nn.Module], body: fx.GraphModule) -> nn.Module:
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    _swap(module, plain, body)
    return module
