"""Depthwise over-parameterised convolution (Cao et al., "DO-Conv", IEEE TIP 2022, sec. 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.kernel_conv import KernelConv
from passes.blocks.kit.registry import block

__all__ = ["DOConv", "doconv"]

INPUTS_AT_ONCE = 4
"""Input channels whose products with D are one matrix product; measured, on 64 to 512 channels."""


@block("doconv", published=("DOConv",))
def doconv(conv: Site, *, depth: int | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Depthwise over-parameterisation: one convolution with the kernel D o W; the batch norm stays where it is.

    ``depth`` is the depth multiplier m, at least the number of taps, which is the default.
    """
    if conv.taps == 1:
        conv.refuse("a kernel of one tap: doconv has no D for it")
    if depth is not None and depth < conv.taps:
        conv.refuse(f"a depth of {depth} is less than its {conv.taps} taps: the kernel could not start as it is")
    yield "main", DOConv(conv, depth or conv.taps)


class DOConv(KernelConv):
    """``kernel[o, i, t] = sum_s (I + D)[c, t, s] W[o, i, s]``, c the input channel that (o, i) reads (F6).

    I is the identity, tiled ``m // taps`` times and not stored; ``D`` starts at 0.

    Args:
        site: the convolution; its kernel becomes the first ``taps`` columns of W, and its bias stays.
        depth: m, the number of columns.
    """

    def __init__(self, site: Site, depth: int) -> None:
        super().__init__(site.geometry, site.conv.bias)
        kernel, trained = site.weight.detach(), site.like.requires_grad
        self.taps, self.depth, self.inputs = site.taps, depth, site.in_channels // site.groups
        self.at_once = math.gcd(self.inputs, INPUTS_AT_ONCE)
        self.sizes = list(site.kernel)
        self.weight = nn.Parameter(kernel.new_empty((*kernel.shape[:2], depth)), requires_grad=trained)
        self.D = nn.Parameter(kernel.new_zeros((site.in_channels, site.taps, depth)), trained)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if site.preserve:
            with torch.no_grad():
                self.weight[..., : depth - depth % site.taps] = 0
                self.weight[..., : site.taps] = kernel.flatten(2)

    def kernel(self) -> Tensor:
        taps, m, inputs, groups, n = self.taps, self.depth, self.inputs, self.groups, self.at_once
        # n inputs of all outputs are one matrix of n * m columns, and its factor is block diagonal: the zeros cost less
        # than products of m columns, which only wait for memory.
        blocks = self.D.unflatten(0, [groups * inputs // n, n]).permute(0, 3, 2, 1)  # in / n, m, taps, n
        factor = torch.diag_embed(blocks, dim1=1, dim2=3).flatten(3).flatten(1, 2)  # in / n, n * m, n * taps
        rows = self.weight.unflatten(0, [groups, -1]).unflatten(2, [inputs // n, n])  # g, out / g, in / g / n, n, m
        columns = rows.flatten(3).transpose(1, 2).flatten(0, 1)  # in / n, out / groups, n * m
        change = torch.bmm(columns, factor).unflatten(0, [groups, -1]).transpose(1, 2)
        change = change.reshape([-1, inputs, taps])
        kernel = self.weight[..., :taps] + change
        for start in range(taps, m - taps + 1, taps):
            kernel = kernel + self.weight[..., start : start + taps]
        return kernel.unflatten(-1, self.sizes)  # type: ignore[no-any-return]
