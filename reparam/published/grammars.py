"""The names that the authors of blocks gave to their tensors, and which of ours they are.

A grammar lists the parts of one block behind the block's path. In a part ``*`` stands for any tensor of a batch norm
and ``{i}`` for a number, which the name on our side repeats. Our names are those of the block that
:func:`reparam.expand` makes; ``norm`` is the batch norm behind a block that has none inside. A block that we have no
declaration of becomes a plain ``weight`` and ``bias`` by formula. What is frozen is checked against the constant that
it has to be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from passes.algebra.geometry import Geometry
from reparam.published import formulas

__all__ = ["BATCH_NORM", "GRAMMARS", "Grammar", "Unit", "normed", "translated"]

Tensors = Mapping[str, Tensor]
Options = Mapping[str, Any]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_TENSOR = f"({'|'.join(BATCH_NORM)})"


@dataclass(frozen=True)
class Unit:
    """A block in a file: its path there, its tensors by the names behind that, and whether it is deployed already."""

    grammar: Grammar
    path: str
    tensors: dict[str, Tensor]
    deployed: bool = False

    def key(self, part: str) -> str:
        """The name of a tensor in the file."""
        return f"{self.path}.{part}" if self.path else part


def _one(t: Tensors) -> int:
    return 1


def _none(t: Tensors) -> dict[str, Any]:
    return {}


def _no_tensors(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    return {}


def _any(t: Tensors) -> bool:
    return True


@dataclass(frozen=True)
class Grammar:
    """How one block is written.

    Args:
        name: what ``--block`` calls it.
        said: what people read.
        block: the block of :func:`reparam.blocks` that it is; empty if it only becomes a kernel and a bias.
        parts: their name and ours, which is empty for what ``convert`` takes or ``constants`` checks.
        main: the part without which it is no block.
        forward: the authors' own computation.
        generic: parts that others have as well; they belong to a block only beside another part.
        deployed: what the folded convolution is called, with ``weight`` and ``bias``, if it has a place of its own.
        groups: of the convolution, as far as the result depends on them.
        options: of our block.
        convert: our tensors that are not just renamed.
        becomes: the block of ours, where that depends on the tensors.
        constants: what frozen tensors have to be, by a pattern for their parts.
        identity: the norm that is the identity branch, where a block has one.
        shape: of the kernel, ``(out, in / groups, *size)``; by default the main part's.
        fits: whether tensors of these names are this block's, or may be where its main part is missing.
    """

    name: str
    said: str
    block: str
    parts: tuple[tuple[str, str], ...]
    main: str
    forward: Callable[[Tensors, Tensor, Geometry, Options], Tensor]
    generic: tuple[str, ...] = ()
    deployed: str = ""
    groups: Callable[[Tensors], int] = _one
    options: Callable[[Tensors], dict[str, Any]] = _none
    convert: Callable[[Tensors, Geometry, Options], dict[str, Tensor]] = _no_tensors
    becomes: Callable[[Tensors], str] | None = None
    constants: Mapping[str, Callable[[Tensors, re.Match[str]], Tensor]] = field(default_factory=dict)
    identity: str = ""
    shape: Callable[[Tensors], tuple[int, ...]] | None = None
    fits: Callable[[Tensors], bool] = _any

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """For a whole key: the parts that only this block has, and all of its parts, behind the block's path."""
        deployed = [f"{self.deployed}.{name}" for name in ("weight", "bias") if self.deployed]
        every = [*(part for part, _ in self.parts), *deployed]
        own = [part for part in every if part not in self.generic]
        whole = (f"(?:(?P<path>.*?)\\.)?(?P<part>{'|'.join(map(_regex, parts))})" for parts in (own, every))
        first, second = map(re.compile, whole)
        return first, second

    @cached_property
    def words(self) -> tuple[str, ...]:
        """How names inside of this block alone begin: what begins like that and is no part is foreign to it."""
        own = (part for part, _ in self.parts if part not in self.generic and "." in part)
        return tuple(sorted({part.partition(".")[0].partition("{")[0] + "." for part in own}))

    def size(self, t: Tensors) -> tuple[int, ...]:
        """Shape of the kernel, ``(out, in / groups, *size)``."""
        return tuple(t[self.main].shape) if self.shape is None else self.shape(t)

    def ours(self, t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
        """The tensors under our names, for our block with these options."""
        return {**translated(self.parts, t), **self.convert(t, g, options)}


def _regex(part: str) -> str:
    escaped = re.sub(r"\\\{\w\\\}", r"(\\d+)", re.escape(part.removesuffix("*")))
    return escaped + (_TENSOR if part.endswith("*") else "")


def translated(parts: tuple[tuple[str, str], ...], t: Tensors) -> dict[str, Tensor]:
    """The tensors that a list of parts renames, under their new names."""
    found = {}
    for part, template in parts:
        numbered = re.sub(r"\{\w\}|\*", "{}", template)
        for name, tensor in t.items() if template else ():
            if match := re.fullmatch(_regex(part), name):
                found[numbered.format(*match.groups())] = tensor
    return found


def normed(*pairs: tuple[str, str, str, str]) -> tuple[tuple[str, str], ...]:
    """Parts of convolutions with their norms: their kernel and norm, our kernel and norm."""
    return tuple(
        part
        for conv, norm, ours, our_norm in pairs
        for part in ((f"{conv}.weight", f"{ours}.weight"), (f"{norm}.*", f"{our_norm}.*"))
    )


# ------------------------------------------------------------------ acb, dbb, repvgg, mobileone, largekernel


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
    return {option: False for option, there in has.items() if not there}


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


_REPVGG = (
    *normed(("rbr_1x1.conv", "rbr_1x1.bn", "point.conv", "point.norm")),
    ("rbr_identity.*", "identity.*"),
)


def _repvgg_options(t: Tensors) -> dict[str, Any]:
    """Blocks after RepVGG's have no identity where there could be one; where there could be none, it is the same."""
    out, inputs = t["rbr_1x1.conv.weight"].shape[:2]
    return {"identity": False} if out == inputs and "rbr_identity.running_mean" not in t else {}


REPVGG = Grammar(
    name="repvgg",
    said="RepVGG block (CVPR 2021)",
    block="repvgg",
    parts=(*normed(("rbr_dense.conv", "rbr_dense.bn", "square.conv", "square.norm")), *_REPVGG),
    main="rbr_dense.conv.weight",
    forward=formulas.repvgg,
    deployed="rbr_reparam",
    groups=_kept_groups("rbr_identity", "rbr_dense.conv.weight"),
    options=_repvgg_options,
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
    """The authors' identity has no factor, and so no tensor."""
    bias = t["conv3x3.bias"]
    return {"identity.scale.weight": torch.ones_like(bias)[:, None, None]} if options.get("identity") else {}


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
)


# ------------------------------------------------------------------ DO-Conv


def _doconv_convert(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    bias = {"bias": t["bias"]} if "bias" in t else {}
    if "D" in t and _doconv_loads(t):
        return {"weight": t["W"], "D": t["D"], **bias}
    kernel = formulas.doconv_kernel(t, g.kernel) if "D" in t else t["W"].reshape(*t["W"].shape[:2], 1, 1)
    return {"weight": kernel, **bias}


def _doconv_loads(t: Tensors) -> bool:
    """Whether the rows of the authors' D belong to the channels that W reads; with groups they are in another order."""
    (out, inputs, _), channels = t["W"].shape, t["D"].shape[0]
    return channels == inputs or (inputs == 1 and out == channels)


def _taps(taps: int) -> tuple[int, ...]:
    """A square kernel of so many taps; of other kernels the file does not say more."""
    side = round(taps**0.5)
    return (side, side) if side * side == taps else (1, taps)


def _depth(taps: int, depth: int) -> dict[str, Any]:
    return {} if depth == taps else {"depth": depth}


DOCONV = Grammar(
    name="doconv",
    said="DO-Conv (IEEE TIP 2022)",
    block="doconv",
    parts=(("W", ""), ("D", ""), ("d_diag", ""), ("D_diag", ""), ("bias", "")),
    main="W",
    forward=formulas.doconv,
    generic=("bias", "D"),
    groups=lambda t: t["D"].shape[0] // t["W"].shape[1] if "D" in t else 1,
    options=lambda t: _depth(t["D"].shape[1], t["W"].shape[2]) if "D" in t else {},
    convert=_doconv_convert,
    becomes=lambda t: "doconv" if "D" in t and _doconv_loads(t) else "",
    constants={"[dD]_diag": lambda t, match: formulas.doconv_identity(t["D"])},
    shape=lambda t: (*t["W"].shape[:2], *(_taps(t["D"].shape[1]) if "D" in t else (1, 1))),
    fits=lambda t: "W" not in t or (t["W"].dim() == 3 and ("D" in t or t["W"].shape[2] == 1)),
)


def _doconv_rows(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    """Ours of TensorFlow's ``kernel (m, in / groups, out)`` and ``D (taps, m, in)``, its rows in our order."""
    kernel = formulas.doconv_last(t)
    D = t["D"].permute(2, 0, 1).unflatten(0, (-1, g.groups)).transpose(0, 1).flatten(0, 1)
    return {"weight": kernel.permute(2, 1, 0), "D": D, **({"bias": t["bias"]} if "bias" in t else {})}


DOCONV_TENSORFLOW = Grammar(
    name="doconv_tensorflow",
    said="DO-Conv as TensorFlow stores it",
    block="doconv",
    parts=(("kernel", ""), ("D", ""), ("bias", "")),
    main="kernel",
    forward=formulas.doconv_channels_last,
    generic=("kernel", "bias"),
    groups=lambda t: t["D"].shape[2] // t["kernel"].shape[1],
    options=lambda t: _depth(*t["D"].shape[:2]),
    convert=_doconv_rows,
    shape=lambda t: (t["kernel"].shape[2], t["kernel"].shape[1], *_taps(t["D"].shape[0])),
    fits=lambda t: "kernel" in t and t["kernel"].dim() == 3,
)
DOCONV_GLUON = Grammar(
    name="doconv_gluon",
    said="DO-Conv as Gluon stores it",
    block="doconv",
    parts=(("weight", ""), ("D", ""), ("bias", "")),
    main="weight",
    forward=formulas.doconv_channels_last,
    generic=("weight", "bias"),
    groups=lambda t: t["D"].shape[2] // t["weight"].shape[1],
    convert=_doconv_rows,
    fits=lambda t: "weight" not in t or t["weight"].dim() == 4,
)


# ------------------------------------------------------------------ OREPA


def _orepa_groups(path: str, word: str) -> Callable[[Tensors], int]:
    first, second = f"{path}weight_{word}_1x1_kxk_idconv1", f"{path}weight_{word}_1x1_kxk_conv2"
    return lambda t: t[first].shape[0] // t[second].shape[1]


def _orepa_convert(t: Tensors, g: Geometry, options: Options) -> dict[str, Tensor]:
    names = ("square", "average", "prior", "sequence", "point", "separable")
    found = {f"{name}.scale.weight": row[:, None, None] for name, row in zip(names, t["vector"], strict=True)}
    first, inputs = t["weight_orepa_1x1_kxk_idconv1"], g.in_channels
    # Twice as wide as the input it is no identity plus a change: the whole kernel counts.
    found["sequence.point.weight"] = first if first.shape[0] == inputs else first + t["id_tensor"]
    found["prior.filters.weight"] = t["weight_orepa_prior"][:, None]
    point = t["weight_orepa_gconv_pw"]  # rows in the order (out / groups, groups); ours are (groups, out / groups)
    found["separable.point.weight"] = point.unflatten(0, (-1, g.groups)).transpose(0, 1).flatten(0, 1)
    return found


def _orepa_options(t: Tensors) -> dict[str, Any]:
    first, second = t["weight_orepa_1x1_kxk_idconv1"], t["weight_orepa_1x1_kxk_conv2"]
    inputs = first.shape[1] * (first.shape[0] // second.shape[1])
    options = {"expansion": t["weight_orepa_gconv_dw"].shape[0] // inputs, "width": first.shape[0] // inputs}
    return {name: value for name, value in options.items() if value != {"expansion": 8, "width": 1}[name]}


def _orepa_parts(word: str, path: str = "") -> tuple[tuple[str, str], ...]:
    names = ["origin", "avg_conv", "avg_avg", "pfir_conv", "prior", "1x1_kxk_idconv1", "1x1_kxk_conv2", "gconv_dw"]
    names += ["gconv_pw", *(["1x1"] if word == "orepa" else [])]
    return tuple((f"{path}{name}", "") for name in (*(f"weight_{word}_{n}" for n in names), "vector", "id_tensor"))


_RENAMED = {
    "weight_orepa_origin": "square.conv.weight",
    "weight_orepa_avg_conv": "average.point.weight",
    "weight_orepa_pfir_conv": "prior.point.weight",
    "weight_orepa_1x1_kxk_conv2": "sequence.square.weight",
    "weight_orepa_1x1": "point.conv.weight",
    "weight_orepa_gconv_dw": "separable.depth.weight",
}


def _orepa_mean(t: Tensors, match: re.Match[str]) -> Tensor:
    window = t[f"{match[1]}_origin"][0, 0]
    return torch.full_like(window, 1 / window.numel())


def _orepa_identity(t: Tensors, match: re.Match[str]) -> Tensor:
    path = match[1] or ""
    words = [word for word in ("orepa", "rbr") if f"{path}weight_{word}_1x1_kxk_idconv1" in t]
    return formulas.frozen_identity(t[f"{path}weight_{(*words, 'orepa')[0]}_1x1_kxk_idconv1"])


_OREPA_CONSTANTS = {r"(.*weight_\w+)_avg_avg": _orepa_mean, r"(.*\.)?id_tensor": _orepa_identity}


OREPA = Grammar(
    name="orepa",
    said="OREPA (CVPR 2022)",
    block="orepa",
    parts=(*((theirs, _RENAMED.get(theirs, "")) for theirs, _ in _orepa_parts("orepa")), ("bn.*", "norm.*")),
    main="weight_orepa_origin",
    forward=formulas.orepa,
    generic=("vector", "id_tensor", "bn.*"),
    deployed="orepa_reparam",
    groups=_orepa_groups("", "orepa"),
    options=_orepa_options,
    convert=_orepa_convert,
    constants=_OREPA_CONSTANTS,
)
OREPA_1X1 = Grammar(
    name="orepa_1x1",
    said="OREPA's 1x1, by formula",
    block="",
    parts=(
        *((f"weight_or1x1_{name}", "") for name in ("origin", "l2i_conv1", "l2i_conv2")),
        ("vector", ""),
        ("bn.*", "norm.*"),
    ),
    main="weight_or1x1_origin",
    forward=formulas.orepa,
    generic=("vector", "bn.*"),
    deployed="or1x1_reparam",
    convert=lambda t, g, options: {"weight": formulas.orepa_1x1_kernel(t)},
)


def _stem_shape(t: Tensors) -> tuple[int, ...]:
    kernels = sorted(name for name in t if name.endswith(".weight_orepa_origin"))
    side = 2 * len(kernels) + 1
    return t[kernels[-1]].shape[0], t[kernels[0]].shape[1], side, side


OREPA_STEM = Grammar(
    name="orepa_stem",
    said="OREPA's large kernel, by formula",
    block="",
    parts=(*_orepa_parts("orepa", "weight{i}."), ("bn.*", "norm.*")),
    main="weight0.weight_orepa_origin",
    forward=formulas.orepa_stem,
    generic=("bn.*",),
    deployed="or_large_reparam",
    convert=lambda t, g, options: {"weight": formulas.orepa_stem_kernel(t)},
    constants=_OREPA_CONSTANTS,
    shape=_stem_shape,
)
OREPA_REPVGG = Grammar(
    name="orepa_repvgg",
    said="RepVGG block with OREPA's kernel, which is folded",
    block="repvgg",
    parts=(*_orepa_parts("rbr", "rbr_dense."), ("rbr_dense.bn.*", "square.norm.*"), *_REPVGG),
    main="rbr_dense.weight_rbr_origin",
    forward=formulas.orepa_repvgg,
    generic=("rbr_dense.bn.*", *(part for part, _ in _REPVGG), "rbr_dense.vector", "rbr_dense.id_tensor"),
    groups=_orepa_groups("rbr_dense.", "rbr"),
    options=_repvgg_options,
    convert=lambda t, g, options: {"square.conv.weight": formulas.orepa_kernel(t, g.groups, "rbr_dense.", "rbr")},
    constants=_OREPA_CONSTANTS,
    identity="rbr_identity",
)

GRAMMARS = (
    ACB, DBB, OREPA_STEM, OREPA_REPVGG, OREPA, OREPA_1X1, REPVGG_NORMED, REPVGG, MOBILEONE, UNIREPLKNET, ECB, DOCONV,
    DOCONV_TENSORFLOW, DOCONV_GLUON,
)  # fmt: skip
"""In the order in which they claim tensors: a block that has another inside comes first."""
