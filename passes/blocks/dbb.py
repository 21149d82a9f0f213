"""Diverse branch block (Ding et al., CVPR 2021, sec. 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from passes.blocks.parts import IdentityConv, border_last, quick_mean
from passes.blocks.registry import block
from passes.blocks.site import Site

__all__ = ["dbb"]


@block("dbb")
def dbb(
    conv: Site, *, pointwise: bool = True, average: bool = True, sequence: bool = True, single: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """Diverse branch block: kxk + 1x1 + (1x1 -> average) + (1x1 -> kxk).

    Each added branch can be switched off. On depthwise convolutions the 1x1 branch is absent and the average stands
    alone. ``single`` starts all added branches at zero with ``init="paper"`` too.
    """
    if conv.taps == 1:
        conv.refuse("a kernel of one tap: the branches of dbb would all be the same")
    last = 0.0 if single else 1.0
    out = conv.out_channels
    yield "square", conv.main()
    if pointwise and not conv.depthwise:
        yield "point", conv.parallel(1, gamma=last)
    if average and conv.depthwise:
        yield "average", conv.row(pool=quick_mean(conv.average(out, padded=True)), norm=conv.new_norm(out, last))
    elif average:
        point, pad = border_last(conv.pointwise(out))
        yield (
            "average",
            conv.row(
                point=point,
                **pad,
                norm=conv.new_norm(out),
                pool=quick_mean(conv.average(out)),
                last_norm=conv.new_norm(out, last),
            ),
        )
    if sequence:
        middle = conv.in_channels * (2 if conv.depthwise else 1)
        point, pad = border_last(conv.pointwise(middle))
        yield (
            "sequence",
            conv.row(
                point=point if conv.depthwise else IdentityConv(point),
                **pad,
                norm=conv.new_norm(middle),
                square=conv.windowed(middle),
                last_norm=conv.new_norm(out, last),
            ),
        )
