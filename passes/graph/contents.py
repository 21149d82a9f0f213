"""What can change about a thing without its becoming another thing: noted, compared and put back in place.

Containers, arrays, tensors that are no parameters, generators of random numbers and objects with slots; an object with
attributes changes as its ``__dict__`` does.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import itertools
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CONTAINERS", "FOREIGN", "LARGE", "Row", "copied", "has_data", "inside", "is_changeable", "refill", "same_items",
    "sameness",
]  # fmt: skip

CONTAINERS = (list, dict, set, deque)
LARGE = 10_000
"""Items beyond which something is a table of data, of which only the length or the counter of changes is looked at."""
EMPTY = object()


@dataclass(frozen=True)
class _Kind:
    """How to note the content of a thing, to compare it with what was noted, and to put that back."""

    copied: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    refill: Callable[[Any, Any], Any]


def is_changeable(value: Any) -> bool:
    """Whether the content of a thing can be noted, apart from what it holds."""
    return _kind_of(value) is not None


def copied(value: Any) -> Any:
    """The content as it is now, to be compared and put back; of a large container its length."""
    return _kind(value).copied(value)


def same_items(now: Any, before: Any) -> bool:
    """Whether something holds the very same things as were noted; their == may be anything."""
    return _kind(now).same(now, before)


def sameness(value: Any) -> Callable[[Any, Any], bool]:
    """What :func:`same_items` asks of this thing, for who asks often."""
    return _kind(value).same


def refill(value: Any, content: Any) -> None:
    """Give something the content back that was noted."""
    _kind(value).refill(value, content)


class Row:
    """All that plain containers hold, one after the other, to see at a glance that none of it is another thing now."""

    KINDS = frozenset({*CONTAINERS, OrderedDict})

    def __init__(self, containers: Iterable[Any]) -> None:
        self._all = [*containers]
        self.note()

    @staticmethod
    def takes(value: Any) -> bool:
        """Whether to go through a thing shows all that it holds."""
        return type(value) in Row.KINDS and len(value) <= LARGE

    def note(self) -> None:
        """Compare with what is there now from here on."""
        self._empty = [each for each in self._all if not each]  # most are: tables of hooks
        self._filled = [each for each in self._all if each]
        self._dicts = [each for each in self._filled if isinstance(each, dict)]
        self._lengths, self._held = [*map(len, self._filled)], [*self._row()]

    def _row(self) -> Iterator[Any]:
        held = (itertools.chain.from_iterable(each) for each in (self._filled, map(dict.values, self._dicts)))
        return itertools.chain.from_iterable(held)

    def same(self) -> bool:
        """Whether everything is as noted."""
        lengths = not any(self._empty) and all(map(operator.eq, map(len, self._filled), self._lengths))
        return lengths and all(map(operator.is_, self._row(), self._held))


def inside(value: Any) -> Iterator[Any]:
    """What a thing holds, and what may change in its turn."""
    if isinstance(value, CONTAINERS):
        if len(value) <= LARGE:
            yield from list(value.values() if isinstance(value, dict) else value)
    elif isinstance(value, (tuple, frozenset)):
        if len(value) <= LARGE:
            yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif has_data(value):
        yield vars(value)
    if _slots_of(value):
        yield from _slotted(value).values()


# ------------------------------------------------------------------ kinds


def _kind(value: Any) -> _Kind:
    kind = _kind_of(value)
    assert kind is not None
    return kind


def _kind_of(value: Any) -> _Kind | None:
    if type(value) in CONTAINERS or isinstance(value, CONTAINERS):
        return _CONTAINER
    for of, kind in _OTHERS:
        if isinstance(value, of):
            return kind
    if type(value).__module__.partition(".")[0] == "numpy":
        return _NUMPY.get(type(value).__name__)
    return _SLOTTED if _slots_of(value) else None


def _container_copied(value: Any) -> Any:
    if len(value) > LARGE:
        return len(value)
    return dict(value) if isinstance(value, dict) else list(value)


def _container_same(now: Any, before: Any) -> bool:
    kind = type(before)  # asked at every step of a trace, which is why a type is asked for, and the likely thing first
    if kind is int:
        return bool(len(now) == before)
    if len(now) != len(before):
        return False
    if kind is dict:
        if all(map(operator.is_, now, before)) and all(map(operator.is_, now.values(), before.values())):
            return True
        return {_key(k): id(v) for k, v in now.items()} == {_key(k): id(v) for k, v in before.items()}
    if type(now) is not list and isinstance(now, (set, frozenset)):
        return {id(v) for v in now} == {id(v) for v in before}
    return all(map(operator.is_, now, before))


def _key(key: Any) -> Any:
    """What a key is known by: some answer neither == nor hash, such as values of a trace."""
    return key if type(key) in (str, int, torch.device) else id(key)


def _container_refill(value: Any, content: Any) -> None:
    if isinstance(content, int):
        return
    value.clear()
    (value.extend if isinstance(value, (list, deque)) else value.update)(content)


def _tensor_copied(value: Tensor) -> Any:
    small = value.numel() <= LARGE and not value.is_meta and value.layout is torch.strided
    return None if value.is_inference() else value._version, value.detach().clone() if small else None


def _tensor_refill(value: Tensor, content: Any) -> None:
    if content[1] is not None:
        with torch.no_grad():
            value.copy_(content[1])


def _slotted(value: Any) -> dict[str, Any]:
    return {name: held for name in _slots_of(value) if (held := getattr(value, name, EMPTY)) is not EMPTY}


def _slotted_refill(value: Any, content: dict[str, Any]) -> None:
    for name in _slotted(value).keys() - content.keys():
        delattr(value, name)
    for name, held in content.items():
        object.__setattr__(value, name, held)


def _same_state(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return isinstance(before, dict) and all(_same_state(now[k], before[k]) for k in now)
    if isinstance(now, (tuple, list)):
        return len(now) == len(before) and all(map(_same_state, now, before))
    same: Any = now is before or now == before
    return bool(same.all()) if hasattr(same, "all") else bool(same)


def _bytes_refill(value: bytearray, content: bytes) -> None:
    value[:] = content


def _variable_refill(value: contextvars.ContextVar[Any], content: Any) -> None:
    # Nobody can take a value away that was set; that of a variable which has none yet is its default.
    with contextlib.suppress(LookupError):
        value.set(contextvars.Context().run(value.get) if content is EMPTY else content)


def _array_refill(value: Any, content: Any) -> None:
    if content is not None:
        value[...] = content


def _numpy_refill(value: Any, content: Any) -> None:
    value.bit_generator.state = content


def _by_state(copied: Callable[[Any], Any], refill: Callable[[Any, Any], Any]) -> _Kind:
    return _Kind(copied, lambda now, before: _same_state(copied(now), before), refill)


_CONTAINER = _Kind(_container_copied, _container_same, _container_refill)
_SLOTTED = _Kind(_slotted, lambda now, before: _container_same(_slotted(now), before), _slotted_refill)
_OTHERS: tuple[tuple[Any, _Kind], ...] = (
    (nn.Parameter, _by_state(lambda v: None, lambda v, content: None)),  # a weight: no forward changes it unseen
    (Tensor, _Kind(_tensor_copied, lambda now, before: _tensor_copied(now)[0] == before[0], _tensor_refill)),
    (bytearray, _by_state(bytes, _bytes_refill)),
    (random.Random, _by_state(random.Random.getstate, random.Random.setstate)),
    (torch.Generator, _by_state(torch.Generator.get_state, torch.Generator.set_state)),
    (contextvars.ContextVar, _by_state(lambda v: v.get(EMPTY), _variable_refill)),
)
_NUMPY: dict[str, _Kind] = {
    "ndarray": _by_state(lambda v: v.copy() if v.size <= LARGE else None, _array_refill),
    "Generator": _by_state(lambda v: copy.deepcopy(v.bit_generator.state), _numpy_refill),
    "RandomState": _by_state(lambda v: v.get_state(), lambda v, content: v.set_state(content)),
}


def _slots_of(value: Any) -> tuple[str, ...]:
    kind: Any = type(value)
    return _slots(kind)


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    """The slots of a person's own class."""
    if kind.__module__.partition(".")[0] in _BUILT_IN:
        return ()
    declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


_BUILT_IN = frozenset({"builtins", "torch", "numpy", "typing", "types", "functools", "collections", "enum", "passes"})
_DATA = frozenset({"argparse", "collections", "threading", "types", "weakref", "_thread"})
"""Modules of Python's own library whose objects hold a person's data."""
FOREIGN = frozenset({"passes", "torch", "numpy", "builtins", *sys.stdlib_module_names}) - {"__main__"}


def has_data(value: Any) -> bool:
    """Whether it is an object of a person's own class, or one that holds a person's data."""
    home = type(value).__module__.partition(".")[0]
    other = isinstance(value, (types.ModuleType, nn.Module, Tensor, type, types.FunctionType))
    known = other or (home in FOREIGN and home not in _DATA)
    return not known and isinstance(getattr(value, "__dict__", None), dict)
