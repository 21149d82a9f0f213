"""What tracing puts in Python's way: counted, restored whatever happens, and only for the thread that traces.

A capture has to hear of module calls, of questions that Python answers without asking the object (``isinstance``,
``hasattr``), of attributes that a forward writes and of functions that take no proxy (``math.sqrt``). Each of those
names is replaced while any thread traces; what stands there then asks which tracer its own thread runs, and is the
original wherever there is none.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.utils.checkpoint import CheckpointFunction

from passes.graph.contents import FOREIGN

__all__ = [
    "INTERCEPTED",
    "Interceptor",
    "active",
    "intercept_function",
    "intercept_type",
    "intercepting",
    "patched",
    "suspended",
]


class _Local(threading.local):
    tracer: Interceptor | None = None


_local = _Local()
_lock = threading.RLock()


class Interceptor(Protocol):
    """What a tracer hears of."""

    def call_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def read(self, module: nn.Module, name: str, value: Any) -> Any: ...
    def write(self, module: nn.Module, name: str, value: Any) -> None: ...
    def is_value(self, value: Any) -> bool: ...
    def is_instance(self, value: Any, kinds: Any) -> bool: ...
    def has_attribute(self, value: Any, name: str) -> bool: ...
    def type_of(self, value: Any) -> Any: ...
    def note_class_asked(self, module: nn.Module) -> None: ...
    def wraps(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool: ...
    def call_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def call_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def enter_context(self, what: str) -> None: ...
    def mode(self, now: bool) -> bool: ...
    def dtype(self, value: Any) -> Any: ...


def active() -> Interceptor | None:
    """The tracer of this thread."""
    return _local.tracer


@contextmanager
def patched() -> Iterator[None]:
    """Leave everything replaced until the end: to put all names back takes as long as to trace a small module."""
    with _lock:
        _Patches.enter()
    try:
        yield
    finally:
        with _lock:
            _Patches.leave()


@contextmanager
def intercepting(tracer: Interceptor) -> Iterator[None]:
    """Let ``tracer`` hear what this thread does."""
    before = active()
    with patched():
        _local.tracer = tracer
        try:
            yield
        finally:
            _local.tracer = before


@contextmanager
def suspended() -> Iterator[None]:
    """Run code of this thread as if nothing were traced."""
    before = active()
    _local.tracer = None
    try:
        yield
    finally:
        _local.tracer = before


def intercept_function(namespace: dict[str, Any], name: str, always: bool = False) -> None:
    """Make calls of a global function visible: with ``always`` those with any proxy, else those the tracer asks for."""
    with _lock:
        function = namespace[name]
        if not hasattr(function, "_reparam_original"):
            _Patches.item(namespace, name, _function(function, always))


class _Patches:
    """All that is replaced now. Restored in reverse order when the last tracer leaves."""

    users = 0
    made: list[Callable[[], None]]

    @classmethod
    def enter(cls) -> None:
        # It looks up Python's own functions by identity, once: had it met those that stand here, it would never again
        # know the real ones, and torch.compile would fail in the whole process.
        importlib.import_module("torch._dynamo")
        cls.users += 1
        if cls.users > 1:
            return
        cls.made = []
        try:
            cls.install()
        # A patch that could not be made must not leave the others behind.
        except BaseException:
            cls.leave()
            raise

    @classmethod
    def leave(cls) -> None:
        cls.users -= 1
        if cls.users == 0:
            while cls.made:
                cls.made.pop()()

    @classmethod
    def item(cls, namespace: dict[str, Any], name: str, new: Any) -> None:
        missing = name not in namespace
        old = namespace.get(name)
        namespace[name] = new
        cls.made.append((lambda: namespace.pop(name, None)) if missing else (lambda: namespace.update({name: old})))

    @classmethod
    def attribute(cls, owner: Any, name: str, new: Any) -> None:
        own, old = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, new)
        cls.made.append((lambda: setattr(owner, name, old)) if own else (lambda: delattr(owner, name)))

    @classmethod
    def install(cls) -> None:
        cls.attribute(nn.Module, "__call__", _module_call)
        cls.attribute(nn.Module, "__getattr__", _module_getattr)
        cls.attribute(nn.Module, "__setattr__", _module_setattr)
        cls.attribute(nn.Module, "get_parameter", _getter(nn.Module.get_parameter))
        cls.attribute(nn.Module, "get_buffer", _getter(nn.Module.get_buffer))
        cls.item(vars(builtins), "isinstance", _isinstance)
        cls.item(vars(builtins), "hasattr", _hasattr)
        cls.item(vars(torch), "is_tensor", _is_tensor)
        cls.item(vars(torch.jit), "isinstance", _jit_isinstance)
        for limits in (torch.finfo, torch.iinfo):
            cls.item(vars(torch), limits.__name__, _of_dtype(limits))
        for name in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"):
            cls.item(vars(torch), name, _mode(getattr(torch, name)))
        cls.attribute(torch.autograd.Function, "apply", classmethod(_apply))
        cls.attribute(torch.no_grad, "__enter__", _no_grad)
        for name, function in list(vars(math).items()):
            if not name.startswith("_") and callable(function):
                cls.item(vars(math), name, _function(function, True))
        for owner, names in _TAKE_SIZES:
            for name in names:
                cls.item(vars(owner), name, _function(getattr(owner, name), True))
        for (_, name), namespace in list(fx_trace._wrapped_fns_to_patch.items()):
            function = namespace.get(name, getattr(builtins, name, None))
            if function is not None and not hasattr(function, "_reparam_original"):
                cls.item(namespace, name, _function(function, True))
        for owner, name in fx_trace._wrapped_methods_to_patch:
            cls.attribute(owner, name, _method(getattr(owner, name), name))


_TAKE_SIZES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch, ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros")),
    (nn.functional, ("avg_pool1d", "avg_pool2d", "avg_pool3d")),
)
"""Functions of C that want numbers where code gives them the sizes of a value, and ask nobody else."""

_call: Any = nn.Module.__call__
_getattr, _setattr = nn.Module.__getattr__, nn.Module.__setattr__
_real_isinstance, _real_hasattr = isinstance, hasattr
_real_is_tensor = torch.is_tensor
_real_jit_isinstance: Any = torch.jit.isinstance
_real_apply: Any = vars(torch.autograd.Function)["apply"]
_real_no_grad: Any = torch.no_grad.__enter__


def _module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tracer = active()
    return _call(module, *args, **kwargs) if tracer is None else tracer.call_module(module, args, kwargs)


def _module_getattr(module: nn.Module, name: str) -> Any:
    value, tracer = _getattr(module, name), active()
    return value if tracer is None else tracer.read(module, name, value)


def _getter(get: Any) -> Any:
    @functools.wraps(get)
    def intercepted(module: nn.Module, target: str) -> Any:
        with suspended():  # it looks whether what it finds is a parameter
            value = get(module, target)
        tracer = active()
        return value if tracer is None else tracer.read(module, target, value)

    return intercepted


def _module_setattr(module: nn.Module, name: str, value: Any) -> None:
    tracer = active()
    if tracer is not None:
        tracer.write(module, name, value)
    _setattr(module, name, value)


def _asked(value: Any) -> Interceptor | None:
    """The tracer that answers for ``value``, unless torch itself asks: its own code tells proxies apart."""
    tracer = active()
    if tracer is None or not tracer.is_value(value):
        return None
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return None if caller.partition(".")[0] in ("torch", "passes") else tracer


_PLAIN = frozenset(
    {bool, int, float, str, tuple, list, dict, set, OrderedDict, slice, type(None), type}
    | {fx.Node, torch.Tensor, nn.Parameter}
)
"""Classes of what is asked for most, by torch.fx itself: nobody else answers for these."""


def _isinstance(value: Any, kinds: Any, /) -> bool:
    if type(value) in _PLAIN or active() is None:
        return _real_isinstance(value, kinds)
    tracer = _asked(value)
    if tracer is None and _real_isinstance(value, nn.Module):
        _note_class_asked(value)
    return _real_isinstance(value, kinds) if tracer is None else tracer.is_instance(value, kinds)


def _hasattr(value: Any, name: str, /) -> bool:
    tracer = _asked(value)
    return _real_hasattr(value, name) if tracer is None else tracer.has_attribute(value, name)


def _note_class_asked(module: nn.Module) -> None:
    tracer = active()
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if tracer is not None and caller.partition(".")[0] not in FOREIGN:
        tracer.note_class_asked(module)


class _AsType(type):
    """What makes :class:`_Type` do as ``type`` does, but for values of a trace."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if len(args) == 1:
            tracer = _asked(args[0])
            if tracer is not None:
                return tracer.type_of(args[0])
            if _real_isinstance(args[0], nn.Module):
                _note_class_asked(args[0])
        return type(*args, **named)

    def __instancecheck__(cls, instance: Any) -> bool:
        return _real_isinstance(instance, type)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_AsType):
    """Stands for ``type`` among the globals of code that is traced."""


def intercept_type(namespace: dict[str, Any]) -> None:
    """Let code with these globals ask for the type of a value."""
    with _lock:
        if "type" not in namespace:
            _Patches.item(namespace, "type", _Type)


def _is_tensor(obj: Any, /) -> bool:
    tracer = active()
    asked = tracer is not None and tracer.is_value(obj)
    return tracer.is_instance(obj, torch.Tensor) if asked and tracer is not None else _real_is_tensor(obj)


@functools.cache
def _of_dtype(limits: Any) -> Any:
    """Stands for the limits of a dtype: they are asked for by the dtype of a value, which is the same in every call."""

    class OfDtype(type):
        def __call__(cls, *args: Any) -> Any:
            tracer = active()
            return limits(*(tracer.dtype(a) if tracer is not None and tracer.is_value(a) else a for a in args))

        def __instancecheck__(cls, instance: Any) -> bool:
            return _real_isinstance(instance, limits)

    return OfDtype(limits.__name__, (), {})


def _mode(function: Any) -> Any:
    @functools.wraps(function)
    def asked(*args: Any) -> Any:
        now, tracer = function(*args), active()
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return now if tracer is None or caller.partition(".")[0] in ("torch", "passes") else tracer.mode(now)

    return asked


def _jit_isinstance(obj: Any, target_type: Any) -> bool:
    tracer = active()
    if tracer is None or not tracer.is_value(obj):
        return bool(_real_jit_isinstance(obj, target_type))
    return tracer.is_instance(obj, target_type)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    tracer = active()
    if tracer is None or not any(map(tracer.is_value, args)):
        apply: Any = _real_apply.__get__(None, cls)
        return apply(*args, **kwargs)
    if cls is CheckpointFunction:  # it computes what it is given, and once more for the gradients
        function, _, *given = args
        return function(*given)
    return tracer.call_function(cls.apply, args, kwargs)


def _no_grad(context: Any) -> None:
    tracer = active()
    if tracer is not None:
        tracer.enter_context("torch.no_grad")
    _real_no_grad(context)


@functools.lru_cache(maxsize=1024)  # every trace replaces the same ones, and small modules are traced by the dozen
def _function(function: Any, always: bool) -> Any:
    @functools.wraps(function)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is None or not (
            _any_value(tracer, (args, kwargs)) if always else tracer.wraps(function, args, kwargs)
        ):
            return function(*args, **kwargs)
        return tracer.call_function(function, args, kwargs)

    intercepted._reparam_original = function  # type: ignore[attr-defined]
    return intercepted


INTERCEPTED = _function(len, False).__code__
"""The code of what stands in the place of functions."""


def _method(function: FunctionType, name: str) -> Any:
    @functools.wraps(function)
    def intercepted(*args: Any, **kwargs: Any) -> Any:
        tracer = active()
        if tracer is None or not _any_value(tracer, (args, kwargs)):
            return function(*args, **kwargs)
        return tracer.call_method(name, args, kwargs)

    return intercepted


def _any_value(tracer: Interceptor, given: Any) -> bool:
    if _real_isinstance(given, (tuple, list)):
        return any(_any_value(tracer, item) for item in given)
    if _real_isinstance(given, dict):
        return any(_any_value(tracer, item) for item in given.values())
    return tracer.is_value(given)
