"""Which ``Resize`` of ONNX is torch's: whole factors, where both agree on what each pixel is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from passes.onnx.pads import attribute

__all__ = ["interpolation"]

_SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}
_CENTRED = ("half_pixel", "pytorch_half_pixel")


def interpolation(
    node: ir.Node, opset: int, scales: Sequence[float] | None, sizes: Sequence[int] | None, given: Sequence[int | None]
) -> tuple[list[float], str, bool | None] | None:
    """Factors, mode and ``align_corners`` for ``torch.nn.functional.interpolate``; None where there are none.

    Args:
        node: a ``Resize``, or an ``Upsample``, whose only rule is that of operator set 10.
        opset: of the standard operators.
        scales: factors, where those are said.
        sizes: of its output, where those are said.
        given: sizes of the input.
    """
    rank = len(given)
    axes = [axis % rank for axis in attribute(node, "axes", range(rank))]
    if any(attribute(node, name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    if not scales and sizes:
        known = [given[axis] for axis in axes]
        if any(not size for size in known):
            return None
        scales = [wanted / (size or 1) for wanted, size in zip(sizes, known, strict=True)]
    factors = [1.0] * rank
    for axis, scale in zip(axes, scales or (), strict=True):
        factors[axis] = float(scale)
    if rank - 2 not in _SMOOTH or factors[:2] != [1, 1] or any(f < 1 or f != int(f) for f in factors):
        return None
    old = node.op_type == "Upsample" or opset < 11
    mode = attribute(node, "mode", "nearest")
    centre = "asymmetric" if old else attribute(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        rounds = "floor" if old else attribute(node, "nearest_mode", "round_prefer_floor")
        # A centre never lies half-way between two pixels, and always in the pixel that it is a part of.
        same = rounds == "floor" if centre == "asymmetric" else centre in _CENTRED and rounds.startswith("round")
        return (factors[2:], "nearest", None) if same else None
    smooth = mode == "linear" and centre in (*_CENTRED, "align_corners")
    return (factors[2:], _SMOOTH[rank - 2], centre == "align_corners") if smooth else None


_PLAIN: dict[str, Any] = {"antialias": 0, "keep_aspect_ratio_policy": "stretch"}
