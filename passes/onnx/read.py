"""ONNX graphs in the terms of the table of operations.

Each operator whose meaning the laws know becomes the torch function that they are written for, with its options as they
are in the operator set that the file names; all others become calls of which only that is known that they have no
effect. Weights are initialisers and constants. What a region computes is never taken from here: its proof replays the
operators of the file.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.algebra.by_rule import BY_RULE, ConvByRule, Rule
from passes.graph.aten import CONVS, TRANSPOSED
from passes.graph.opset import pure
from passes.graph.shapes import Known
from passes.onnx.constants import Constants
from passes.onnx.pads import attribute as _attribute
from passes.onnx.pads import pads_of, rule_of, transposed_rule
from passes.onnx.resize import interpolation
from passes.refusal import Reason, Refusal

__all__ = ["Read", "inner_values", "read", "tensor_of"]

POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
}


_ANY = frozenset((*DTYPES, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16))


@dataclass
class Read:
    """A graph in the terms of the table.

    Args:
        graph: inputs are placeholders, weights ``get_attr`` nodes.
        names: of the value that each node gives; weights have none.
        numbers: weights by name.
        told: how a person finds each node.
        unread: operators that are not read, by name.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    names: dict[fx.Node, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    told: dict[fx.Node, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)


def read(graph: ir.Graph, constants: Constants) -> Read:
    """Read a graph, which is not changed."""
    return _Reader(constants).graph(graph)


def tensor_of(number: ir.TensorProtocol, *, anything: bool = False) -> Tensor | None:
    """The numbers as a tensor of torch; None for kinds that no weight has, or with ``anything``, that torch has not."""
    if number.dtype not in (_ANY if anything else DTYPES):
        return None
    array = np.ascontiguousarray(number.numpy())
    if number.dtype is ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16).astype(np.int32)).to(torch.int16).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy()).reshape(tuple(array.shape))


def inner_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values from outside that the graphs inside of an operator read: the branches of If, the body of Loop."""
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type is ir.AttributeType.GRAPH else attribute.value
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        for graph in graphs:
            own = {*graph.inputs, *graph.initializers.values()} | {v for inner in graph for v in inner.outputs}
            read_inside = [v for inner in graph for v in [*inner.inputs, *inner_values(inner)]]
            yield from (v for v in [*read_inside, *graph.outputs] if v is not None and v not in own)


class _Unread(Exception):
    """An operator with options that the laws do not know; says which."""


class _Reader:
    def __init__(self, constants: Constants) -> None:
        self.constants, self.opset, self.shape = constants, constants.opset, constants.shape
        self.read = Read()
        self.new: dict[ir.Value, fx.Node] = {}
        self.out = self.read.graph

    def graph(self, graph: ir.Graph) -> Read:
        for value in graph.inputs:
            if self.constants.overridable or not value.is_initializer():
                self._enter(value, self.out.placeholder(f"input_{len(self.new)}"))
        for node in graph:
            self._node(node)
        outputs = [self.value(value) for value in graph.outputs]
        self.out.output(tuple(outputs))
        return self.read

    def _node(self, node: ir.Node) -> None:
        if all(self.constants.of(value) is not None for value in node.outputs):
            return
        inner = list(inner_values(node))
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        rule = _RULES.get(node.op_type) if not node.domain and not inner else None
        try:
            if rule is None or used != list(node.outputs[: len(used)]):
                raise _Unread("")
            if len(used) > 1 and node.op_type not in _SEVERAL:  # the mask of a dropout
                raise _Unread("another of its results is used")
            made = rule(self, node)
        except (_Unread, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            made = self.call(pure, [self.value(v) for v in [*node.inputs, *inner] if v is not None])
            self._say(node, made, error)
            results = (
                [made]
                if len(node.outputs) == 1
                else [self.call(operator.getitem, made, i) for i in range(len(node.outputs))]
            )
        else:
            results = made if isinstance(made, list) else [made]
        for value, result in zip(node.outputs, results, strict=False):
            self._enter(value, result, node)

    def _say(self, node: ir.Node, made: fx.Node, why: Exception) -> None:
        """Why an operator is not read; a layer with weights is told of, and others where a norm stands behind them."""
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        layer = not node.domain and node.op_type in _LAYERS
        if node.domain or node.op_type not in KNOWN or layer:
            self.read.unread[kind] += 1
        elif node.op_type not in _RULES:
            return
        said = str(why) if isinstance(why, _Unread) else "an option is not understood"
        reason = Reason.ATTRIBUTE if layer else Reason.NOT_AFFINE
        made.meta["refusal"] = Refusal(reason, f"this {kind} is not read{f': {said}' if said else ''}")

    def _enter(self, value: ir.Value, node: fx.Node, made: ir.Node | None = None) -> None:
        self.new[value] = node
        self.read.names[node] = str(value.name)
        self.read.told[node] = str(value.name) if made is None or not made.name else f"{made.name}"
        node.meta["known"] = self.known(value)

    # -------------------------------------------------------------- what is asked of values

    def value(self, value: ir.Value) -> fx.Node:
        """The node of a value; weights get theirs where they are read first."""
        if value not in self.new:
            number, name = self.constants.of(value), str(value.name)
            tensor = None if number is None else tensor_of(number)
            if tensor is not None and tensor.is_floating_point():
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.read.numbers[name] = tensor
            self.new[value] = self.out.get_attr(name)
            if tensor is not None:
                self.new[value].meta["known"] = Known(tensor.dim(), None, tensor.dtype)
        return self.new[value]

    def known(self, value: ir.Value) -> Known | None:
        shape, dtype = self.shape(value), self.constants.shapes.get(str(value.name), value).dtype
        if shape is None:
            return None
        channels = shape[1] if len(shape) > 1 and isinstance(shape[1], int) else None
        return Known(len(shape), channels, None if dtype is None else DTYPES.get(dtype))

    def rank(self, value: ir.Value) -> int:
        shape = self.shape(value)
        if shape is None:
            raise _Unread(f"the number of dimensions of {value.name} is not known")
        return len(shape)

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The integers that an input always is; None if it is left out."""
        if value is None:
            return None
        number = self.constants.of(value)
        if number is None:
            raise _Unread(f"{value.name} is no constant")
        return [int(i) for i in np.atleast_1d(number.numpy())]

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.out.call_function(function, args)

    def arguments(self, node: ir.Node) -> list[fx.Node | None]:
        return [None if value is None else self.value(value) for value in node.inputs]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


# ------------------------------------------------------------------ operators


def _conv(reader: _Reader, node: ir.Node) -> fx.Node:
    x, weight, *bias = reader.arguments(node)
    kernel = _kernel(reader, node)
    n = len(kernel)
    pads, group = pads_of(node, reader.constants, kernel), _attribute(node, "group", 1)
    if pads is None:
        return _by_rule(reader, node, rule_of(node, kernel))
    strides, dilations = (list(_attribute(node, name, [1] * n)) for name in ("strides", "dilations"))
    paired = tuple(zip(pads[:n], pads[n:], strict=True))
    return reader.call(CONVS[n], x, weight, bias[0] if bias else None, strides, paired, dilations, group)


def _conv_transpose(reader: _Reader, node: ir.Node) -> fx.Node:
    x, weight, *bias = reader.arguments(node)
    kernel = _kernel(reader, node)
    n = len(kernel)
    strides, dilations = (list(_attribute(node, name, [1] * n)) for name in ("strides", "dilations"))
    pads, more = list(_attribute(node, "pads", [0] * 2 * n)), list(_attribute(node, "output_padding", [0] * n))
    auto = _attribute(node, "auto_pad", "NOTSET")
    pads = pads if auto == "NOTSET" else [0] * 2 * n
    many = any(m >= max(s, d) for m, s, d in zip(more, strides, dilations, strict=True))  # torch has no such layer
    if (
        many
        or auto not in ("NOTSET", "VALID")
        or "output_shape" in node.attributes
        or pads[:n] != pads[n:]
        or min(pads) < 0
    ):
        return _by_rule(reader, node, transposed_rule(node, kernel))
    group = _attribute(node, "group", 1)
    return reader.call(TRANSPOSED[n], x, weight, bias[0] if bias else None, strides, pads[:n], more, group, dilations)


def _kernel(reader: _Reader, node: ir.Node) -> list[int]:
    shape = reader.shape(node.inputs[1])  # type: ignore[arg-type]
    if shape is None or None in shape:
        raise _Unread("the shape of its weight is not known")
    if len(shape) - 2 not in CONVS:
        raise _Unread(f"it has {len(shape) - 2} spatial dimensions")
    return [int(size or 0) for size in shape[2:]]


def _by_rule(reader: _Reader, node: ir.Node, rule: Rule) -> fx.Node:
    """A convolution of which only the numbers can change: all else about it is a matter of its operator."""
    x, weight, *bias = reader.arguments(node)
    shape = [int(size or 0) for size in reader.shape(node.inputs[1]) or []]  # type: ignore[arg-type]
    n, transposed, group = len(shape) - 2, node.op_type == "ConvTranspose", int(_attribute(node, "group", 1))
    strides, dilations = (_attribute(node, name, [1] * n) for name in ("strides", "dilations"))
    more = _attribute(node, "output_padding", [0] * n) if transposed else ()
    layer = ConvByRule(torch.empty(shape, device="meta"), rule, strides, dilations, group, transposed, more)
    args: tuple[Any, ...] = (x, weight, bias[0] if bias else None, layer)
    return reader.out.call_function(BY_RULE[n, transposed], args, {"groups": group})


def _gemm(reader: _Reader, node: ir.Node) -> fx.Node:
    x, weight, *bias = reader.arguments(node)
    if _attribute(node, "transA", 0) or reader.constants.of(node.inputs[1]) is None:
        raise _Unread("its input is transposed, or its weight is no constant")
    if not _attribute(node, "transB", 0):
        weight = reader.call(torch.transpose, weight, 0, 1)
    alpha, beta = _attribute(node, "alpha", 1.0), _attribute(node, "beta", 1.0)
    if alpha != 1:
        weight = reader.call(torch.mul, weight, alpha)
    if not bias or bias[0] is None:
        return reader.call(F.linear, x, weight)
    shift = bias[0] if beta == 1 else reader.call(torch.mul, bias[0], beta)
    shape, sizes = reader.shape(node.inputs[2]), reader.shape(node.outputs[0])  # type: ignore[arg-type]
    if shape is not None and sizes is not None and shape in ([sizes[-1]], [1, sizes[-1]]):
        return reader.call(F.linear, x, weight, shift if len(shape) == 1 else reader.call(torch.reshape, shift, [-1]))
    return reader.call(torch.add, reader.call(F.linear, x, weight), shift)


def _matmul(reader: _Reader, node: ir.Node) -> fx.Node:
    x, weight = reader.arguments(node)
    if reader.constants.of(node.inputs[1]) is None or reader.rank(node.inputs[1]) != 2:  # type: ignore[arg-type]
        raise _Unread("its second input is no constant of two dimensions")
    return reader.call(F.linear, x, reader.call(torch.transpose, weight, 0, 1))


def _batch_norm(reader: _Reader, node: ir.Node) -> list[fx.Node]:
    x, scale, shift, mean, var = reader.arguments(node)
    if not _attribute(node, "spatial", 1):
        raise _Unread("it normalises each position by itself")
    eps = float(np.float32(_attribute(node, "epsilon", 1e-5)))
    several = [value for value in node.outputs[1:] if value.name]
    # Before operator set 14, whoever names its other results wants it to train.
    training = bool(_attribute(node, "training_mode", 0)) or (reader.opset < 14 and bool(several))
    if training:  # torch would write into the statistics, which are results here
        made = reader.call(F.batch_norm, x, None, None, scale, shift, True, 0.0, eps)
        return [made, *(reader.call(pure, *(mean, var, x)) for _ in node.outputs[1:])]
    return [reader.call(F.batch_norm, x, mean, var, scale, shift, False, 0.0, eps)]


def _binary(function: Callable[..., Any]) -> Callable[[_Reader, ir.Node], fx.Node]:
    def rule(reader: _Reader, node: ir.Node) -> fx.Node:
        if reader.opset < 7 and _attribute(node, "broadcast", 0):
            raise _Unread("it depends on the size or the kind of its input")
        return reader.call(function, *reader.arguments(node))

    return rule


def _sum(reader: _Reader, node: ir.Node) -> fx.Node:
    total, *others = reader.arguments(node)
    for other in others:
        total = reader.call(torch.add, total, other)
    return reader.call(torch.positive, total) if not others else total  # type: ignore[return-value]


def _same(reader: _Reader, node: ir.Node) -> fx.Node:
    return reader.call(torch.positive, reader.arguments(node)[0])


def _dropout(reader: _Reader, node: ir.Node) -> fx.Node:
    training = _input(node, 2)
    if training is not None and any(reader.integers(training) or [1]):
        raise _Unread("an option is not understood")
    if reader.opset < 7 and not _attribute(node, "is_test", 0):
        raise _Unread("an option is not understood")
    return _same(reader, node)


def _cast(reader: _Reader, node: ir.Node) -> fx.Node:
    dtype = DTYPES[ir.DataType(_attribute(node, "to"))]
    return reader.out.call_method("to", (reader.arguments(node)[0], dtype))


def _average_pool(reader: _Reader, node: ir.Node) -> fx.Node:
    kernel = list(_attribute(node, "kernel_shape"))
    n = len(kernel)
    strides, dilations = (list(_attribute(node, name, [1] * n)) for name in ("strides", "dilations"))
    pads = pads_of(node, reader.constants, kernel)
    counted, ceil = bool(_attribute(node, "count_include_pad", 0)), bool(_attribute(node, "ceil_mode", 0))
    if pads is None:
        raise _Unread("its padding depends on the size of its input")
    if any(d != 1 for d in dilations) or ceil or (any(pads) and not counted):
        raise _Unread("its windows are not all of one size")
    x = reader.arguments(node)[0]
    if pads[:n] != pads[n:]:
        x, pads = reader.call(F.pad, x, _torch_pads(pads[:n], pads[n:])), [0] * 2 * n
    return reader.call(POOLS[n], x, kernel, strides, pads[:n], False, True)


def _pad(reader: _Reader, node: ir.Node) -> fx.Node:
    x = node.inputs[0]
    rank = reader.rank(x)  # type: ignore[arg-type]
    given = _attribute(node, "pads", _attribute(node, "paddings"))
    given = list(given) if given is not None else reader.integers(_input(node, 1)) or []
    value = reader.constants.of(_input(node, 2))
    number = _attribute(node, "value", 0.0) if value is None else float(np.ravel(value.numpy())[0])
    if _input(node, 2) is not None and value is None:
        raise _Unread("an option is not understood")
    axes = reader.integers(_input(node, 3)) or list(range(rank))
    half = len(axes)
    lead, trail = [0] * rank, [0] * rank
    for axis, first, last in zip(axes, given[:half], given[half:], strict=True):
        lead[axis], trail[axis] = first, last
    if any([*lead[:2], *trail[:2]]):
        raise _Unread("an option is not understood")
    mode = MODES[_attribute(node, "mode", "constant")]
    amounts = _torch_pads(lead[2:], trail[2:])
    return reader.call(F.pad, reader.arguments(node)[0], amounts, mode, number if mode == "constant" else None)


def _torch_pads(lead: Sequence[int], trail: Sequence[int]) -> list[int]:
    """As ``torch.nn.functional.pad`` takes them: the last dimension first."""
    return [p for pair in zip(reversed(lead), reversed(trail), strict=True) for p in pair]


def _concat(reader: _Reader, node: ir.Node) -> fx.Node:
    return reader.call(torch.cat, reader.arguments(node), _attribute(node, "axis", 1))


def _split(reader: _Reader, node: ir.Node) -> list[fx.Node]:
    axis, count = _attribute(node, "axis", 0), len(node.outputs)
    sizes = list(_attribute(node, "split", [])) or reader.integers(_input(node, 1))
    if sizes is None:
        size = (reader.shape(node.inputs[0]) or [])[axis]  # type: ignore[arg-type]
        if size is None:
            raise _Unread("it depends on the size or the kind of its input")
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    made = reader.call(torch.split, reader.arguments(node)[0], sizes, axis)
    return [reader.call(operator.getitem, made, i) for i in range(count)]


def _slice(reader: _Reader, node: ir.Node) -> fx.Node:
    rank = reader.rank(node.inputs[0])  # type: ignore[arg-type]
    if reader.opset < 10:
        starts, ends = list(_attribute(node, "starts")), list(_attribute(node, "ends"))
        axes, steps = list(_attribute(node, "axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = (reader.integers(_input(node, i)) or [] for i in (1, 2))
        axes = reader.integers(_input(node, 3)) or list(range(len(starts)))
        steps = reader.integers(_input(node, 4)) or [1] * len(starts)
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise _Unread("it depends on the size or the kind of its input")
        index[axis] = slice(start or None, None if end >= 1 << 31 - 1 else end, None if step == 1 else step)
    return reader.call(operator.getitem, reader.arguments(node)[0], tuple(index))


def _gather(reader: _Reader, node: ir.Node) -> fx.Node:
    x, axis, number = reader.arguments(node)[0], _attribute(node, "axis", 0), reader.constants.of(node.inputs[1])
    if number is None:
        raise _Unread("an option is not understood")
    if not len(number.shape):
        return reader.call(torch.select, x, axis, int(number.numpy()))
    if len(number.shape) != 1:
        raise _Unread("an option is not understood")
    size = (reader.shape(node.inputs[0]) or [])[axis]  # type: ignore[arg-type]
    chosen = [int(i) + (size or 0) * (i < 0) for i in number.numpy()]
    index = f"{node.outputs[0].name}:index"
    reader.read.numbers[index] = torch.tensor(chosen)
    return reader.call(torch.index_select, x, axis, reader.out.get_attr(index))


def _transpose(reader: _Reader, node: ir.Node) -> fx.Node:
    rank = reader.rank(node.inputs[0])  # type: ignore[arg-type]
    return reader.call(torch.permute, reader.arguments(node)[0], list(_attribute(node, "perm", range(rank)[::-1])))


def _reshape(reader: _Reader, node: ir.Node) -> fx.Node:
    x = reader.arguments(node)[0]
    wanted = list(_attribute(node, "shape", [])) or reader.integers(_input(node, 1)) or []
    if _attribute(node, "allowzero", 0) and 0 in wanted:
        raise _Unread("an option is not understood")
    given = reader.shape(node.inputs[0]) or []  # type: ignore[arg-type]
    sizes: list[Any] = [reader.out.call_method("size", (x, i)) if size == 0 else size for i, size in enumerate(wanted)]
    if wanted[:1] and wanted[0] > 0:  # the batch that the file was made for; what is read must hold for any
        if given[:1] != wanted[:1]:
            raise _Unread("it depends on the size or the kind of its input")
        sizes[0] = reader.out.call_method("size", (x, 0))
    return reader.call(torch.reshape, x, sizes)


def _flatten(reader: _Reader, node: ir.Node) -> fx.Node:
    if _attribute(node, "axis", 1) != 1:
        raise _Unread("an option is not understood")
    return reader.call(torch.flatten, reader.arguments(node)[0], 1)


def _axes(function: Callable[..., Any]) -> Callable[[_Reader, ir.Node], fx.Node]:
    def rule(reader: _Reader, node: ir.Node) -> fx.Node:
        axes = list(_attribute(node, "axes", [])) or reader.integers(_input(node, 1))
        if not axes or len(axes) != 1:
            raise _Unread("it depends on the size or the kind of its input")
        return reader.call(function, reader.arguments(node)[0], axes[0])

    return rule


def _mean(reader: _Reader, node: ir.Node) -> fx.Node:
    rank = reader.rank(node.inputs[0])  # type: ignore[arg-type]
    if node.op_type == "GlobalAveragePool":
        return reader.call(torch.mean, reader.arguments(node)[0], list(range(2, rank)), True)
    axes = list(_attribute(node, "axes", [])) or reader.integers(_input(node, 1))
    if not axes:
        raise _Unread("an option is not understood")
    return reader.call(torch.mean, reader.arguments(node)[0], axes, bool(_attribute(node, "keepdims", 1)))


def _depth_to_space(reader: _Reader, node: ir.Node) -> fx.Node:
    if _attribute(node, "mode", "DCR") != "CRD":
        raise _Unread("an option is not understood")
    return reader.call(F.pixel_shuffle, reader.arguments(node)[0], _attribute(node, "blocksize"))


def _resize(reader: _Reader, node: ir.Node) -> fx.Node:
    given = reader.shape(node.inputs[0])  # type: ignore[arg-type]
    at = 1 if reader.opset < 11 or node.op_type == "Upsample" else 2
    number = reader.constants.of(_input(node, at))
    scales = list(_attribute(node, "scales", [])) or ([] if number is None else [float(s) for s in number.numpy()])
    sizes = reader.integers(_input(node, 3)) if not scales else None
    found = None if given is None else interpolation(node, reader.opset, scales, sizes, given)
    if found is None:
        raise _Unread("its factors are not whole, or it places pixels as torch does not")
    factors, mode, corners = found
    return reader.call(F.interpolate, reader.arguments(node)[0], None, factors, mode, corners)


_RULES: dict[str, Callable[[_Reader, ir.Node], Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Neg": lambda reader, node: reader.call(torch.neg, reader.arguments(node)[0]),
    "Sum": _sum,
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    "AveragePool": _average_pool,
    "Pad": _pad,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "DepthToSpace": _depth_to_space,
    "Resize": _resize,
    "Upsample": _resize,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _axes(torch.squeeze),
    "Unsqueeze": _axes(torch.unsqueeze),
}

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "BatchNormalization")
_SEVERAL = ("Split", "BatchNormalization")
"""Operators whose other results are read as well."""

KNOWN = frozenset(
    (
        *_RULES,
        *("Constant", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Gelu", "Sigmoid", "HardSigmoid", "Tanh"),
        *("HardSwish", "Mish", "Softplus", "Softmax", "LogSoftmax", "Clip", "Exp", "Log", "Sqrt", "Pow", "Abs", "Erf"),
        *("MaxPool", "GlobalMaxPool", "ReduceSum", "ReduceMax", "ReduceMin", "Max"),
        *("Min", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "Shape"),
        *("ConstantOfShape", "Expand", "Tile", "Where", "Equal", "Less", "Greater", "Not", "And", "Or", "ArgMax"),
        *("ArgMin", "TopK", "NonMaxSuppression", "SpaceToDepth", "Einsum", "Range", "NonZero", "Floor"),
        *("Ceil", "Round", "Reciprocal", "Swish", "Attention", "LSTM", "GRU", "RNN", "LRN", "LpNormalization"),
    )
)
"""Operators of which it is known what they are: that none of the others folds is worth saying."""
