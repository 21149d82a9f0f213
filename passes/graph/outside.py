"""What a forward can change outside of its modules: containers and names in globals, closures, defaults and classes.

Only what the code of the forwards can reach is looked at, from ``forward`` by the names that it uses; code of torch and
of Python's own library changes nothing of a person's by itself.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passes.graph.contents import (
    CONTAINERS,
    FOREIGN,
    LARGE,
    Row,
    copied,
    has_data,
    inside,
    is_changeable,
    refill,
    sameness,
)
from passes.graph.walk import modules_of

__all__ = ["Outside", "kept_outside", "kept_statistics", "speaks_of_weights"]

SMALL = 200
DEPTH = 6
"""How far what holds something that holds something is followed."""


class Outside:
    """What the forwards of ``modules`` can reach, as it is now."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        walk = _Walk()
        for kind in set(map(type, modules)):
            walk.method(kind, "forward")
        for module in modules:
            walk.value(vars(module).get("forward"))
            walk.attributes(module)
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in vars(module).get(name, {}).values():
                    walk.value(hook)
        self._containers = [(c, copied(c), sameness(c)) for c in walk.containers.values()]
        self._slots = [(get, put, get()) for get, put in walk.slots.values()]
        self._plain = [c for c in walk.containers.values() if type(c) in CONTAINERS and len(c) <= LARGE]
        self._row = Row(c for c in walk.containers.values() if Row.takes(c))
        self._special = [i for i, (c, _, _) in enumerate(self._containers) if not Row.takes(c)]
        self.note()
        self._is_first = True
        """Whether what was noted last is what there was at first."""
        sizes = (len(c) if isinstance(c, CONTAINERS) else 1 for c in walk.containers.values())
        self._iterates = bool(walk.iterators)
        self.small = sum(sizes) + len(self._slots) <= SMALL
        """Whether it costs nothing to look again at every step."""

    def drawing(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Those whose forward can reach an iterator, which nobody can put back once it has gone on."""
        return [module for module in modules if _draws(module)] if self._iterates else []

    @property
    def containers(self) -> list[Any]:
        """Lists, dictionaries and such, without tables of data."""
        return [*self._plain]

    def note(self) -> None:
        """What :meth:`changed` asks about is what there is from now on."""
        self._now = [copied(c) for c, _, _ in self._containers], [get() for get, _, _ in self._slots]
        self._row.note()
        self._is_first = False

    def _as_noted(self) -> bool:
        """Whether nothing has changed for sure, seen at a glance: this is asked at every step of a trace."""
        if not self._row.same() or any(
            get() is not before for (get, _, _), before in zip(self._slots, self._now[1], strict=True)
        ):
            return False
        return all(self._containers[i][2](self._containers[i][0], self._now[0][i]) for i in self._special)

    def changed(self) -> bool:
        """Whether anything has changed since this was last asked."""
        if self._as_noted():
            return False
        contents, values = self._now
        for (container, _, same), before in zip(self._containers, contents, strict=True):
            if not same(container, before):
                break
        else:
            if all(get() is before for (get, _, _), before in zip(self._slots, values, strict=True)):
                return False
        self.note()
        return True

    def restore(self) -> None:
        """Give everything the content that it had."""
        if self._is_first and self._as_noted():
            return
        for container, content, same in self._containers:
            if not same(container, content):
                refill(container, content)
        for get, put, value in self._slots:
            if get() is not value:
                put(value)
        self.note()
        self._is_first = True


def _draws(module: nn.Module) -> bool:
    walk = _Walk()
    walk.method(type(module), "forward")
    walk.value(vars(module).get("forward"))
    for name in walk.names & vars(module).keys():
        walk.held(vars(module)[name])
    return bool(walk.iterators)


@contextmanager
def kept_outside(model: nn.Module) -> Iterator[None]:
    """Restore what the model's forwards can reach outside of it."""
    outside = Outside(modules_of(model))
    try:
        yield
    finally:
        outside.restore()


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model in training that a function holds: a copy of the model has the same function."""
    held = [
        m
        for m in modules_of(model)
        if getattr(m, "training", False) and any(b is not None for b in m._buffers.values())
    ]
    walk = _Walk()
    for module in model.modules() if held else ():
        walk.value(vars(module).get("forward"))
        walk.attributes(module)
    kept = [(b, b.detach().clone()) for m in held if id(m) in walk.layers for b in m._buffers.values() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in kept:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


def speaks_of_weights(code: Any) -> bool:
    """Whether a function, or the forward of a module, names tensors of layers, itself or in what it calls by name."""
    walk = _Walk()
    if isinstance(code, nn.Module):
        walk.method(type(code), "forward")
        walk.value(vars(code).get("forward"))
        for name in walk.names & vars(code).keys():
            walk.held(vars(code)[name])
    else:
        walk.value(code)
    return not walk.names.isdisjoint(_WEIGHTS)


_WEIGHTS = frozenset(
    {"weight", "bias", "weight_orig", "weight_mask", "weight_g", "weight_v", "parameters", "named_parameters"}
    | {"_parameters", "state_dict", "load_state_dict", "register_parameter"}
)


class _Walk:
    """Follows code to what it can change; ``slots`` are names that are assigned, as a way to read and to set them."""

    def __init__(self) -> None:
        self.containers: dict[int, Any] = {}
        self.slots: dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        self._seen: set[Any] = set()
        self._held: dict[int, Any] = {}
        self.layers: set[int] = set()
        """Modules that functions hold."""
        self.names: set[str] = set()
        """What the code speaks of."""
        self.iterators: list[Any] = []
        """What cannot be asked how far it is without going on."""

    def method(self, kind: type, name: str) -> None:
        """All definitions of a method that a call by name may reach, and what a class holds under that name."""
        for cls in kind.__mro__:
            if name in vars(cls) and not _is_foreign(cls):
                self.value(vars(cls)[name], kind)
                if not callable(vars(cls)[name]) and not hasattr(vars(cls)[name], "__get__"):
                    for at in {cls, kind}:  # self.count += 1 on a class sets it there
                        self._slot(
                            (at, name), functools.partial(vars(at).get, name, _EMPTY), functools.partial(_set, at, name)
                        )

    def value(self, value: Any, kind: type | None = None) -> None:
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self.value(value.__func__, kind)
        elif isinstance(value, property):
            self.value(value.fget, kind)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.value(part, kind)
        elif isinstance(value, types.FunctionType):
            self._function(value, kind)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.value(value.__wrapped__, kind)
        elif isinstance(value, type):
            if not _is_foreign(value) and not issubclass(value, (nn.Module, Tensor)):
                for name in ("__init__", "__call__", "__enter__", "__exit__"):
                    self.method(value, name)
        else:
            self.held(value)

    def attributes(self, module: nn.Module) -> None:
        """What a module holds and can change; its own containers are looked at as attributes are."""
        for value in [v for name, v in vars(module).items() if type(v) not in _NUMBERS and name not in _OF_TORCH]:
            if isinstance(value, type) and not _is_foreign(value) and not issubclass(value, (nn.Module, Tensor)):
                for spoken in tuple(self.names):
                    self.method(value, spoken)
            if type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value))):
                continue
            for item in inside(value) if isinstance(value, CONTAINERS) else (value,):
                self.held(item)

    def held(self, value: Any, depth: int = DEPTH) -> None:
        """Anything that may change while it stays the same thing, and what it holds."""
        if type(value) in _PLAIN or id(value) in self._held or not depth:
            return
        self._held[id(value)] = value
        if is_changeable(value):
            self.containers[id(value)] = value
        if hasattr(type(value), "__next__"):
            self.iterators.append(value)
        if isinstance(value, (types.FunctionType, types.MethodType)):
            self.value(value)
        elif has_data(value):
            self.value(type(value))
        for item in inside(value):
            self.held(item, depth - 1)

    def _slot(self, key: Any, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.slots.setdefault(key, (get, put))

    def _function(self, function: types.FunctionType, kind: type | None) -> None:
        if (function, kind) in self._seen:
            return
        self._seen.add((function, kind))
        if vars(function):
            self.held(vars(function))
        if _is_foreign(function):  # a decorator, which calls a person's function: contextlib's, torch.no_grad
            for cell in function.__closure__ or ():
                if isinstance(_content(cell), types.FunctionType):
                    self.value(_content(cell), kind)
            return
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(value)
        self.value(inspect.unwrap(function), kind)
        space = function.__globals__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if isinstance(_content(cell), nn.Module):
                self.layers |= {id(module) for module in _content(cell).modules()}
            if name != "__class__" and _content(cell) is not _EMPTY:
                self.value(_content(cell), kind)
                self._slot(
                    id(cell), functools.partial(_content, cell), functools.partial(setattr, cell, "cell_contents")
                )
        for code in _codes(function.__code__):
            self.names.update(code.co_names)
            classes = [space[name] for name in code.co_names if isinstance(space.get(name), type)]
            for name in code.co_names:
                if name in space and not hasattr(builtins, name):
                    self.value(space[name])
                for of in classes:
                    if not issubclass(of, (nn.Module, Tensor)):
                        self.method(of, name)
                if kind is not None:
                    self.method(kind, name)
            for name in _assigned(code):
                self._slot(
                    (id(space), name), functools.partial(space.get, name, _EMPTY), functools.partial(_set, space, name)
                )


_EMPTY = object()
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that torch gives every module: its tables, which are looked at as such."""
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), nn.Parameter, torch.Size, torch.dtype, type})

_NUMBERS = _PLAIN - {type}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _EMPTY


def _set(space: Any, name: str, value: Any) -> None:
    if isinstance(space, type):
        delattr(space, name) if value is _EMPTY else setattr(space, name, value)
    elif value is _EMPTY:
        space.pop(name, None)
    else:
        space[name] = value


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.cache
def _assigned(code: types.CodeType) -> tuple[str, ...]:
    """Globals that code sets."""
    return tuple(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL")


def _is_foreign(thing: Any) -> bool:
    # A function that wraps another says that it is of the other's module.
    home = thing.__globals__.get("__name__") if isinstance(thing, types.FunctionType) else None
    return str(home or getattr(thing, "__module__", None) or "").partition(".")[0] in FOREIGN
