"""The geometry of a convolution: everything about it but its numbers.

A transposed convolution is described as the algebra has it (:mod:`passes.algebra.conv_form`): its padding is that of
the input with zeros between the pixels, ``dilation * (kernel - 1) - padding`` in front and ``output_padding`` more
behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from passes.algebra.conv_form import ConvForm, Ints, per_dim, transposed_padding
from passes.algebra.kernels import swap_in_out

__all__ = ["CONVS", "PADS", "TRANSPOSED", "Geometry", "Layer", "flat_pads", "paddings"]

Layer = _ConvNd | nn.Linear
"""What has a geometry."""

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Convolutions by number of spatial dimensions, from one."""

TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Transposed convolutions by number of spatial dimensions, from one."""

PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
"""Modules that pad, by padding mode and number of dimensions."""


@dataclass(frozen=True)
class Geometry:
    """Everything about a convolution but its numbers: one integer per spatial dimension.

    What has no effect is at its default: the dilation of a single tap, the mode of a padding of nothing. ``stride`` of
    a transposed convolution is how far apart its input's pixels are in the output.
    """

    in_channels: int
    out_channels: int
    kernel: Ints
    stride: Ints
    lead: Ints
    trail: Ints
    dilation: Ints
    groups: int
    mode: str
    transposed: bool = False

    @staticmethod
    def of(conv: Layer) -> Geometry:
        """The geometry of a convolution, ``padding="same"`` included; a linear layer has no dimensions."""
        if isinstance(conv, nn.Linear):
            return Geometry(conv.in_features, conv.out_features, (), (), (), (), (), 1, "zeros")
        transposed = isinstance(conv, _ConvTransposeNd)
        kernel, pads = tuple(conv.kernel_size), _stuffed_paddings(conv) if transposed else paddings(conv)
        steps = zip(per_dim(conv.dilation, len(kernel)), kernel, strict=True)
        return Geometry(
            conv.in_channels,
            conv.out_channels,
            kernel,
            tuple(per_dim(conv.stride, len(kernel))),
            tuple(lead for lead, _ in pads),
            tuple(trail for _, trail in pads),
            tuple(d if k > 1 or transposed else 1 for d, k in steps),  # output_padding is less than the dilation
            conv.groups,
            conv.padding_mode if any(map(any, pads)) else "zeros",
            transposed,
        )

    @property
    def n(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel)

    @property
    def pad_mode(self) -> str:
        """What :func:`torch.nn.functional.pad` calls the mode."""
        return "constant" if self.mode == "zeros" else self.mode

    @property
    def depthwise(self) -> bool:
        """One input channel per group, and as many outputs as inputs."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def center(self) -> Ints:
        """The tap on which branches are centred."""
        return tuple((k - 1) // 2 for k in self.kernel)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run a layer of this geometry with another kernel ``(out, in / groups, *kernel)`` and bias."""
        if not self.kernel:
            return F.linear(x, weight, bias)
        if self.transposed:
            run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.n - 1]
            own, extra = transposed_padding(self.kernel, self.dilation, self.lead, self.trail)
            stuffed: Tensor = run(x, self.laid_out(weight), bias, self.stride, own, extra, self.groups, self.dilation)
            return stuffed
        padding: Sequence[int] = self.lead
        if self.lead != self.trail or self.mode != "zeros":
            x, padding = F.pad(x, flat_pads(self.lead, self.trail), mode=self.pad_mode), (0,) * self.n
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.n - 1]
        y: Tensor = conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y

    def laid_out(self, kernel: Tensor) -> Tensor:
        """A kernel ``(out, in / groups, *kernel)`` in the layout of torch's layer, and back."""
        if not self.transposed:
            return kernel
        flipped = kernel.flip(tuple(range(2, 2 + self.n)))
        return swap_in_out(flipped, self.groups)

    def matches(self, form: ConvForm) -> bool:
        """Whether ``form`` is a convolution of just this geometry."""
        ones = (1,) * self.n
        stride, up = (ones, self.stride) if self.transposed else (self.stride, ones)
        own = (self.in_channels, self.out_channels, self.kernel, stride, up, self.lead, self.trail, self.groups)
        theirs = (
            form.in_channels, form.out_channels, form.kernel, form.stride, form.up, form.lead, form.trail, form.groups,
        )  # fmt: skip
        steps = all(a == b or k == 1 for a, b, k in zip(self.dilation, form.dilation, self.kernel, strict=True))
        mode = self.mode == form.mode or not any((*self.lead, *self.trail))
        return own == theirs and steps and mode

    def __str__(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}", "x".join(map(str, self.kernel)) or "linear"]
        if self.transposed:
            parts.append("transposed")
        if any(s > 1 for s in self.stride):
            parts.append("stride " + _short(self.stride))
        if any(d > 1 for d in self.dilation):
            parts.append("dilation " + _short(self.dilation))
        if self.groups > 1:
            parts.append("depthwise" if self.groups == self.in_channels else f"groups {self.groups}")
        return " ".join(parts) + ("" if self.mode == "zeros" else f" {self.mode}")


def paddings(conv: _ConvNd) -> list[tuple[int, int]]:
    """What a layer's own forward pads, leading and trailing, per dimension.

    People set stride, dilation and padding after construction. Zeros are padded by what ``padding`` says now, ``same``
    with the present dilation; in another mode torch pads by what it said when the layer was made.
    """
    n = len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        flat = list(conv._reversed_padding_repeated_twice)
        return list(zip(flat[-2::-2], flat[-1::-2], strict=True))
    if conv.padding == "valid":
        return [(0, 0)] * n
    if conv.padding == "same":
        totals = (d * (k - 1) for d, k in zip(per_dim(conv.dilation, n), conv.kernel_size, strict=True))
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in per_dim(conv.padding, n)]


def _stuffed_paddings(conv: Any) -> list[tuple[int, int]]:
    """What a transposed convolution pads around the input with zeros between its pixels."""
    n, kernel = len(conv.kernel_size), conv.kernel_size
    options = (per_dim(value, n) for value in (conv.dilation, conv.padding, conv.output_padding))
    return [(d * (k - 1) - p, d * (k - 1) - p + extra) for k, d, p, extra in zip(kernel, *options, strict=True)]


def flat_pads(lead: Ints, trail: Ints) -> list[int]:
    """In the order of ``torch.nn.functional.pad``: the last dimension first."""
    return [p for pair in zip(reversed(lead), reversed(trail), strict=True) for p in pair]


def _short(values: Ints) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
