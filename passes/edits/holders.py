"""Who else holds a module: lists, dicts, plain attributes and functions, beside the tables that torch keeps.

Code may call a layer through such a reference, so whoever puts another module into a layer's place has to change the
reference as well. Containers and attributes can be changed; what a function closes over cannot, since a copy of the
model shares its functions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from passes.graph.copies import shadow
from passes.graph.walk import named_of
from passes.refusal import ReparamError

__all__ = ["Holder", "apart", "holders", "substituted"]

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that torch gives every module, none of which holds another but the table of children."""
_DEPTH = 4
_PLAIN = frozenset({bool, int, float, str, type(None), nn.Parameter, Tensor})
"""Classes of most values: looked up first, since every attribute of every module is looked at."""


@dataclass(frozen=True)
class Holder:
    """A plain attribute that holds a module: of whom, the owner's path, and whether the reference can be changed."""

    owner: nn.Module
    path: str
    name: str
    changeable: bool

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def holders(model: nn.Module) -> dict[int, list[Holder]]:
    """For the id of each module: the attributes that hold it beside its parent's table of children."""
    found: dict[int, list[Holder]] = {}
    for path, owner in named_of(model):
        own = [(n, v) for n, v in vars(owner).items() if type(v) not in _PLAIN and n not in _OF_TORCH]
        for name, value in own:
            if type(value) is tuple and _PLAIN.issuperset(map(type, value)):  # a stride, a padding
                continue
            if name.endswith("_hooks") or not _may_hold(value):
                continue
            held: dict[int, bool] = {}
            for module, changeable in _modules_in(value, _DEPTH):
                held[id(module)] = held.get(id(module), True) and changeable
            for key, changeable in held.items():
                found.setdefault(key, []).append(Holder(owner, path, name, changeable))
    return found


def apart(model: nn.Module) -> nn.Module:
    """What may be put into another mode while other threads run the model: copies of its modules, the tensors shared.

    The model itself where it cannot be copied, or where a function holds modules: that would call those that it knows.
    """
    held = any(not holder.changeable for found in holders(model).values() for holder in found)
    if held or any("forward" in vars(module) for module in model.modules()):
        return model
    try:
        return shadow(model)
    except ReparamError:
        return model


def substituted(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """``value`` with ``new`` wherever it holds ``old``; containers that change are copied."""
    if value is old:
        return new
    if isinstance(value, dict):
        pairs = {key: substituted(item, old, new) for key, item in value.items()}
        return value if all(pairs[key] is value[key] for key in pairs) else _refilled(value, pairs)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [substituted(item, old, new) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            changed = copy.copy(value)
            changed[:] = items
            return changed
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


def _refilled(value: dict[Any, Any], pairs: dict[Any, Any]) -> dict[Any, Any]:
    changed = copy.copy(value)
    changed.update(pairs)
    return changed


def _may_hold(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, Tensor, type)):
        return False
    return not isinstance(value, (dict, list, tuple, set, frozenset)) or len(value) > 0


def _modules_in(value: Any, depth: int, changeable: bool = True) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that a value holds, each with whether :func:`substituted` reaches it."""
    if isinstance(value, nn.Module):
        yield value, changeable
        return
    if depth == 0 or not _may_hold(value):
        return
    if isinstance(value, dict):
        inside: Any = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = value
    else:
        inside, changeable = _inside(value), False
    for item in inside:
        if type(item) not in _PLAIN:
            yield from _modules_in(item, depth - 1, changeable)


def _inside(value: Any) -> list[Any]:
    """What a function or an object of user code holds."""
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
