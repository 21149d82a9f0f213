"""One transfer function per operation: how it acts on a signal that is affine in the region's entry.

The functions below have the signatures of the torch operations that they stand for, so an option that is not named in
one is a refusal, not a silent drop. F-numbers are the folding facts: F1 batch norm, F2 sum, F3 sequence, F4 average,
F5 identity, F10 layer scale (Ding et al., "Diverse Branch Block", CVPR 2021, sec. 3.2 and following).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.algebra.conv_form import ConvForm
from passes.laws.values import Dim, Signal, channel_axis_is, crop, merge, move, per_channel, settle
from passes.refusal import Reason, RefusalError

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "Weights", "is_affine", "is_shape_query", "module_law"]

Law = Callable[..., Any]
Weights = Callable[[nn.Module, str], "Tensor | None"]


# ------------------------------------------------------------------ convolutions and linear layers


def _conv(n: int) -> Law:
    def conv(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
        mode: str = "zeros",
    ) -> Signal:  # fmt: skip
        signal = _read(x, n)
        weight, bias = _constant(weight), None if bias is None else _constant(bias)
        pads = _named_padding(padding, weight, dilation) if isinstance(padding, str) else _ints(padding, n)
        outer = ConvForm.conv(
            weight,
            bias,
            stride=_ints(stride, n),
            padding=pads,
            dilation=_ints(dilation, n),
            groups=groups,
            mode=mode,
        )
        return _then(signal, outer, conv=True)

    return conv


def _conv_transpose(n: int) -> Law:
    def conv_transpose(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Signal:  # fmt: skip
        outer = ConvForm.transposed(
            _constant(weight),
            None if bias is None else _constant(bias),
            stride=_ints(stride, n),
            padding=_ints(padding, n),
            output_padding=_ints(output_padding, n),
            dilation=_ints(dilation, n),
            groups=groups,
        )
        return _then(_read(x, n), outer, conv=True)

    return conv_transpose


def _linear(x: Any, weight: Any, bias: Any = None) -> Signal:
    signal = settle(_signal(x))
    if not signal.view.last:
        raise RefusalError(Reason.LAYOUT, "a linear layer reads the last dimension, which is not the channels here")
    weight, bias = _constant(weight), None if bias is None else _constant(bias)
    if weight.dim() != 2:
        raise RefusalError(Reason.CHANNELS, f"a linear layer's weight has two dimensions, got {weight.dim()}")
    return _then(signal, ConvForm.conv(weight, bias), conv=True)


def _matmul(x: Any, y: Any) -> Signal:
    if not isinstance(x, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    return _linear(x, _constant(y).transpose(-1, -2))


def _addmm(bias: Any, x: Any, y: Any) -> Signal:
    return _linear(x, _constant(y).transpose(-1, -2), bias)


# ------------------------------------------------------------------ per-channel maps


def _batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Signal:  # fmt: skip
    """F1: ``a = gamma / sqrt(var + eps)``, ``y = a x + (beta - a mean)``."""
    signal = _signal(x)
    if training:
        raise RefusalError(Reason.BATCH_STATISTICS, "batch norm in training mode uses the batch's own statistics")
    if running_mean is None or running_var is None:
        raise RefusalError(Reason.BATCH_STATISTICS)
    mean, var = _constant(running_mean), _constant(running_var)
    if mean.shape[0] != signal.form.out_channels:
        raise RefusalError(Reason.CHANNELS, f"batch norm of {mean.shape[0]} channels after {signal.form.out_channels}")
    if not channel_axis_is(signal, 1):
        raise RefusalError(Reason.LAYOUT, "batch norm acts on dimension 1, which does not hold the channels here")
    if mean.device.type == "meta":  # planning: only the shapes count
        scale = shift = mean
    else:
        scale = torch.rsqrt(var + eps) if weight is None else _constant(weight) * torch.rsqrt(var + eps)
        shift = -mean * scale if bias is None else _constant(bias) - mean * scale
    shape = (-1, *(1,) * _dims_after_one(signal))
    return _affine(signal, scale.reshape(shape), shift.reshape(shape))


def _dims_after_one(signal: Signal) -> int:
    """How many dimensions stand behind the channels, so that a vector broadcasts along them."""
    if signal.ids is not None:
        return signal.ids.dim() - 2
    return 0 if signal.view.last else signal.view.n


def _affine(signal: Signal, scale: Tensor | None, shift: Tensor | None) -> Signal:
    a = None if scale is None else per_channel(signal, scale)
    c = None if shift is None else per_channel(signal, shift)
    return signal.with_form(signal.form.affine(a, c))


def _mul(x: Any, y: Any) -> Signal:
    if isinstance(x, Signal) and isinstance(y, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    signal, factor = (x, y) if isinstance(x, Signal) else (y, x)
    return _affine(signal, _number(signal, factor), None)


def _div(x: Any, y: Any) -> Signal:
    if not isinstance(x, Signal) or isinstance(y, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    return _affine(x, 1.0 / _number(x, y), None)


def _add(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    if isinstance(y, Signal) and alpha != 1:
        y = _mul(y, alpha)
    elif alpha != 1:
        y = y * alpha
    if isinstance(x, Signal) and isinstance(y, Signal):
        return _sum(x, y)
    signal, shift = (x, y) if isinstance(x, Signal) else (y, x)
    return _affine(signal, None, _number(signal, shift))


def _sub(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    minus = _neg(y) if isinstance(y, Signal) else -y
    return _add(x, minus, alpha=alpha)


def _rsub(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    return _sub(y, x, alpha=alpha)


def _neg(x: Any) -> Signal:
    signal = _signal(x)
    return signal.with_form(-signal.form)


def _sum(x: Signal, y: Signal) -> Signal:
    """F2: kernels embedded on a common grid and added."""
    same_layout = (x.ids is None and y.ids is None) or (
        x.ids is not None and y.ids is not None and torch.equal(x.ids, y.ids)
    )
    if not same_layout:
        x, y = settle(x), settle(y)
    if x.view != y.view:
        raise RefusalError(Reason.LAYOUT)
    return x.with_form(x.form + y.form)


def _addcmul(x: Any, y: Any, z: Any, *, value: float = 1) -> Signal:
    product = _mul(y, z) if isinstance(y, Signal) or isinstance(z, Signal) else y * z
    return _add(x, product, alpha=value)


# ------------------------------------------------------------------ pooling and padding


def _avg_pool(n: int) -> Law:
    def avg_pool(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Signal:  # fmt: skip
        """F4: a depthwise kernel of 1 / k^2."""
        signal = _read(x, n)
        kernel, pads = _ints(kernel_size, n), _ints(padding, n)
        if ceil_mode:
            raise RefusalError(Reason.CEIL_MODE)
        if any(pads) and not count_include_pad and divisor_override is None:
            raise RefusalError(Reason.PAD_NOT_COUNTED)
        steps = kernel if stride is None or stride == [] else _ints(stride, n)
        form = ConvForm.average(
            signal.form.out_channels, kernel, steps, pads, divisor_override, like=signal.form.weight
        )
        return _then(signal, form)

    return avg_pool


def _pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Signal:
    """F3: exact when what the windows outside would give equals the pad value."""
    signal = settle(_signal(x))
    flat = [int(p) for p in pad]
    if signal.view.last or len(flat) > 2 * signal.view.n:
        raise RefusalError(Reason.LAYOUT, "padding of batch or channels")
    flat += [0] * (2 * signal.view.n - len(flat))
    lead, trail = tuple(reversed(flat[0::2])), tuple(reversed(flat[1::2]))
    form = signal.form.pad(lead, trail, value or 0.0) if mode == "constant" else signal.form.pad_mode(lead, trail, mode)
    return signal.with_form(form, work=0)


# ------------------------------------------------------------------ data movement


def _cat(tensors: Any, dim: int = 0) -> Signal:
    parts = list(tensors)
    if not all(isinstance(p, Signal) for p in parts):
        raise RefusalError(Reason.NOT_AFFINE, "concatenated with a constant")
    return merge(parts, lambda ids: torch.cat(ids, dim))


def _stack(tensors: Any, dim: int = 0) -> Signal:
    parts = list(tensors)
    if not all(isinstance(p, Signal) for p in parts):
        raise RefusalError(Reason.NOT_AFFINE, "stacked with a constant")
    return merge(parts, lambda ids: torch.stack(ids, dim))


def _getitem(x: Any, index: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return x[index]
    signal = _signal(x)
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(signal.shape)
    if Ellipsis in [i for i in items if not isinstance(i, Tensor)]:
        at = next(k for k, item in enumerate(items) if item is Ellipsis)
        missing = rank - (len([i for i in items if i is not None]) - 1)
        items[at : at + 1] = [slice(None)] * missing
    return crop(signal, [_plain(i) for i in items])


def _along(operation: Law) -> Law:
    """chunk, split, narrow and the like: along the channels only."""

    def law(x: Any, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[1] if len(args) > 1 and operation not in (torch.narrow, torch.select) else 0)
        if operation in (torch.narrow, torch.select, torch.index_select):
            dim = kwargs.get("dim", args[0] if args else 0)
        signal = settle(_signal(x))
        if not (channel_axis_is(signal, dim) or (dim < 0 and dim == _negative_axis(signal))):
            raise RefusalError(Reason.LAYOUT, "split along batch or space")
        return move(signal, lambda ids: operation(ids, *_plain(args), **_plain(kwargs)))

    return law


def _negative_axis(signal: Signal) -> int:
    return -1 if signal.view.last else -1 - signal.view.n


def _movement(operation: Law) -> Law:
    """Any operation that only moves data, followed by example."""

    def law(x: Any, *args: Any, **kwargs: Any) -> Any:
        signal = _signal(x)

        def run(ids: Tensor) -> Any:
            try:
                return operation(ids, *_plain(args), **_plain(kwargs))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise RefusalError(Reason.LAYOUT, f"{Reason.LAYOUT.value} ({error})".splitlines()[0]) from error

        return move(signal, run)

    return law


def _as_other(x: Any, other: Any) -> Any:
    signal, shape = _signal(x), _signal(other).shape
    return move(signal, lambda ids: ids.reshape(_plain(shape)))


# ------------------------------------------------------------------ nothing at all


def _identity(x: Any, *args: Any, **kwargs: Any) -> Any:
    return replace(_signal(x), work=0, conv=False, bias=0)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise RefusalError(Reason.NOT_AFFINE, "dropout in training mode")
    return _identity(x)


def _stochastic_depth(x: Any, p: float, mode: str, training: bool = True) -> Any:
    return _dropout(x, p, training)


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    given = [*args, *(v for k, v in kwargs.items() if k != "memory_format")]
    if given:
        raise RefusalError(Reason.ATTRIBUTE, "a cast or a move between devices")
    return _identity(x)


# ------------------------------------------------------------------ shapes


def _getattr(x: Any, name: str) -> Any:
    signal = _signal(x)
    if name == "shape":
        return signal.shape
    if name == "ndim":
        return len(signal.shape)
    raise RefusalError(Reason.NOT_AFFINE, f"reads .{name}")


def _size(x: Any, dim: int | None = None) -> Any:
    shape = _signal(x).shape
    return shape if dim is None else shape[dim]


def _dim(x: Any) -> int:
    return len(_signal(x).shape)


def is_shape_query(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a node asks only for shape, number of dimensions, dtype or device of its input."""
    if op == "call_function" and target is getattr:
        return len(args) > 1 and args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
    return op == "call_method" and target in ("size", "dim", "is_contiguous", "get_device", "numel")


# ------------------------------------------------------------------ tables

FUNCTIONS: dict[Any, Law] = {
    F.conv1d: _conv(1),
    F.conv2d: _conv(2),
    F.conv3d: _conv(3),
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
    torch.conv3d: _conv(3),
    F.conv_transpose1d: _conv_transpose(1),
    F.conv_transpose2d: _conv_transpose(2),
    F.conv_transpose3d: _conv_transpose(3),
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.addmm: _addmm,
    operator.matmul: _matmul,
    F.batch_norm: _batch_norm,
    F.avg_pool1d: _avg_pool(1),
    F.avg_pool2d: _avg_pool(2),
    F.avg_pool3d: _avg_pool(3),
    F.pad: _pad,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    torch.stack: _stack,
    torch.chunk: _along(torch.chunk),
    torch.split: _along(torch.split),
    torch.tensor_split: _along(torch.tensor_split),
    torch.narrow: _along(torch.narrow),
    torch.select: _along(torch.select),
    torch.index_select: _along(torch.index_select),
    torch.flatten: _movement(torch.flatten),
    torch.unflatten: _movement(torch.unflatten),
    torch.reshape: _movement(torch.reshape),
    torch.transpose: _movement(torch.transpose),
    torch.permute: _movement(torch.permute),
    torch.movedim: _movement(torch.movedim),
    torch.squeeze: _movement(torch.squeeze),
    torch.unsqueeze: _movement(torch.unsqueeze),
    torch.flip: _movement(torch.flip),
    torch.roll: _movement(torch.roll),
    torch.unbind: _movement(torch.unbind),
    F.channel_shuffle: _movement(F.channel_shuffle),
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
    F.alpha_dropout: _dropout,
    F.feature_alpha_dropout: _dropout,
    torch.addcmul: _addcmul,
    torch.rsub: _rsub,
    getattr: _getattr,
    operator.getitem: _getitem,
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract), _sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide), _div),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative), _neg),
    **dict.fromkeys((operator.pos, torch.clone, torch.positive), _identity),
}

_NAMED_FUNCTIONS: dict[str, Law] = {"torchvision.ops.stochastic_depth.stochastic_depth": _stochastic_depth}
"""Functions of libraries that may not be installed, by their full name."""

METHODS: dict[str, Law] = {
    **dict.fromkeys(("add", "add_"), _add),
    **dict.fromkeys(("sub", "sub_"), _sub),
    **dict.fromkeys(("mul", "mul_"), _mul),
    **dict.fromkeys(("div", "div_", "true_divide"), _div),
    **dict.fromkeys(("neg", "neg_"), _neg),
    **dict.fromkeys(("addcmul", "addcmul_"), _addcmul),
    **dict.fromkeys(("contiguous", "clone"), _identity),
    **dict.fromkeys(("view_as", "reshape_as"), _as_other),
    **{
        name: _movement(getattr(Tensor, name))
        for name in (
            "reshape",
            "flatten",
            "unflatten",
            "transpose",
            "permute",
            "movedim",
            "moveaxis",
            "swapaxes",
            "swapdims",
            "squeeze",
            "unsqueeze",
            "flip",
            "roll",
            "unbind",
        )
    },
    **{
        name: _along(getattr(torch, name))
        for name in ("chunk", "split", "tensor_split", "narrow", "select", "index_select")
    },
    "view": _movement(Tensor.reshape),  # strides are the model's own matter: it runs
    "matmul": _matmul,
    "to": _to,
    "size": _size,
    "dim": _dim,
}


def _module_conv(n: int) -> Law:
    law = _conv(n)

    def apply(m: Any, read: Weights, x: Any) -> Signal:
        weight, bias = read(m, "weight"), read(m, "bias")
        return law(x, weight, bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)  # type: ignore[no-any-return]

    return apply


def _module_conv_transpose(n: int) -> Law:
    law = _conv_transpose(n)

    def apply(m: Any, read: Weights, x: Any) -> Signal:
        weight, bias = read(m, "weight"), read(m, "bias")
        return law(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)  # type: ignore[no-any-return]

    return apply


def _module_batch_norm(m: Any, read: Weights, x: Any) -> Signal:
    mean, var = read(m, "running_mean"), read(m, "running_var")
    return _batch_norm(x, mean, var, read(m, "weight"), read(m, "bias"), m.training, m.momentum, m.eps)


def _module_pool(n: int) -> Law:
    law = _avg_pool(n)

    def apply(m: Any, read: Weights, x: Any) -> Signal:
        divisor = getattr(m, "divisor_override", None)
        return law(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)  # type: ignore[no-any-return]

    return apply


def _module_pad(mode: str) -> Law:
    return lambda m, read, x: _pad(x, m.padding, mode, getattr(m, "value", 0.0))


MODULES: dict[type[nn.Module], Law] = {
    nn.Conv1d: _module_conv(1),
    nn.Conv2d: _module_conv(2),
    nn.Conv3d: _module_conv(3),
    nn.ConvTranspose1d: _module_conv_transpose(1),
    nn.ConvTranspose2d: _module_conv_transpose(2),
    nn.ConvTranspose3d: _module_conv_transpose(3),
    nn.Linear: lambda m, read, x: _linear(x, read(m, "weight"), read(m, "bias")),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _module_batch_norm),
    nn.AvgPool1d: _module_pool(1),
    nn.AvgPool2d: _module_pool(2),
    nn.AvgPool3d: _module_pool(3),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), _module_pad("constant")),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _module_pad("constant")),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), _module_pad("reflect")),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), _module_pad("replicate")),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), _module_pad("circular")),
    nn.ChannelShuffle: lambda m, read, x: FUNCTIONS[F.channel_shuffle](x, m.groups),
    nn.Flatten: lambda m, read, x: FUNCTIONS[torch.flatten](x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m, read, x: METHODS["unflatten"](x, m.dim, m.unflattened_size),
    nn.Identity: lambda m, read, x: _identity(x),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        lambda m, read, x: _dropout(x, m.p, m.training),
    ),
}


def module_law(module: nn.Module) -> Law | None:
    """The transfer function of a layer; subclasses count only as far as the tracer took them for the layer itself."""
    exact = MODULES.get(type(module))
    if exact is not None:
        return exact
    return next((law for base, law in MODULES.items() if isinstance(module, base) and base is not nn.Identity), None)


def function_law(target: Any) -> Law | None:
    """The transfer function of a function, by identity or by full name."""
    try:
        law = FUNCTIONS.get(target)
    except TypeError:  # unhashable callables exist
        return None
    return law or _NAMED_FUNCTIONS.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}")


def is_affine(op: str, target: Any, module: nn.Module | None) -> bool:
    """Whether any transfer function exists for this operation."""
    if op == "call_module":
        return module is not None and module_law(module) is not None
    if op == "call_method":
        return target in METHODS
    return op == "call_function" and function_law(target) is not None


# ------------------------------------------------------------------ reading arguments


def _signal(x: Any) -> Signal:
    if not isinstance(x, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    return x


def _read(x: Any, n: int) -> Signal:
    """A signal in canonical layout with ``n`` spatial dimensions."""
    signal = settle(_signal(x))
    if signal.view.last or signal.view.n != n:
        raise RefusalError(Reason.LAYOUT, f"a layer for {n} spatial dimensions reads {signal.view.n}")
    return signal


def _then(signal: Signal, outer: ConvForm, conv: bool = False) -> Signal:
    if outer.in_channels != signal.form.out_channels:
        raise RefusalError(
            Reason.CHANNELS, f"a layer for {outer.in_channels} channels reads {signal.form.out_channels}"
        )
    bias = 0 if outer.bias is None else outer.out_channels
    form = outer if signal.untouched else signal.form.then(outer)
    return signal.with_form(form, work=outer.weight.numel(), conv=conv, bias=bias)


def _constant(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise RefusalError(Reason.NOT_AFFINE, "a weight that depends on the input")
    return x


def _number(signal: Signal, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, (int, float)):
        return torch.tensor(float(x), dtype=torch.float64, device=signal.form.weight.device)
    raise RefusalError(Reason.NOT_AFFINE, "a factor that depends on the input's size or value")


def _ints(value: Any, n: int) -> tuple[int, ...]:
    """One integer per spatial dimension; torch repeats a single number."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    values = values * n if len(values) == 1 else values
    if len(values) != n or not all(isinstance(v, int) for v in values):
        raise RefusalError(Reason.ATTRIBUTE, f"expected {n} whole numbers, got {value!r}")
    return values


def _named_padding(padding: str, weight: Tensor, dilation: Any) -> Any:
    """``same`` puts the odd pixel behind, as torch does."""
    if padding == "valid":
        return (0,) * (weight.dim() - 2)
    if padding != "same":
        raise RefusalError(Reason.ATTRIBUTE, f"padding {padding!r} is not understood")
    steps = _ints(dilation, weight.dim() - 2)
    total = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)


def _plain(value: Any) -> Any:
    """Arguments of a data movement with the example's sizes as ordinary numbers."""
    if isinstance(value, Dim):
        return value.value
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, slice):
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
