"""Dilated re-parameterisation of large depthwise kernels (Ding et al., "UniRepLKNet", CVPR 2024, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["largekernel"]

_TABLES: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
    "unireplknet": {
        5: ((3, 1), (3, 2)),
        7: ((5, 1), (3, 2), (3, 3)),
        9: ((5, 1), (5, 2), (3, 3), (3, 4)),
        11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
        13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    },
    "overlock": {
        5: ((3, 1), (3, 2)),
        7: ((5, 1), (3, 1), (3, 2), (3, 3)),
        9: ((7, 1), (5, 1), (5, 2), (3, 3), (3, 4)),
        11: ((7, 1), (5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
        13: ((7, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        15: ((7, 1), (5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        17: ((7, 1), (5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
        19: ((9, 1), (7, 1), (5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    },
    "yolov10": {7: ((3, 1),)},
}
"""Kernel size: (size, dilation) of the added branches."""

_SIZES = sorted({size for table in _TABLES.values() for size in table})


@block("largekernel", published=("DilatedReparamBlock",), meant={"depthwise": True, "kernel": _SIZES, "stride": 1})
def largekernel(conv: Site, *, table: str = "unireplknet") -> Iterator[tuple[str, nn.Module]]:
    """Large depthwise kernel + dilated smaller ones, each with its batch norm.

    ``table`` says which: ``"unireplknet"``, ``"overlock"`` (Lou and Yu, "OverLoCK", CVPR 2025) or ``"yolov10"``
    (RepVGGDW: a 3x3 beside a 7x7; Wang et al., NeurIPS 2024).
    """
    if table not in _TABLES:
        raise ReparamError(f"block 'largekernel': table is one of {', '.join(_TABLES)}; got {table!r}")
    branches, size = _TABLES[table], conv.kernel[0]
    if not conv.depthwise or size not in branches or set(conv.kernel) != {size}:
        conv.refuse(
            f"largekernel is for depthwise convolutions with a square kernel of {', '.join(map(str, branches))}"
        )
    if any(s > 1 for s in conv.stride) or any(d > 1 for d in conv.geometry.dilation):
        conv.refuse("largekernel is for stride 1 and dilation 1")
    yield "large", conv.main()
    for kernel, dilation in branches[size]:
        yield f"k{kernel}d{dilation}", conv.parallel(kernel, dilation=dilation)
