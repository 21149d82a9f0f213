"""Re-parameterisation blocks written as their publications write them: material for the tests, no folding code.

They keep the habits of the reference implementations on purpose (item assignment while padding, questions about the
device, kernels computed in the forward): the compiler must read them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A network in one line: ``Net(lambda m, x: m.bn(m.conv(x)), conv=..., bn=...)``."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def whole(model: nn.Module) -> nn.Module:
    """Small whole numbers for every weight, in float64: all products and sums are exact, so ``==`` is fair."""
    model = model.double().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randint(-3, 4, tensor.shape))
    return model


def lively(model: nn.Module) -> nn.Module:
    """Weights and running statistics as after training, in float64: no gamma is 1 and no mean is 0."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, tensor.shape) * 2 - 1)
            elif tensor.dim() == 1:
                tensor.normal_()
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                tensor.normal_()
    return model


def conv_bn(inp: int, out: int, kernel: Any, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inp, out, kernel, bias=False, **options), nn.BatchNorm2d(out))


def add(*branches: nn.Module) -> Net:
    """The sum of branches."""
    return Net(lambda m, x: sum(b(x) for b in m.branches), branches=nn.ModuleList(branches))


# ------------------------------------------------------------------ sums of branches


class CropLayer(nn.Module):
    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.rows, self.cols = rows, cols

    def forward(self, x: Tensor) -> Tensor:
        rows = slice(self.rows, -self.rows) if self.rows else slice(None)
        cols = slice(self.cols, -self.cols) if self.cols else slice(None)
        return x[:, :, rows, cols]


class ACB(nn.Module):
    """Asymmetric Convolution Block (Ding et al., ICCV 2019), with the crop of the reference where padding is small."""

    def __init__(
        self, inp: int, out: int, k: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
    ):
        super().__init__()
        same = {"stride": stride, "dilation": dilation, "groups": groups}
        edge = padding - dilation * (k // 2)
        self.square = conv_bn(inp, out, k, padding=padding, **same)
        self.ver_crop = CropLayer(0, -edge) if edge < 0 else nn.Identity()
        self.hor_crop = CropLayer(-edge, 0) if edge < 0 else nn.Identity()
        self.ver = conv_bn(inp, out, (k, 1), padding=(padding, max(edge, 0)), **same)
        self.hor = conv_bn(inp, out, (1, k), padding=(max(edge, 0), padding), **same)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.ver(self.ver_crop(x)) + self.hor(self.hor_crop(x))


class RepVGG(nn.Module):
    """RepVGG (Ding et al., CVPR 2021); the identity is a bare batch norm."""

    def __init__(self, inp: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None
        self.rbr_dense = conv_bn(inp, out, 3, stride=stride, padding=1, groups=groups)
        self.rbr_1x1 = conv_bn(inp, out, 1, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return self.rbr_dense(x) + self.rbr_1x1(x) + identity


class MobileOne(nn.Module):
    """MobileOne (Vasu et al., CVPR 2023): several equal branches, a scale branch, a skip."""

    def __init__(self, inp: int, out: int, k: int = 3, stride: int = 1, groups: int = 1, branches: int = 4) -> None:
        super().__init__()
        self.rbr_skip = nn.BatchNorm2d(inp) if inp == out and stride == 1 else None
        same = {"stride": stride, "groups": groups}
        self.rbr_conv = nn.ModuleList(conv_bn(inp, out, k, padding=k // 2, **same) for _ in range(branches))
        self.rbr_scale = conv_bn(inp, out, 1, **same) if k > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = self.rbr_skip(x) if self.rbr_skip is not None else 0
        scaled = self.rbr_scale(x) if self.rbr_scale is not None else 0
        out = scaled + identity
        for branch in self.rbr_conv:
            out += branch(x)
        return out


class RepMixer(nn.Module):
    """FastViT's token mixer (Vasu et al., ICCV 2023): x + layer_scale * (mixer(x) - norm(x))."""

    def __init__(self, dim: int, k: int = 3) -> None:
        super().__init__()
        self.norm = MobileOne(dim, dim, 1, groups=dim, branches=0)
        self.mixer = MobileOne(dim, dim, k, groups=dim, branches=1)
        self.layer_scale = nn.Parameter(torch.rand(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class RepViT(nn.Module):
    """RepViT's depthwise block (Wang et al., CVPR 2024): BN(dw3x3-BN + dw1x1 + x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = conv_bn(dim, dim, 3, padding=1, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class QARepVGG(nn.Module):
    """QARepVGG (Chu et al., AAAI 2024): the norm behind the sum."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense, self.point, self.bn = (
            conv_bn(dim, dim, 3, padding=1),
            nn.Conv2d(dim, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.dense(x) + self.point(x) + x)


class RepGhost(nn.Module):
    """RepGhost (Chen et al., 2022): depthwise 3x3 and a batch norm as identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cheap = conv_bn(dim, dim, 3, padding=1, groups=dim)
        self.fusion_conv = nn.Sequential(nn.Identity())
        self.fusion_bn = nn.Sequential(nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.cheap(x)
        for conv, bn in zip(self.fusion_conv, self.fusion_bn, strict=True):
            out = out + bn(conv(x))
        return out


class DilatedReparam(nn.Module):
    """UniRepLKNet's dilated re-param block (Ding et al., CVPR 2024): a large kernel and dilated small ones."""

    def __init__(self, dim: int, k: int = 7, branches: tuple[tuple[int, int], ...] = ((5, 1), (3, 2), (3, 3))) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False)
        self.origin_bn = nn.BatchNorm2d(dim)
        self.branches = branches
        for size, r in branches:
            conv = nn.Conv2d(dim, dim, size, padding=r * (size - 1) // 2, dilation=r, groups=dim, bias=False)
            setattr(self, f"dil_conv_k{size}_{r}", conv)
            setattr(self, f"dil_bn_k{size}_{r}", nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin_bn(self.lk_origin(x))
        for size, r in self.branches:
            out = out + getattr(self, f"dil_bn_k{size}_{r}")(getattr(self, f"dil_conv_k{size}_{r}")(x))
        return out


class OddKernels(nn.Module):
    """LCNetV2: a sum over all odd kernels and a skip, activation outside."""

    def __init__(self, dim: int, k: int = 5) -> None:
        super().__init__()
        sizes = range(k, 0, -2)
        self.convs = nn.ModuleList(conv_bn(dim, dim, s, padding=s // 2, groups=dim) for s in sizes)
        self.identity = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        out = self.identity(x)
        for conv in self.convs:
            out = out + conv(x)
        return out


# ------------------------------------------------------------------ sequences that pad with a value of their own


class BNAndPad(nn.Module):
    """DBB's padding: batch norm, then the border is filled with what the norm makes of zero, item by item."""

    def __init__(self, pixels: int, dim: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim)
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        if self.pixels > 0:
            pad = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / torch.sqrt(
                self.bn.running_var + self.bn.eps
            )
            out = F.pad(out, [self.pixels] * 4)
            pad = pad.view(1, -1, 1, 1)
            out[:, :, 0 : self.pixels, :] = pad
            out[:, :, -self.pixels :, :] = pad
            out[:, :, :, 0 : self.pixels] = pad
            out[:, :, :, -self.pixels :] = pad
        return out


class IdentityBased1x1(nn.Conv2d):
    """DBB's 1x1 that starts as the identity."""

    def __init__(self, dim: int, groups: int = 1) -> None:
        super().__init__(dim, dim, 1, groups=groups, bias=False)
        eye = torch.zeros(dim, dim // groups, 1, 1)
        eye[torch.arange(dim), torch.arange(dim) % (dim // groups)] = 1
        self.register_buffer("id_tensor", eye)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, groups=self.groups)


class DBB(nn.Module):
    """Diverse Branch Block (Ding et al., CVPR 2021)."""

    def __init__(self, inp: int, out: int, k: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        p = k // 2
        same = {"stride": stride, "groups": groups, "bias": False}
        self.dbb_origin = conv_bn(inp, out, k, stride=stride, padding=p, groups=groups)
        self.dbb_avg = nn.Sequential()
        if groups < out:
            self.dbb_avg.add_module("conv", nn.Conv2d(inp, out, 1, groups=groups, bias=False))
            self.dbb_avg.add_module("bn", BNAndPad(p, out))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, 0))
            self.dbb_1x1: nn.Module | None = conv_bn(inp, out, 1, stride=stride, groups=groups)
        else:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, p))
            self.dbb_1x1 = None
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(out))
        middle = inp if groups < out else 2 * inp
        self.dbb_1x1_kxk = nn.Sequential()
        first = IdentityBased1x1(inp, groups) if middle == inp else nn.Conv2d(inp, middle, 1, groups=groups, bias=False)
        self.dbb_1x1_kxk.add_module("idconv1", first)
        self.dbb_1x1_kxk.add_module("bn1", BNAndPad(p, middle))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(middle, out, k, **same))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dbb_origin(x)
        if self.dbb_1x1 is not None:
            out += self.dbb_1x1(x)
        out += self.dbb_avg(x)
        out += self.dbb_1x1_kxk(x)
        return out


class SeqConv3x3(nn.Module):
    """ECB's 1x1 then 3x3, learned or a scaled edge filter; the border is filled item by item."""

    def __init__(self, kind: str, inp: int, out: int, multiplier: int = 2) -> None:
        super().__init__()
        self.kind, self.out = kind, out
        middle = out * multiplier if kind == "conv1x1-conv3x3" else out
        first = nn.Conv2d(inp, middle, 1)
        self.k0, self.b0 = first.weight, first.bias
        if kind == "conv1x1-conv3x3":
            second = nn.Conv2d(middle, out, 3)
            self.k1, self.b1 = second.weight, second.bias
            return
        self.scale = nn.Parameter(torch.randn(out, 1, 1, 1))
        self.bias = nn.Parameter(torch.randn(out))
        edge = {"sobelx": [[1, 0, -1], [2, 0, -2], [1, 0, -1]], "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]]}[kind]
        mask = torch.tensor(edge, dtype=torch.float32).expand(out, 1, 3, 3).clone()
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y0 = F.conv2d(x, self.k0, self.b0)
        y0 = F.pad(y0, (1, 1, 1, 1), "constant", 0)
        border = self.b0.view(1, -1, 1, 1)
        y0[:, :, 0:1, :] = border
        y0[:, :, -1:, :] = border
        y0[:, :, :, 0:1] = border
        y0[:, :, :, -1:] = border
        if self.kind == "conv1x1-conv3x3":
            return F.conv2d(y0, self.k1, self.b1)
        return F.conv2d(y0, self.scale * self.mask, self.bias, groups=self.out)


class ECB(nn.Module):
    """Edge-oriented convolution block (Zhang et al., ACM MM 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv1x1_3x3 = SeqConv3x3("conv1x1-conv3x3", dim, dim)
        self.conv1x1_sbx = SeqConv3x3("sobelx", dim, dim)
        self.conv1x1_lpl = SeqConv3x3("laplacian", dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3x3(x) + self.conv1x1_3x3(x) + self.conv1x1_sbx(x) + self.conv1x1_lpl(x) + x


# ------------------------------------------------------------------ kernels that are computed


class DOConv(nn.Module):
    """DO-Conv (Cao et al., TIP 2022): the kernel is D composed with W."""

    def __init__(self, inp: int, out: int, k: int = 3, groups: int = 1, **options: Any) -> None:
        super().__init__()
        self.inp, self.out, self.k, self.groups, self.options = inp, out, k, groups, options
        self.W = nn.Parameter(torch.randn(out, inp // groups, k * k))
        self.D = nn.Parameter(torch.zeros(inp, k * k, k * k))
        self.D_diag = nn.Parameter(torch.eye(k * k).repeat(inp, 1, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out, self.inp // self.groups, self.k, self.k)
        d = self.D + self.D_diag
        w = torch.reshape(self.W, (self.out // self.groups, self.inp, self.k * self.k))
        kernel = torch.reshape(torch.einsum("ims,ois->oim", d, w), shape)
        return F.conv2d(x, kernel, self.bias, groups=self.groups, **self.options)


class OREPA(nn.Module):
    """Online re-parameterisation (Hu et al., CVPR 2022): the kernel is built from branches in every forward."""

    def __init__(self, dim: int, k: int = 3) -> None:
        super().__init__()
        self.origin = nn.Parameter(torch.randn(dim, dim, k, k))
        self.point = nn.Parameter(torch.randn(dim, dim, 1, 1))
        self.avg_conv = nn.Parameter(torch.randn(dim, dim, 1, 1))
        self.register_buffer("avg_avg", torch.ones(k, k) / (k * k))
        self.vector = nn.Parameter(torch.randn(3, dim))
        self.bn = nn.BatchNorm2d(dim)
        self.k = k

    def weight_gen(self) -> Tensor:
        origin = torch.einsum("oihw,o->oihw", self.origin, self.vector[0, :])
        avg = torch.einsum(
            "oihw,o->oihw",
            torch.einsum("oi,hw->oihw", self.avg_conv.squeeze(3).squeeze(2), self.avg_avg),
            self.vector[1, :],
        )
        p = self.k // 2
        return origin + avg + torch.einsum("oihw,o->oihw", F.pad(self.point, (p, p, p, p)), self.vector[2, :])

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.weight_gen(), None, padding=self.k // 2))


class WSConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = self.weight - mean
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NumpyKernel(nn.Module):
    """A kernel that is put together in numpy on every forward: nothing a tracer could follow."""

    def __init__(self, inp: int, out: int, k: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inp, k, k))
        self.point = nn.Parameter(torch.randn(out, inp))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.detach().cpu().numpy().copy()
        middle = kernel.shape[-1] // 2
        kernel[:, :, middle, middle] += self.point.detach().cpu().numpy()
        kernel = torch.from_numpy(np.ascontiguousarray(kernel))
        return F.conv2d(x, kernel, padding=middle)


class AsksDevice(nn.Module):
    """Control flow on a question about the device, as older CUDA code has it."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, 3, padding=1)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        if x.get_device() >= 0:
            x = x.cuda(x.get_device())
        return self.bn(self.conv(x))


# ------------------------------------------------------------------ linear layers


class LinearNorm(nn.Module):
    """LeViT's linear layer with batch norm over tokens (Graham et al., ICCV 2021)."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inp, out, bias=False)
        self.bn = nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class NormLinear(nn.Module):
    """LeViT's head: batch norm, dropout, linear."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(inp)
        self.drop = nn.Dropout(0.1)
        self.linear = nn.Linear(inp, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.bn(x)))


class TwoHeads(nn.Module):
    """A classifier and a distilled one, averaged in eval."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.head, self.head_dist = NormLinear(inp, out), NormLinear(inp, out)
        self.distilled_training = False

    def forward(self, x: Tensor) -> Any:
        x, x_dist = self.head(x), self.head_dist(x)
        if self.distilled_training and self.training:
            return x, x_dist
        return (x + x_dist) / 2
