"""ConvForm: the algebra of convolutions, tensors in and out.

A linear, shift-equivariant map with a bias, in one canonical form for any number of spatial dimensions
(0 is a linear layer):

    y[o] = bias + sum_k  weight[:, :, k] x[o * stride + offset + dilation * k]
    out  = (size + extent) // stride + 1

with ``offset = -(leading padding)`` and ``extent = leading + trailing padding - dilation * (k - 1) - 1``.
Offset and extent instead of "padding" make asymmetric padding, cropping (negative padding) and branches with
different kernel sizes ordinary cases. ``up > 1`` is a transposed convolution: ``up - 1`` zeros stand between the
input's pixels and ``size`` is ``(in - 1) * up + 1``. ``mode`` says what ``x`` is outside the input.

The laws, each with the condition under which it is exact (otherwise it refuses):

    affine     a * y + c per output channel             always                          (F1, F10)
    sum        common dilation gcd, common offset min   same stride, extent and up      (F2, F8)
    pad        offset -= p * stride, extent += ...      crop; or every window outside reads only outside
                                                        and the bias equals the pad value            (F3)
    then       kernels convolved, strides multiplied    no padding between, or the law of pad        (F3, F7, F11)
    concat     rows stacked                             same geometry after the embedding of sum

F-numbers: Ding et al., "Diverse Branch Block" (CVPR 2021), sec. 3.2, transforms I-VI, and the facts around them.
Everything is ordinary differentiable torch code, and runs on meta tensors when only shapes are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from passes.algebra.changed import replace
from passes.algebra.grid import common_grid
from passes.algebra.kernels import (
    block_diagonal,
    channel_product,
    convolve,
    divisors,
    pad_or_crop,
    passed_on,
    swap_in_out,
)  # fmt: skip
from passes.algebra.opaque import OpaqueForm
from passes.refusal import Reason, RefusalError

__all__ = ["ConvForm", "Form", "Ints", "per_dim", "transposed_padding"]

Ints = tuple[int, ...]

PAD_VALUE_TOLERANCE = 1e-9
"""Relative difference allowed between a pad value and the bias it must equal, both computed in float64."""


@dataclass(frozen=True, eq=False)  # == on tensors has no single truth value; forms are compared as maps
class ConvForm:
    """One convolution (or linear layer) in canonical form; see the module's docstring for the algebra.

    Args:
        weight: ``(out, in / groups, *kernel)``, float64 (or on the meta device while planning).
        bias: ``(out,)`` or None, which is exactly zero.
        stride, dilation, offset, extent, up: one integer per spatial dimension.
        groups: number of channel groups.
        mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``: the input's continuation outside.
        widened: whether block structure may have been lost to zeros, so that :meth:`narrowed` is worth a try.
        spread: whether a transposed convolution takes part, also one of stride 1; it is written as one where it fits.
        ties: of a widened form: how many inputs, and outputs, at least belong together; see :attr:`tied`.
        channelwise: whether its layer is to be a scale and shift per channel; no law makes such a form, or takes one.
    """

    weight: Tensor
    bias: Tensor | None
    stride: Ints
    dilation: Ints
    offset: Ints
    extent: Ints
    up: Ints
    groups: int = 1
    mode: str = "zeros"
    widened: bool = False
    spread: bool = False
    ties: tuple[int, int] | None = None
    channelwise: bool = False

    # ---------------------------------------------------------------- construction

    @staticmethod
    def conv(
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int | tuple[int, int]] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        mode: str = "zeros",
    ) -> ConvForm:
        """The form of an ordinary convolution; ``padding`` may give (leading, trailing) per dimension."""
        kernel = tuple(weight.shape[2:])
        n = len(kernel)
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in per_dim(padding, n)]
        d = tuple(per_dim(dilation, n))
        return ConvForm(
            weight,
            bias,
            stride=tuple(per_dim(stride, n)),
            dilation=d,
            offset=tuple(-lead for lead, _ in pads),
            extent=tuple(a + b - d[i] * (kernel[i] - 1) - 1 for i, (a, b) in enumerate(pads)),
            up=(1,) * n,
            groups=groups,
            mode=mode,
        )

    @staticmethod
    def transposed(
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        output_padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
    ) -> ConvForm:
        """The form of a transposed convolution; ``weight`` in torch's layout ``(in, out / groups, *kernel)``."""
        kernel = tuple(weight.shape[2:])
        n = len(kernel)
        d, p, op = (tuple(per_dim(v, n)) for v in (dilation, padding, output_padding))
        lead = tuple(d[i] * (kernel[i] - 1) - p[i] for i in range(n))
        return ConvForm(
            swap_in_out(weight, groups).flip(tuple(range(2, 2 + n))),
            bias,
            stride=(1,) * n,
            dilation=d,
            offset=tuple(-x for x in lead),
            extent=tuple(2 * lead[i] + op[i] - d[i] * (kernel[i] - 1) - 1 for i in range(n)),
            up=tuple(per_dim(stride, n)),
            groups=groups,
            spread=True,
        )

    @staticmethod
    def identity(channels: int, n: int, *, like: Tensor | None = None) -> ConvForm:
        """The map that returns its input: one tap of 1 per channel, ``groups = channels``."""
        shape = (channels, 1, *(1,) * n)
        if like is not None and like.is_meta:  # where only the shape counts, ones take ten times as long
            return ConvForm.conv(like.new_empty(shape), groups=channels)
        return ConvForm.conv(torch.ones(shape, **_placed(like)), groups=channels)

    @staticmethod
    def average(
        channels: int,
        kernel: Ints,
        stride: Ints,
        padding: Ints,
        divisor: int | None = None,
        *,
        like: Tensor | None = None,
    ) -> ConvForm:
        """Average pooling that counts its padding: a depthwise kernel of ``1 / prod(kernel)`` (F4)."""
        value = 1.0 / (divisor or math.prod(kernel))
        weight = torch.full((channels, 1, *kernel), value, **_placed(like))
        return ConvForm.conv(weight, stride=stride, padding=padding, groups=channels)

    # ---------------------------------------------------------------- facts

    @property
    def n(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def lead(self) -> Ints:
        """Leading padding per dimension; negative is a crop."""
        return tuple(-o for o in self.offset)

    @property
    def trail(self) -> Ints:
        """Trailing padding per dimension; negative is a crop."""
        span = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        return tuple(e + s + o for e, s, o in zip(self.extent, span, self.offset, strict=True))

    @property
    def reads_outside(self) -> bool:
        """Whether some window reaches over the input's edge."""
        return any(p > 0 for p in (*self.lead, *self.trail))

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel reads just the input pixel at its own place."""
        ones, zeros = (1,) * self.n, (0,) * self.n
        return (
            self.kernel == ones
            and self.stride == ones
            and self.up == ones
            and self.offset == zeros
            and all(e == -1 for e in self.extent)
        )

    @property
    def fits_transposed(self) -> bool:
        """Whether torch has a transposed convolution of this geometry."""
        padding, extra = transposed_padding(self.kernel, self.dilation, self.lead, self.trail)
        most = (max(pair) for pair in zip(self.up, self.dilation, strict=True))
        ends = all(p >= 0 for p in padding) and all(0 <= e < m for e, m in zip(extra, most, strict=True))
        return ends and all(s == 1 for s in self.stride) and (self.mode == "zeros" or not self.reads_outside)

    @property
    def is_transposed(self) -> bool:
        """Whether it is written as a transposed convolution."""
        return any(u != 1 for u in self.up) or (self.spread and self.fits_transposed)

    @property
    def is_depthwise(self) -> bool:
        """One input and one output channel per group."""
        return self.groups == self.in_channels == self.out_channels

    def out_size(self, size: Sequence[int]) -> Ints:
        """Output size for an input of ``size`` (without batch and channels)."""
        stuffed = [(s - 1) * u + 1 for s, u in zip(size, self.up, strict=True)]
        return tuple((s + e) // t + 1 for s, e, t in zip(stuffed, self.extent, self.stride, strict=True))

    @property
    def rate(self) -> float:
        """Output positions per input position."""
        return math.prod(self.up) / math.prod(self.stride)

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per input position."""
        return self.weight.numel() * self.rate

    @property
    def numbers(self) -> int:
        """How many numbers weight and bias hold."""
        return self.weight.numel() + (0 if self.bias is None else self.out_channels)

    @property
    def tied(self) -> tuple[int, int]:
        """The largest number of inputs, and of outputs, known to be in one group; zeros by chance aside.

        A layer ties what its own groups hold. Known from shapes alone, it says how many groups a widened form may
        turn out to have, where finding the zeros would take the whole matrix.
        """
        return self.ties or (self.in_channels // self.groups, self.out_channels // self.groups)

    @property
    def most_groups(self) -> int:
        """More groups than this a widened form cannot have."""
        channels = math.gcd(self.in_channels, self.out_channels)
        inputs, outputs = self.tied
        fits = (g for g in divisors(channels) if g * inputs <= self.in_channels and g * outputs <= self.out_channels)
        return max(fits, default=1)

    def same_size(self, other: object) -> bool:
        """Whether another form gives maps of the same size and number of channels for every input."""
        if not isinstance(other, ConvForm):
            return False
        own = (self.stride, self.extent, self.up, self.out_channels)
        return own == (other.stride, other.extent, other.up, other.out_channels)

    def to(self, device: torch.device | str) -> ConvForm:
        """The same form with its numbers elsewhere; on the meta device only the shapes are left."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    # ---------------------------------------------------------------- laws

    def affine(self, scale: Tensor | None, shift: Tensor | None) -> ConvForm:
        """``scale * y + shift`` per output channel; both ``(out,)`` or None."""
        weight, bias = self.weight, self.bias
        if weight.device.type == "meta":  # planning: shapes stay, and a product without numbers takes its time too
            return replace(self, bias=shift if bias is None else bias)
        if scale is not None:
            weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
            bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return replace(self, weight=weight, bias=bias)

    def __neg__(self) -> ConvForm:
        return replace(self, weight=-self.weight, bias=None if self.bias is None else -self.bias)

    def __add__(self, other: Form) -> ConvForm:
        if isinstance(other, OpaqueForm):
            other.refuse()
        if self.out_channels != other.out_channels or self.in_channels != other.in_channels:
            raise RefusalError(
                Reason.CHANNELS,
                f"cannot add {self.in_channels}->{self.out_channels} "
                f"and {other.in_channels}->{other.out_channels} channels",
            )
        grid = common_grid([self, other])
        inner, outer = (self, other) if other.kernel == grid.kernel else (other, self)
        widened, spread = self.widened or other.widened, self.spread or other.spread
        ties = _ties(self, other) if widened else None
        if self.weight.is_meta:  # planning: torch would only find out the shapes, at a multiple of the cost
            shape = self.out_channels, self.in_channels // grid.groups, *grid.kernel
            bias = other.bias if self.bias is None else self.bias
            whole = grid.written(self, self.weight.new_empty(shape))
            return replace(whole, bias=bias, widened=widened, spread=spread, ties=ties)
        bias = other.bias if self.bias is None else self.bias if other.bias is None else self.bias + other.bias
        whole, small = grid.embed(outer), inner.widen(grid.groups)
        if small.kernel == grid.kernel:
            weight = whole.weight + small.weight
        elif torch.is_grad_enabled():  # every change in place would cost autograd a copy of the whole kernel
            weight = whole.weight + grid.embed(small).weight
        else:  # a branch that already fills the grid is copied once, and the other added in place
            weight = whole.weight.clone() if whole.weight is outer.weight else whole.weight
            weight[grid.place(small)].add_(small.weight)
        return replace(whole, weight=weight, bias=bias, widened=widened, spread=spread, ties=ties)

    def then(self, outer: Form) -> ConvForm:
        """``outer`` applied to the result of this form."""
        if isinstance(outer, OpaqueForm):
            outer.refuse()
        if outer.in_channels != self.out_channels or outer.n != self.n:
            raise RefusalError(
                Reason.CHANNELS,
                f"a layer for {outer.in_channels} channels in {outer.n} dimensions follows one that gives "
                f"{self.out_channels} in {self.n}",
            )
        inner = self
        if any(u != 1 for u in outer.up):
            # No bias and one pixel at a time: the zeros between and around the pixels stay zeros.
            if not inner.is_pointwise or inner.bias is not None:
                raise RefusalError(Reason.TRANSPOSED)
            return _compose(replace(inner, mode=outer.mode), outer)
        if outer.reads_outside:
            if outer.mode == "zeros":
                inner = inner.pad(outer.lead, outer.trail)
            else:
                inner = inner.pad_mode(outer.lead, outer.trail, outer.mode)
            outer = outer._without_padding()
        if any(u != 1 for u in inner.up) and not outer.is_pointwise:
            raise RefusalError(Reason.TRANSPOSED)
        return _compose(inner, outer)

    def pad(self, lead: Ints, trail: Ints, value: float | Tensor = 0.0) -> ConvForm:
        """Constant padding of the output (negative: crop), ``value`` a number or one per channel ``(out,)``."""
        mode = self.mode
        if any(p > 0 for p in (*lead, *trail)):
            self._check_outside(lead, trail, value)
            mode = "zeros"
        return replace(
            self,
            mode=mode,
            offset=tuple(o - p * s for o, p, s in zip(self.offset, lead, self.stride, strict=True)),
            extent=tuple(e + (a + b) * s for e, a, b, s in zip(self.extent, lead, trail, self.stride, strict=True)),
        )

    def pad_mode(self, lead: Ints, trail: Ints, mode: str) -> ConvForm:
        """Reflect, replicate or circular padding of the output: commutes with a pointwise map."""
        if not self.is_pointwise:
            raise RefusalError(Reason.PAD_MODE, f"{mode} padding commutes only with a 1x1, stride 1 map in front of it")
        padded = replace(
            self,
            mode=mode,
            offset=tuple(-p for p in lead),
            extent=tuple(a + b - 1 for a, b in zip(lead, trail, strict=True)),
        )
        return padded

    def rows(self, index: Sequence[int]) -> ConvForm:
        """The output channels ``index``, in that order."""
        order = list(index)
        if order == list(range(self.out_channels)):
            return self
        dense = self.widen(1)
        rows = torch.tensor(order, device=dense.weight.device)
        bias = None if dense.bias is None else dense.bias[rows]
        # Rows may be taken from anywhere: each has the inputs of its group, if all groups are alike.
        ties = (1 if self.widened else self.tied[0], 1)
        return replace(dense, weight=dense.weight[rows], bias=bias, widened=True, ties=ties)

    @staticmethod
    def concat(given: Sequence[Form]) -> ConvForm:
        """Output channels of several forms over the same input, one after another."""
        if len({f.in_channels for f in given}) != 1:
            raise RefusalError(Reason.CHANNELS, "concatenated maps read different numbers of channels")
        forms = [f.refuse() if isinstance(f, OpaqueForm) else f for f in given]
        dense = [f.widen(1) for f in forms]
        grid = common_grid(dense)
        aligned = [grid.embed(f) for f in dense]
        bias = None
        if any(f.bias is not None for f in aligned):
            zero = [f.weight.new_zeros(f.out_channels) if f.bias is None else f.bias for f in aligned]
            bias = torch.cat(zero)
        weight = torch.cat([f.weight for f in aligned])
        return replace(aligned[0], weight=weight, bias=bias, widened=True, ties=_ties(*forms))

    def narrowed(self) -> ConvForm:
        """The same map with the largest number of groups its zeros allow."""
        if not self.widened or self.weight.device.type == "meta":
            return self
        dense = self.widen(1)
        used = (dense.weight.detach() != 0).flatten(2).any(-1) if dense.n else dense.weight.detach() != 0
        for groups in sorted(divisors(math.gcd(self.in_channels, self.out_channels)), reverse=True):
            blocks = used.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).any(3).any(1)
            if not bool((blocks & ~torch.eye(groups, dtype=torch.bool, device=blocks.device)).any()):
                return replace(self._regroup_from_dense(dense, groups), widened=False, ties=None)
        return self

    # ---------------------------------------------------------------- evaluation

    def apply(self, x: Tensor, *, absolute: bool = False) -> Tensor:
        """The map applied to ``x`` of shape ``(batch, in, *size)``; for ``n = 0``, ``(..., in)``.

        With ``absolute`` the sum of the magnitudes of all products: the scale of its rounding error.
        """
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if absolute:
            x, weight, bias = x.abs(), weight.abs(), None if bias is None else bias.abs()
        if self.n == 0:
            blocks = torch.einsum(
                "...gi,goi->...go", x.unflatten(-1, (self.groups, -1)), weight.unflatten(0, (self.groups, -1))
            )
            y = blocks.flatten(-2)
            return y if bias is None else y + bias
        for axis, up in enumerate(self.up):
            if up > 1:
                shape = list(x.shape)
                shape[2 + axis] = (shape[2 + axis] - 1) * up + 1
                stuffed = x.new_zeros(shape)
                stuffed[(slice(None),) * (2 + axis) + (slice(None, None, up),)] = x
                x = stuffed
        pads = [p for pair in zip(reversed(self.lead), reversed(self.trail), strict=True) for p in pair]
        x = pad_or_crop(x, pads, "constant" if self.mode == "zeros" else self.mode)
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[self.n - 1]
        return conv(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    # ---------------------------------------------------------------- helpers of the laws

    def _check_outside(self, lead: Ints, trail: Ints, value: float | Tensor) -> None:
        if self.mode != "zeros" and self.reads_outside:
            raise RefusalError(Reason.PAD_MODE, f"zero padding after {self.mode} padding is not one convolution")
        for i in range(self.n):
            s, d, k, off = self.stride[i], self.dilation[i], self.kernel[i], self.offset[i]
            ahead = lead[i] <= 0 or off + d * (k - 1) < s
            behind = trail[i] <= 0 or self.extent[i] + off + 1 >= 0
            # With zeros between the pixels the nearest real pixel is further away, so the same test is safe.
            if not (ahead and behind):
                raise RefusalError(Reason.BORDER)
        bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
        if self.bias is None and isinstance(value, (int, float)) and value == 0:
            return
        if bias.device.type == "meta" or isinstance(bias, FakeTensor):
            return  # only shapes are at hand: decided again with numbers
        wanted = torch.as_tensor(value, dtype=bias.dtype, device=bias.device)
        gap = float((bias - wanted).abs().max().detach())
        if not gap <= PAD_VALUE_TOLERANCE * max(1.0, float(bias.abs().max().detach())):  # NaN is a difference too
            raise RefusalError(Reason.PAD_VALUE, f"{Reason.PAD_VALUE.value}: they differ by {gap:.3g}")

    def _without_padding(self) -> ConvForm:
        extent = tuple(e - a - b for e, a, b in zip(self.extent, self.lead, self.trail, strict=True))
        return replace(self, offset=(0,) * self.n, extent=extent, mode="zeros")

    def widen(self, groups: int) -> ConvForm:
        """The same map written with fewer groups; ``groups`` divides the present number."""
        if groups == self.groups:
            return self
        return replace(self, weight=block_diagonal(self.weight, self.groups, groups), groups=groups)

    @staticmethod
    def _regroup_from_dense(dense: ConvForm, groups: int) -> ConvForm:
        blocks = dense.weight.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))  # G, o, G, i, k
        own = torch.stack([blocks[g, :, g] for g in range(groups)])
        return replace(dense, weight=own.flatten(0, 1), groups=groups)


Form = ConvForm | OpaqueForm
"""What a linear layer may be."""


def _compose(inner: ConvForm, outer: ConvForm) -> ConvForm:
    """``outer`` after ``inner`` where ``outer`` never reads outside: kernels convolved group by group."""
    n = inner.n
    groups, product = channel_product(inner, outer)
    scale = [outer.dilation[i] * inner.stride[i] if outer.up[i] == 1 else outer.dilation[i] for i in range(n)]
    dilation, kernel, outer_step, inner_step = [], [], [], []
    for i in range(n):
        a = inner.dilation[i] if inner.kernel[i] > 1 else 0
        b = scale[i] if outer.kernel[i] > 1 else 0
        step = math.gcd(a, b) or 1
        dilation.append(step)
        inner_step.append(a // step)
        outer_step.append(b // step)
        kernel.append(inner_step[i] * (inner.kernel[i] - 1) + outer_step[i] * (outer.kernel[i] - 1) + 1)
    if inner.weight.is_meta:  # planning: torch would only find out the shapes, at a multiple of the cost
        weight = inner.weight.new_empty((outer.out_channels, inner.in_channels // groups, *kernel))
        bias = outer.bias if inner.bias is None else inner.weight.new_empty(outer.out_channels)
    else:
        weight = convolve(inner.weight, outer.weight, tuple(kernel), inner_step, outer_step, product)
        bias = passed_on(inner, outer)
    widened = inner.widened or outer.widened
    return ConvForm(
        weight,
        bias,
        stride=tuple(s * t for s, t in zip(inner.stride, outer.stride, strict=True)),
        dilation=tuple(dilation),
        offset=tuple(inner.offset[i] + outer.offset[i] * inner.stride[i] for i in range(n)),
        extent=tuple(inner.extent[i] + inner.stride[i] * (1 + outer.extent[i]) for i in range(n)),
        up=tuple(u * v for u, v in zip(inner.up, outer.up, strict=True)),
        groups=groups,
        mode=inner.mode,
        widened=widened,
        spread=inner.spread or outer.spread,
        # A widened map may leave some of its inputs unread, and with them what ties the inputs of the one before it.
        ties=(1 if outer.widened else inner.tied[0], outer.tied[1]) if widened else None,
    )


def _ties(*forms: ConvForm) -> tuple[int, int]:
    """What is tied in one of several branches over the same input is tied in all of them together."""
    return max(f.tied[0] for f in forms), max(f.tied[1] for f in forms)


def _placed(like: Tensor | None) -> dict[str, Any]:
    """Dtype and device of a tensor; float64 on the CPU without one."""
    return {"dtype": torch.float64} if like is None else {"dtype": like.dtype, "device": like.device}


def transposed_padding(kernel: Ints, dilation: Ints, lead: Ints, trail: Ints) -> tuple[Ints, Ints]:
    """``padding`` and ``output_padding`` of torch's layer, per dimension; it takes none below zero."""
    reach = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding = tuple(r - p for r, p in zip(reach, lead, strict=True))
    return padding, tuple(b - a for a, b in zip(lead, trail, strict=True))


def per_dim(value: Sequence[Any] | int, n: int) -> list[Any]:
    """One value per spatial dimension; as in torch, a single one stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values
