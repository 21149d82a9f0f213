"""RepVGG block (Ding et al., CVPR 2021, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block

__all__ = ["repvgg"]


@block("repvgg", published=("RepVGGBlock",), meant={"kernel": 3})
def repvgg(conv: Site, *, identity: bool = True, alpha: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """RepVGG: kxk + 1x1 + identity (where shapes allow), each with its batch norm.

    Without ``identity`` it is the block of YOLOv7, YOLOv9 and D-FINE; ``alpha`` multiplies the 1x1 branch by one
    trained number, as in PP-YOLOE.
    """
    conv.needs_window("repvgg's 1x1 branch would be the same again")
    yield "square", conv.main()
    yield "point", conv.row(conv=conv.parallel(1), alpha=conv.factor(1.0) if alpha else None)
    if identity and conv.keeps_shape:
        yield "identity", conv.identity()
