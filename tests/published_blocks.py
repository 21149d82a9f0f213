"""Blocks as their authors' code has them: the names, shapes and buffers of its state dict, and what it computes.

Written from the publications and the keys of the authors' files; material for the tests of imports, no folding code.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ACB", "DBB", "ECB", "OREPA", "DOConv", "Dilated", "MobileOne", "Orepa1x1", "OrepaRepVGG", "OrepaStem", "RepVGG",
    "conv_bn",
]  # fmt: skip


def conv_bn(inp: int, out: int, k: int, stride: int = 1, groups: int = 1, padding: int | None = None) -> nn.Sequential:
    padding = k // 2 if padding is None else padding
    conv = nn.Conv2d(inp, out, k, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out)))


def deployed(inp: int, out: int, k: int, stride: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(inp, out, k, stride, k // 2, groups=groups)


class ACB(nn.Module):
    """ACNet, with an optional norm behind the sum and lines of another length, as its older code has them."""

    def __init__(
        self,
        inp: int,
        out: int,
        k: int,
        stride: int = 1,
        groups: int = 1,
        *,
        line: int | None = None,
        last: bool = False,
    ) -> None:
        super().__init__()
        line = line or k
        same: dict[str, Any] = {"stride": stride, "groups": groups, "bias": False}
        self.square_conv = nn.Conv2d(inp, out, (k, k), padding=k // 2, **same)
        self.square_bn = nn.BatchNorm2d(out)
        self.ver_conv = nn.Conv2d(inp, out, (line, 1), padding=(line // 2, 0), **same)
        self.hor_conv = nn.Conv2d(inp, out, (1, line), padding=(0, line // 2), **same)
        self.ver_bn, self.hor_bn = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        if last:
            self.last_bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.square_bn(self.square_conv(x)) + self.ver_bn(self.ver_conv(x)) + self.hor_bn(self.hor_conv(x))
        return self.last_bn(y) if hasattr(self, "last_bn") else y


class BNAndPad(nn.Module):
    """A norm, padded with what it makes of zero."""

    def __init__(self, pixels: int, channels: int) -> None:
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(channels), pixels

    def forward(self, x: Tensor) -> Tensor:
        bn, p = self.bn, self.pixels
        edge = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        y = edge.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2] + 2 * p, x.shape[3] + 2 * p).clone()
        y[:, :, p : y.shape[2] - p, p : y.shape[3] - p] = bn(x)
        return y


class IdentityPoint(nn.Module):
    """A 1x1 kernel that is the identity and a change; only the change is stored."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        inputs = channels // groups
        self.weight = nn.Parameter(torch.zeros(channels, inputs, 1, 1))
        self.groups, self.fixed = groups, torch.zeros(channels, inputs, 1, 1)
        for i in range(channels):
            self.fixed[i, i % inputs, 0, 0] = 1

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + self.fixed.to(self.weight), groups=self.groups)


class DBB(nn.Module):
    def __init__(self, inp: int, out: int, k: int, stride: int = 1, groups: int = 1, inner: int | None = None) -> None:
        super().__init__()
        p, dense = k // 2, groups < out
        self.dbb_origin = conv_bn(inp, out, k, stride, groups)
        self.dbb_avg = nn.Sequential()
        if dense:
            self.dbb_avg.add_module("conv", nn.Conv2d(inp, out, 1, groups=groups, bias=False))
            self.dbb_avg.add_module("bn", BNAndPad(p, out))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride))
            self.dbb_1x1 = conv_bn(inp, out, 1, stride, groups)
        else:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, p))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(out))
        inner = inner or (inp if dense else 2 * inp)
        same = inner == inp
        point = IdentityPoint(inp, groups) if same else nn.Conv2d(inp, inner, 1, groups=groups, bias=False)
        self.dbb_1x1_kxk = nn.Sequential()
        self.dbb_1x1_kxk.add_module("idconv1" if same else "conv1", point)
        self.dbb_1x1_kxk.add_module("bn1", BNAndPad(p, inner))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(inner, out, k, stride, groups=groups, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return y + self.dbb_1x1(x) if hasattr(self, "dbb_1x1") else y


class RepVGG(nn.Module):
    def __init__(self, inp: int, out: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None
        self.rbr_dense = conv_bn(inp, out, k, stride, groups)
        self.rbr_1x1 = conv_bn(inp, out, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return y if self.rbr_identity is None else y + self.rbr_identity(x)


class MobileOne(nn.Module):
    def __init__(self, inp: int, out: int, k: int, stride: int = 1, groups: int = 1, n: int = 4) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(inp, out, k, stride, groups) for _ in range(n))
        self.rbr_scale = conv_bn(inp, out, 1, stride, groups) if k > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for branch in self.rbr_conv)
        if self.rbr_scale is not None:
            y = y + self.rbr_scale(x)
        return y if self.rbr_skip is None else y + self.rbr_skip(x)


class Dilated(nn.Module):
    """UniRepLKNet's large depthwise kernel."""

    SIZES: ClassVar = {
        9: ((5, 1), (5, 2), (3, 3), (3, 4)),
        13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        7: ((5, 1), (3, 2), (3, 3)),
    }

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        same: dict[str, Any] = {"groups": channels, "bias": False}
        self.lk_origin = nn.Conv2d(channels, channels, k, padding=k // 2, **same)
        self.origin_bn = nn.BatchNorm2d(channels)
        self.small = self.SIZES[k]
        for size, r in self.small:
            conv = nn.Conv2d(channels, channels, size, padding=r * (size - 1) // 2, dilation=r, **same)
            self.add_module(f"dil_conv_k{size}_{r}", conv)
            self.add_module(f"dil_bn_k{size}_{r}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin_bn(self.lk_origin(x))
        for size, r in self.small:
            conv, norm = (getattr(self, f"dil_{word}_k{size}_{r}") for word in ("conv", "bn"))
            y = y + norm(conv(x))
        return y


class DOConv(nn.Module):
    """DO-Conv in PyTorch: with groups its D belongs to other channels than those that the kernel reads."""

    def __init__(
        self, inp: int, out: int, k: int | tuple[int, int], stride: int = 1, padding: Any = 0, groups: int = 1,
        bias: bool = False, diag: str = "D_diag",
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = (stride, padding, 1, groups)
        size = k if isinstance(k, tuple) else (k, k)
        self.shape, taps = (out, inp // groups, *size), math.prod(size)
        self.W = nn.Parameter(torch.randn(out, inp // groups, taps) / math.sqrt(inp * taps))
        if taps > 1:
            self.D = nn.Parameter(torch.randn(inp, taps, taps) / taps)
            self.diag = diag
            eye = torch.eye(taps).repeat(inp, 1, 1)
            self.register_parameter(diag, nn.Parameter(eye, requires_grad=False))
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.W
        if hasattr(self, "D"):
            D = self.D + getattr(self, self.diag)
            W = self.W.reshape(-1, D.shape[0], D.shape[2])
            kernel = torch.stack([torch.stack([D[i] @ W[o, i] for i in range(len(D))]) for o in range(len(W))])
        return F.conv2d(x, kernel.reshape(self.shape), self.bias, *self.geometry)


class ECB(nn.Module):
    MASKS: ClassVar = {"sbx": [[1, 0, -1], [2, 0, -2], [1, 0, -1]], "sby": [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
             "lpl": [[0, 1, 0], [1, -4, 1], [0, 1, 0]]}  # fmt: skip

    class Branch(nn.Module):
        def __init__(self, inp: int, out: int, middle: int = 0, mask: list[list[int]] | None = None) -> None:
            super().__init__()
            first = nn.Conv2d(inp, middle or out, 1)
            self.k0, self.b0 = first.weight, first.bias
            if mask is None:
                second = nn.Conv2d(middle, out, 3)
                self.k1, self.b1 = second.weight, second.bias
            else:
                self.scale = nn.Parameter(torch.randn(out, 1, 1, 1))
                self.bias = nn.Parameter(torch.randn(out))
                whole = torch.tensor(mask, dtype=torch.float32).expand(out, 1, 3, 3).clone()
                self.mask = nn.Parameter(whole, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(F.conv2d(x, self.k0, self.b0), (1, 1, 1, 1))
            edge = self.b0.view(1, -1, 1, 1)
            y[:, :, 0:1, :], y[:, :, -1:, :], y[:, :, :, 0:1], y[:, :, :, -1:] = edge, edge, edge, edge
            if hasattr(self, "k1"):
                return F.conv2d(y, self.k1, self.b1)
            return F.conv2d(y, self.scale * self.mask, self.bias, groups=len(self.bias))

    def __init__(self, inp: int, out: int, multiplier: float = 2.0, identity: bool = False) -> None:
        super().__init__()
        self.identity = identity and inp == out
        self.conv3x3 = nn.Conv2d(inp, out, 3, padding=1)
        self.conv1x1_3x3 = ECB.Branch(inp, out, int(out * multiplier))
        for name, mask in self.MASKS.items():
            self.add_module(f"conv1x1_{name}", ECB.Branch(inp, out, mask=mask))
        self.act = nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.conv3x3, self.conv1x1_3x3, self.conv1x1_sbx, self.conv1x1_sby, self.conv1x1_lpl)
        y = sum(branch(x) for branch in branches)
        return self.act(y + x if self.identity else y)


# ------------------------------------------------------------------ OREPA


def prior(channels: int, k: int) -> Tensor:
    found = torch.zeros(channels, k, k)
    half = channels / 2
    for c in range(channels):
        for h in range(k):
            for w in range(k):
                angle = (h + 0.5) * (c + 1) if c < half else (w + 0.5) * (c + 1 - half)
                found[c, h, w] = math.cos(math.pi * angle / k)
    return found


class OREPA(nn.Module):
    """Six weighted kernels; with ``word="rbr"`` the five of the form inside of RepVGG's block."""

    def __init__(
        self, inp: int, out: int, k: int, stride: int = 1, groups: int = 1, *, word: str = "orepa", norm: bool = True
    ) -> None:
        super().__init__()
        self.word, self.sizes, self.geometry = word, (inp, out, k, groups), (stride, k // 2, 1, groups)
        few, inner = inp // groups, inp if groups <= 4 else 2 * inp

        def weight(name: str, *shape: int) -> None:
            fan = math.prod(shape[1:])
            self.register_parameter(f"weight_{word}_{name}", nn.Parameter(torch.randn(shape) / math.sqrt(fan)))

        weight("origin", out, few, k, k)
        weight("avg_conv", out, few, 1, 1)
        weight("pfir_conv", out, few, 1, 1)
        self.register_buffer(f"weight_{word}_avg_avg", torch.full((k, k), 1 / k**2))
        if word == "orepa":
            weight("1x1", out, few, 1, 1)
        weight("1x1_kxk_idconv1", inner, few, 1, 1)
        fixed = torch.zeros(inner, few, 1, 1)
        for i in range(inner):
            fixed[i, i % few] = 1
        self.register_buffer("id_tensor", fixed)
        weight("1x1_kxk_conv2", out, inner // groups, k, k)
        weight("gconv_dw", inp * 8, 1, k, k)
        weight("gconv_pw", out, inp * 8 // groups, 1, 1)
        rows = 6 if word == "orepa" or (inp == out and stride == 1) else 5
        self.vector = nn.Parameter(torch.randn(rows, out))
        if norm:
            self.bn = nn.BatchNorm2d(out)
        self.register_buffer(f"weight_{word}_prior", prior(out, k))

    def kernel(self) -> Tensor:
        (inp, out, k, groups), v = self.sizes, self.vector[:, :, None, None, None]

        def w(name: str) -> Tensor:
            return getattr(self, f"weight_{self.word}_{name}")

        first, second = (w("1x1_kxk_idconv1") + self.id_tensor).flatten(1), w("1x1_kxk_conv2")
        both = [
            torch.einsum("ti,othw->oihw", a, b) for a, b in zip(first.chunk(groups), second.chunk(groups), strict=True)
        ]
        depth = w("gconv_dw").reshape(groups, inp // groups, 8, k, k)
        point = w("gconv_pw").reshape(out // groups, groups, inp // groups, 8)
        separable = torch.einsum("cgthw,ocgt->coghw", depth, point).reshape(out, inp // groups, k, k)
        kernel = v[0] * w("origin") + v[1] * w("avg_conv") * w("avg_avg") + v[2] * w("pfir_conv") * w("prior")[:, None]
        kernel = kernel + v[3] * torch.cat(both)
        if self.word == "rbr":
            return kernel + v[4] * separable
        return kernel + v[4] * F.pad(w("1x1"), [k // 2] * 4) + v[5] * separable

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.kernel(), None, *self.geometry))


class Orepa1x1(nn.Module):
    def __init__(self, inp: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        few = min(inp, out)
        self.weight_or1x1_origin = nn.Parameter(torch.randn(out, inp, 1, 1) / math.sqrt(inp))
        self.weight_or1x1_l2i_conv1 = nn.Parameter(torch.randn(few, inp, 1, 1) / math.sqrt(inp))
        self.weight_or1x1_l2i_conv2 = nn.Parameter(torch.randn(out, few, 1, 1) / math.sqrt(few))
        self.vector = nn.Parameter(torch.randn(2, out))
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        v = self.vector[:, :, None, None, None]
        product = (self.weight_or1x1_l2i_conv2.flatten(1) @ self.weight_or1x1_l2i_conv1.flatten(1))[..., None, None]
        return self.bn(F.conv2d(x, v[0] * self.weight_or1x1_origin + v[1] * product, stride=self.stride))


class OrepaStem(nn.Module):
    """Three 3x3 kernels, correlated one after another, in the place of a 7x7."""

    def __init__(self, inp: int, out: int, k: int, stride: int = 1) -> None:
        super().__init__()
        self.geometry = (stride, k // 2)
        for i in range((k - 1) // 2):
            self.add_module(f"weight{i}", OREPA(inp if i == 0 else out, out, 3, norm=False))
        self.count, self.bn = (k - 1) // 2, nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight0.kernel().transpose(0, 1)
        for i in range(1, self.count):
            kernel = F.conv2d(kernel, getattr(self, f"weight{i}").kernel(), padding=2)
        return self.bn(F.conv2d(x, kernel.transpose(0, 1), None, *self.geometry))


class OrepaRepVGG(nn.Module):
    def __init__(self, inp: int, out: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None
        self.rbr_dense = OREPA(inp, out, k, stride, groups, word="rbr")
        self.rbr_1x1 = conv_bn(inp, out, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return y if self.rbr_identity is None else y + self.rbr_identity(x)
