"""Give one module a new forward, generated from a program, and leave everything else about it alone.

The module keeps its attributes, hooks, other methods and state-dict names; ``isinstance`` with its class still holds,
as with ``torch.nn.utils.parametrize``, which also swaps the class. Copies and pickles keep the new forward.
"""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any

from torch import fx, nn

from passes.edits.program import Program

__all__ = ["Remainder", "Rewritten", "plain_class", "rewrite_forward"]


class Rewritten:
    """Mixed into the class of a module whose forward was rewritten."""

    _program: Program
    _plain: type[nn.Module]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._plain, self._program), self.__dict__


class Remainder(nn.Module):
    """What is left of a layer that also did something else: the rest of its forward."""


def rewrite_forward(module: nn.Module, program: Program) -> None:
    """Replace ``module.forward`` by what ``program`` computes; its paths are relative to the module."""
    members = {
        **program.constants,
        "forward": _forward(program),
        "_program": program,
        "_plain": (plain := plain_class(module)),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    module.__class__ = type(plain.__name__, (Rewritten, plain), members)
    module.__dict__.pop("forward", None)  # one replaced on the instance would go first


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made of."""
    return module._plain if isinstance(module, Rewritten) else type(module)


def _forward(program: Program) -> FunctionType:
    """GraphModule generates the code and registers its source: tracebacks, torch.jit and torch.compile see it."""
    graph = program.graph()
    # It wants something in each place that the code names; the code finds the module's own there.
    held = {str(node.target): nn.Identity() for node in graph.nodes if node.op in ("call_module", "get_attr")}
    made = type(fx.GraphModule(held, graph)).forward
    assert isinstance(made, FunctionType)
    made.__defaults__, made.__kwdefaults__ = program.defaults()
    return made


def _restore(plain: type[nn.Module], program: Program) -> nn.Module:
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    rewrite_forward(module, program)
    return module
