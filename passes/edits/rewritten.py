"""Give one module a new forward, or another method, generated from a program, and leave all else about it alone.

The module keeps its attributes, hooks, other methods and state-dict names; ``isinstance`` with its class still holds,
as with ``torch.nn.utils.parametrize``, which also swaps the class. Copies and pickles keep the new forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import fx, nn

from passes.edits.program import Program
from passes.graph.generated import forget_with
from passes.refusal import ReparamError

__all__ = ["Remainder", "Rewritten", "function_of", "plain_class", "rewrite", "settle"]


class Rewritten:
    """Mixed into the class of a module of which methods were rewritten, most often its forward."""

    _programs: Mapping[str, Program]
    _folded: frozenset[str]
    _plain: type[nn.Module]
    _read: frozenset[str]
    _settled: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        """A class that keeps a register of its subclasses, or asks them for something, is not told of this one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = getattr(self._plain, "__deepcopy__", None)
        if own is not None and not issubclass(self._plain, fx.GraphModule):  # which makes its forward of its graph
            return own(self, memo)
        differs = any(getattr(self._plain, name, None) is not getattr(nn.Module, name, None) for name in _COPYING)
        if differs and not issubclass(self._plain, fx.GraphModule):
            return copy._reconstruct(self, memo, *self.__reduce__())  # type: ignore[attr-defined]
        new = object.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        plain = self._plain
        if issubclass(plain, fx.GraphModule):  # each has a class of its own, and a graph that the program makes again
            plain = next(kind for kind in plain.__mro__ if not kind.__qualname__.endswith("GraphModuleImpl"))
            state = {name: value for name, value in self.__dict__.items() if name not in _MADE}
        return _restore, (plain, dict(self._programs), self._folded, self._settled), state

    def __setattr__(self, name: str, value: Any) -> None:
        # The new code no longer calls what is set here, or calls it for several layers: not to be ignored in silence.
        if name in self._folded and isinstance(value, nn.Module) and vars(self)["_modules"].get(name) is not value:
            raise ReparamError(
                f"{name} of this {self._plain.__name__} is folded with other layers and cannot be replaced any more: "
                "replace it in the network that was collapsed"
            )
        if name in self._read and name in vars(self) and not _same(vars(self)[name], value):
            raise ReparamError(
                f"{name} of this {self._plain.__name__} was {vars(self)[name]!r:.40} when its forward was folded, and "
                "is not read any more: set it in the network that was collapsed"
            )
        super().__setattr__(name, value)


class Remainder(nn.Module):
    """What is left of a layer that also did something else: the rest of its forward."""


def rewrite(module: nn.Module, program: Program, method: str = "forward", folded: Iterable[str] = ()) -> None:
    """Replace a method by what ``program`` computes; its paths are relative to the module.

    ``folded`` are names of children that are no longer what they were.
    """
    programs, before, settled = _changes(module)
    settled = tuple(name for name in settled if name != method)
    _swap(module, plain_class(module), {**programs, method: program}, frozenset(folded) | before, settled)
    module.__dict__.pop(method, None)  # one replaced on the instance would go first
    _show(module)


def settle(module: nn.Module, methods: Iterable[str]) -> None:
    """Let methods do nothing and return the module: what they would fold and delete is folded already."""
    programs, folded, settled = _changes(module)
    _swap(module, plain_class(module), programs, folded, tuple(dict.fromkeys((*settled, *methods))))


def _changes(module: nn.Module) -> tuple[Mapping[str, Program], frozenset[str], tuple[str, ...]]:
    """What was rewritten before."""
    if isinstance(module, Rewritten):
        return module._programs, module._folded, module._settled
    return {}, frozenset(), ()


def _as_it_is(module: nn.Module) -> nn.Module:
    """Nothing is left to fold."""
    return module


def _swap(
    module: nn.Module,
    plain: type[nn.Module],
    programs: Mapping[str, Program],
    folded: frozenset[str],
    settled: tuple[str, ...],
) -> None:
    constants = {name: tensor for program in programs.values() for name, tensor in program.constants.items()}
    members = {
        **constants,
        **{method: function_of(program, method) for method, program in programs.items()},
        **dict.fromkeys(settled, _as_it_is),
        "_settled": settled,
        "_programs": programs,
        "_folded": folded,
        "_plain": plain,
        "_read": frozenset(name for method in programs for name in _names_in(plain, method)) - {"training"},
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    object.__setattr__(module, "__class__", type(plain.__name__, (Rewritten, plain), members))


def _show(module: nn.Module) -> None:
    """Let a module that has a graph say what it computes now."""
    program = vars(type(module))["_programs"].get("forward")
    if isinstance(module, fx.GraphModule) and program is not None:
        graph = program.graph()
        graph.owning_module = module
        module.__dict__.update(_graph=graph, _code=graph.python_code("self").src)


_MADE = frozenset(("_graph", "_code", "_wrapped_call", "_tracer_cls"))
_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
"""How a class may say what is copied of it."""


def _names_in(plain: type[nn.Module], method: str) -> tuple[str, ...]:
    """Names of attributes in the code of a method."""
    code = getattr(inspect.unwrap(getattr(plain, method, None)), "__code__", None)  # type: ignore[arg-type]
    return () if code is None else code.co_names


def _same(value: Any, other: Any) -> bool:
    try:
        return value is other or (type(value) is type(other) and bool(value == other))
    # Whatever a comparison of a person's own objects may raise.
    except Exception:
        return False


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made of."""
    return module._plain if isinstance(module, Rewritten) else type(module)


def function_of(program: Program, name: str) -> FunctionType:
    """GraphModule generates the code and registers its source: tracebacks, torch.jit and torch.compile see it."""
    graph = program.graph()
    # It wants something in each place that the code names; the code finds the module's own there.
    held = {str(node.target): nn.Identity() for node in graph.nodes if node.op in ("call_module", "get_attr")}
    made = type(fx.GraphModule(held, graph)).forward
    assert isinstance(made, FunctionType)
    forget_with(made)
    made.__name__ = name
    made.__defaults__, made.__kwdefaults__ = program.defaults()
    return made


def _restore(
    plain: type[nn.Module], programs: dict[str, Program], folded: frozenset[str], settled: tuple[str, ...] = ()
) -> nn.Module:
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    _swap(module, type(module), programs, folded, settled)
    _show(module)
    return module
