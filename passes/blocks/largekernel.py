"""Dilated re-parameterisation of large depthwise kernels (Ding et al., "UniRepLKNet", CVPR 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block

__all__ = ["largekernel"]

_BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Kernel size: (size, dilation) of the added branches."""


@block("largekernel")
def largekernel(conv: Site) -> Iterator[tuple[str, nn.Module]]:
    """Large depthwise kernel + dilated smaller ones, each with its batch norm."""
    size = conv.kernel[0]
    if not conv.depthwise or size not in _BRANCHES or set(conv.kernel) != {size}:
        conv.refuse(
            f"largekernel is for depthwise convolutions with a square kernel of {', '.join(map(str, _BRANCHES))}"
        )
    if any(s > 1 for s in conv.stride) or any(d > 1 for d in conv.geometry.dilation):
        conv.refuse("largekernel is for stride 1 and dilation 1")
    yield "large", conv.main()
    for kernel, dilation in _BRANCHES[size]:
        yield f"k{kernel}d{dilation}", conv.parallel(kernel, dilation=dilation)
