"""Memos, which a forward fills on its first call and reads from then on: found where they are filled.

A forward with a memo (``if key not in self.cache``, ``if self.grid is None``) does something else in a network that was
called already: it sets nothing, and reads a number that nobody can follow to a parameter. So every trace begins like
the first call of a new network. Whether something is a memo is seen by that trace: it fills it again.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passes.graph.contents import LARGE
from passes.graph.methods import handed_on, methods_of

__all__ = ["Memo", "filled_memos"]

_DEPTH = 3
"""How deep containers are looked into for a tensor."""
_TABLES = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Memo:
    """Something that may be one.

    Args:
        empty: makes it what it is before the first call.
        is_filled: whether a trace that began there has filled it; given the ids of modules with the names of attributes
            that it has set.
    """

    empty: Callable[[], Any]
    is_filled: Callable[[Set[tuple[int, str]]], bool]


def filled_memos(root: nn.Module, outside: Collection[Any]) -> list[Memo]:
    """What may be a memo, and holds something now.

    Lists and dictionaries, of the modules or from ``outside``, with tensors that are no parameters; of a module whose
    forward can set an attribute that holds such a tensor, or a buffer, all attributes that it can set: one may be the
    key of another.
    """
    containers = {id(value): value for value in outside if _is_container(value)}
    attributes: list[Memo] = []
    for module in root.modules():
        own = {name: value for name, value in vars(module).items() if name not in _TABLES}
        containers |= {id(value): value for value in own.values() if _is_container(value)}
        kind: Any = type(module)
        names, absent = _set_by(kind)
        single = {name for name in names & own.keys() if not _is_container(own[name])}
        buffers = {name for name in names if module._buffers.get(name) is not None}
        if buffers or any(_holds_tensor(own[name]) for name in single):
            attributes += [_entry(module, vars(module), name, name in absent) for name in single]
            attributes += [_entry(module, module._buffers, name, False) for name in buffers]
    return [*(_container(value) for value in containers.values() if _holds_tensor(value)), *attributes]


def _container(value: Any) -> Memo:
    return Memo(value.clear, lambda written: len(value) > 0)


def _entry(module: nn.Module, table: dict[str, Any], name: str, absent: bool) -> Memo:
    def empty() -> None:
        if absent:
            table.pop(name, None)
        else:
            table[name] = None

    return Memo(empty, lambda written: (id(module), name) in written)


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list)) and 0 < len(value) <= LARGE


def _holds_tensor(value: Any, depth: int = _DEPTH) -> bool:
    """Whether there is a tensor in it that is no parameter."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if not depth or not isinstance(value, (dict, list, tuple)) or len(value) > LARGE:
        return False
    return any(_holds_tensor(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))


@functools.lru_cache(maxsize=4096)
def _set_by(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes that a forward can set, itself or by its methods; and texts, by which it may ask for one."""
    methods = methods_of(kind)
    codes = [inspect.unwrap(methods[name]).__code__ for name in ("forward", *handed_on(kind)) if name in methods]
    names = {str(step.argval) for code in codes for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    return frozenset(names), frozenset(text for code in codes for text in code.co_consts if isinstance(text, str))
