"""Operators of an ONNX graph that runtimes recognise together and run as one: a fold of a part of them costs time.

Exporters without an operator for them write GELU around ``Erf`` and layer norms around ``Sqrt``. onnxruntime, OpenVINO
and TensorRT fuse each into one kernel, but only if all of its operators are there: their factors are no free gain.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from passes.onnx.constants import Constants

__all__ = ["fused_by_runtimes"]


def fused_by_runtimes(graph: ir.Graph, constants: Constants) -> dict[ir.Node, str]:
    """The operators that are part of such a pattern, and what the whole is called."""
    found: dict[ir.Node, str] = {}
    for node in graph:
        if node.domain:
            continue
        if node.op_type == "Erf":
            found.update(dict.fromkeys(_gelu(node, constants), "a GELU"))
        elif node.op_type == "Sqrt":
            found.update(dict.fromkeys(_norm(node, constants), "a layer norm"))
    return found


def _gelu(erf: ir.Node, constants: Constants) -> Iterator[ir.Node]:
    """``x / sqrt(2) -> Erf -> + 1 -> * x -> * 0.5``; the half may also stand before the product."""
    yield from _scaled(erf.inputs[0], constants)
    for shifted in _readers(erf, ("Add",), constants, scalar=True):
        yield shifted
        for product in _readers(shifted, ("Mul",), constants, scalar=None):
            yield product
            for value in product.inputs:
                yield from _scaled(value, constants)
            yield from _readers(product, ("Mul", "Div"), constants, scalar=None)


def _norm(root: ir.Node, constants: Constants) -> Iterator[ir.Node]:
    """``(x - mean) / sqrt(var + eps) * gamma + beta``; the variance is a mean over what the graph computes."""
    source = root.inputs[0]
    shifted = None if source is None else source.producer()
    if shifted is None or shifted.op_type != "Add" or not _is_mean(shifted):
        return
    for divided in [*_readers(root, ("Div",), constants, scalar=None), *_reciprocals(root, constants)]:
        for scaled in _readers(divided, ("Mul",), constants, scalar=False):
            yield scaled
            yield from _readers(scaled, ("Add",), constants, scalar=False)


def _is_mean(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return any(each is not None and each.op_type == "ReduceMean" for each in producers)


def _reciprocals(root: ir.Node, constants: Constants) -> Iterator[ir.Node]:
    for inverse in _readers(root, ("Reciprocal", "Div"), constants, scalar=None):
        yield from _readers(inverse, ("Mul",), constants, scalar=None)


def _readers(node: ir.Node, kinds: tuple[str, ...], constants: Constants, scalar: bool | None) -> Iterator[ir.Node]:
    """Operators that read the first value of ``node``: with one number beside it, with several, or with anything."""
    for use in node.outputs[0].uses():
        if use.node.op_type in kinds and not use.node.domain:
            numbers = [n for v in use.node.inputs if (n := constants.of(v)) is not None]
            if scalar is None or (bool(numbers) and (numbers[0].size == 1) is scalar):
                yield use.node


def _scaled(value: ir.Value | None, constants: Constants) -> Iterator[ir.Node]:
    """The operator behind a value, if it is a product with one number."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type in ("Mul", "Div") and not node.domain:
        numbers = [n for v in node.inputs if (n := constants.of(v)) is not None]
        if numbers and numbers[0].size == 1:
            yield node
