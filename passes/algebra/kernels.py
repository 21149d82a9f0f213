"""Arithmetic on the kernels of convolutions: plain tensors, whatever the geometry that they belong to.

A kernel is ``(out, in / groups, *taps)``. All of it is differentiable and can be recorded: nothing is changed in place
that autograd would have to copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product as product_of
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from passes.algebra.conv_form import ConvForm, Ints

__all__ = [
    "block_diagonal", "channel_product", "convolve", "divisors", "pad_or_crop", "passed_on", "spread", "swap_in_out",
]  # fmt: skip


def spread(weight: Tensor, axis: int, step: int) -> Tensor:
    """``step - 1`` zeros between the taps of one axis (F8); not in place, so that it can be recorded and derived."""
    if step == 1:
        return weight
    apart = F.pad(weight.movedim(axis, -1).unsqueeze(-1), (0, step - 1)).flatten(-2)
    return apart[..., : apart.shape[-1] - step + 1].movedim(-1, axis)


def passed_on(inner: ConvForm, outer: ConvForm) -> Tensor | None:
    """The bias of ``outer`` after ``inner``, whose own is the same at every tap."""
    if inner.bias is None:
        return outer.bias
    per_group = outer.weight.flatten(2).sum(-1) if inner.n else outer.weight
    passed = torch.einsum(
        "goi,gi->go", per_group.unflatten(0, (outer.groups, -1)), inner.bias.unflatten(0, (outer.groups, -1))
    ).flatten()
    return passed if outer.bias is None else passed + outer.bias


Product = Callable[[Tensor, Tensor], Tensor]


def channel_product(inner: ConvForm, outer: ConvForm) -> tuple[int, Product]:
    """Groups of the composed map, and the product of channels that belongs to them.

    The product takes ``(O, M / g_outer, t)`` and ``(M, I / g_inner, u)`` with t = 1 or u = 1 taps and gives
    ``(O, I / groups, max(t, u))``. Depthwise maps are multiplied as diagonals, and groups inside groups one by one,
    never as dense matrices.
    """
    if inner.is_depthwise:

        def scale_inputs(b: Tensor, a: Tensor) -> Tensor:
            per_group = a.reshape(outer.groups, 1, -1, a.shape[-1])
            scaled: Tensor = b.unflatten(0, (outer.groups, -1)) * per_group
            return scaled.flatten(0, 1)

        return outer.groups, scale_inputs
    if outer.groups == outer.in_channels:

        def scale_outputs(b: Tensor, a: Tensor) -> Tensor:
            return b * a.repeat_interleave(outer.out_channels // outer.in_channels, 0)

        return inner.groups, scale_outputs
    if inner.groups % outer.groups == 0 and inner.groups > outer.groups:

        def group_by_group(b: Tensor, a: Tensor) -> Tensor:
            left = b.unflatten(0, (outer.groups, -1)).unflatten(2, (inner.groups // outer.groups, -1))  # g, o, q, m, t
            right = a.unflatten(0, (inner.groups, -1))  # g * q, m, i, u
            rows = left.permute(0, 2, 1, 4, 3).flatten(0, 1).flatten(1, 2)  # g * q, o * t, m
            flat = torch.bmm(rows, right.flatten(2)).unflatten(1, (-1, b.shape[-1])).unflatten(3, right.shape[2:])
            y = flat.unflatten(0, (outer.groups, -1)).permute(0, 2, 1, 4, 3, 5)  # g, o, q, i, t, u
            whole: Tensor = y.contiguous().flatten(4).flatten(2, 3).flatten(0, 1)
            return whole

        return outer.groups, group_by_group
    groups = math.gcd(inner.groups, outer.groups)

    def matrix(b: Tensor, a: Tensor) -> Tensor:
        if groups == 1 and inner.groups == outer.groups == 1 and a.shape[-1] == 1 and b.dtype is torch.float32:
            return times_pointwise(b, a)
        left = block_diagonal(b, outer.groups, groups).unflatten(0, (groups, -1))  # g, o, m, t
        right = block_diagonal(a, inner.groups, groups).unflatten(0, (groups, -1))  # g, m, i, u
        taps_first = left.movedim(3, 2).flatten(1, 2)  # g, o * t, m
        flat = torch.bmm(taps_first, right.flatten(2))  # g, o * t, i * u
        y: Tensor = flat.unflatten(1, (left.shape[1], -1)).unflatten(3, right.shape[2:])  # g, o, t, i, u
        # In the order of a kernel at once: whatever follows is the faster for it, in both directions.
        return y.movedim(2, 3).contiguous().flatten(3).flatten(0, 1)

    return groups, matrix


def times_pointwise(b: Tensor, a: Tensor) -> Tensor:
    """``(O, M, t)`` times ``(M, I, 1)``: ``(O, I, t)``, in this order of numbers without a copy.

    In float32 on the CPU as a convolution, for which oneDNN is up to twice as fast as what multiplies matrices there; a
    GPU's convolutions may round as TF32 does.
    """
    # What a tracer follows may run anywhere.
    if isinstance(b, Tensor) and b.is_cpu and b.dtype == torch.float32:
        return F.conv1d(b, a.transpose(0, 1))
    return torch.matmul(a[:, :, 0].t(), b)


def block_diagonal(weight: Tensor, have: int, want: int) -> Tensor:
    """A weight of ``have`` groups written with ``want`` groups, zeros between; ``want`` divides ``have``."""
    if have == want:
        return weight
    ratio = have // want
    blocks: Tensor = weight.unflatten(0, (want, ratio, -1)).unsqueeze(3)  # g, r, o, 1, i, k
    eye = torch.eye(ratio, dtype=weight.dtype, device=weight.device)
    wide = blocks * eye.reshape(1, ratio, 1, ratio, *(1,) * (weight.dim() - 1))  # g, r, o, r, i, k
    return wide.flatten(3, 4).flatten(0, 2)


def convolve(
    inner: Tensor, outer: Tensor, kernel: Ints, inner_step: list[int], outer_step: list[int], product: Product
) -> Tensor:
    """``weight[j * outer_step + k * inner_step] += outer[j] inner[k]``: one product per tap of the smaller kernel."""
    a, b = inner.flatten(2) if kernel else inner.unsqueeze(-1), outer.flatten(2) if kernel else outer.unsqueeze(-1)
    if a.shape[-1] == 1 or b.shape[-1] == 1:
        whole = product(b, a)
        return whole.reshape(*whole.shape[:2], *kernel)
    swap = a.shape[-1] < b.shape[-1]
    few, few_step = (inner, inner_step) if swap else (outer, outer_step)
    many, many_step = (outer, outer_step) if swap else (inner, inner_step)
    weight: Tensor | None = None
    for tap, at in enumerate(_taps(few.shape[2:])):
        part = product(b, a[..., tap : tap + 1]) if swap else product(b[..., tap : tap + 1], a)
        if weight is None:
            weight = part.new_zeros((*part.shape[:2], *kernel))
        place: list[slice] = [slice(None), slice(None)]
        for i, size in enumerate(many.shape[2:]):
            start, step = at[i] * few_step[i], max(many_step[i], 1)
            place.append(slice(start, start + step * (size - 1) + 1, step))
        weight[tuple(place)].add_(part.unflatten(-1, many.shape[2:]))
    assert weight is not None
    return weight


def swap_in_out(weight: Tensor, groups: int) -> Tensor:
    """``(I, O / g, k)`` to ``(O, I / g, k)`` and back."""
    blocks: Tensor = weight.unflatten(0, (groups, -1))
    return blocks.transpose(1, 2).flatten(0, 1)


def pad_or_crop(x: Tensor, pads: list[int], mode: str) -> Tensor:
    """Pad, then crop where negative: the whole input is continued, also where the other end is cropped."""
    if any(p > 0 for p in pads):
        x = F.pad(x, [max(p, 0) for p in pads], mode=mode)
    return F.pad(x, [min(p, 0) for p in pads]) if any(p < 0 for p in pads) else x


def _taps(shape: Sequence[int]) -> list[Ints]:
    return list(product_of(*(range(s) for s in shape)))


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]
