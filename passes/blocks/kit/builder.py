"""A convolution or linear layer as a block sees it: its geometry, and a workshop for layers that run beside it.

A branch with another kernel is centred on the main kernel's middle tap t0 = (k - 1) // 2 (F2): its leading padding is
``p - d t0 + d' t0'``, its trailing one ``p - d (k - 1 - t0) + d' (k' - 1 - t0')``. A negative one crops. That covers
every stride, dilation, padding, even and rectangular kernels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.algebra.conv_form import Ints
from passes.algebra.geometry import CONVS, PADS, Geometry, Layer, flat_pads
from passes.blocks.kit.layers import ChannelScale, Every, IdentityConv, SumBefore, WindowMean, silence
from passes.graph.copies import shadow
from passes.graph.weights import weight_like
from passes.graph.within import Inside
from passes.refusal import Reason, RefusalError

__all__ = ["Site"]

_NORM: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOL: tuple[Any, ...] = (nn.AvgPool1d, WindowMean, nn.AvgPool3d)


class Site:
    """One convolution that a block replaces, and the batch norm behind it; or a linear layer, which has no dimensions.

    The methods make layers that read what the convolution reads, on its device and in its dtype.

    Args:
        conv: the convolution; it becomes the main branch, or gives it its kernel.
        layer: the layer that the block replaces, if ``conv`` is only what its forward does in the middle of more.
        inside: where that forward convolves.
        norm: the batch norm that alone reads it, or None.
        preserve: whether the block starts as the function that it replaces; else with its published initialisation.
        norms: whether added layers may have a batch norm of their own: several calls of one would share statistics.
        online: whether it is trained as one convolution: then the norm stays where it is, behind the sum, and those of
            the branches become factors per channel.

    Attributes:
        like: the convolution's weight; where that is computed, a tensor like it without numbers.
        shift: whether there is a place for a bias when the block is folded: the convolution's own, or the norm's.
            Without one, added layers carry neither bias nor batch norm, since each would leave a bias behind.
        norm_taken: whether the block has taken the norm in.
    """

    def __init__(
        self,
        conv: Layer,
        norm: _BatchNorm | None = None,
        *,
        preserve: bool = True,
        online: bool = False,
        norms: bool = True,
        layer: _ConvNd | None = None,
        inside: Inside | None = None,
    ) -> None:
        self.conv, self.layer, self.inside = conv, layer, inside
        self.like = weight_like(conv)
        self.norm = norm
        self.preserve = preserve
        self.geometry = Geometry.of(conv)
        self.shift = conv.bias is not None or norm is not None
        self.norm_taken = False
        self.online, self.norms = online, norms

    # ---------------------------------------------------------------- facts

    @property
    def n(self) -> int:
        """Number of spatial dimensions."""
        return self.geometry.n

    @property
    def in_channels(self) -> int:
        return self.geometry.in_channels

    @property
    def out_channels(self) -> int:
        return self.geometry.out_channels

    @property
    def kernel(self) -> Ints:
        return self.geometry.kernel

    @property
    def stride(self) -> Ints:
        return self.geometry.stride

    @property
    def groups(self) -> int:
        return self.geometry.groups

    @property
    def taps(self) -> int:
        """Pixels that the kernel reads."""
        return math.prod(self.kernel)

    @property
    def weight(self) -> Tensor:
        """The kernel ``(out, in / groups, *kernel)``, however torch's layer holds it."""
        return self.geometry.laid_out(self.like)

    @property
    def reads_one(self) -> bool:
        """Whether each output pixel reads a single pixel of the input, so that a smaller kernel would add nothing."""
        return self.taps == 1

    @property
    def depthwise(self) -> bool:
        """One input channel per group, and as many outputs as inputs."""
        return self.geometry.depthwise

    @property
    def keeps_shape(self) -> bool:
        """Whether an identity branch could be added: as many channels out as in, and stride 1."""
        return self.in_channels == self.out_channels and self.stride == (1,) * self.n

    def refuse(self, why: str) -> NoReturn:
        """Leave this convolution alone; ``why`` is what the plan prints."""
        raise RefusalError(Reason.BLOCK, why)

    def needs_window(self, why: str) -> None:
        """Leave it alone if it :attr:`reads_one`; ``why`` says what the block would come to."""
        if self.reads_one:
            self.refuse(f"a kernel of one tap: {why}")

    def span(self, kernel: Sequence[int] | int) -> Ints:
        """Sizes of the kernel that :meth:`parallel` makes for ``kernel``, one per dimension."""
        return _per_dim(kernel, self.n)

    # ---------------------------------------------------------------- branches

    def main(self, *, norm: bool = True, gamma: float = 1.0, frozen: bool = False) -> nn.Module:
        """The original convolution, with the batch norm behind it; with ``norm=False`` that stays where it is.

        If ``frozen``, its own numbers are not trained. Published initialisation multiplies the norm's weight by
        ``gamma``.
        """
        conv: nn.Module = _frozen(self.conv) if frozen else self.conv
        if not norm or self.norm is None or self.online:
            return conv
        self.norm_taken = True
        if not self.preserve and self.norm.affine and gamma != 1.0:
            with torch.no_grad():
                self.norm.weight.mul_(gamma)
        return self.row(conv=conv, norm=self.norm)

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
        """A convolution beside the main one, centred on it, with the same groups and stride.

        ``channels`` go out, as many as of the main one by default. ``dilation`` defaults to the main one's. A batch
        norm of weight ``gamma`` follows, if ``norm`` and if its shift has a place.

        A single tap before a norm takes every so many pixels first and has no stride: that is faster, and torch 2.14's
        compiled backward of ``Conv2d(3, 64, 1, stride=2)`` ends the process. (A lone layer keeps its stride, and its
        name in the state dict.)
        """
        k = self.span(kernel)
        d = _per_dim(dilation, self.n) if dilation else self.geometry.dilation
        g = self.geometry
        out = channels or g.out_channels
        behind = self.new_norm(out, gamma) if norm else None
        if behind is not None and set(k) == {1} and set(g.stride) != {1}:
            conv = self._conv(g.in_channels, out, k, g.groups, bias=bias)
            return self.row(**self._aligning(*self._pads(k, d)), every=Every(g.stride), conv=conv, norm=behind)
        layers = self._padded(
            *self._pads(k, d), g.in_channels, out, k, g.groups, stride=g.stride, dilation=d, bias=bias
        )
        return self.row(**layers, norm=behind)

    def spread(self, kernel: Sequence[int] | int, *, bias: bool = False) -> nn.Module:
        """A convolution beside the main one that reads the same window with fewer taps, from its first to its last."""
        g, k = self.geometry, _per_dim(kernel, self.n)
        reach = [d * (size - 1) for d, size in zip(g.dilation, g.kernel, strict=True)]
        if any(few < 2 or whole % (few - 1) for few, whole in zip(k, reach, strict=True)):
            self.refuse(f"taps of {k} cannot be spread evenly over its window")
        steps = tuple(whole // (few - 1) for few, whole in zip(k, reach, strict=True))
        layers = self._padded(
            g.lead, g.trail, g.in_channels, g.out_channels, k, g.groups, stride=g.stride, dilation=steps, bias=bias
        )
        return self.row(**layers)

    def lines(self, length: int) -> nn.Module:
        """A line of ``length`` taps along each axis, one after another, the last axis first; centred, without biases.

        One convolution, borders included: each pads along its own axis only, where those behind it read nothing else.
        Padding in another mode than zeros stands in front of all.
        """
        g, size = self.geometry, (length,) * self.n
        lead, trail = self._pads(size, g.dilation)
        layers: dict[str, nn.Module] = {}
        if g.mode != "zeros":
            layers, lead, trail = self._aligning(lead, trail), (0,) * self.n, (0,) * self.n
        for axis in reversed(range(self.n)):
            along = _along(axis)
            line = self._padded(
                along(lead, 0), along(trail, 0), g.in_channels, g.in_channels if axis else g.out_channels,
                along(size, 1), g.groups, stride=along(g.stride, 1), dilation=along(g.dilation, 1),
            )  # fmt: skip
            layers[f"line{axis}"] = self.row(**line)
        return self.row(**layers)

    def identity(self, *, norm: bool = True) -> nn.Module:
        """The input itself, aligned with the main branch's output, and a batch norm if ``norm``.

        Where the norm's shift has no place a factor per channel takes its place, so that the branch has something to
        train, and can start at zero.
        """
        ones = (1,) * self.n
        norm_layer = (self.new_norm(self.out_channels) or self.scale(1.0)) if norm else None
        return self.row(**self._aligning(*self._pads(ones, ones)), norm=norm_layer)

    def pointwise(self, channels: int | None = None, *, bias: bool = False) -> Layer:
        """The 1x1 convolution that begins a sequence; ``None`` channels means as many as go in.

        It has all of the main convolution's padding, so that what follows it needs none: then the sequence is one
        convolution, exactly, borders included (F3), and its batch norm sees the border. Where the two sides differ it
        has the larger one on both, and what follows is :meth:`trimmed`.
        """
        g = self.geometry
        both = tuple(max(pair) for pair in zip(g.lead, g.trail, strict=True))
        return self._conv(
            g.in_channels, channels or g.in_channels, (1,) * self.n, g.groups, padding=both, bias=bias,
            padding_mode=g.mode,
        )  # fmt: skip

    def begin(self, channels: int, *, identity: bool = False) -> dict[str, nn.Module | None]:
        """A 1x1 convolution, the padding behind it and a batch norm, by name: they begin a sequence, see :meth:`row`.

        The same map as :meth:`pointwise` and a norm, for a 1x1 without bias commutes with padding; the convolution is
        spared the border, and libraries have fast 1x1 kernels only for inputs without padding. With ``identity`` it is
        stored as identity + V, V = 0.
        """
        g = self.geometry
        both = tuple(max(pair) for pair in zip(g.lead, g.trail, strict=True))
        conv = self._conv(g.in_channels, channels, (1,) * self.n, g.groups)
        point = IdentityConv(conv) if identity else conv
        return {"point": point, **self._aligning(both, both), "norm": self.new_norm(channels)}

    def trimmed(self, layer: nn.Module) -> nn.Module:
        """``layer``, behind a crop of what :meth:`pointwise` has padded too much; most often there is nothing to crop.

        No single layer pads its two sides differently, as ``padding="same"`` does with an even kernel.
        """
        g = self.geometry
        lead = tuple(min(a - b, 0) for a, b in zip(g.lead, g.trail, strict=True))
        trail = tuple(min(b - a, 0) for a, b in zip(g.lead, g.trail, strict=True))
        return self.row(**self._aligning(lead, trail), layer=layer)

    def windowed(
        self, channels: int, *, out: int | None = None, bias: bool = False, groups: int | None = None
    ) -> nn.Module:
        """The convolution that ends such a sequence: the main one's kernel, stride and dilation, no padding.

        ``out`` channels go out, as many as of the main one by default; for others :meth:`mixed` may follow.
        """
        g = self.geometry
        conv = self._conv(
            channels, out or g.out_channels, g.kernel, groups or g.groups, stride=g.stride, dilation=g.dilation,
            bias=bias,
        )  # fmt: skip
        return self.trimmed(conv)

    def expanded(self, channels: int) -> nn.Module:
        """A depthwise convolution of the main one's kernel, stride and padding that gives ``channels``."""
        g = self.geometry
        layers = self._padded(
            g.lead, g.trail, g.in_channels, channels, g.kernel, g.in_channels, stride=g.stride, dilation=g.dilation
        )
        return self.row(**layers)

    def mixed(self, channels: int, *, bias: bool = False) -> Layer:
        """The 1x1 convolution that brings ``channels`` to as many as the main one gives."""
        return self._conv(channels, self.out_channels, (1,) * self.n, self.groups, bias=bias)

    def average(self, channels: int, *, padded: bool = False) -> nn.Module:
        """Mean over the main kernel's window (F4); ``padded`` when nothing in front of it has done the padding."""
        g = self.geometry
        # Torch's 3-d pooling refuses a map smaller than its kernel, however much it pads: a convolution does not.
        refuses = self.n == 3 and any(g.lead)
        if padded and (g.lead != g.trail or g.mode != "zeros" or refuses):
            return self.row(**self._aligning(g.lead, g.trail), pool=self._mean(channels, (0,) * self.n))
        return self._mean(channels, g.lead) if padded else self.trimmed(self._mean(channels, (0,) * self.n))

    def _mean(self, channels: int, padding: Ints) -> nn.Module:
        g = self.geometry
        if all(d == 1 for d in g.dilation) and all(2 * p <= k for p, k in zip(padding, g.kernel, strict=True)):
            return _POOL[self.n - 1](g.kernel, g.stride, padding)  # type: ignore[no-any-return]
        # Pooling has no dilation, and pads at most half a window: a depthwise convolution that is not trained.
        pool = self._conv(channels, channels, g.kernel, channels, stride=g.stride, dilation=g.dilation, padding=padding)
        with torch.no_grad():
            pool.weight.fill_(1.0 / self.taps)
        return pool.requires_grad_(False)

    def new_norm(self, channels: int, gamma: float = 1.0) -> _BatchNorm | None:
        """A batch norm of the kind, eps and momentum of the one behind the convolution.

        None if its shift has no place, or if there are to be none; :meth:`row` leaves that out.
        """
        if not self.shift or not self.norms:
            return None
        if not self.n:
            self.refuse("a batch norm beside a linear layer would have to know how many dimensions its input has")
        like = self.norm
        synced = isinstance(like, nn.SyncBatchNorm)
        made: Any = nn.SyncBatchNorm if synced else _NORM[self.n - 1]
        options = {} if like is None else {"eps": like.eps, "momentum": like.momentum}
        norm: _BatchNorm = made(channels, **options, **self._placed())
        nn.init.constant_(norm.weight, gamma)
        return norm

    def scale(self, value: float) -> ChannelScale:
        """A trained factor per output channel that starts at ``value``."""
        return ChannelScale(self.out_channels, value, self.n, **self._placed())

    def factor(self, value: float, *, shift: bool = False) -> ChannelScale:
        """One trained number that multiplies all channels; with ``shift`` one that is added too, if it has a place."""
        return ChannelScale(1, value, self.n, shift=shift and self.shift, **self._placed())

    def sum_before(self, branches: dict[str, nn.Module], **layer: nn.Module) -> nn.Module:
        """One named layer behind the sum of several, as one branch; all but the first start at zero to preserve."""
        for branch in list(branches.values())[1:] if self.preserve else ():
            silence(branch)
        ((name, behind),) = layer.items()
        return SumBefore(branches, name, behind)

    def filters(self, weight: Tensor, *, bias: bool = False) -> Layer:
        """A fixed depthwise convolution without padding, for after :meth:`pointwise`; ``weight`` is ``(out, *kernel)``.

        Its kernel is not trained. Put it behind :meth:`trimmed`.
        """
        g = self.geometry
        conv = self._conv(
            g.out_channels, g.out_channels, g.kernel, g.out_channels, stride=g.stride, dilation=g.dilation, bias=bias
        )
        conv.weight.requires_grad_(False).copy_(weight.unsqueeze(1))
        return conv

    @staticmethod
    def row(**layers: nn.Module | None) -> nn.Module:
        """The layers that are there, one after another; a single one as itself, none as the identity."""
        present = OrderedDict((name, layer) for name, layer in layers.items() if layer is not None)
        if not present:
            return nn.Identity()
        return next(iter(present.values())) if len(present) == 1 else nn.Sequential(present)

    # ---------------------------------------------------------------- helpers

    def _pads(self, kernel: Ints, dilation: Ints) -> tuple[Ints, Ints]:
        """Leading and trailing padding of a branch centred on the main kernel (F2)."""
        g = self.geometry
        lead, trail = [], []
        for i in range(self.n):
            own = (kernel[i] - 1) // 2
            lead.append(g.lead[i] - g.dilation[i] * g.center[i] + dilation[i] * own)
            behind = g.dilation[i] * (g.kernel[i] - 1 - g.center[i])
            trail.append(g.trail[i] - behind + dilation[i] * (kernel[i] - 1 - own))
        return tuple(lead), tuple(trail)

    def _aligning(self, lead: Ints, trail: Ints) -> dict[str, nn.Module]:
        """Modules that pad and crop the input; none where nothing is to be done."""
        found: dict[str, nn.Module] = {}
        if any(p > 0 for p in (*lead, *trail)):
            grow = flat_pads(tuple(max(p, 0) for p in lead), tuple(max(p, 0) for p in trail))
            found["pad"] = PADS[self.geometry.mode][self.n - 1](grow)
        if any(p < 0 for p in (*lead, *trail)):
            crop = flat_pads(tuple(min(p, 0) for p in lead), tuple(min(p, 0) for p in trail))
            found["crop"] = PADS["zeros"][self.n - 1](crop)
        return found

    def _padded(
        self, lead: Ints, trail: Ints, inputs: int, outputs: int, kernel: Ints, groups: int, **options: Any
    ) -> dict[str, nn.Module]:
        """A convolution that pads by itself where it can, else behind modules that do, by name."""
        symmetric = lead == trail and all(p >= 0 for p in lead)
        mode = self.geometry.mode if symmetric and any(lead) else "zeros"
        conv = self._conv(
            inputs, outputs, kernel, groups, padding=lead if symmetric else 0, padding_mode=mode, **options
        )
        return {**({} if symmetric else self._aligning(lead, trail)), "conv": conv}

    def _conv(self, inputs: int, outputs: int, kernel: Ints, groups: int, **options: Any) -> Layer:
        options["bias"] = options.get("bias", False) and self.shift
        if not self.n:
            return nn.Linear(inputs, outputs, options["bias"], **self._placed())
        conv: _ConvNd = CONVS[self.n - 1](inputs, outputs, kernel, groups=groups, **options, **self._placed())
        return conv

    def _placed(self) -> dict[str, Any]:
        return {"device": self.like.device, "dtype": self.like.dtype}


def _frozen(layer: Layer) -> Layer:
    """The layer with the same numbers, not trained; the layer itself, which others may hold, stays as it is."""
    kept = shadow(layer)
    for module in kept.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return kept


def _along(axis: int) -> Callable[[Ints, int], Ints]:
    """A function that keeps a value along ``axis`` and has another along all others."""
    return lambda values, other: tuple(v if i == axis else other for i, v in enumerate(values))


def _per_dim(value: Sequence[int] | int, n: int) -> Ints:
    return (value,) * n if isinstance(value, int) else tuple(value)
