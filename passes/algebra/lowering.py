"""From a ConvForm back to layers: one convolution or linear layer, with an explicit pad only where torch needs one.

Symmetric padding is the convolution's own. Otherwise the kernel grows by zero taps if that is allowed to cost, or the
padding stands in front as a module of its own. The cast to the shipped dtype happens here, once.
"""

from __future__ import annotations

import cmath
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passes.algebra.conv_form import ConvForm, Form, transposed_padding
from passes.algebra.geometry import CONVS, PADS, TRANSPOSED
from passes.algebra.kernels import swap_in_out
from passes.algebra.opaque import OpaqueForm, without_numbers
from passes.portable import ScaleShift
from passes.refusal import Reason, RefusalError

__all__ = ["Target", "all_finite", "emit", "held_weight", "target_of"]


@dataclass(frozen=True)
class Target:
    """What the emitted layer must look like: dtype, device, whether it trains, and the weight's memory format."""

    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    channels_last: bool


def target_of(tensors: Iterable[Tensor]) -> Target:
    """Taken from the weights that the new layer replaces, the largest of them first."""
    ordered = sorted(tensors, key=lambda t: (t.dim() > 1, t.numel()), reverse=True)
    main = ordered[0]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ambiguous = main.is_contiguous()
    last = not ambiguous and main.dim() in formats and main.is_contiguous(memory_format=formats[main.dim()])
    return Target(main.dtype, main.device, any(t.requires_grad for t in ordered), last)


def emit(form: Form, target: Target) -> nn.Module:
    """The layer that computes ``form``; refuses with ``NOT_FINITE`` if the cast overflows."""
    weight, bias = (_cast(t, target, what) for t, what in ((form.weight, "weight"), (form.bias, "bias")))
    assert weight is not None
    layer: nn.Module
    if isinstance(form, OpaqueForm):
        layer = without_numbers(form.layer)
        weight = _cast(form.own_weight, target, "weight")
        assert weight is not None
    elif form.channelwise:
        assert bias is not None
        layer = ScaleShift(form.out_channels, form.n, device="meta")
        weight, bias = (number.reshape(layer.weight.shape) for number in (weight, bias))
    elif form.n == 0:
        layer = nn.Linear(form.in_channels, form.out_channels, device="meta")
    elif form.is_transposed:
        layer = _transposed(form)
        weight = _swapped(weight, form).contiguous()
    else:
        return _conv(form, weight, bias, target)
    return _fill(layer, weight, bias, target)


def held_weight(form: ConvForm) -> Tensor:
    """The kernel as the emitted layer holds it; differentiable."""
    return _swapped(form.weight, form) if form.is_transposed else form.weight


def _swapped(weight: Tensor, form: ConvForm) -> Tensor:
    return swap_in_out(weight.flip(tuple(range(2, 2 + form.n))), form.groups)


def _conv(form: ConvForm, weight: Tensor, bias: Tensor | None, target: Target) -> nn.Module:
    lead, trail, n = form.lead, form.trail, form.n
    symmetric = lead == trail and all(p >= 0 for p in lead)
    total = [d * (k - 1) for d, k in zip(form.dilation, form.kernel, strict=True)]
    same = (
        not symmetric
        and form.stride == (1,) * n
        and list(zip(lead, trail, strict=True)) == [(t // 2, t - t // 2) for t in total]
    )
    layer = CONVS[n - 1](
        form.in_channels,
        form.out_channels,
        form.kernel,
        stride=form.stride,
        padding=lead if symmetric else "same" if same else 0,
        dilation=form.dilation,
        groups=form.groups,
        bias=bias is not None,
        padding_mode=form.mode if same or (symmetric and any(lead)) else "zeros",
        device="meta",
    )
    conv = _fill(layer, weight, bias, target)
    if symmetric or same:
        return conv
    pads = [p for pair in zip(reversed(lead), reversed(trail), strict=True) for p in pair]
    if form.mode != "zeros" and any(p < 0 for p in pads):
        raise RefusalError(Reason.PAD_MODE, f"cannot crop and pad in mode {form.mode} at once")
    pad = PADS[form.mode][n - 1](tuple(pads))
    return nn.Sequential(OrderedDict(pad=pad, conv=conv)).eval()


def _transposed(form: ConvForm) -> nn.Module:
    n = form.n
    if not form.fits_transposed:
        raise RefusalError(Reason.TRANSPOSED, "no transposed convolution of torch has this geometry")
    padding, extra = transposed_padding(form.kernel, form.dilation, form.lead, form.trail)
    layer: nn.Module = TRANSPOSED[n - 1](
        form.in_channels,
        form.out_channels,
        form.kernel,
        stride=form.up,
        padding=padding,
        output_padding=extra,
        groups=form.groups,
        bias=form.bias is not None,
        dilation=form.dilation,
        device="meta",
    )
    return layer


def _fill(layer: nn.Module, weight: Tensor, bias: Tensor | None, target: Target) -> nn.Module:
    """Give a layer its numbers; it was made without any, so that nothing is allocated or drawn twice."""
    if target.channels_last and weight.dim() in (4, 5):
        weight = weight.contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)
    layer.weight = nn.Parameter(weight, requires_grad=target.requires_grad)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=target.requires_grad))
    return layer.eval()


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; tensors on the meta device have none.

    A finite sum says so at once; one that overflows is looked into.
    """
    flat = tensor.detach()
    return flat.is_meta or cmath.isfinite(flat.sum().item()) or bool(torch.isfinite(flat).all())


def _cast(tensor: Tensor | None, target: Target, what: str) -> Tensor | None:
    if tensor is None:
        return None
    cast = tensor.detach().to(target.device, target.dtype, copy=True).contiguous()  # never a view of the form's own
    if not all_finite(cast):
        worst = tensor.detach().abs().max().item() if all_finite(tensor) else float("nan")
        raise RefusalError(
            Reason.NOT_FINITE, f"the folded {what} does not fit into {target.dtype}: its largest value is {worst:.4g}"
        )
    return cast
