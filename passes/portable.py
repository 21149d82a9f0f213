"""What stays of this package in a network that was collapsed; a pickle of it carries this file.

So a whole pickle loads and runs where there is torch and the network's own code. Classes of this file are pickled as
its text (``_Carried``), a rewritten forward as the source that it was made of; where this package is installed, loading
takes what stands there. Nothing here may import anything but Python, torch and, if it is there, the error of ours.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import itertools
import linecache
import operator
import sys
import weakref
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

try:
    from passes.refusal import ReparamError
except ImportError:

    class ReparamError(ValueError):  # type: ignore[no-redef]
        """As of reparam, which is not installed here."""


__all__ = [
    "Again",
    "Remainder",
    "Rewritten",
    "ScaleShift",
    "Unchanged",
    "function_of",
    "plain_class",
    "source_of",
    "unchanged",
]

# ------------------------------------------------------------------ this file, in a pickle


class _File:
    """The names of this file; where they are unpickled they come out of its text, or of the package, if it is there."""

    def __getitem__(self, name: str) -> Any:
        return globals()[name]

    def __reduce__(self) -> tuple[Any, ...]:
        text = globals().get("TEXT") or inspect.getsource(sys.modules[__name__])
        names = "{'TEXT': TEXT, '__name__': 'passes.portable'}"
        return eval, (f"(lambda names: exec(TEXT, names) or names['_here']())({names})", {"TEXT": text})


_FILE = _File()


def _here() -> _File:
    try:
        return import_module("passes.portable")._FILE  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        return _FILE


class _Carried(type):
    """The class of classes that are pickled as the text of this file."""


def _from_text(kind: type) -> Any:
    """What pickle takes for a class; one that was made on the spot has no place where it would be found."""
    return (operator.getitem, (_FILE, kind.__name__)) if globals().get(kind.__name__) is kind else kind.__qualname__


copyreg.pickle(_Carried, _from_text)

# ------------------------------------------------------------------ layers


class ScaleShift(nn.Module, metaclass=_Carried):
    """``weight * x + bias``, a number of each per channel: what a batch norm is in evaluation, in half of its numbers.

    Args:
        channels: C, the size of dimension 1 of the input.
        dims: n, how many dimensions stand behind it.
        device: of the numbers.

    Shape: ``(N, C, *n)`` to the same; weight and bias are ``(C, 1, ...)`` with n ones. The result has the wider of the
    dtypes of input and numbers, as any arithmetic of torch, under autocast too.
    """

    def __init__(self, channels: int, dims: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.channels, self.dims = channels, dims
        shape = channels, *(1,) * dims
        self.weight = nn.Parameter(torch.ones(shape, device=device))
        self.bias = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.channels}, dims={self.dims}"


class Remainder(nn.Module, metaclass=_Carried):
    """What is left of a layer that also did something else: the rest of its forward."""


# ------------------------------------------------------------------ generated code


def unchanged(got: Any, wanted: Any, name: str) -> None:
    """Called by a rewritten forward for each argument that was at a fixed value when the network was collapsed."""
    if isinstance(got, fx.Proxy):
        got.tracer.create_proxy("call_function", unchanged, (got, wanted, name), {})
        return
    if got is wanted or isinstance(got, Tensor) or isinstance(wanted, Tensor):
        same = got is wanted
    else:
        same = type(got) is type(wanted) and bool(got == wanted)
    if not same:
        raise ValueError(f"this forward was collapsed for {name}={wanted!r} and cannot be called with another value")


class Unchanged(metaclass=_Carried):
    """The same for a value that has no text."""

    def __init__(self, wanted: Any, name: str) -> None:
        self.wanted, self.name = wanted, name
        self.__name__ = f"unchanged_{name}"

    def __call__(self, got: Any) -> None:
        if isinstance(got, fx.Proxy):
            got.tracer.create_proxy("call_function", self, (got,), {})
        else:
            unchanged(got, self.wanted, self.name)


torch.fx.node._side_effectful_functions.add(unchanged)
_COUNT = itertools.count()
Source = tuple[str, Mapping[str, tuple[str, Any]], tuple[Any, ...], Mapping[str, Any]]
"""The text of a function, what its names stand for, its defaults and those of parameters that have to be named."""


def source_of(graph: fx.Graph, defaults: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Source:
    """The code of a graph, in parts that can be pickled."""
    code = graph.python_code("self")
    return code.src, {name: _told(value) for name, value in code.globals.items()}, *defaults


def _told(value: Any) -> tuple[str, Any]:
    if inspect.ismodule(value):
        return "module", value.__name__
    return ("own", value.__name__) if value is unchanged else ("value", value)


def function_of(source: Source, name: str) -> FunctionType:
    """The function; tracebacks, ``torch.jit`` and ``torch.compile`` see its text for as long as it is there."""
    text, told, defaults, named = source
    names: dict[str, Any] = {"module": import_module, "own": globals().get, "value": lambda value: value}
    names = {known: names[kind](value) for known, (kind, value) in told.items()}
    where = f"<forward of reparam {next(_COUNT)}>"
    exec(compile(text, where, "exec"), names)
    made: FunctionType = names["forward"]
    made.__name__, made.__defaults__, made.__kwdefaults__ = name, defaults, dict(named)
    linecache.cache[where] = len(text), None, text.splitlines(keepends=True), where
    weakref.finalize(made.__code__, linecache.cache.pop, where, None).atexit = False
    return made


class _Whole(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graph_of(module: nn.Module) -> fx.Graph:
    """What a module that has a graph computes now."""
    graph = _Whole().trace(module)
    graph.owning_module = module  # type: ignore[assignment]
    return graph


# ------------------------------------------------------------------ rewritten modules


class Rewritten:
    """Mixed into the class of a module of which methods were rewritten, most often its forward."""

    _sources: Mapping[str, Source] = {}
    _constants: Mapping[str, Tensor] = {}
    _folded: frozenset[str] = frozenset()
    _plain: type[nn.Module]
    _read: frozenset[str]
    _settled: tuple[str, ...] = ()

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
        if issubclass(plain, fx.GraphModule):  # each has a class of its own, and a graph that its code makes again
            plain = next(kind for kind in plain.__mro__ if not kind.__qualname__.endswith("GraphModuleImpl"))
            state = {name: value for name, value in self.__dict__.items() if name not in _MADE}
        return Again.made, (plain, self._sources, self._constants, self._folded, self._settled), state

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


class Again(metaclass=_Carried):
    """Makes rewritten modules again; what a pickle calls."""

    @classmethod
    def made(
        cls,
        plain: type[nn.Module],
        sources: Mapping[str, Source],
        constants: Mapping[str, Tensor],
        folded: frozenset[str],
        settled: tuple[str, ...],
    ) -> nn.Module:
        """A module without its state; ``constants`` are what its code finds on its class."""
        module = plain.__new__(plain)
        nn.Module.__init__(module)
        cls.swap(module, type(module), sources, constants, folded, settled)
        return module

    @classmethod
    def swap(
        cls,
        module: nn.Module,
        plain: type[nn.Module],
        sources: Mapping[str, Source],
        constants: Mapping[str, Tensor],
        folded: frozenset[str],
        settled: tuple[str, ...],
    ) -> None:
        """Give a module the class that has the methods of ``sources`` beside its own."""
        members: dict[str, Any] = {
            **constants,
            **{method: function_of(source, method) for method, source in sources.items()},
            **dict.fromkeys(settled, _as_it_is),
            "_settled": settled,
            "_sources": sources,
            "_constants": constants,
            "_folded": folded,
            "_plain": plain,
            "_read": frozenset(name for method in sources for name in _names_in(plain, method)) - {"training"},
            "__module__": plain.__module__,
            "__qualname__": plain.__qualname__,
            "__doc__": plain.__doc__,
        }
        if isinstance(module, fx.GraphModule) and "forward" in sources:
            members |= {"_graph": cached_property(_graph_of), "_code": sources["forward"][0]}
            for name in ("_graph", "_code"):
                vars(module).pop(name, None)
        object.__setattr__(module, "__class__", type(plain.__name__, (Rewritten, plain), members))


_MADE = frozenset(("_graph", "_code", "_wrapped_call", "_tracer_cls"))
_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
"""How a class may say what is copied of it."""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made of."""
    return module._plain if isinstance(module, Rewritten) else type(module)


def _as_it_is(module: nn.Module) -> nn.Module:
    """Nothing is left to fold."""
    return module


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
