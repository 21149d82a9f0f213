"""Whether what a file says is of the type that a field is declared with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["fits", "hints"]


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a class's fields by name."""
    return get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of a type: a class, or unions, tuples, lists and mappings of them; an integer is a float."""
    if hint is Any:
        return True
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return any(fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is ...:
            return all(fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(fits(item, arg) for item, arg in zip(value, args, strict=True))
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is not None:  # a mapping
        items = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in items)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    return isinstance(value, hint) or (hint is float and type(value) is int)
