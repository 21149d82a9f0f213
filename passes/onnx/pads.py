"""What operators of ONNX pad with: numbers, or a rule that makes them of the input's size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir

from passes.algebra.by_rule import Rule
from passes.onnx.constants import Constants

__all__ = ["attribute", "pads_of", "rule_of", "transposed_pads", "transposed_rule", "with_pads"]

_SAME = ("SAME_UPPER", "SAME_LOWER")
Pads = tuple[list[int], list[int]]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def pads_of(node: ir.Node, constants: Constants, kernel: Sequence[int]) -> list[int] | None:
    """Leading, then trailing pads of each dimension; None where they depend on a size that the file leaves open."""
    n = len(kernel)
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto not in _SAME:
        return list(attribute(node, "pads", [0] * 2 * n)) if auto == "NOTSET" else [0] * 2 * n
    strides, rule = attribute(node, "strides", [1] * n), rule_of(node, kernel)
    if all(stride == 1 for stride in strides):  # whatever the size
        lead, trail = rule([1] * n)
        return [*lead, *trail]
    sizes = (constants.shape(node.inputs[0]) or [])[2:]  # type: ignore[arg-type]
    known = [size for size in sizes if size is not None]
    if not constants.fixed or len(known) != n:
        return None
    lead, trail = rule(known)
    return [*lead, *trail]


def rule_of(node: ir.Node, kernel: Sequence[int]) -> Rule:
    """How an operator with ``auto_pad`` pads."""
    strides, dilations = (attribute(node, name, [1] * len(kernel)) for name in ("strides", "dilations"))
    reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    return partial(_same, attribute(node, "auto_pad") == "SAME_UPPER", tuple(reach), tuple(strides))


def _same(upper: bool, reach: Sequence[int], strides: Sequence[int], sizes: Sequence[int]) -> Pads:
    """As many outputs as strides fit into the input."""
    each = zip(reach, sizes, strides, strict=True)
    return _halves(upper, [max(r - (size - 1) % stride, 0) for r, size, stride in each])


def _halves(upper: bool, total: Sequence[int]) -> Pads:
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if upper else (more, less)


def with_pads(node: ir.Node, constants: Constants) -> onnx.NodeProto:
    """An operator with the pads that it has at the sizes of the file, where those decide about them."""
    proto = ir.to_proto(node)
    if node.domain or node.op_type not in ("Conv", "AveragePool") or "strides" not in node.attributes:
        return proto
    if attribute(node, "auto_pad", "NOTSET") in _SAME:
        weight = None if node.op_type == "AveragePool" else constants.shape(node.inputs[1])  # type: ignore[arg-type]
        pads = pads_of(node, constants, weight[2:] if weight else attribute(node, "kernel_shape"))  # type: ignore[arg-type]
        if pads is not None:
            kept = [each for each in proto.attribute if each.name != "auto_pad"]
            del proto.attribute[:]
            proto.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads)])
    return proto


# ------------------------------------------------------------------ transposed convolutions


def transposed_rule(node: ir.Node, kernel: Sequence[int]) -> Rule:
    """How much of its whole output a transposed convolution leaves out on each side."""
    n = len(kernel)
    options = {
        "strides": attribute(node, "strides", [1] * n), "dilations": attribute(node, "dilations", [1] * n),
        "output_padding": attribute(node, "output_padding", [0] * n), "pads": attribute(node, "pads"),
        "auto_pad": attribute(node, "auto_pad", "NOTSET"), "output_shape": attribute(node, "output_shape"),
    }  # fmt: skip
    return partial(
        transposed_pads, tuple(kernel), {k: v if isinstance(v, str | None) else [*v] for k, v in options.items()}
    )


def transposed_pads(kernel: Sequence[int], options: dict[str, Any], sizes: Sequence[int]) -> Pads:
    """Its ``pads``, or those that give the ``output_shape``; ``auto_pad`` wants the input's size times the stride."""
    n, auto, wanted = len(kernel), options["auto_pad"], options["output_shape"]
    if not wanted and auto not in _SAME:
        pads = (options["pads"] if auto == "NOTSET" else None) or [0] * 2 * n
        return pads[:n], pads[n:]
    strides, steps, more = options["strides"], options["dilations"], options["output_padding"]
    wanted = wanted[-n:] if wanted else [size * stride for size, stride in zip(sizes, strides, strict=True)]
    whole = [strides[i] * (sizes[i] - 1) + more[i] + steps[i] * (kernel[i] - 1) + 1 for i in range(n)]
    return _halves(auto == "SAME_UPPER", [max(w - out, 0) for w, out in zip(whole, wanted, strict=True)])
