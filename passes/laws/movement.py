"""Data movement: concatenation, splits, reshapes, transposes, shuffles; and questions about the shape.

    cat, stack       the rows of several forms become the rows of one     same geometry after the embedding of sum
    chunk, split...  rows of a form                                       along the channels
    any other        followed by example (:mod:`passes.laws.values`)      the numbers come back to a channel permutation
    mean, upsample   the form stays; a map per channel may follow         the weights add up to 1, within a channel

Exact whenever it is not refused: nothing is computed, or, in the last line, it stays where it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from passes.algebra.changed import replace
from passes.algebra.conv_form import Ints
from passes.laws.arguments import plain, signal
from passes.laws.channelwise import add, mul
from passes.laws.values import Signal, average, channel_axis_is, crop, merge, move, pick, settle, spread_of
from passes.refusal import Reason, RefusalError

__all__ = [
    "along", "as_other", "attribute", "averaged", "cat", "dropout", "getitem", "identity", "mean", "moved", "size",
    "stack", "stochastic_depth", "total",
]  # fmt: skip

Law = Callable[..., Any]


def cat(tensors: Any, dim: int = 0) -> Signal:
    """``torch.cat``."""
    return merge(_signals(tensors), lambda ids: torch.cat(ids, dim), along=dim)


def stack(tensors: Any, dim: int = 0) -> Signal:
    """``torch.stack``."""
    return merge(_signals(tensors), lambda ids: torch.stack(ids, dim))


def _signals(tensors: Any) -> list[Signal]:
    parts = list(tensors)
    if not all(isinstance(p, Signal) for p in parts):
        raise RefusalError(Reason.NOT_AFFINE, "joined with a constant")
    return parts


def getitem(x: Any, index: Any) -> Any:
    """``x[index]``."""
    if isinstance(x, (tuple, list)):
        return x[index]
    value = signal(x)
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        at = next(k for k, item in enumerate(items) if item is Ellipsis)
        missing = len(value.shape) - (len([i for i in items if i is not None]) - 1)
        items[at : at + 1] = [slice(None)] * missing
    return crop(value, [plain(i) for i in items])


def along(operation: Law) -> Law:
    """The law of chunk, split, narrow and the like: along the channels only."""
    first = 0 if operation in (torch.narrow, torch.select, torch.index_select) else 1

    def law(x: Any, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[first] if len(args) > first else 0)
        value = settle(signal(x))
        last = -1 if value.view.last else -1 - value.view.n
        if not (dim == last or channel_axis_is(value, dim)):
            raise RefusalError(Reason.LAYOUT, "split along batch or space")
        return pick(value, lambda ids: operation(ids, *plain(args), **plain(kwargs)))

    return law


def moved(operation: Law) -> Law:
    """The law of any operation that only moves data, followed by example."""
    return _by_example(operation, move)


def averaged(operation: Law) -> Law:
    """The law of what gives weighted means of one channel each: pooling, upsampling, a mean over space."""

    def law(x: Any, *args: Any, **kwargs: Any) -> Any:
        given = plain(args), tuple(sorted(plain(kwargs).items()))
        known = all(isinstance(value, _OPTIONS) for value in tree_leaves(given))
        spread = functools.partial(_spread, operation, *_frozen(given)) if known else None
        return average(signal(x), _run(operation, args, kwargs), spread)

    return law


_OPTIONS = (bool, int, float, str, type(None))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (tuple, list)) else value


@functools.lru_cache(maxsize=256)  # a network of poolings asks the same of each, for each norm behind them
def _spread(operation: Law, args: Any, kwargs: Any, shape: Ints) -> Ints | None:
    return spread_of(_run(operation, args, dict(kwargs)), shape)


def _run(operation: Law, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    def run(numbers: Tensor) -> Any:
        try:
            return operation(numbers, *plain(args), **plain(kwargs))
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            raise RefusalError(Reason.LAYOUT, f"{Reason.LAYOUT.value} ({error})".splitlines()[0]) from error

    return run


def _by_example(operation: Law, follow: Callable[[Signal, Callable[[Tensor], Any]], Any]) -> Law:
    def law(x: Any, *args: Any, **kwargs: Any) -> Any:
        return follow(signal(x), _run(operation, args, kwargs))

    return law


def total(x: Any, dim: Any = None, keepdim: bool = False) -> Signal:
    """``torch.sum`` over a dimension along which several values were stacked."""
    value = signal(x)
    if not value.is_moved or not isinstance(dim, int):
        raise RefusalError(Reason.NOT_AFFINE)
    parts = move(value, lambda ids: ids.unbind(dim))
    summed = functools.reduce(add, parts)
    result: Signal = move(summed, lambda ids: ids.unsqueeze(dim)) if keepdim else summed
    return result


def mean(x: Any, dim: Any = None, keepdim: bool = False) -> Signal:
    """``torch.mean``: of values that were stacked, or over positions."""
    value = signal(x)
    if value.is_moved and not value.mixed and isinstance(dim, int):
        try:
            return mul(total(x, dim, keepdim), 1 / value.ids.shape[dim])
        except RefusalError:
            pass  # they are positions
    result: Signal = averaged(torch.mean)(x, dim, keepdim)
    return result


def as_other(x: Any, other: Any) -> Any:
    """``x.view_as(other)``."""
    value, wanted = signal(x), signal(other).shape
    return move(value, lambda ids: ids.reshape(plain(wanted)))


def identity(x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same value; whatever the arguments are, they are about memory or, for a cast, have been looked at before."""
    return replace(signal(x), work=0, conv=False, bias=0)


def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Nothing, in evaluation."""
    if training and p > 0:
        raise RefusalError(Reason.NOT_AFFINE, "dropout in training mode")
    return identity(x)


def stochastic_depth(x: Any, p: float, mode: str, training: bool = True) -> Any:
    """``torchvision.ops.stochastic_depth``."""
    return dropout(x, p, training)


def attribute(x: Any, name: str) -> Any:
    """``x.shape``; other attributes are values."""
    if name == "shape":
        return signal(x).shape
    if name == "ndim":
        return len(signal(x).shape)
    raise RefusalError(Reason.NOT_AFFINE, f"reads .{name}")


def size(x: Any, dim: int | None = None) -> Any:
    """``x.size()``, ``x.size(dim)``."""
    whole = signal(x).shape
    return whole if dim is None else whole[dim]
