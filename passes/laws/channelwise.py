"""Maps of one channel to itself, and sums of maps.

    batch norm    a y + c,  a = gamma / sqrt(var + eps),  c = beta - a mean     running statistics              (F1)
    scale, shift  a y + c                                                       one number per channel          (F10)
    sum           kernels embedded on a common grid and added                   same stride and output size     (F2)

F-numbers: Ding et al., "Diverse Branch Block" (CVPR 2021), sec. 3.2, and the facts around it. The functions have the
signatures of the torch operations that they stand for, so an option that is not named in one is a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes.algebra.sparse_form import SparseForm
from passes.laws.arguments import constant, number, signal
from passes.laws.values import Signal, alike, channel_axis_is, per_channel, settle
from passes.refusal import Reason, RefusalError

__all__ = [
    "add",
    "addcmul",
    "batch_norm",
    "batch_norm_arguments",
    "div",
    "instance_norm",
    "instance_norm_arguments",
    "mul",
    "neg",
    "rsub",
    "sub",
]


def batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: Any = 0.1, eps: float = 1e-5,
) -> Signal:  # fmt: skip
    """Batch norm in evaluation."""
    value = signal(x)
    if training:
        raise RefusalError(Reason.BATCH_STATISTICS, "batch norm in training mode uses the batch's own statistics")
    if running_mean is None or running_var is None:
        raise RefusalError(Reason.BATCH_STATISTICS)
    mean, var = constant(running_mean, value), constant(running_var, value)
    channels = value.form.out_channels
    if not value.is_moved and not channel_axis_is(value, 1):
        raise RefusalError(Reason.LAYOUT, "batch norm acts on dimension 1, which does not hold the channels here")
    if value.is_moved:  # a shuffle of pixels may have made several of one
        channels = value.ids.shape[1] if value.ids.dim() > 1 else 0
    if mean.shape[0] != channels and value.is_moved:  # the size of the example says nothing
        told = f"dimension 1 no longer holds just the {value.form.out_channels} channels of the layer before it"
        raise RefusalError(Reason.CHANNELS, f"batch norm of {mean.shape[0]} channels, where {told}")
    if mean.shape[0] != channels:
        raise RefusalError(Reason.CHANNELS, f"batch norm of {mean.shape[0]} channels after {channels}")
    if mean.device.type == "meta":  # planning: only the shapes count
        scale = shift = mean
    else:
        scale = torch.rsqrt(var + eps) if weight is None else constant(weight, value) * torch.rsqrt(var + eps)
        shift = -mean * scale if bias is None else constant(bias, value) - mean * scale
    if not value.is_moved and scale.dim() == shift.dim() == 1:  # one number per channel, on the channels' axis
        return value.with_form(value.form.affine(scale, shift))
    shape = (-1, *(1,) * ((value.ids.dim() if value.is_moved else 2 + value.view.n) - 2))
    return _affine(value, scale.reshape(shape), shift.reshape(shape))


def batch_norm_arguments(m: Any, weights: Any) -> tuple[Any, ...]:
    """Statistics, weights and options of a layer."""
    mean, var = weights(m, "running_mean"), weights(m, "running_var")
    return mean, var, weights(m, "weight"), weights(m, "bias"), m.training, m.momentum, m.eps


def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: Any = 0.1, eps: float = 1e-5,
) -> Signal:  # fmt: skip
    """Instance norm in evaluation, with running statistics: the same as batch norm with them."""
    if use_input_stats:
        raise RefusalError(Reason.BATCH_STATISTICS, "instance norm uses the statistics of each input")
    return batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


def instance_norm_arguments(m: Any, weights: Any) -> tuple[Any, ...]:
    """Statistics, weights and options of a layer."""
    mean, var = weights(m, "running_mean"), weights(m, "running_var")
    own = m.training or not m.track_running_stats
    return mean, var, weights(m, "weight"), weights(m, "bias"), own, m.momentum, m.eps


def mul(x: Any, y: Any) -> Signal:
    """``x * y``, one of them a constant."""
    if isinstance(x, Signal) and isinstance(y, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    value, factor = (x, y) if isinstance(x, Signal) else (signal(y), x)
    return _affine(value, number(factor, value), None)


def div(x: Any, y: Any) -> Signal:
    """``x / y``, y a constant."""
    if isinstance(y, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    value = signal(x)
    return _affine(value, 1.0 / number(y, value), None)


def add(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """``x + alpha * y``."""
    if isinstance(y, Signal):
        y = y if alpha == 1 else mul(y, alpha)
        return _sum(x, y) if isinstance(x, Signal) else _affine(y, None, number(x, y))
    value = signal(x)
    shift = number(y, value)
    return _affine(value, None, shift if alpha == 1 else shift * number(alpha, value))


def sub(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """``x - alpha * y``."""
    return add(x, neg(y), alpha=alpha) if isinstance(y, Signal) else add(x, y, alpha=-alpha)


def rsub(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """``y - alpha * x``."""
    return sub(y, x, alpha=alpha)


def neg(x: Any) -> Signal:
    """``-x``."""
    value = signal(x)
    return value.with_form(-value.form)


def addcmul(x: Any, y: Any, z: Any, *, value: float = 1) -> Signal:
    """``x + value * y * z``, one factor a constant; of constants alone, the product is one number per channel."""
    if isinstance(y, Signal) or isinstance(z, Signal):
        return add(x, mul(y, z), alpha=value)
    given = signal(x)
    return add(given, number(y, given) * number(z, given), alpha=value)


def _sum(x: Signal, y: Signal) -> Signal:
    if x.mixed or y.mixed:
        if isinstance(x.form, SparseForm) and alike(x, y):
            return (x if x.mixed else y).with_form(x.form + y.form)
        raise RefusalError(Reason.LAYOUT, "a sum of averages, which may be different ones")
    same_layout = (not x.is_moved and not y.is_moved) or (x.is_moved and y.is_moved and torch.equal(x.ids, y.ids))
    if not same_layout:
        x, y = settle(x), settle(y)
    if x.view != y.view:
        raise RefusalError(Reason.LAYOUT)
    return x.with_form(x.form + y.form)


def _affine(value: Signal, scale: Tensor | None, shift: Tensor | None) -> Signal:
    a, c = per_channel(value, scale, shift)
    return value.with_form(value.form.affine(a, c))
