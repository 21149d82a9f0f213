"""Where the forward of a class of its own convolves: found by running it, never by its name.

A copy of the layer runs on the CPU with a weight that is none (:func:`passes.graph.within.bare`). Every operation that
it calls is seen. It must convolve with just that weight, once, in the same way for every size and in both modes, and do
nothing else with it: then the rest of its code is before, behind and around the convolution, and stays as it is.

Whatever else it does with its weight, it does the same with another tensor that it is given in that place. This too is
seen by running it, with both.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from passes.algebra.conv_form import Ints, per_dim
from passes.algebra.geometry import CONVS, Geometry, Layer
from passes.graph.contents import LARGE
from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators
from passes.graph.leaf import without_hooks
from passes.graph.modes import has_own_modes
from passes.graph.weights import computing, weight_like
from passes.graph.within import CONVOLUTIONS, Given, Inside, Options, bare, convolution
from passes.laws.watch import watched
from passes.refusal import Reason, RefusalError

__all__ = ["inside_of", "is_steady", "kind_of", "plain_conv", "sizes_for", "takes_any_weight"]

_ASKED = ("shape", "size", "dim", "ndim", "dtype", "device", "numel", "requires_grad", "is_floating_point", "stride")
"""What may be asked of a weight beside its numbers."""


def inside_of(layer: _ConvNd) -> Inside:
    """Where ``layer``, whose class has a forward of its own, convolves.

    Nothing about the layer changes. Raises :class:`RefusalError` where it does more with its weight than convolve, or
    cannot be run.
    """
    name = type(layer).__name__
    own: Any = without_hooks(layer)  # they see what the layer sees, and go on as those of the block
    layer = own
    if isinstance(layer, _ConvTransposeNd):
        raise _refusal(f"{name} does more in its forward than convolve, and is a transposed convolution")
    if has_own_modes(layer):
        raise _refusal(f"{name} does more in its forward than convolve, and its own train() may change its weight")
    if "forward" in vars(layer):
        raise _refusal(f"{name} does more in its forward than convolve: that was replaced on this one layer")
    if len(inspect.signature(layer.forward).parameters) != 1:
        raise _refusal(f"{name} does more in its forward than convolve: it takes more than one input")
    why: RefusalError | None = None
    for biased in (True, False) if layer.bias is None else (True,):
        try:
            return _seen(layer, biased=biased)
        except RefusalError as error:
            why = why or error
    assert why is not None
    return _given(layer, why)


def kind_of(layer: _ConvNd) -> Any:
    """What is the same for layers of which one is tried for all; None for a layer that has to be tried itself.

    All that a forward can find in its layer but the numbers of the weight and bias, which no trial looks at. Objects of
    a class of their own are the same only if they are the very same.
    """
    if layer._modules:
        return None
    tables = ("_parameters", "_buffers", "_modules")
    tensors = []
    for name, t in [*layer._parameters.items(), *layer._buffers.items()]:
        numbers = None
        if t is not None and name not in ("weight", "bias") and not t.is_meta:
            if t.numel() > LARGE:
                return None
            numbers = tuple(t.detach().flatten().tolist())
        tensors.append((name, t if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad, numbers)))
    return type(layer), tuple(tensors), tuple((k, _value(v)) for k, v in vars(layer).items() if k not in tables)


def _value(value: Any) -> Any:
    """Something that equals another's if the two are the same."""
    kind = type(value)
    if kind in (list, tuple, set, dict, OrderedDict, torch.Size):
        items = value.items() if isinstance(value, dict) else value
        return kind, tuple(map(_value, items))
    return kind, value if kind in _PLAIN else id(value)


_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})


def _seen(layer: _ConvNd, *, biased: bool) -> Inside:
    """What is seen at several sizes and in both modes, with a bias to be used or without."""
    found: set[Inside] = set()
    with _trial():
        for training in (False, True):
            for sizes in sizes_for(layer):
                found.add(_run(layer, sizes, training, biased))
    if len(found) > 1:
        raise _refusal(f"{type(layer).__name__} convolves in another way for another size, or in training")
    (inside,) = found
    if biased and not inside.biased:
        raise _refusal(f"{type(layer).__name__} does more in its forward than convolve: it leaves its bias out")
    return inside


def _given(layer: _ConvNd, why: RefusalError) -> Inside:
    """Of a layer that does more with its weight: it does that with a tensor given in its place, or ``why``."""
    with _trial():
        tensors = [("weight", layer.weight), ("bias", layer.bias)]
        numbers = {name: torch.randn(t.shape) for name, t in tensors if t is not None}
        kept = {name: t.clone() for name, t in numbers.items()}
        # The weight is computed in each run, which takes long: both modes and all sizes, but not each with each.
        for sizes, training in zip(sizes_for(layer), (False, True, False), strict=True):
            if not _same_given(layer, sizes, training, numbers):
                raise why
        if not all(torch.equal(kept[name], t) for name, t in numbers.items()):
            raise why
    options = tuple(layer.stride), (0,) * len(layer.kernel_size), tuple(layer.dilation), layer.groups
    return Inside(_geometry(layer.weight.shape, options), options, layer.bias is not None, False, computed=True)


def _same_given(layer: _ConvNd, sizes: Ints, training: bool, numbers: dict[str, Tensor]) -> bool:
    """Whether a layer computes the same with ``numbers`` of its own and with these given to it, and changes nothing."""
    own = _on_cpu(bare(layer)).train(training)
    around = _shown(deep_copy(own), layer.bias is not None)
    vars(own).update(numbers)
    pairs: list[tuple[Any, Any]] = [(vars(around)[name], t) for name, t in numbers.items()]
    before, x = _plain(own), torch.randn(2, layer.in_channels, *sizes)
    kept, results = x.clone(), list[Any]()
    for each, mode in ((own, nullcontext()), (around, Given(pairs))):
        torch.manual_seed(1)
        try:
            with mode:
                results.append(each(x))
        # User code may fail in any way on an input it was not made for.
        except Exception:
            return False
    wanted, got = results
    return (
        isinstance(wanted, Tensor)
        and isinstance(got, Tensor)
        and torch.equal(wanted, got)
        and wanted.untyped_storage()._cdata != x.untyped_storage()._cdata
        and _plain(own) == before
        and all(vars(own)[name] is t for name, t in numbers.items())
        and torch.equal(kept, x)
    )


def _geometry(shape: torch.Size, options: Options) -> Geometry:
    """Of a convolution with a kernel of this shape."""
    stride, padding, dilation, groups = options
    n = len(shape) - 2
    conv = CONVS[n - 1](
        shape[1] * groups, shape[0], tuple(shape[2:]), stride=stride, padding=padding, dilation=dilation,
        groups=groups, device="meta",
    )  # fmt: skip
    return Geometry.of(conv)


def sizes_for(layer: _ConvNd) -> Iterator[Ints]:
    """Sizes of inputs that show what a layer does at the border: all remainders of a stride of two, and larger."""
    n = len(layer.kernel_size)
    steps = zip(layer.kernel_size, per_dim(layer.dilation, n), per_dim(layer.stride, n), strict=True)
    least = [d * (k - 1) + 1 + 2 * s for k, d, s in steps]
    for more in ((0, 1, 2), (1, 0, 1), (8, 9, 11)):
        yield tuple(size + extra for size, extra in zip(least, more, strict=False))


def plain_conv(layer: _ConvNd, inside: Inside) -> _ConvNd:
    """The convolution alone of a layer that does more, holding the very same tensors."""
    g = inside.geometry
    stride, padding, dilation, groups = inside.options
    conv: _ConvNd = CONVS[g.n - 1](
        g.in_channels, g.out_channels, g.kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=layer.bias is not None, device="meta",
    )  # fmt: skip
    conv._parameters.update(weight=layer._parameters["weight"], bias=layer._parameters["bias"])
    conv.training = layer.training
    return conv


def takes_any_weight(layer: Layer) -> bool:
    """Whether a layer that computes its weight can compute any."""
    numbers = torch.randn(weight_like(layer).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        computing(_on_cpu(layer), numbers)
    except ValueError:
        return False
    return True


def is_steady(layer: Layer) -> bool:
    """Whether a layer whose weight is computed in each call does so alike in training and in evaluation, each time."""
    copied = _on_cpu(layer)
    sizes = () if isinstance(layer, nn.Linear) else next(sizes_for(layer))
    with _trial():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_()
        x = torch.randn(2, Geometry.of(layer).in_channels, *sizes)
        results = [copied.train(training)(x) for training in (True, False, True)]
    return all(torch.equal(results[0], each) for each in results[1:])


def _run(layer: _ConvNd, sizes: Ints, training: bool, biased: bool) -> Inside:
    name = type(layer).__name__
    copied = _shown(_on_cpu(bare(layer)), biased).train(training)
    seen = _Seen(copied)
    before = _plain(copied)
    x = torch.randn(2, layer.in_channels, *sizes)
    version = x._version
    try:
        with seen:
            y = watched(copied, x)
    except RefusalError:
        raise
    # User code may fail in any way on an input it was not made for.
    except Exception as error:
        why = f"{error}".partition("\n")[0]
        raise _refusal(f"{name} does more in its forward than convolve, and could not be tried: {why}") from error
    if seen.inside is None:
        raise _refusal(f"{name} does not convolve with its weight as it is, but with one that it computes")
    if x._version != version or _plain(copied) != before:
        raise _refusal(f"{name} does more in its forward than convolve: it changes its input or itself")
    if not isinstance(y, Tensor) or y.untyped_storage()._cdata == x.untyped_storage()._cdata:
        raise _refusal(f"{name} does more in its forward than convolve: it does not return one new tensor")
    geometry, options, uses_bias = seen.inside
    if geometry.in_channels != layer.in_channels:
        raise _refusal(f"{name} convolves another number of channels than it is given")
    return Inside(geometry, options, uses_bias, y is seen.result)


@contextmanager
def _trial() -> Iterator[None]:
    """Where copies in float32 run, on the same numbers each time, whatever dtype the caller's new tensors have."""
    default = torch.get_default_dtype()
    with torch.no_grad(), kept_generators():
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _on_cpu(layer: Any) -> Any:
    """A copy on the CPU in float32, with some numbers where there are none."""
    for module in layer.modules():
        for table in (module._parameters, module._buffers):
            if any(t is not None and t.is_meta for t in table.values()):
                layer = deep_copy(layer).to_empty(device="cpu")
                for tensor in [*layer.parameters(), *layer.buffers()]:
                    tensor.detach().fill_(1)
    return deep_copy(layer).to("cpu", torch.float32)


def _shown(layer: _ConvNd, biased: bool) -> _ConvNd:
    """With a weight to be recognised, and a bias, also where there is none, to see whether it would be used."""
    weight = vars(layer)["weight"]
    vars(layer)["weight"] = torch.full((), float("nan")).expand(weight.shape)
    vars(layer)["bias"] = torch.full((), float("nan")).expand(weight.shape[0]) if biased else None
    return layer


def _plain(layer: nn.Module) -> list[Any]:
    """Every module's attributes that are no tensors, to see whether they change."""
    tables = ("_parameters", "_buffers", "_modules", "weight", "bias")
    return [{k: repr(v) for k, v in vars(m).items() if k not in tables} for m in layer.modules()]


def _refusal(why: str) -> RefusalError:
    return RefusalError(Reason.OWN_FORWARD, why)


class _Seen(TorchFunctionMode):
    """Sees what a layer does with its weight and bias; answers its convolution with random numbers."""

    def __init__(self, layer: _ConvNd) -> None:
        super().__init__()
        self.name = type(layer).__name__
        self.weight, self.bias = vars(layer)["weight"], vars(layer)["bias"]
        self.inside: tuple[Geometry, Any, bool] | None = None
        self.result: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(value is self.weight or (value is self.bias is not None) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func in CONVOLUTIONS:
            given, options = convolution(args, kwargs)
            bias = given.get("bias")
            if given["weight"] is self.weight and (bias is None or bias is self.bias):
                return self._convolved(func, given, options)
        if _asked(func) in _ASKED:
            return func(*args, **kwargs)
        what = getattr(func, "__name__", str(func))
        raise _refusal(f"{self.name} does more with its weight or bias than convolve: it calls {what} with it")

    def _convolved(self, func: Any, given: dict[str, Any], options: Any) -> Tensor:
        if self.inside is not None:
            raise _refusal(f"{self.name} convolves more than once")
        self.inside = _geometry(self.weight.shape, options), options, given.get("bias") is not None
        y: Tensor = func(given["input"], torch.randn(self.weight.shape), None, *options)
        self.result = y
        return y


def _asked(func: Any) -> str:
    """The name of a method or attribute of tensors, also of one that is read through its descriptor."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
