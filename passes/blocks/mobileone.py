"""MobileOne block (Vasu et al., CVPR 2023, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["mobileone"]


@block("mobileone", published=("MobileOneBlock",), meant=({"depthwise": True}, {"kernel": 1}))
def mobileone(conv: Site, *, n: int = 4, affine: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """MobileOne: ``n`` convolutions of the same kernel + 1x1 (if k > 1) + identity, each with its batch norm.

    ``affine="scalar"`` puts one trained factor and one shift for all channels behind the sum, as PP-LCNetV3 has them.
    """
    if n < 1:
        raise ReparamError(f"block 'mobileone': n is at least 1, got {n}")
    if affine not in (None, "scalar"):
        raise ReparamError(f"block 'mobileone': affine is 'scalar' or None, got {affine!r}")
    branches = {"conv0": conv.main(), **{f"conv{i}": conv.parallel(conv.kernel) for i in range(1, n)}}
    if not conv.reads_one:
        branches["point"] = conv.parallel(1)
    if conv.keeps_shape:
        branches["identity"] = conv.identity()
    if affine is None:
        yield from branches.items()
    else:
        yield "main", conv.sum_before(branches, affine=conv.factor(1.0, shift=True))
