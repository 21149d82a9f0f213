"""Values that an ONNX graph always has: initialisers, constants, and what a few operators make of those.

Exporters write sizes, bounds, biases of zeros and casts of weights as operators; runtimes compute them once, when they
load the file. So does this, operator by operator, by onnx's reference evaluator, when a value is asked for. The shape
of a value is a constant where it is fixed; a cast to the kind of another value needs that kind only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

__all__ = ["Constants", "constant_of", "opset_of"]

LARGEST = 1 << 24
"""Numbers that one operator may make of constants; what makes more stays an operator."""
MOST = 1 << 27
"""Numbers that all of them may make together."""
_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Equal", "Less", "Greater", "And", "Or", "Mod")
)
_SHRINKING = frozenset(
    (
        *("Cast", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Floor", "Ceil", "Not", "Identity", "Concat", "Slice"),
        *("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Split", "ReduceProd", "ReduceSum", "ReduceMax"),
        *("ReduceMin", "Size"),
    )
)
_GROWING = frozenset(("Expand", "ConstantOfShape", "Tile", "Range", "Gather", "MatMul", "Einsum"))
_COMPUTED = _ELEMENTWISE | _SHRINKING | _GROWING
"""Operators that give the same numbers for the same numbers, and how many is known before. ``DequantizeLinear`` is none
of them: its numbers are kept small on purpose."""


def opset_of(imports: Mapping[str, int], default: int = 1) -> int:
    """The standard operator set that is imported, under either of its names."""
    return imports.get("", imports.get("ai.onnx", default))


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that is written down for a value: an initialiser, or what a ``Constant`` gives."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type != "Constant" or node.domain:
        return None
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.int64))
    return None


class Constants:
    """The constants of one graph.

    Args:
        graph: in topological order.
        opset: of the standard operators.
        shapes: values with shapes by name, where more is known than the graph says.
        overridable: whether initialisers that are inputs as well may be replaced by a caller.
    """

    def __init__(self, graph: ir.Graph, opset: int, shapes: Mapping[str, ir.Value], *, overridable: bool) -> None:
        self.opset, self.shapes, self.overridable = opset, shapes, overridable
        inputs = [value.shape for value in graph.inputs if not value.is_initializer()]
        self.fixed = all(shape is not None and all(isinstance(size, int) for size in shape[1:]) for shape in inputs)
        """Whether all sizes are, but for the batch's."""
        self._computed: dict[ir.Value, ir.Node] = {}
        self._known: dict[ir.Value, ir.TensorProtocol | None] = {}
        self._left = MOST
        for node in graph:
            if self._is_constant(node):
                self._computed.update(dict.fromkeys(node.outputs, node))

    def of(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor that a value always is; None if it has none, or none that is worth computing."""
        written = constant_of(value)
        if written is not None or value is None or value not in self._computed:
            return written
        todo = [value]
        while todo:
            node = self._computed[todo[-1]]
            first = [each for each in self._read(node) if each in self._computed and each not in self._known]
            todo += first
            if not first:
                done = todo.pop()
                if done not in self._known:
                    self._known |= {**dict.fromkeys(node.outputs), **self._evaluated(node)}
        return self._known[value]

    def shape(self, value: ir.Value) -> list[int | None] | None:
        """Sizes of a value, where they are known and fixed."""
        number = self.of(value)
        shape = self.shapes.get(str(value.name), value).shape if number is None else number.shape
        return None if shape is None else [size if isinstance(size, int) and size >= 0 else None for size in shape]

    def _is_constant(self, node: ir.Node) -> bool:
        if node.domain or (self.overridable and any(v is not None and v.is_graph_input() for v in self._read(node))):
            return False
        if node.op_type == "Shape":
            return node.inputs[0] is not None and self._sizes(node) is not None
        if node.op_type == "CastLike":
            like = node.inputs[1]
            if like is None or self.shapes.get(str(like.name), like).dtype is None:
                return False
        elif node.op_type not in _COMPUTED:
            return False
        read = self._read(node)
        return bool(read) and all(constant_of(v) is not None or v in self._computed for v in read)

    def _read(self, node: ir.Node) -> list[ir.Value]:
        """The values whose numbers an operator needs."""
        if node.op_type == "Shape":
            return []
        inputs = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
        return [value for value in inputs if value is not None]

    def _sizes(self, node: ir.Node) -> list[int] | None:
        """What ``Shape`` gives, if that is fixed."""
        value = node.inputs[0]
        assert value is not None
        number = constant_of(value)
        shape = self.shapes.get(str(value.name), value).shape if number is None else number.shape
        if shape is None:
            return None
        start, end = (node.attributes[k].value if k in node.attributes else None for k in ("start", "end"))
        sizes = [size if isinstance(size, int) and size >= 0 else None for size in shape][start:end]
        return None if None in sizes else [int(size or 0) for size in sizes]

    def _evaluated(self, node: ir.Node) -> dict[ir.Value, ir.TensorProtocol]:
        """What the operator gives, by its outputs; nothing where that cannot be computed, or is too much."""
        if node.op_type == "Shape":
            return {node.outputs[0]: ir.tensor(np.array(self._sizes(node), dtype=np.int64))}
        read = {str(value.name): self.of(value) for value in self._read(node)}
        numbers = {name: number.numpy() for name, number in read.items() if number is not None}
        if len(numbers) < len(read):
            return {}
        try:
            size = _size(node, [numbers[str(value.name)] for value in self._read(node)])
            if size > min(LARGEST, self._left):
                return {}
            self._left -= size
            return dict(zip(node.outputs, self._run(node, numbers), strict=True))
        # The evaluator fails in many ways on what it does not know; then the operator stays one.
        except Exception:
            return {}

    def _run(self, node: ir.Node, numbers: dict[str, Any]) -> list[ir.TensorProtocol]:
        proto = ir.to_proto(node)
        if node.op_type == "CastLike":
            like = node.inputs[1]
            assert like is not None
            dtype = self.shapes.get(str(like.name), like).dtype
            proto = onnx.helper.make_node("Cast", [proto.input[0]], list(proto.output), to=int(dtype or 0))
        outputs = [onnx.helper.make_value_info(str(v.name), onnx.TypeProto()) for v in node.outputs]
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()]
        graph = onnx.helper.make_graph([proto], "constants", [], outputs, tensors)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)])
        found: Any = ReferenceEvaluator(model).run(None, {})
        return [ir.tensor(np.asarray(each), name=str(v.name)) for v, each in zip(node.outputs, found, strict=True)]


def _size(node: ir.Node, arrays: list[Any]) -> int:
    """How many numbers an operator will make of these, at most."""
    kind, first = node.op_type, arrays[0]
    if kind in ("Expand", "ConstantOfShape"):
        target = tuple(int(size) for size in arrays[-1])
        return math.prod(np.broadcast_shapes(first.shape, target) if kind == "Expand" else target)
    if kind == "Tile":
        return int(first.size * math.prod(int(times) for times in arrays[1]))
    if kind == "Range":
        start, limit, step = (float(array) for array in arrays)
        return max(math.ceil((limit - start) / step), 0)
    if kind == "Gather":
        return int(first.size * arrays[1].size)
    if kind == "MatMul":
        second = arrays[1]
        rows, columns = first.shape[-2] if first.ndim > 1 else 1, second.shape[-1] if second.ndim > 1 else 1
        return rows * columns * math.prod(np.broadcast_shapes(first.shape[:-2], second.shape[:-2]))
    if kind == "Einsum":  # every letter once, for what it makes on the way
        letters = str(node.attributes["equation"].value).partition("->")[0].replace(" ", "").split(",")
        return math.prod(
            {k: n for name, a in zip(letters, arrays, strict=True) for k, n in zip(name, a.shape, strict=True)}.values()
        )
    if kind in _ELEMENTWISE:
        return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))
    return sum(array.size for array in arrays)
