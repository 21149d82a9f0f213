"""Diverse branch block (Ding et al., CVPR 2021, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block
from passes.refusal import ReparamError

__all__ = ["dbb"]


@block("dbb", published=("DiverseBranchBlock",), meant={"kernel": range(2, 7)})
def dbb(
    conv: Site,
    *,
    pointwise: bool = True,
    average: bool = True,
    sequence: bool = True,
    single: bool = False,
    width: float | None = None,
) -> Iterator[tuple[str, nn.Module]]:
    """Diverse branch block: kxk + 1x1 + (1x1 -> average) + (1x1 -> kxk).

    Each added branch can be switched off. On depthwise convolutions the 1x1 branch is absent and the average stands
    alone. ``single`` starts all added branches at zero with ``init="paper"`` too. ``width`` times the input channels
    are between the 1x1 and the kxk: as many by default, twice as many on depthwise convolutions; if as many, the 1x1 is
    stored as identity + V.
    """
    if width is not None and width <= 0:
        raise ReparamError(f"block 'dbb': width is above 0, got {width}")
    conv.needs_window("the branches of dbb would all be the same")
    last = 0.0 if single else 1.0
    out = conv.out_channels
    yield "square", conv.main()
    if pointwise and not conv.depthwise:
        yield "point", conv.parallel(1, gamma=last)
    if average:
        begin = {} if conv.depthwise else conv.begin(out)
        mean = conv.average(out, padded=conv.depthwise)
        yield "average", conv.row(**begin, pool=mean, last_norm=conv.new_norm(out, last) or conv.scale(last))
    if sequence:
        times = width or (2 if conv.depthwise else 1)
        middle = max(1, round(times * conv.in_channels / conv.groups)) * conv.groups
        begin = conv.begin(middle, identity=middle == conv.in_channels)
        yield "sequence", conv.row(**begin, square=conv.windowed(middle), last_norm=conv.new_norm(out, last))
