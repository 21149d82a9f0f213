"""Edge-oriented convolution block (Zhang et al., "ECBSR", ACM MM 2021, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passes.algebra.geometry import Geometry
from passes.blocks.kit.builder import Site
from passes.blocks.kit.kernel_conv import KernelConv
from passes.blocks.kit.registry import block

__all__ = ["ScaledFilter", "ecb"]

_FILTERS = {
    "sobel_x": ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
    "sobel_y": ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
    "laplacian": ((0, 1, 0), (1, -4, 1), (0, 1, 0)),
}


@block("ecb", published=("ECB",), meant={"kernel": 3, "stride": 1})
def ecb(conv: Site, *, multiplier: float = 2.0, identity: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Edge-oriented block for super-resolution: 3x3 + (1x1 -> 3x3) + (1x1 -> scaled Sobel x, Sobel y, Laplacian).

    Biases and no batch norm. ``multiplier`` sets the width of the 1x1 -> 3x3 branch relative to the output.
    """
    if conv.kernel != (3, 3):
        conv.refuse("ecb is for 3x3 kernels: its edge filters are 3x3")
    out = conv.out_channels
    middle = max(1, int(multiplier * out / conv.groups)) * conv.groups
    yield "square", conv.main(norm=False)
    yield "sequence", conv.row(point=conv.pointwise(middle, bias=True), square=conv.windowed(middle, bias=True))
    for name, taps in _FILTERS.items():
        yield name, conv.row(point=conv.pointwise(out, bias=True), edge=ScaledFilter(conv, taps))
    if identity and conv.keeps_shape:
        yield "identity", conv.row(x=conv.identity(norm=False), scale=conv.scale(1.0))


class ScaledFilter(KernelConv):
    """A fixed filter per channel, times a trained factor, plus a bias; both start at ``1e-3 N(0, 1)``."""

    def __init__(self, site: Site, taps: tuple[tuple[int, ...], ...]) -> None:
        like = site.like
        conv = site.filters(
            torch.tensor(taps, dtype=like.dtype, device="cpu").expand(site.out_channels, 3, 3), bias=True
        )
        super().__init__(Geometry.of(conv), conv.bias)
        self.register_buffer("filter", self.geometry.laid_out(conv.weight.detach()))
        self.scale = nn.Parameter(like.new_empty((site.out_channels, 1, 1, 1)).normal_(std=1e-3))
        if self.bias is not None:
            nn.init.normal_(self.bias, std=1e-3)

    def kernel(self) -> Tensor:
        return self.scale * self.filter  # type: ignore[operator]

    def silence(self) -> None:
        """Return zero, and take a gradient."""
        nn.init.zeros_(self.scale)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
