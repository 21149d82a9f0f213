"""What a forward can change outside of its modules: containers and names in globals, closures, defaults and classes.

Only what the code of the forwards can reach is looked at, from ``forward`` by the names that it uses; code of torch and
of Python's own library changes nothing of a person's by itself.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["FOREIGN", "Outside", "copied", "kept_outside", "refill", "same_items"]

CONTAINERS = (list, dict, set, deque)
LARGE = 10_000
"""Items beyond which a container is a table of data, of which only the length is looked at."""
SMALL = 200
FOREIGN = frozenset({"passes", "torch", "numpy", "builtins", *sys.stdlib_module_names}) - {"__main__"}


class Outside:
    """What the forwards of ``model`` can reach, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        walk = _Walk()
        for kind in {type(module) for module in model.modules()}:
            walk.method(kind, "forward")
        for module in model.modules():
            walk.value(vars(module).get("forward"))
            walk.attributes(module)
            for name in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in vars(module).get(name, {}).values():
                    walk.value(hook)
        self._containers = [(c, copied(c)) for c in walk.containers.values()]
        self._slots = [(get, put, get()) for get, put in walk.slots.values()]
        self._now = self._state()
        self.small = sum(map(len, walk.containers.values())) + len(self._slots) <= SMALL
        """Whether it costs nothing to look again at every step."""

    def _state(self) -> tuple[list[Any], list[Any]]:
        return [copied(c) for c, _ in self._containers], [get() for get, _, _ in self._slots]

    def changed(self) -> bool:
        """Whether anything has changed since this was last asked."""
        contents, values = self._now
        same = all(same_items(c, before) for (c, _), before in zip(self._containers, contents, strict=True))
        if same and all(get() is before for (get, _, _), before in zip(self._slots, values, strict=True)):
            return False
        self._now = self._state()
        return True

    def restore(self) -> None:
        """Give everything the content that it had."""
        for container, content in self._containers:
            if not same_items(container, content):
                refill(container, content)
        for get, put, value in self._slots:
            if get() is not value:
                put(value)
        self._now = self._state()


@contextmanager
def kept_outside(model: nn.Module) -> Iterator[None]:
    """Restore what the model's forwards can reach outside of it."""
    outside = Outside(model)
    try:
        yield
    finally:
        outside.restore()


class _Walk:
    """Follows code to what it can change; ``slots`` are names that are assigned, as a way to read and to set them."""

    def __init__(self) -> None:
        self.containers: dict[int, Any] = {}
        self.slots: dict[Any, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        self._seen: set[Any] = set()

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
        if isinstance(value, CONTAINERS):
            self._container(value)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
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
        elif isinstance(value, types.SimpleNamespace) or _is_object(value):
            self._container(vars(value))
            self.value(type(value))

    def attributes(self, module: nn.Module) -> None:
        """Objects that a module holds, and what lies within its containers; those themselves are its own."""
        for name, value in vars(module).items():
            if name.startswith("_") or value is None or isinstance(value, (bool, int, float, str, Tensor)):
                continue
            for item in _items(value) if isinstance(value, CONTAINERS) else [value]:
                if isinstance(item, CONTAINERS):
                    self._container(item)
                elif _is_object(item):
                    self._container(vars(item))

    def _container(self, container: Any) -> None:
        if id(container) in self.containers:
            return
        self.containers[id(container)] = container
        for item in _items(container):
            if isinstance(item, CONTAINERS):
                self._container(item)

    def _slot(self, key: Any, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.slots.setdefault(key, (get, put))

    def _function(self, function: types.FunctionType, kind: type | None) -> None:
        if (function, kind) in self._seen:
            return
        self._seen.add((function, kind))
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
            if name != "__class__" and _content(cell) is not _EMPTY:
                self.value(_content(cell), kind)
                self._slot(
                    id(cell), functools.partial(_content, cell), functools.partial(setattr, cell, "cell_contents")
                )
        for code in _codes(function.__code__):
            for name in code.co_names:
                if name in space and not hasattr(builtins, name):
                    self.value(space[name])
                if kind is not None:
                    self.method(kind, name)
            for name in _assigned(code):
                self._slot(
                    (id(space), name), functools.partial(space.get, name, _EMPTY), functools.partial(_set, space, name)
                )


_EMPTY = object()


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


def _is_object(value: Any) -> bool:
    """Whether it is an object of a person's own class."""
    known = isinstance(value, (types.ModuleType, nn.Module, Tensor))
    return hasattr(value, "__dict__") and not known and not _is_foreign(type(value))


def _is_foreign(thing: Any) -> bool:
    # A function that wraps another says that it is of the other's module.
    home = thing.__globals__.get("__name__") if isinstance(thing, types.FunctionType) else None
    return str(home or getattr(thing, "__module__", None) or "").partition(".")[0] in FOREIGN


# ------------------------------------------------------------------ containers


def _items(container: Any) -> list[Any]:
    if len(container) > LARGE:
        return []
    return list(container.values() if isinstance(container, dict) else container)


def copied(container: Any) -> Any:
    """The items as they are now, in a container of the plain kind; of a large one their number."""
    if len(container) > LARGE:
        return len(container)
    return dict(container) if isinstance(container, dict) else list(container)


def same_items(now: Any, before: Any) -> bool:
    """Whether a container holds the very same things as a copy; their == may be anything."""
    if isinstance(before, int):
        return len(now) == before
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(map(operator.is_, map(now.__getitem__, before), before.values()))
    if isinstance(now, (set, frozenset)):
        return {id(v) for v in now} == {id(v) for v in before}
    return all(map(operator.is_, now, before))


def refill(container: Any, content: Any) -> None:
    """Give a container the content of its copy back."""
    if isinstance(content, int):
        return
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(content)
