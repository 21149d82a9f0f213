"""The grammars of blocks whose kernel is computed: DO-Conv in three layouts, OREPA in four forms."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passes.algebra.geometry import Geometry
from reparam.disk import FileError
from reparam.published import formulas
from reparam.published.grammar import Grammar, Options, Tensors
from reparam.published.sums import BESIDE_REPVGG, repvgg_options

__all__ = ["DOCONV", "DOCONV_GLUON", "DOCONV_TENSORFLOW", "OREPA", "OREPA_1X1", "OREPA_REPVGG", "OREPA_STEM"]


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
    """A square kernel of so many taps; of others the file does not say which: :class:`FileError`."""
    side = round(taps**0.5)
    if side * side != taps:
        raise FileError(
            f"its D is of {taps} taps, which is no square kernel, and the file does not say of what shape: a network "
            "does (--like), if its layer there has as many"
        )
    return side, side


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
    taps=lambda t: (t["W"].shape[0], t["W"].shape[1], t["D"].shape[1] if "D" in t else 1),
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
    taps=lambda t: (t["kernel"].shape[2], t["kernel"].shape[1], t["D"].shape[0]),
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
    parts=(*_orepa_parts("rbr", "rbr_dense."), ("rbr_dense.bn.*", "square.norm.*"), *BESIDE_REPVGG),
    main="rbr_dense.weight_rbr_origin",
    forward=formulas.orepa_repvgg,
    generic=("rbr_dense.bn.*", *(part for part, _ in BESIDE_REPVGG), "rbr_dense.vector", "rbr_dense.id_tensor"),
    groups=_orepa_groups("rbr_dense.", "rbr"),
    options=repvgg_options,
    convert=lambda t, g, options: {"square.conv.weight": formulas.orepa_kernel(t, g.groups, "rbr_dense.", "rbr")},
    constants=_OREPA_CONSTANTS,
    identity="rbr_identity",
)
