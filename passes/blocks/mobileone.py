"""MobileOne block (Vasu et al., CVPR 2023, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["mobileone"]


@block("mobileone")
def mobileone(conv: Site, *, n: int = 4) -> Iterator[tuple[str, nn.Module]]:
    """MobileOne: ``n`` convolutions of the same kernel + 1x1 (if k > 1) + identity, each with its batch norm."""
    if n < 1:
        raise ReparamError(f"block 'mobileone': n is at least 1, got {n}")
    yield "conv0", conv.main()
    for i in range(1, n):
        yield f"conv{i}", conv.parallel(conv.kernel)
    if not conv.reads_one:
        yield "point", conv.parallel(1)
    if conv.keeps_shape:
        yield "identity", conv.identity()
