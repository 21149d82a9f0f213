"""A transposed convolution as a block sees it.

In the algebra it reads the input with ``stride - 1`` zeros between the pixels, so an output pixel meets only every
``stride``-th tap: one of ``stride / gcd(stride, dilation)`` phases. A branch with a smaller kernel is centred as
everywhere (F2), and its sizes count taps of one phase: what is a 1x1 elsewhere is a kernel of that many taps, the
smallest with which each output pixel reads its nearest input pixel. Padding and cropping lie behind the layer, in the
output.

The zeros between the pixels are no input: a batch norm or a bias in front of a transposed kernel would be another
number in each phase and at the border. So a sequence has neither before its last layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.conv_form import Ints, transposed_padding
from passes.algebra.geometry import TRANSPOSED, Geometry, Layer
from passes.blocks.kit.builder import Site
from passes.blocks.kit.layers import IdentityConv

__all__ = ["TransposedSite", "site_at"]


def site_at(conv: Layer, norm: _BatchNorm | None, **options: Any) -> Site:
    """The site of a linear layer, or of a convolution of either kind; the options are those of :class:`Site`."""
    kind = TransposedSite if Geometry.of(conv).transposed else Site
    return kind(conv, norm, **options)


class TransposedSite(Site):
    """A transposed convolution that a block replaces; see :class:`Site`."""

    @property
    def phases(self) -> Ints:
        """How many taps lie between two that one output pixel meets."""
        return tuple(s // math.gcd(s, d) for s, d in zip(self.stride, self.geometry.dilation, strict=True))

    @property
    def reads_one(self) -> bool:
        return all(k <= phases for k, phases in zip(self.kernel, self.phases, strict=True))

    def span(self, kernel: Sequence[int] | int) -> Ints:
        sizes = zip(super().span(kernel), self.phases, self.kernel, strict=True)
        return tuple(k if phases == 1 else min(k * phases, own) for k, phases, own in sizes)

    def needs_window(self, why: str) -> None:
        if self.reads_one and self.taps > 1:
            self.refuse(f"no two of its taps reach one output pixel: {why}")
        super().needs_window(why)

    def parallel(
        self,
        kernel: Sequence[int] | int,
        *,
        channels: int | None = None,
        dilation: Sequence[int] | int = 0,
        bias: bool = False,
        norm: bool = True,
        gamma: float = 1.0,
    ) -> nn.Module:
        """As :meth:`Site.parallel`; without ``bias`` where the branch is padded behind the layer that would hold it."""
        g, k, out = self.geometry, self.span(kernel), channels or self.out_channels
        d = super().span(dilation) if dilation else g.dilation
        lead, trail = self._pads(k, d)
        padding, extra = transposed_padding(k, d, lead, trail)
        spare = (max(s, step) for s, step in zip(g.stride, d, strict=True))
        if all(p >= 0 for p in padding) and all(0 <= e < most for e, most in zip(extra, spare, strict=True)):
            own: dict[str, nn.Module] = {"conv": self._spread(g.in_channels, out, k, g.groups, d, padding, extra, bias)}
        else:
            none = (0,) * self.n
            ends = [tuple(-p for p in padding), tuple(e - p for e, p in zip(extra, padding, strict=True))]
            conv = self._spread(g.in_channels, out, k, g.groups, d, none, none)
            own = {"conv": conv, **self._aligning(*ends)}
        return self.row(**own, norm=self.new_norm(out, gamma) if norm else None)

    def spread(self, kernel: Sequence[int] | int, *, bias: bool = False) -> nn.Module:
        self.refuse("a transposed convolution: taps spread over its window are not defined for it")

    def lines(self, length: int) -> nn.Module:
        self.refuse("a transposed convolution: lines in a row are not defined for it")

    def pointwise(self, channels: int | None = None, *, bias: bool = False) -> Layer:
        """The 1x1 convolution that begins a sequence, on the input as it is, without bias."""
        g = self.geometry
        return self._conv(g.in_channels, channels or g.in_channels, (1,) * self.n, g.groups)

    def begin(self, channels: int, *, identity: bool = False) -> dict[str, nn.Module | None]:
        """:meth:`pointwise`, by name; no norm."""
        point = self.pointwise(channels)
        return {"point": IdentityConv(point) if identity else point}

    def trimmed(self, layer: nn.Module) -> nn.Module:
        return layer

    def windowed(
        self, channels: int, *, out: int | None = None, bias: bool = False, groups: int | None = None
    ) -> nn.Module:
        """The transposed convolution that ends a sequence: the main one's, for ``channels``."""
        return self._like_main(channels, out or self.out_channels, groups or self.groups, bias)

    def expanded(self, channels: int) -> nn.Module:
        return self._like_main(self.in_channels, channels, self.in_channels)

    def average(self, channels: int, *, padded: bool = False) -> nn.Module:
        """The sum over the main kernel's taps, divided by their number; not trained."""
        mean = self._like_main(channels, channels, channels)
        with torch.no_grad():
            mean.weight.fill_(1.0 / self.taps)
        return mean.requires_grad_(False)

    def filters(self, weight: Tensor, *, bias: bool = False) -> _ConvNd:
        conv = self._like_main(self.out_channels, self.out_channels, self.out_channels, bias)
        conv.weight.requires_grad_(False).copy_(Geometry.of(conv).laid_out(weight.unsqueeze(1)))
        return conv

    def _like_main(self, inputs: int, outputs: int, groups: int, bias: bool = False) -> _ConvNd:
        g = self.geometry
        padding, extra = transposed_padding(g.kernel, g.dilation, g.lead, g.trail)
        return self._spread(inputs, outputs, g.kernel, groups, g.dilation, padding, extra, bias)

    def _spread(
        self, inputs: int, outputs: int, kernel: Ints, groups: int, dilation: Ints, padding: Ints, extra: Ints,
        bias: bool = False,
    ) -> _ConvNd:  # fmt: skip
        options: dict[str, Any] = {"groups": groups, "dilation": dilation, "bias": bias and self.shift}
        conv: _ConvNd = TRANSPOSED[self.n - 1](
            inputs, outputs, kernel, self.stride, padding, extra, **options, **self._placed()
        )
        return conv
