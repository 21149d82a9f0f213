"""Frozen values with some fields changed."""

from __future__ import annotations

from typing import Any, TypeVar

__all__ = ["replace"]

Value = TypeVar("Value")


def replace(value: Value, /, **changes: Any) -> Value:
    """As ``dataclasses.replace``, for plain frozen dataclasses whose constructor only stores what it is given.

    Of a form or a signal one is made for each operation in each region, and the constructor is most of it.
    """
    made = object.__new__(type(value))
    vars(made).update(vars(value), **changes)
    return made
