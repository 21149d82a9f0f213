"""What modules hand each other, as structures of nodes: containers can be made again as what they were."""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx

__all__ = ["Made", "parts_of", "structure"]


class Made(NamedTuple):
    """A container of a class of its own, as the call that makes it; ``fx.map_arg`` finds the nodes in it."""

    kind: type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def structure(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with ``leaf`` applied to all that is no container.

    Named tuples, dataclasses and ordered dictionaries come as :class:`Made`, a container of another class as the tuple,
    list or dict that it is based on.
    """

    def inside(each: Any) -> Any:
        return structure(each, leaf)

    kind = type(value)
    if isinstance(value, tuple):
        items = tuple(map(inside, value))
        return Made(kind, items, {}) if hasattr(value, "_fields") else items
    if isinstance(value, list):
        return list(map(inside, value))
    if dataclasses.is_dataclass(kind):  # of its class: no question may be asked of a traced value
        names = [f.name for f in dataclasses.fields(value) if f.init and hasattr(value, f.name)]
        given = value if isinstance(value, dict) else {name: getattr(value, name) for name in names}  # a ModelOutput
        return Made(kind, (), {name: inside(given[name]) for name in given})
    if kind is collections.OrderedDict:
        return Made(kind, ([(key, inside(item)) for key, item in value.items()],), {})
    if isinstance(value, dict):
        return {key: inside(item) for key, item in value.items()}
    return leaf(value)


def parts_of(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """How to get at what a structure holds: a function, its key, and what it gives."""
    if isinstance(value, Made):
        if value.kind is collections.OrderedDict:
            yield from ((operator.getitem, *pair) for pair in value.args[0])
        else:
            yield from ((operator.getitem, i, part) for i, part in enumerate(value.args))
        take = operator.getitem if issubclass(value.kind, dict) else getattr
        yield from ((take, key, part) for key, part in value.kwargs.items())
    elif isinstance(value, dict):
        yield from ((operator.getitem, key, part) for key, part in value.items())
    elif isinstance(value, (tuple, list)):
        yield from ((operator.getitem, i, part) for i, part in enumerate(value))
    elif isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type):
        yield from parts_of(Made(value.target, value.args, value.kwargs))


def leaves(value: Any) -> Iterator[Any]:
    """What plain containers and slices hold, in order."""
    if isinstance(value, (tuple, list, set)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value
