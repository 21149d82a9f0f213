"""Depthwise over-parameterised convolution (Cao et al., "DO-Conv", IEEE TIP 2022, sec. 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passes.blocks.parts import KernelConv
from passes.blocks.registry import block
from passes.blocks.site import Site

__all__ = ["DOConv", "doconv"]


@block("doconv")
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
        kernel = site.conv.weight
        self.taps, self.depth = site.taps, depth
        self.weight = nn.Parameter(kernel.new_empty((*kernel.shape[:2], depth)), requires_grad=kernel.requires_grad)
        self.D = nn.Parameter(kernel.new_zeros((site.in_channels, site.taps, depth)), kernel.requires_grad)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if site.preserve:
            with torch.no_grad():
                self.weight[..., : depth - depth % site.taps] = 0
                self.weight[..., : site.taps] = kernel.flatten(2)

    def kernel(self) -> Tensor:
        g, taps = self.geometry, self.taps
        weight = self.weight
        by_input = weight.unflatten(0, (g.groups, -1)).transpose(1, 2).flatten(0, 1)  # in, out / groups, m
        change = torch.bmm(by_input, self.D.transpose(1, 2))  # in, out / groups, taps
        change = change.unflatten(0, (g.groups, -1)).transpose(1, 2).flatten(0, 1)  # out, in / groups, taps
        kernel = weight[..., :taps] + change
        for start in range(taps, self.depth - taps + 1, taps):
            kernel = kernel + weight[..., start : start + taps]
        whole: Tensor = kernel.unflatten(-1, g.kernel)
        return whole
