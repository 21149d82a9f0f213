"""RepVGG block (Ding et al., CVPR 2021, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block

__all__ = ["repvgg"]


@block("repvgg")
def repvgg(conv: Site) -> Iterator[tuple[str, nn.Module]]:
    """RepVGG: kxk + 1x1 + identity (where shapes allow), each with its batch norm."""
    conv.needs_window("repvgg's 1x1 branch would be the same again")
    yield "square", conv.main()
    yield "point", conv.parallel(1)
    if conv.keeps_shape:
        yield "identity", conv.identity()
