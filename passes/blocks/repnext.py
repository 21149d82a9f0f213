"""Multi-scale depthwise kernels (Zhao et al., "RepNeXt", arXiv 2406.16004, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block

__all__ = ["repnext"]


@block("repnext", meant={"depthwise": True, "kernel": [3, 7]})
def repnext(conv: Site) -> Iterator[tuple[str, nn.Module]]:
    """RepNeXt: 3x3 + 1x3 + 3x1 + 2x2 dilated (strided: 3x1 after 1x3); 7x7 + 5x3 + 3x5 + two pairs of lines in a row.

    Biases, but for lines in a row, and no batch norm: the network's own stays behind the sum.
    """
    if conv.kernel not in ((3, 3), (7, 7)):
        conv.refuse("repnext is for kernels of 3x3 and 7x7")
    yield "square", conv.main(norm=False)
    if conv.kernel == (7, 7):
        for kernel in ((5, 3), (3, 5)):
            yield "k{}x{}".format(*kernel), conv.parallel(kernel, bias=True, norm=False)
        for length in (7, 5):
            yield f"lines{length}", conv.lines(length)
        return
    if conv.stride == (1, 1):
        for kernel in ((1, 3), (3, 1)):
            yield "k{}x{}".format(*kernel), conv.parallel(kernel, bias=True, norm=False)
    else:
        yield "lines3", conv.lines(3)
    yield "corners", conv.spread(2, bias=True)
