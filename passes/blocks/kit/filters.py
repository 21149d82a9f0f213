"""Filters on a layer's geometry: which layers a caller asks for, and for which a block is meant.

A filter is a number, which stands for all dimensions, a tuple for one shape, or a list, set or range of these. A linear
layer, which has no dimensions, counts as a kernel of one tap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from passes.algebra.geometry import Geometry
from passes.refusal import ReparamError

__all__ = ["GEOMETRIC", "Filters", "check_filters", "fits", "in_words"]

Filters = Mapping[str, Any]
GEOMETRIC = ("kernel", "depthwise", "groups", "stride")


def check_filters(filters: Filters, known: Sequence[str] = GEOMETRIC) -> None:
    """Raise :class:`ReparamError` for a filter that does not exist, or with a value that it cannot have."""
    for key, wanted in filters.items():
        if key not in known:
            raise ReparamError(f"there is no filter {key!r}; known: {', '.join(known)}")
        if key == "depthwise" and not isinstance(wanted, bool):
            raise ReparamError(f"the filter 'depthwise' is True or False, got {wanted!r}")
        if key in ("kernel", "stride", "groups") and not _is_sizes(wanted):
            raise ReparamError(
                f"the filter {key!r} is a number, a tuple for one shape, or a list of these, got {wanted!r}"
            )


def fits(filters: Filters, geometry: Geometry) -> bool:
    """Whether a layer is what all geometric filters ask for."""
    if "depthwise" in filters and geometry.depthwise is not filters["depthwise"]:
        return False
    facts = {"kernel": geometry.kernel or (1,), "stride": geometry.stride or (1,), "groups": (geometry.groups,)}
    return all(_allowed(filters[key], value) for key, value in facts.items() if key in filters)


def in_words(choices: Sequence[Filters]) -> str:
    """What is allowed by one of several filters: ``depthwise square kernels of 5 or 7, or kernels of one tap``."""
    return ", or ".join(_phrase(filters) for filters in choices)


def _phrase(filters: Filters) -> str:
    kind = {True: "depthwise ", False: "other than depthwise "}.get(filters.get("depthwise", ""), "")
    kernel = filters.get("kernel")
    sizes = "kernels" if kernel is None else f"kernels of {_sizes(kernel)}"
    if kernel == 1:
        sizes = "kernels of one tap"
    elif kernel is not None and "x" not in sizes:
        sizes = f"square {sizes}"
    rest = [f"{key} {_sizes(filters[key])}" for key in ("stride", "groups") if key in filters]
    return kind + sizes + (f" with {' and '.join(rest)}" if rest else "")


def _sizes(wanted: Any) -> str:
    if isinstance(wanted, range):
        return f"{wanted[0]} to {wanted[-1]}"
    if isinstance(wanted, tuple):
        return "x".join(map(str, wanted))
    if not isinstance(wanted, (list, set, frozenset)):
        return str(wanted)
    *others, last = map(_sizes, wanted)
    return f"{', '.join(others)} or {last}" if others else last


def _is_sizes(value: Any) -> bool:
    if isinstance(value, (list, set, frozenset, range)):
        return all(_is_sizes(each) for each in value)
    if isinstance(value, tuple):
        return all(isinstance(each, int) for each in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _allowed(wanted: Any, value: tuple[int, ...]) -> bool:
    if isinstance(wanted, (list, set, frozenset, range)):
        return any(_allowed(each, value) for each in wanted)
    return value == (wanted if isinstance(wanted, tuple) else (wanted,) * len(value))
