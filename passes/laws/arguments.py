"""What laws are given, read: signals, weights, numbers, options."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from passes.algebra.conv_form import Form
from passes.laws.values import Dim, Signal, settle
from passes.refusal import Reason, RefusalError

__all__ = ["constant", "integers", "number", "plain", "read", "signal", "then"]


def signal(x: Any) -> Signal:
    """A value that is affine in the region's entry; anything else is refused."""
    if not isinstance(x, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    return x


def read(x: Any, n: int) -> Signal:
    """A signal in canonical layout with ``n`` spatial dimensions."""
    value = settle(signal(x))
    if value.view.last or value.view.n != n:
        raise RefusalError(Reason.LAYOUT, f"a layer for {n} spatial dimensions reads {value.view.n}")
    return value


def then(x: Signal, outer: Form, conv: bool = False) -> Signal:
    """``outer`` applied to a signal in canonical layout."""
    if outer.in_channels != x.form.out_channels:
        raise RefusalError(Reason.CHANNELS, f"a layer for {outer.in_channels} channels reads {x.form.out_channels}")
    bias = 0 if outer.bias is None else outer.out_channels
    form: Form = outer if x.untouched else x.form.then(outer)
    return x.with_form(form, work=outer.weight.numel(), conv=conv, bias=bias)


def constant(x: Any, of: Signal) -> Tensor:
    """A weight, in the dtype of a signal's form: an expression may have left it in another."""
    if not isinstance(x, Tensor):
        raise RefusalError(Reason.NOT_AFFINE, "a weight that depends on the input")
    return x.to(of.form.weight.dtype)


def number(x: Any, of: Signal) -> Tensor:
    """A finite factor or shift of a signal, in the dtype of its form: torch divides by integers in that as well."""
    if isinstance(x, Tensor):
        if x.is_complex():
            raise RefusalError(Reason.ATTRIBUTE, "complex numbers")
        value = x.to(of.form.weight.dtype)
        known = not (torch.is_grad_enabled() or value.is_meta or isinstance(value, FakeTensor))
        if known and not bool(torch.isfinite(value).all()):
            raise RefusalError(Reason.NOT_AFFINE, "a factor or shift that is not finite")
        return value
    if isinstance(x, (int, float)):
        if not math.isfinite(x):
            raise RefusalError(Reason.NOT_AFFINE, f"a factor or shift of {x}")
        return torch.tensor(float(x), dtype=of.form.weight.dtype, device=of.form.weight.device)
    raise RefusalError(Reason.NOT_AFFINE, "a factor that depends on the input's size or value")


def integers(value: Any, n: int) -> tuple[int, ...]:
    """One integer per spatial dimension; torch repeats a single number."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    values = values * n if len(values) == 1 else values
    if len(values) != n or not all(isinstance(v, int) for v in values):
        raise RefusalError(Reason.ATTRIBUTE, f"expected {n} whole numbers, got {value!r}")
    return values


def plain(value: Any) -> Any:
    """Arguments of a data movement with the example's sizes as ordinary numbers."""
    if isinstance(value, Dim):
        return value.value
    if isinstance(value, (tuple, list)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
