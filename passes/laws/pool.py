"""Average pooling and padding.

average pooling   a depthwise kernel of 1 / k^n            padding is counted, no ceil_mode           (F4)
                  commutes with a map per channel          padding is not counted, or there is none
pad with v        offset and extent of what stands before  every window that falls outside gives v    (F3)
other modes       commute with a pointwise map                                                        (F3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional as F

from passes.algebra.conv_form import ConvForm
from passes.algebra.geometry import PADS
from passes.algebra.sparse_form import SparseForm
from passes.laws.arguments import integers, read, signal, then
from passes.laws.movement import averaged
from passes.laws.values import Signal, settle
from passes.refusal import Reason, RefusalError

__all__ = ["avg_pool", "avg_pool_arguments", "pad", "pad_arguments"]

Law = Callable[..., Any]

_MODES: dict[type[nn.Module], str] = {kind: mode for mode, kinds in PADS.items() for kind in kinds if mode != "zeros"}


def avg_pool(n: int) -> Law:
    """The law of average pooling with ``n`` spatial dimensions."""

    def law(
        x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Signal:  # fmt: skip
        if isinstance(signal(x).form, SparseForm):  # only maps per channel are asked for: the pooling stays
            if divisor_override is not None or (count_include_pad and any(integers(padding, n))):
                raise RefusalError(Reason.PAD_COUNTED)
            pool = getattr(F, f"avg_pool{n}d")
            steps = kernel_size if stride is None or stride == [] else stride
            stays: Signal = averaged(pool)(x, kernel_size, steps, padding, ceil_mode, count_include_pad)
            return stays
        value = read(x, n)
        kernel, pads = integers(kernel_size, n), integers(padding, n)
        if ceil_mode:
            raise RefusalError(Reason.CEIL_MODE)
        if any(pads) and not count_include_pad and divisor_override is None:
            raise RefusalError(Reason.PAD_NOT_COUNTED)
        steps = kernel if stride is None or stride == [] else integers(stride, n)
        form = ConvForm.average(value.form.out_channels, kernel, steps, pads, divisor_override, like=value.form.weight)
        return then(value, form)

    return law


def avg_pool_arguments(m: Any, weights: Any) -> tuple[Any, ...]:
    """The options of a pooling layer."""
    return (
        m.kernel_size,
        m.stride,
        m.padding,
        m.ceil_mode,
        m.count_include_pad,
        getattr(m, "divisor_override", None),
    )


def pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Signal:
    """``torch.nn.functional.pad``: the last dimension first."""
    given = settle(signal(x))
    flat = [int(p) for p in pad]
    if given.view.last or len(flat) > 2 * given.view.n:
        raise RefusalError(Reason.LAYOUT, "padding of batch or channels")
    flat += [0] * (2 * given.view.n - len(flat))
    lead, trail = tuple(reversed(flat[0::2])), tuple(reversed(flat[1::2]))
    form = given.form.pad(lead, trail, value or 0.0) if mode == "constant" else given.form.pad_mode(lead, trail, mode)
    return given.with_form(form, work=0)


def pad_arguments(m: Any, weights: Any) -> tuple[Any, ...]:
    """The options of a layer that pads; its mode is that of the class, or of the base whose forward it has."""
    mode = next((mode for kind, mode in _MODES.items() if isinstance(m, kind)), "constant")
    return m.padding, mode, getattr(m, "value", 0.0)
