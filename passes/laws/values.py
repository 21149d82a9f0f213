"""Signal: a value inside a region, as an affine function of the region's entry, and how its data lie in memory.

Most values lie just as a convolution leaves them. Reshapes, transposes, shuffles and slices are followed *by example*:
the operation itself runs on a small tensor of element numbers, and the value counts as a channel permutation again
as soon as those numbers say so. Nothing has to be known about the operation, and what does not come back to a channel
permutation is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from passes.algebra.changed import replace
from passes.algebra.conv_form import ConvForm, Form, Ints
from passes.algebra.sparse_form import SparseForm
from passes.refusal import Reason, RefusalError

__all__ = [
    "Dim",
    "Signal",
    "View",
    "alike",
    "average",
    "channels_along",
    "crop",
    "merge",
    "move",
    "per_channel",
    "pick",
    "settle",
    "spread_of",
]

_SIZES = (13, 11, 7)
_BATCH = (11, 3, 5, 7)
"""Primes, so that nothing divides them by chance; code that splits batches does so into twos and fives."""


@dataclass(frozen=True)
class View:
    """How the entry's tensor is read: ``(batch, channels, *n spatial)``, or, with ``last``, ``(*batch, channels)``.

    ``rank`` is the number of dimensions, None where it is not known (only with ``last``).
    """

    n: int
    last: bool = False
    rank: int | None = None

    @property
    def channel_axis(self) -> int:
        return -1 if self.last else 1


class Late:
    """Numbers of elements that are computed when they are asked for: few averages have a norm behind them."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = cache(make)

    def __call__(self) -> Tensor:
        return self.make()


@dataclass(frozen=True)
class Signal:
    """An affine function of the entry.

    Args:
        form: the function, a :data:`Form`; behind several layers, a :class:`SparseForm` of all that they give.
        view: the layout of the entry, shared by all values of a region.
        elements: number of each element in the canonical layout, for a small example; None if canonical.
        work: multiply-adds of the operation that made this value, per output position.
        conv: whether that operation is a convolution or linear layer.
        bias: how many bias numbers that operation holds.
        untouched: whether this is the entry itself.
        mixed: whether elements are averages over one channel each: their numbers tell the channel and nothing else.
    """

    form: Any  # of one kind or the other for all values of a region; the laws are the same
    view: View
    elements: Tensor | Late | None = None
    work: int = 0
    conv: bool = False
    bias: int = 0
    untouched: bool = False
    mixed: bool = False

    @property
    def is_moved(self) -> bool:
        """Whether the value does not lie as a convolution leaves it."""
        return self.elements is not None

    @property
    def ids(self) -> Tensor:
        """The numbers of the elements, of a value that does not lie as a convolution leaves it."""
        assert self.elements is not None
        return self.elements() if isinstance(self.elements, Late) else self.elements

    def with_form(self, form: Form | SparseForm, work: int | None = None, conv: bool = False, bias: int = 0) -> Signal:
        """Same layout, another function."""
        work = form.out_channels if work is None else work
        return replace(self, form=form, work=work, conv=conv, bias=bias, untouched=False)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape as the traced code may use it; sizes of the example are marked so that they cannot become numbers."""
        if self.is_moved:
            return tuple(Dim(s) for s in self.ids.shape)
        if self.view.last and self.view.rank is None:
            raise RefusalError(Reason.RANK_UNKNOWN)
        sizes: list[Any] = [Dim(s) for s in _example_shape(self)]
        sizes[self.view.channel_axis] = self.form.out_channels
        return tuple(sizes)


class Dim:
    """A size that depends on the input: good for reshaping, never for arithmetic on values."""

    def __init__(self, value: int) -> None:
        self.value = value

    def _with(self, other: Any, op: Callable[[Any, Any], Any], swap: bool = False) -> Dim:
        theirs = other.value if isinstance(other, Dim) else other
        return Dim(op(theirs, self.value) if swap else op(self.value, theirs))

    def __add__(self, other: Any) -> Dim:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> Dim:
        return self._with(other, operator.sub)

    def __mul__(self, other: Any) -> Dim:
        return self._with(other, operator.mul)

    def __floordiv__(self, other: Any) -> Dim:
        return self._with(other, operator.floordiv)

    def __radd__(self, other: Any) -> Dim:
        return self._with(other, operator.add, swap=True)

    def __rmul__(self, other: Any) -> Dim:
        return self._with(other, operator.mul, swap=True)

    def _refuse(self, *_: Any) -> Any:
        raise RefusalError(Reason.NOT_AFFINE, "compares a size of the input")

    # Python has an answer of its own for each of these, which is that for no size.
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _refuse


def settle(signal: Signal) -> Signal:
    """The same value in canonical layout; refuses if it does not lie that way."""
    if not signal.is_moved:
        return signal
    if signal.mixed:
        raise RefusalError(Reason.LAYOUT, "is averaged over positions before")
    shape = _example_shape(signal)
    whole = _numbered(shape)
    axis = signal.view.channel_axis
    got = signal.ids
    if got.dim() != whole.dim():
        raise RefusalError(Reason.LAYOUT)
    at_zero = _line(got, axis)
    rows = (_channel_of(signal, at_zero)).tolist()
    wanted = whole.index_select(axis, torch.tensor(rows, dtype=torch.long, device="cpu"))
    if wanted.shape != got.shape or not torch.equal(wanted, got):
        raise RefusalError(Reason.LAYOUT)
    return replace(signal, form=signal.form.rows(rows), elements=None, untouched=False)


def move(signal: Signal, operation: Callable[[Tensor], Any]) -> Any:
    """Apply an operation that only moves data; a tuple of parts gives a tuple of signals."""
    moved = operation(_ids(signal))
    if isinstance(moved, (tuple, list)):
        return tuple(_moved(signal, part) for part in moved)
    return _moved(signal, moved)


def average(
    signal: Signal, operation: Callable[[Tensor], Any], spread: Callable[[Ints], Ints | None] | None = None
) -> Signal:
    """Apply an operation of which each element is a weighted mean of elements of one channel.

    A map of each channel may as well act before it: the weights add up to 1. Which channel an element belongs to, the
    operation says itself, of a tensor that holds the number of its channel everywhere. Where ``spread`` is given, it
    says at once what shape comes of a value with its channels along dimension 1, if they lie so afterwards.
    """

    def late() -> Tensor:
        if (
            spread is not None
            and not _is_recorded()
            and not signal.view.last
            and (not signal.is_moved or _is_in_place(signal))
        ):
            shape = spread(tuple(signal.ids.shape) if signal.is_moved else _example_shape(signal))
            if shape is not None:
                return _in_place(shape, _positions(signal))
        number = _channel_of(signal, _ids(signal)).double() + 1
        averaged, squares = operation(number), operation(number**2)
        channel = averaged.round()
        # Of several channels the mean may be the number of one, but not that of the squares as well.
        if not bool(torch.maximum((averaged - channel).abs(), (squares / channel**2 - 1).abs()).lt(1e-6).all()):
            raise RefusalError(Reason.LAYOUT, "averages over several channels")
        numbers: Tensor = (channel.long() - 1) * _positions(signal)
        return numbers

    return replace(signal, elements=Late(late), mixed=True, work=0, conv=False, bias=0, untouched=False)


def spread_of(operation: Callable[[Tensor], Any], shape: Ints) -> Ints | None:
    """The shape that an average gives of a value with its channels along dimension 1, None if they lie otherwise."""
    number = torch.arange(1, shape[1] + 1, device="cpu", dtype=torch.float64).reshape(-1, *(1,) * (len(shape) - 2))
    averaged, squares = operation(number.expand(shape)), operation((number**2).expand(shape))
    found = tuple(averaged.shape)
    if len(found) < 2 or found[1] != shape[1]:
        return None
    wanted = number.reshape(-1, *(1,) * (len(found) - 2))
    same = bool(torch.maximum((averaged - wanted).abs(), (squares / wanted**2 - 1).abs()).lt(1e-6).all())
    return found if same else None


@lru_cache(maxsize=256)
def _in_place(shape: Ints, positions: int) -> Tensor:
    """Elements of an average that lie along dimension 1 as the channels do; the same tensor whoever asks."""
    channels = torch.arange(shape[1], device="cpu") * positions
    return channels.reshape(-1, *(1,) * (len(shape) - 2)).expand(shape)


def _is_in_place(signal: Signal) -> bool:
    """Whether the channels of an average are known to lie along dimension 1."""
    if not signal.mixed or signal.view.last or _is_recorded():
        return False
    shape = tuple(signal.ids.shape)
    fits = len(shape) == signal.view.n + 2 and shape[1] == signal.form.out_channels
    return fits and signal.ids is _in_place(shape, _positions(signal))


def pick(signal: Signal, operation: Callable[[Tensor], Any]) -> Any:
    """As :func:`move`, along the channels: of a signal in canonical layout, only their order is looked at."""
    rank = signal.view.rank if signal.view.last else signal.view.n + 2
    if signal.is_moved or rank is None:
        return move(signal, operation)
    shape = [1] * rank
    shape[signal.view.channel_axis] = -1
    picked = operation(torch.arange(signal.form.out_channels, device="cpu").reshape(shape))
    parts = picked if isinstance(picked, (tuple, list)) else (picked,)
    if any(part.dim() != rank for part in parts):
        return move(signal, operation)
    signals = tuple(
        replace(signal, form=signal.form.rows(part.flatten().tolist()), work=0, conv=False, bias=0, untouched=False)
        for part in parts
    )
    return signals if isinstance(picked, (tuple, list)) else signals[0]


def crop(signal: Signal, index: Sequence[Any]) -> Signal:
    """Python indexing: anything along channels, ``start:-stop:step`` along space."""
    if not signal.is_moved and not signal.view.last:
        signal, index = _crop_space(signal, list(index))
    if all(item == slice(None) for item in index):
        return replace(signal, work=0, conv=False, bias=0)
    ids = _ids(signal)
    axis = 0
    for item in index:
        if item is None:
            continue
        if item != slice(None) and not _only_channels(signal, ids, axis):
            raise RefusalError(
                Reason.LAYOUT, "a slice along batch or space with fixed bounds depends on the input's size"
            )
        axis += 1
    return _moved(signal, ids[tuple(index)])


def merge(parts: Sequence[Signal], operation: Callable[[list[Tensor]], Tensor], along: int | None = None) -> Signal:
    """Concatenate (``along`` a dimension) or stack: channels of several signals become channels of one."""
    mixed = any(part.mixed for part in parts)
    if len({part.view for part in parts}) != 1 or (mixed and not isinstance(parts[0].form, SparseForm)):
        raise RefusalError(Reason.LAYOUT)
    kind = SparseForm if isinstance(parts[0].form, SparseForm) else ConvForm
    form = kind.concat([part.form for part in parts])
    joined = replace(parts[0], form=form, elements=None, work=0, conv=False, bias=0, untouched=False)
    if along in (1, -1 - joined.view.n) and not joined.view.last and all(not part.is_moved for part in parts):
        return joined
    whole = _canonical_ids(joined)
    axis, start, ids = joined.view.channel_axis, 0, []
    for part in parts:
        own = whole.narrow(axis, start, part.form.out_channels)
        if mixed:
            ids.append((_channel_of(part, _ids(part)) + start) * _positions(joined))
        else:
            ids.append(own if not part.is_moved else own.flatten()[part.ids])
        start += part.form.out_channels
    return _moved(replace(joined, mixed=mixed), operation(ids))


def per_channel(signal: Signal, *values: Tensor | None) -> list[Tensor | None]:
    """Each value, broadcast against the signal, as one number per channel of its form ``(out,)``; else refuses."""
    numbered = cache(partial(_numbers_of_channels, signal))
    return [None if value is None else _per_channel(signal, value, numbered) for value in values]


def _per_channel(signal: Signal, value: Tensor, numbered: Callable[[torch.Size], Tensor]) -> Tensor:
    if value.numel() == 1:
        return value.reshape(1).expand(signal.form.out_channels)
    if signal.is_moved and not _is_in_place(signal):
        return value.reshape(-1)[numbered(value.shape).to(value.device)]
    rank = signal.view.rank if signal.view.last else signal.view.n + 2
    at = -1 if signal.view.last else -1 - signal.view.n
    wrong = [i for i in range(-value.dim(), 0) if i != at and value.shape[i] != 1]
    if wrong or value.dim() < -at or value.shape[at] not in (1, signal.form.out_channels) or value.dim() > (rank or 99):
        raise RefusalError(Reason.NOT_PER_CHANNEL, f"{Reason.NOT_PER_CHANNEL.value}: shape {tuple(value.shape)}")
    flat = value.reshape(-1)
    return flat.expand(signal.form.out_channels) if flat.numel() == 1 else flat


def _numbers_of_channels(signal: Signal, shape: torch.Size) -> Tensor:
    """Which number of a constant of this shape meets each channel of the form; refuses if several meet one."""
    channel = _channel_of(signal, signal.ids)
    try:
        met = _numbered(tuple(shape)).expand(channel.shape)
    except RuntimeError as error:
        raise RefusalError(Reason.NOT_PER_CHANNEL, f"{Reason.NOT_PER_CHANNEL.value}: shape {tuple(shape)}") from error
    found = torch.full((signal.form.out_channels,), -1, dtype=torch.long, device="cpu")
    found[channel.flatten()] = met.flatten()
    if bool((found < 0).any()) or not torch.equal(found[channel], met):
        raise RefusalError(Reason.NOT_PER_CHANNEL, f"{Reason.NOT_PER_CHANNEL.value}: shape {tuple(shape)}")
    return found


def channel_axis_is(signal: Signal, wanted: int) -> bool:
    """Whether the tensor's axis ``wanted`` holds the channels."""
    axis = _channel_axis(signal)
    if axis >= 0:
        return axis == wanted
    if signal.view.rank is None:
        raise RefusalError(Reason.RANK_UNKNOWN)
    return signal.view.rank - 1 == wanted


def alike(x: Signal, y: Signal) -> bool:
    """Whether the channels of two values stand in the same places, whichever positions they hold of them."""
    if x.view != y.view or x.form.out_channels != y.form.out_channels or x.view.last:
        return False
    if x.is_moved and y.is_moved and x.ids is y.ids and _positions(x) == _positions(y):
        return True
    if x.is_moved and y.is_moved and x.ids.shape == y.ids.shape:
        return torch.equal(_channel_of(x, x.ids), _channel_of(y, y.ids))
    order = torch.arange(x.form.out_channels, device="cpu")

    def lies_so(value: Signal) -> bool:
        if _is_in_place(value):
            return True
        ids = value.ids
        in_place = ids.dim() == value.view.n + 2 and _channel_axis(value) == 1
        return in_place and torch.equal(_channel_of(value, _line(ids, 1)), order)

    return all(not value.is_moved or lies_so(value) for value in (x, y))


def _channel_axis(signal: Signal) -> int:
    """Axis of the channels, each of which stands there once."""
    if not signal.is_moved:
        return signal.view.channel_axis
    channel = _channel_of(signal, signal.ids)
    for axis in range(channel.dim()):
        if channel.shape[axis] != signal.form.out_channels:
            continue
        line = _line(channel, axis)
        if line.sort().values.tolist() == list(range(signal.form.out_channels)) and bool(
            (channel.movedim(axis, -1) == line).all()
        ):
            return axis
    raise RefusalError(Reason.LAYOUT)


def _channel_of(signal: Signal, ids: Tensor) -> Tensor:
    """The form's channel that each element number belongs to."""
    channels: Tensor = (ids // _positions(signal)) % signal.form.out_channels
    return channels


def _positions(signal: Signal) -> int:
    """How many positions each channel of the example has."""
    return 1 if signal.view.last else math.prod(_example_shape(signal)[2:])


def channels_along(signal: Signal, view: View) -> Tensor:
    """The form's channel that each element belongs to along the axis on which a layer of this view reads channels."""
    shape = signal.ids.shape if signal.is_moved else _example_shape(signal)
    rank = view.rank or (len(shape) if view.last else view.n + 2)
    if len(shape) != rank:
        raise RefusalError(Reason.LAYOUT)
    if not signal.is_moved and (signal.view.channel_axis - view.channel_axis) % rank == 0:
        return torch.arange(signal.form.out_channels, device="cpu")
    channel = _channel_of(signal, _ids(signal))
    line = _line(channel, view.channel_axis)
    if not bool((channel.movedim(view.channel_axis, -1) == line).all()):
        raise RefusalError(Reason.LAYOUT, "what it reads as a channel holds several of the map's")
    return line


def _only_channels(signal: Signal, ids: Tensor, axis: int) -> bool:
    """Whether moving along ``axis`` changes the channel and nothing else."""
    if ids.shape[axis] == 1:
        return True
    if not signal.is_moved:
        return axis == signal.view.channel_axis % ids.dim()
    step = _positions(signal)
    channel = _channel_of(signal, ids)
    rest = ids - channel * step
    return bool((rest == rest.narrow(axis, 0, 1)).all())


def _crop_space(signal: Signal, index: list[Any]) -> tuple[Signal, list[Any]]:
    n = signal.view.n
    lead, trail, stride = [0] * n, [0] * n, [1] * n
    for i in range(n):
        if len(index) <= 2 + i or index[2 + i] == slice(None):
            continue
        item = index[2 + i]
        start, stop, step = (item.start or 0, item.stop, item.step or 1) if isinstance(item, slice) else (-1, 0, 1)
        fixed = isinstance(stop, Dim) or (stop is not None and stop >= 0)
        if any(isinstance(v, Dim) for v in (start, step)) or start < 0 or fixed or step < 1:
            raise RefusalError(Reason.LAYOUT, "a slice along space with fixed bounds depends on the input's size")
        lead[i], trail[i], stride[i] = -start, stop or 0, step
        index[2 + i] = slice(None)
    form = signal.form.pad(tuple(lead), tuple(trail))
    if any(s > 1 for s in stride) and not isinstance(form, SparseForm):  # of that, a step changes no channel
        identity = ConvForm.identity(form.out_channels, n, like=form.weight)
        form = form.then(replace(identity, stride=tuple(stride)))
    return replace(signal, form=form, work=0, conv=False, bias=0, untouched=False), index


def _example_shape(signal: Signal) -> Ints:
    if isinstance(signal.form, SparseForm) and (own := signal.form.example) is not None:
        at = signal.view.channel_axis % len(own)
        return (*own[:at], signal.form.out_channels, *own[at + 1 :])
    if signal.view.last:
        if signal.view.rank is None:
            raise RefusalError(Reason.RANK_UNKNOWN)
        return (*_BATCH[: signal.view.rank - 1], signal.form.out_channels)
    size = signal.form.out_size(_SIZES[: signal.view.n])
    if any(s < 1 for s in size):
        raise RefusalError(Reason.LAYOUT, "kernel too large to follow this data movement by example")
    return (_BATCH[0], signal.form.out_channels, *size)


def _canonical_ids(signal: Signal) -> Tensor:
    return _numbered(_example_shape(signal))


def _numbered(shape: Ints) -> Tensor:
    """A tensor that holds the number of each of its elements; many are asked for, and all are views of one."""
    size = math.prod(shape)
    if _is_recorded():
        return torch.arange(size, device="cpu").reshape(shape)
    if len(_NUMBERS[0]) < size:
        _NUMBERS[0] = torch.arange(size, device="cpu")
    return _NUMBERS[0][:size].view(shape)


def _is_recorded() -> bool:
    """Whether somebody records what is computed, who takes tensors of its own."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


_NUMBERS = [torch.arange(0, device="cpu")]


def _line(ids: Tensor, axis: int) -> Tensor:
    """The first elements along an axis."""
    return ids.movedim(axis, -1)[(0,) * (ids.dim() - 1)]


def _ids(signal: Signal) -> Tensor:
    return _canonical_ids(signal) if not signal.is_moved else signal.ids


def _moved(signal: Signal, ids: Tensor) -> Signal:
    moved = replace(signal, elements=ids, work=0, conv=False, bias=0, untouched=False)
    try:
        return settle(moved)
    except RefusalError:
        return moved
