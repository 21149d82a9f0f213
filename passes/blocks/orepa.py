"""Online convolutional re-parameterisation (Hu et al., "OREPA", CVPR 2022, sec. 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.layers import IdentityConv
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["frequency_prior", "orepa"]


@block("orepa", published=("OREPA",), online=True, meant={"kernel": range(2, 7)})
def orepa(conv: Site, *, expansion: int = 8, width: int = 1) -> Iterator[tuple[str, nn.Module]]:
    """OREPA: six linear branches, each times a vector, one batch norm behind; trained as one convolution.

    kxk, 1x1 -> average, 1x1 -> frequency prior, 1x1 -> kxk, 1x1, depthwise (x ``expansion``) -> 1x1. ``width`` times
    the input channels are between the 1x1 and the kxk, whose 1x1 starts near the identity only with ``width`` 1; its
    code has 2 for more than four groups.
    """
    if width < 1:
        raise ReparamError(f"block 'orepa': width is at least 1, got {width}")
    conv.needs_window("the branches of orepa would all be the same")
    out = conv.out_channels
    yield "square", conv.row(conv=conv.main(norm=False), scale=conv.scale(1.0 if conv.preserve else 0.25))
    yield "average", conv.row(point=conv.pointwise(out), pool=conv.average(out), scale=conv.scale(0.25))
    if conv.n == 2:
        prior = conv.filters(frequency_prior(out, conv.kernel))
        yield "prior", conv.row(point=conv.pointwise(out), filters=conv.trimmed(prior), scale=conv.scale(0.0))
    inner = width * conv.in_channels
    point = IdentityConv(conv.pointwise()) if width == 1 else conv.pointwise(inner)
    yield "sequence", conv.row(point=point, square=conv.windowed(inner), scale=conv.scale(0.5))
    yield "point", conv.row(conv=conv.parallel(1, norm=False), scale=conv.scale(1.0))
    wide = expansion * conv.in_channels
    yield "separable", conv.row(depth=conv.expanded(wide), point=conv.mixed(wide), scale=conv.scale(0.5))


def frequency_prior(channels: int, kernel: tuple[int, ...]) -> Tensor:
    """Cosines of growing frequency, along the height for one half of the channels and the width for the other.

    Shape ``(channels, height, width)``; the prior of frequency channel attention that OREPA takes over.
    """
    half = channels // 2
    number = torch.arange(channels, device="cpu")
    down, across = (torch.arange(k, device="cpu", dtype=torch.float32) + 0.5 for k in kernel)
    rows = torch.cos(math.pi / kernel[0] * (number[:half, None] + 1) * down)
    columns = torch.cos(math.pi / kernel[1] * (number[half:, None] + 1 - half) * across)
    return torch.cat([rows[:, :, None].expand(-1, *kernel), columns[:, None, :].expand(-1, *kernel)])
