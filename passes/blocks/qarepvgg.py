"""Quantisation-aware RepVGG block (Chu et al., "Make RepVGG Greater Again", AAAI 2024, sec. 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import block

__all__ = ["qarepvgg"]


@block(
    "qarepvgg", published=("QARepVGGBlock",), exact_in_training=False, meant={"kernel": 3}
)  # a norm behind a norm: up to eps, and other statistics
def qarepvgg(conv: Site, *, average: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """QARepVGG, made for int8: BN(kxk-BN + 1x1 with bias + identity); the network's own batch norm is the outer one.

    ``average`` adds the mean over the kernel's window where there is an identity, as in YOLOv6's second version. The
    identity and the mean have a factor per channel, so that they can start at zero. With ``init="preserve"`` the inner
    batch norm starts as the inverse of the outer one's statistics: the function is kept up to rounding in eval mode and
    up to eps in train mode.
    """
    if conv.reads_one or conv.norm is None or conv.norm.running_var is None:
        conv.refuse("qarepvgg is for a kernel of more than one tap with a batch norm behind it")
    norm, inner = conv.norm, conv.new_norm(conv.out_channels)
    if conv.preserve and not conv.online and inner is not None:
        _invert(inner, norm)
    yield "square", conv.row(conv=conv.main(norm=False), norm=inner)
    yield "point", conv.parallel(1, bias=True, norm=False)
    if conv.keeps_shape:
        yield "identity", conv.row(x=conv.identity(norm=False), scale=conv.scale(1.0))
        if average:
            mean = conv.average(conv.in_channels, padded=True)
            yield "average", conv.row(pool=mean, scale=conv.scale(1.0))


def _invert(inner: _BatchNorm, outer: _BatchNorm) -> None:
    """Let ``inner`` be the identity in eval mode, with the statistics that it will have in training."""
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(inner, name).copy_(getattr(outer, name))
        mean, var = inner.running_mean, inner.running_var
        assert mean is not None and var is not None  # noqa: PT018
        inner.bias.copy_(mean)
        inner.weight.copy_(torch.sqrt(var + inner.eps))
