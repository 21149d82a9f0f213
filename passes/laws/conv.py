"""Convolutions, transposed convolutions and linear layers (F3: a sequence; F7: a 1x1 with a kxk).

    y[o] = bias + sum_k  W[:, :, k] x[o * stride - padding + dilation * k]

All of them are exact behind anything that leaves nothing of the border to chance; see ``ConvForm.then`` for when that
is. A linear layer is a convolution without spatial dimensions along the last axis, ``x @ W`` one with ``W`` transposed.

The functions have the signatures of the torch operations that they stand for, so an option that is not named in one is
a refusal, not a silent drop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from passes.algebra.by_rule import ConvByRule
from passes.algebra.conv_form import ConvForm
from passes.algebra.geometry import paddings
from passes.algebra.opaque import OpaqueForm
from passes.laws.arguments import constant, integers, read, signal, then
from passes.laws.values import Signal, settle
from passes.refusal import Reason, RefusalError

__all__ = [
    "addmm", "by_rule", "contraction", "conv", "conv_arguments", "conv_transpose", "conv_transpose_arguments", "einsum",
    "linear", "matmul",
]  # fmt: skip

Law = Callable[..., Any]
Weights = Callable[[Any, str], "Tensor | None"]


def conv(n: int) -> Law:
    """The law of a convolution with ``n`` spatial dimensions; ``padding`` may give (leading, trailing) for each."""

    def law(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
        mode: str = "zeros",
    ) -> Signal:  # fmt: skip
        value = read(x, n)
        kernel = constant(weight, value)
        outer = ConvForm.conv(
            kernel,
            None if bias is None else constant(bias, value),
            stride=integers(stride, n),
            padding=_pads(padding, kernel, dilation),
            dilation=integers(dilation, n),
            groups=groups,
            mode=mode,
        )
        return then(value, outer, conv=True)

    return law


def conv_arguments(m: Any, weights: Weights) -> tuple[Any, ...]:
    """What a layer convolves with, padding included as its own forward pads."""
    return weights(m, "weight"), weights(m, "bias"), m.stride, tuple(paddings(m)), m.dilation, m.groups, m.padding_mode


def conv_transpose(n: int) -> Law:
    """The law of a transposed convolution with ``n`` spatial dimensions."""

    def law(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> Signal:  # fmt: skip
        value = read(x, n)
        outer = ConvForm.transposed(
            constant(weight, value),
            None if bias is None else constant(bias, value),
            stride=integers(stride, n),
            padding=integers(padding, n),
            output_padding=integers(output_padding, n),
            dilation=integers(dilation, n),
            groups=groups,
        )
        return then(value, outer, conv=True)

    return law


def conv_transpose_arguments(m: Any, weights: Weights) -> tuple[Any, ...]:
    """What a layer convolves with."""
    return (
        weights(m, "weight"),
        weights(m, "bias"),
        m.stride,
        m.padding,
        m.output_padding,
        m.groups,
        m.dilation,
    )


def by_rule(n: int) -> Law:
    """The law of a convolution that pads by a rule: per-channel maps behind it go into its numbers."""

    def law(x: Any, weight: Any, bias: Any, layer: ConvByRule, *, groups: int) -> Signal:
        value = read(x, n)
        kernel = constant(weight, value)
        outer = OpaqueForm.of(layer, kernel, None if bias is None else constant(bias, value))
        return then(value, outer, conv=True)

    return law


def linear(x: Any, weight: Any, bias: Any = None) -> Signal:
    """A linear layer."""
    value = settle(signal(x))
    if not value.view.last:
        raise RefusalError(Reason.LAYOUT, "a linear layer reads the last dimension, which is not the channels here")
    weight, bias = constant(weight, value), None if bias is None else constant(bias, value)
    if weight.dim() != 2:
        raise RefusalError(Reason.CHANNELS, f"a linear layer's weight has two dimensions, got {weight.dim()}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RefusalError(
            Reason.CHANNELS, f"a linear layer's bias has one number per channel, got {tuple(bias.shape)}"
        )
    return then(value, ConvForm.conv(weight, bias), conv=True)


def matmul(x: Any, y: Any) -> Signal:
    """``x @ y``: a linear layer, or a 1x1 of ``y``, ``(batch, channels, positions)``."""
    if isinstance(x, Tensor):
        value = read(y, 1)
        return then(value, ConvForm.conv(constant(x, value).unsqueeze(-1)), conv=True)
    return linear(x, constant(y, signal(x)).transpose(-1, -2))


def contraction(equation: str, weight: int) -> tuple[str, str, str, int] | None:
    """The letters of the value, of the ``weight``, which operand that is, and of the result; where the channels are.

    None for an equation that does more than weigh the channels at each position.
    """
    given, arrow, result = equation.replace(" ", "").replace("...", "~").partition("->")
    parts = given.split(",")
    if not arrow or len(parts) != 2:
        return None
    value, w = parts[1 - weight], parts[weight]
    summed = [letter for letter in w if letter not in result]
    if len(w) != 2 or "~" in w or len({*w}) != 2 or len(summed) != 1 or value.count(summed[0]) != 1:
        return None
    (made,) = {*w} - {*summed}
    distinct = len({*value}) == len(value) and made not in value
    return (value, w, result, value.index(summed[0])) if distinct and result == value.replace(summed[0], made) else None


def einsum(equation: Any, *operands: Any) -> Signal:
    """``torch.einsum`` of a value and a matrix that weighs its channels: a 1x1, or a linear layer."""
    weight = 0 if operands and isinstance(operands[0], Tensor) else 1
    read_as = contraction(equation, weight) if isinstance(equation, str) and len(operands) == 2 else None
    if read_as is None:
        raise RefusalError(Reason.NOT_AFFINE, "an einsum that is no 1x1")
    letters, w, result, at = read_as
    value = settle(signal(operands[1 - weight]))
    matrix = constant(operands[weight], value)
    rank = value.view.rank if value.view.last else value.view.n + 2
    open_at = letters.find("~")  # any number of dimensions
    named = open_at >= 0 or len(letters) == rank
    fits = at == len(letters) - 1 if value.view.last else at == 1 and open_at not in (0, at - 1)
    if not named or not fits or matrix.dim() != 2:
        raise RefusalError(Reason.LAYOUT, "an einsum over another dimension than the channels")
    if w[0] not in result:
        matrix = matrix.t()
    return then(value, ConvForm.conv(matrix.reshape(*matrix.shape, *(1,) * value.view.n)), conv=True)


def addmm(bias: Any, x: Any, y: Any) -> Signal:
    """``bias + x @ y``."""
    return linear(x, constant(y, signal(x)).transpose(-1, -2), bias)


def _pads(padding: Any, weight: Tensor, dilation: Any) -> Any:
    """``same`` puts the odd pixel behind, as torch does."""
    n = weight.dim() - 2
    if not isinstance(padding, str):
        paired = isinstance(padding, tuple) and all(isinstance(p, tuple) for p in padding)
        return padding if paired and padding else integers(padding, n)
    if padding == "valid":
        return (0,) * n
    if padding != "same":
        raise RefusalError(Reason.ATTRIBUTE, f"padding {padding!r} is not understood")
    total = [d * (k - 1) for d, k in zip(integers(dilation, n), weight.shape[2:], strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)
