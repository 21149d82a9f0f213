"""What the authors' blocks compute in evaluation, written from their publications and the names of their tensors.

Each function takes the tensors of one block by their own names behind the block's path, in float64, the input ``(N, C,
H, W)`` and the geometry of the convolution that the block stands for. An import is compared with these, so they use
nothing of the algebra that folds. All batch norms have torch's default eps, in every one of the publications.

Sources: Ding et al., "ACNet" (ICCV 2019), "RepVGG", "Diverse Branch Block" (CVPR 2021) and "UniRepLKNet" (CVPR 2024);
Cao et al., "DO-Conv" (IEEE TIP 2022); Vasu et al., "MobileOne" (CVPR 2023); Hu et al., "OREPA" (CVPR 2022); Zhang et
al., "ECBSR" (ACM MM 2021).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.algebra.geometry import Geometry

__all__ = [
    "acb",
    "dbb",
    "doconv",
    "doconv_channels_last",
    "doconv_identity",
    "doconv_kernel",
    "doconv_last",
    "ecb",
    "frozen_identity",
    "largekernel",
    "mobileone",
    "normed",
    "orepa",
    "orepa_1x1_kernel",
    "orepa_kernel",
    "orepa_repvgg",
    "orepa_stem",
    "orepa_stem_kernel",
    "repvgg",
]

EPS = 1e-5
Tensors = Mapping[str, Tensor]


def _norm(t: Tensors, name: str, x: Tensor) -> Tensor:
    mean, var = t[f"{name}.running_mean"], t[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, t.get(f"{name}.weight"), t.get(f"{name}.bias"), eps=EPS)


def _conv(x: Tensor, weight: Tensor, g: Geometry, bias: Tensor | None = None) -> Tensor:
    """The convolution of this geometry with another kernel, centred on it; a negative padding crops."""
    pads = [p - k // 2 + own // 2 for p, k, own in zip(g.lead, g.kernel, weight.shape[2:], strict=True)]
    x = F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)])
    return F.conv2d(x, weight, bias, g.stride, 0, g.dilation, g.groups)


def _norm_and_pad(t: Tensors, name: str, x: Tensor, g: Geometry) -> Tensor:
    """A batch norm whose border is what it makes of zero."""
    zero = _norm(t, name, x.new_zeros(1, x.shape[1], 1, 1))
    return F.pad(_norm(t, name, x) - zero, [g.lead[1], g.lead[1], g.lead[0], g.lead[0]]) + zero


def normed(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """A deployed RepVGG block's convolution with a norm behind it."""
    return _norm(t, "rbr_reparam.bn", _conv(x, t["rbr_reparam.conv.weight"], g))


def frozen_identity(like: Tensor) -> Tensor:
    """A 1x1 kernel ``(C, C / groups, 1, 1)`` that gives each group its own channels."""
    rows, columns = like.shape[:2]
    return torch.eye(columns, dtype=like.dtype).repeat(-(-rows // columns), 1)[:rows].reshape(like.shape)


# ------------------------------------------------------------------ sums of branches


def acb(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """Square, vertical and horizontal kernel, each with its norm; of an older form one more behind the sum."""
    y = sum(_norm(t, f"{n}_bn", _conv(x, t[f"{n}_conv.weight"], g)) for n in ("square", "ver", "hor"))
    assert isinstance(y, Tensor)
    return _norm(t, "last_bn", y) if "last_bn.running_mean" in t else y


def dbb(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """Sum of kxk, 1x1, (1x1, average), (1x1, kxk), each with norms; the inner ones pad with what they make of zero."""
    y = _norm(t, "dbb_origin.bn", _conv(x, t["dbb_origin.conv.weight"], g))
    if "dbb_1x1.conv.weight" in t:
        y = y + _norm(t, "dbb_1x1.bn", _conv(x, t["dbb_1x1.conv.weight"], g))
    if "dbb_avg.conv.weight" in t:
        first = _norm_and_pad(t, "dbb_avg.bn.bn", F.conv2d(x, t["dbb_avg.conv.weight"], groups=g.groups), g)
        y = y + _norm(t, "dbb_avg.avgbn", F.avg_pool2d(first, g.kernel, g.stride))
    elif "dbb_avg.avgbn.running_mean" in t:
        y = y + _norm(t, "dbb_avg.avgbn", F.avg_pool2d(x, g.kernel, g.stride, g.lead))
    if "dbb_1x1_kxk.conv2.weight" in t:
        point = t.get("dbb_1x1_kxk.conv1.weight")
        if point is None:
            change = t["dbb_1x1_kxk.idconv1.weight"]
            point = change + frozen_identity(change)
        first = _norm_and_pad(t, "dbb_1x1_kxk.bn1.bn", F.conv2d(x, point, groups=g.groups), g)
        second = F.conv2d(first, t["dbb_1x1_kxk.conv2.weight"], None, g.stride, groups=g.groups)
        y = y + _norm(t, "dbb_1x1_kxk.bn2", second)
    return y


def repvgg(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """Sum of kxk, 1x1 and identity, each with its norm."""
    return _norm(t, "rbr_dense.bn", _conv(x, t["rbr_dense.conv.weight"], g)) + _beside(t, x, g)


def orepa_repvgg(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """As RepVGG; the kxk kernel is OREPA's."""
    kernel = orepa_kernel(t, g.groups, "rbr_dense.", "rbr")
    return _norm(t, "rbr_dense.bn", _conv(x, kernel, g)) + _beside(t, x, g)


def _beside(t: Tensors, x: Tensor, g: Geometry) -> Tensor:
    y = _norm(t, "rbr_1x1.bn", _conv(x, t["rbr_1x1.conv.weight"], g))
    return y + _norm(t, "rbr_identity", x) if "rbr_identity.running_mean" in t else y


def mobileone(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """Several kxk + 1x1 + identity, each with its norm."""
    names = sorted({match[0] for name in t if (match := re.match(r"rbr_conv\.\d+|rbr_scale", name))})
    y = sum(_norm(t, f"{name}.bn", _conv(x, t[f"{name}.conv.weight"], g)) for name in names)
    assert isinstance(y, Tensor)
    return y + _norm(t, "rbr_skip", x) if "rbr_skip.running_mean" in t else y


def largekernel(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """A large depthwise kernel and smaller dilated ones, each with its norm."""
    y = _norm(t, "origin_bn", _conv(x, t["lk_origin.weight"], g))
    for name, weight in t.items():
        if match := re.fullmatch(r"dil_conv_k(\d+)_(\d+)\.weight", name):
            size, step = map(int, match.groups())
            out = F.conv2d(x, weight, None, 1, step * (size - 1) // 2, step, g.groups)
            y = y + _norm(t, f"dil_bn_k{size}_{step}", out)
    return y


def ecb(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """3x3 + (1x1, 3x3) + (1x1, scaled filter) three times, with biases; the 1x1's border is its bias."""
    y = F.conv2d(x, t["conv3x3.weight"], t["conv3x3.bias"], padding=1)
    for branch in ("conv1x1_3x3", "conv1x1_sbx", "conv1x1_sby", "conv1x1_lpl"):
        bias = t[f"{branch}.b0"]
        edge = bias[None, :, None, None]
        first = F.pad(F.conv2d(x, t[f"{branch}.k0"]), [1, 1, 1, 1]) + edge
        if branch == "conv1x1_3x3":
            y = y + F.conv2d(first, t[f"{branch}.k1"], t[f"{branch}.b1"])
        else:
            weight = t[f"{branch}.scale"] * t[f"{branch}.mask"]
            y = y + F.conv2d(first, weight, t[f"{branch}.bias"], groups=weight.shape[0])
    return y + x if options.get("identity") and y.shape == x.shape else y


# ------------------------------------------------------------------ kernels that are computed


def doconv_kernel(t: Tensors, kernel: tuple[int, ...]) -> Tensor:
    """D with its frozen identity, times W; W is read as ``(out / groups, in, m)``, whatever the groups are."""
    W, inputs = t["W"], t["D"].shape[0]
    D = t["D"] + doconv_identity(t["D"])
    rows = torch.einsum("ims,ois->oim", D, W.reshape(-1, inputs, W.shape[2]))
    return rows.reshape(*W.shape[:2], *kernel)


def doconv_identity(like: Tensor) -> Tensor:
    """What the D of the same shape is added to: the identity, as often as it fits."""
    taps, depth = like.shape[1:]
    eye = torch.eye(taps, dtype=like.dtype).repeat(1, depth // taps)
    return F.pad(eye, [0, depth - eye.shape[1]]).expand_as(like)


def doconv(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """One convolution with the kernel D o W."""
    kernel = doconv_kernel(t, g.kernel) if "D" in t else t["W"].reshape(*t["W"].shape[:2], 1, 1)
    return _conv(x, kernel, g, t.get("bias"))


def doconv_last(t: Tensors) -> Tensor:
    """W as TensorFlow has it, ``(m, in / groups, out)``; Gluon's is ``(out, in / groups, h, w)``."""
    return t["kernel"] if "kernel" in t else t["weight"].permute(2, 3, 1, 0).flatten(0, 1)


def doconv_channels_last(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """The same in TensorFlow's and Gluon's order: W is read as ``(m, in, out / groups)``."""
    W, D = doconv_last(t), t["D"].permute(2, 0, 1)
    D = (D + doconv_identity(D)).permute(1, 2, 0)
    rows = torch.einsum("msi,sio->mio", D, W.reshape(W.shape[0], D.shape[2], -1))
    kernel = rows.reshape(*g.kernel, *W.shape[1:]).permute(3, 2, 0, 1)
    return _conv(x, kernel, g, t.get("bias"))


def orepa_kernel(t: Tensors, groups: int, path: str = "", word: str = "orepa") -> Tensor:
    """Six weighted kernels of one size, five in the form that RepVGG's 3x3 has; without the norm behind them."""

    def weight(name: str) -> Tensor:
        return t[f"{path}weight_{word}_{name}"]

    def pointwise(name: str, window: str) -> Tensor:
        return torch.einsum("oixy,ohw->oihw", weight(name), weight(window).expand(out, *size))

    origin = weight("origin")
    (out, inputs), size = origin.shape[:2], origin.shape[2:]
    kernels = [origin, pointwise("avg_conv", "avg_avg"), pointwise("pfir_conv", "prior")]
    change, prior = weight("1x1_kxk_idconv1"), weight("prior")
    if change.shape[1:] != (inputs, 1, 1) or prior.shape != (out, *size):
        raise ValueError("shapes that would be broadcast")
    first = change + t[f"{path}id_tensor"]
    second = weight("1x1_kxk_conv2")
    both = torch.einsum("gti,gothw->goihw", first.reshape(groups, -1, inputs), second.unflatten(0, (groups, -1)))
    kernels.append(both.flatten(0, 1))
    if word == "orepa":
        kernels.append(F.pad(weight("1x1"), [p for s in reversed(size) for p in (s // 2, s // 2)]))
    depth, point = weight("gconv_dw"), weight("gconv_pw")
    depth = depth.reshape(groups, inputs, -1, *size)
    point = point.reshape(-1, groups, inputs, depth.shape[2])
    kernels.append(torch.einsum("cgthw,ocgt->coghw", depth, point).reshape(origin.shape))
    # RepVGG's form has a last row that nothing reads.
    rows = t[f"{path}vector"][: len(kernels), :, None, None, None]
    whole: Tensor = (rows * torch.stack(kernels)).sum(0)
    return whole


def orepa(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """One convolution, one norm."""
    kernel = orepa_kernel(t, g.groups) if "weight_orepa_origin" in t else orepa_1x1_kernel(t)
    return _norm(t, "bn", _conv(x, kernel, g))


def orepa_1x1_kernel(t: Tensors) -> Tensor:
    """A 1x1 kernel and a product of two, each times its vector."""
    both = torch.einsum("tixy,otxy->oixy", t["weight_or1x1_l2i_conv1"], t["weight_or1x1_l2i_conv2"])
    origin, product = t["vector"][:, :, None, None, None]
    whole: Tensor = origin * t["weight_or1x1_origin"] + product * both
    return whole


def orepa_stem_kernel(t: Tensors) -> Tensor:
    """3x3 kernels of OREPA, correlated one after another: each of the next is laid over the last at every offset."""
    paths: list[str] = sorted({name.partition(".")[0] for name in t if re.match(r"weight\d+\.", name)})
    kernel: Tensor = orepa_kernel(t, 1, f"{paths[0]}.").transpose(0, 1)
    for path in paths[1:]:
        kernel = F.conv2d(kernel, orepa_kernel(t, 1, f"{path}."), padding=2)
    return kernel.transpose(0, 1)


def orepa_stem(t: Tensors, x: Tensor, g: Geometry, options: Mapping[str, Any]) -> Tensor:
    """One convolution with that kernel, one norm."""
    return _norm(t, "bn", _conv(x, orepa_stem_kernel(t), g))
