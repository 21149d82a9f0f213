"""Three convolutions in a row (Wan et al., "Swift Parameter-free Attention Network", CVPRW 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["conv3xc"]


@block("conv3xc", published=("Conv3XC",), meant={"kernel": 3})
def conv3xc(conv: Site, *, gain: int = 2) -> Iterator[tuple[str, nn.Module]]:
    """SPAN's block: the kernel + (1x1 -> kxk -> 1x1, ``gain`` times as wide) + 1x1.

    Biases and no batch norm; the input is padded, so that the border sees the first bias. The published block has no
    kernel beside these: here it is the one that is replaced.
    """
    if gain < 1:
        raise ReparamError(f"block 'conv3xc': gain is at least 1, got {gain}")
    conv.needs_window("the branches of conv3xc would all be the same")
    wide, out = gain * conv.in_channels, gain * conv.out_channels
    yield "square", conv.main(norm=False)
    yield (
        "sequence",
        conv.row(
            point=conv.pointwise(wide, bias=True),
            square=conv.windowed(wide, out=out, bias=True),
            mixed=conv.mixed(out, bias=True),
        ),
    )
    yield "point", conv.parallel(1, bias=True, norm=False)
