"""The grammars of blocks that are sums of branches: ACNet, DBB, RepVGG, MobileOne, UniRepLKNet, ECB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passes.algebra.geometry import Geometry
from reparam.published import formulas
from reparam.published.grammar import Grammar, Options, Tensors, normed

__all__ = [
    "ACB",
    "BESIDE_REPVGG",
    "DBB",
    "ECB",
    "MOBILEONE",
    "REPVGG",
    "REPVGG_NORMED",
    "UNIREPLKNET",
    "repvgg_options",
]


def _acb_options(t: Tensors) -> dict[str, Any]:
    line, size = t["ver_conv.weight"].shape[2], t["square_conv.weight"].shape[2]
    return {} if line == size else {"line": line}


ACB = Grammar(
    name="acb",
    said="Asymmetric Convolution Block (ACNet, ICCV 2019)",
    block="acb",
    parts=(
        *normed(
            ("square_conv", "square_bn", "square.conv", "square.norm"),
            ("ver_conv", "ver_bn", "line0.conv", "line0.norm"),
            ("hor_conv", "hor_bn", "line1.conv", "line1.norm"),
        ),
        ("last_bn.*", "norm.*"),
    ),
    main="square_conv.weight",
    forward=formulas.acb,
    generic=("last_bn.*",),
    deployed="fused_conv",
    options=_acb_options,
)


def _dbb_groups(t: Tensors) -> int:
    for point in ("idconv1", "conv1"):
        if (first := t.get(f"dbb_1x1_kxk.{point}.weight")) is not None and "dbb_1x1_kxk.conv2.weight" in t:
            return first.shape[0] // t["dbb_1x1_kxk.conv2.weight"].shape[1]
    origin = t["dbb_origin.conv.weight"]
    depthwise = origin.shape[1] == 1 and "dbb_1x1.conv.weight" not in t
    return origin.shape[0] if depthwise else 1


def _dbb_options(t: Tensors) -> dict[str, Any]:
    depthwise = _dbb_groups(t) == t["dbb_origin.conv.weight"].shape[0]
    words = {name.partition(".")[0] for name in t}
    has = {
        "pointwise": "dbb_1x1" in words or depthwise,
        "average": "dbb_avg" in words,
        "sequence": "dbb_1x1_kxk" in words,
    }
    options: dict[str, Any] = {option: False for option, there in has.items() if not there}
    if (second := t.get("dbb_1x1_kxk.conv2.weight")) is not None:
        inputs = t["dbb_origin.conv.weight"].shape[1] * _dbb_groups(t)
        width = second.shape[1] * _dbb_groups(t) / inputs
        options |= {"width": width} if width != (2 if depthwise else 1) else {}
    return options


DBB = Grammar(
    name="dbb",
    said="Diverse Branch Block (CVPR 2021)",
    block="dbb",
    parts=(
        *normed(
            ("dbb_origin.conv", "dbb_origin.bn", "square.conv", "square.norm"),
            ("dbb_1x1.conv", "dbb_1x1.bn", "point.conv", "point.norm"),
            ("dbb_avg.conv", "dbb_avg.bn.bn", "average.point", "average.norm"),
            ("dbb_1x1_kxk.conv2", "dbb_1x1_kxk.bn2", "sequence.square", "sequence.last_norm"),
        ),
        ("dbb_avg.avgbn.*", "average.last_norm.*"),
        ("dbb_1x1_kxk.idconv1.weight", "sequence.point.weight"),
        ("dbb_1x1_kxk.conv1.weight", "sequence.point.weight"),
        ("dbb_1x1_kxk.bn1.bn.*", "sequence.norm.*"),
    ),
    main="dbb_origin.conv.weight",
    forward=formulas.dbb,
    deployed="dbb_reparam",
    groups=_dbb_groups,
    options=_dbb_options,
)


def _kept_groups(identity: str, main: str) -> Callable[[Tensors], int]:
    """Of a block with an identity branch, which has as many channels as it gives; else they do not matter."""
    return lambda t: t[main].shape[0] // t[main].shape[1] if f"{identity}.running_mean" in t else 1


BESIDE_REPVGG = (
    *normed(("rbr_1x1.conv", "rbr_1x1.bn", "point.conv", "point.norm")),
    ("rbr_identity.*", "identity.*"),
)


def repvgg_options(t: Tensors) -> dict[str, Any]:
    """Blocks after RepVGG's have no identity where there could be one; where there could be none, it is the same."""
    out, inputs = t["rbr_1x1.conv.weight"].shape[:2]
    return {"identity": False} if out == inputs and "rbr_identity.running_mean" not in t else {}


REPVGG = Grammar(
    name="repvgg",
    said="RepVGG block (CVPR 2021)",
    block="repvgg",
    parts=(*normed(("rbr_dense.conv", "rbr_dense.bn", "square.conv", "square.norm")), *BESIDE_REPVGG),
    main="rbr_dense.conv.weight",
    forward=formulas.repvgg,
    deployed="rbr_reparam",
    groups=_kept_groups("rbr_identity", "rbr_dense.conv.weight"),
    options=repvgg_options,
    identity="rbr_identity",
)
REPVGG_NORMED = Grammar(
    name="repvgg_normed",
    said="RepVGG block, deployed, with a batch norm put behind it",
    block="",
    parts=(("rbr_reparam.conv.weight", "weight"), ("rbr_reparam.bn.*", "norm.*")),
    main="rbr_reparam.conv.weight",
    forward=formulas.normed,
)

MOBILEONE = Grammar(
    name="mobileone",
    said="MobileOne block (CVPR 2023)",
    block="mobileone",
    parts=(
        *normed(
            ("rbr_conv.{i}.conv", "rbr_conv.{i}.bn", "conv{i}.conv", "conv{i}.norm"),
            ("rbr_scale.conv", "rbr_scale.bn", "point.conv", "point.norm"),
        ),
        ("rbr_skip.*", "identity.*"),
    ),
    main="rbr_conv.0.conv.weight",
    forward=formulas.mobileone,
    deployed="reparam_conv",
    groups=_kept_groups("rbr_skip", "rbr_conv.0.conv.weight"),
    identity="rbr_skip",
    options=lambda t: {"n": sum(name.startswith("rbr_conv.") and name.endswith(".conv.weight") for name in t)},
)

UNIREPLKNET = Grammar(
    name="largekernel",
    said="dilated re-parameterised large kernel (UniRepLKNet, CVPR 2024)",
    block="largekernel",
    parts=normed(
        ("lk_origin", "origin_bn", "large.conv", "large.norm"),
        ("dil_conv_k{k}_{r}", "dil_bn_k{k}_{r}", "k{k}d{r}.conv", "k{k}d{r}.norm"),
    ),
    main="lk_origin.weight",
    forward=formulas.largekernel,
    generic=(),
    deployed="lk_origin",
    groups=lambda t: t["lk_origin.weight"].shape[0],
)

# ------------------------------------------------------------------ ecb

_EDGES = (("sbx", "sobel_x"), ("sby", "sobel_y"), ("lpl", "laplacian"))


def _ecb_options(t: Tensors) -> dict[str, Any]:
    middle, out = t["conv1x1_3x3.k0"].shape[0], t["conv3x3.weight"].shape[0]
    return {"multiplier": middle / out}


def _ecb_convert(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    """The authors' identity has no factor, and so no tensor; it is there where the block keeps its channels."""
    has = options.get("identity") and g.in_channels == g.out_channels
    return {"identity.scale.weight": torch.ones_like(t["conv3x3.bias"])[:, None, None]} if has else {}


ECB = Grammar(
    name="ecb",
    said="edge-oriented convolution block (ECBSR, ACM MM 2021)",
    block="ecb",
    parts=(
        ("conv3x3.weight", "square.weight"),
        ("conv3x3.bias", "square.bias"),
        ("conv1x1_3x3.k0", "sequence.point.weight"),
        ("conv1x1_3x3.b0", "sequence.point.bias"),
        ("conv1x1_3x3.k1", "sequence.square.weight"),
        ("conv1x1_3x3.b1", "sequence.square.bias"),
        *(
            part
            for theirs, ours in _EDGES
            for part in (
                (f"conv1x1_{theirs}.k0", f"{ours}.point.weight"),
                (f"conv1x1_{theirs}.b0", f"{ours}.point.bias"),
                (f"conv1x1_{theirs}.scale", f"{ours}.edge.scale"),
                (f"conv1x1_{theirs}.bias", f"{ours}.edge.bias"),
                (f"conv1x1_{theirs}.mask", f"{ours}.edge.filter"),
            )
        ),
    ),
    main="conv3x3.weight",
    forward=formulas.ecb,
    generic=("conv3x3.weight", "conv3x3.bias"),
    options=_ecb_options,
    convert=_ecb_convert,
    unsaid="identity",
)
