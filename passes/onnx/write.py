"""Edits of an ONNX graph: one layer's operators in the place of a region's, on a copy.

All that is not part of a region stays as it is: names, order, metadata, documentation, operators of other domains. The
value that a region gives keeps its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.by_rule import ConvByRule
from passes.algebra.geometry import PADS
from passes.edits.edit import Substitute
from passes.onnx.constants import opset_of
from passes.onnx.files import names_of
from passes.programs import fresh

__all__ = ["substitute"]

_MODES = {
    kind: {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    for mode, kinds in PADS.items()
    for kind in kinds
}


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DEFAULT = {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}
"""What operators have in each dimension where nothing is said."""


def substitute(
    model: ir.Model, edits: Iterable[tuple[Substitute, nn.Module]], matrices: Collection[str] = ()
) -> ir.Model:
    """A copy of the model with these edits, each with the layer whose numbers are meant.

    ``matrices`` names the values of two dimensions that layers read: there a linear layer is one operator.
    """
    result = model.clone()
    told = model.meta.get("told")
    result.meta.clear()  # it is no longer what is in the file
    graph = result.graph
    values = {str(v.name): v for v in [*graph.inputs, *graph.initializers.values()]}
    values |= {str(v.name): v for node in graph for v in node.outputs}
    taken = names_of(result)
    for edit, layer in edits:
        old = values[edit.path]
        producer = old.producer()
        assert producer is not None
        gone = [values[name].producer() for name in edit.gone]
        idle = [v for node in [producer, *gone] if node is not None for v in node.inputs if v is not None]
        removed = [producer, *(node for node in reversed(gone) if node is not None)]
        if edit.end:
            values[edit.end].replace_all_uses_with(values[edit.moved], replace_graph_outputs=True)
        writer = _Writer(graph, producer, values, taken, edit, edit.source in matrices, _name_of(edit, removed))
        new = writer.layer(layer, values[edit.source])
        _describe(new, old)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        _remove(graph, removed)
        new.name = edit.path
        values[edit.path] = new
        if edit.ahead:
            values[edit.end] = values[edit.moved]
        elif edit.end:
            end = values.pop(edit.moved)
            _describe(end, values[edit.end])
            end.name, values[edit.end] = edit.end, end
        listed = (model.ir_version or 0) < 4  # where initialisers are listed among the inputs
        _drop(graph, idle, values, listed)
        writer.register(listed)
        told = None if told is None else told.difference(str(value.name) for value in writer.new)
    if told is not None:
        result.meta["told"] = told
    return result


def _name_of(edit: Substitute, removed: Iterable[ir.Node]) -> str:
    """The name that a layer takes over: that of the one that had the weight, or else of another that goes."""
    layers = [node for node in removed if node.op_type in _LAYERS and not node.domain]
    own = [node for node in layers if any(v is not None and v.name == edit.weight for v in node.inputs)]
    return next((str(node.name) for node in [*own, *reversed(layers)] if node.name), "")


def _describe(new: ir.Value, old: ir.Value) -> None:
    """Say of a value what was said of the one that it takes the place of."""
    new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)


def _remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Take nodes away, those behind first."""
    left = list(dict.fromkeys(nodes))
    while left:
        free = [node for node in left if not any(value.uses() for value in node.outputs)]
        if not free:  # an operator of several values of which others are read
            return
        graph.remove(free, safe=True)
        left = [node for node in left if node not in free]


def _drop(graph: ir.Graph, values: Iterable[ir.Value], known: dict[str, ir.Value], listed: bool) -> None:
    """Take away weights that nothing reads any more, and what only they were made of."""
    todo = list(values)
    while todo:
        value = todo.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and (listed or not value.is_graph_input()):
                if value.is_graph_input():
                    graph.inputs.remove(value)
                graph.initializers.pop(str(value.name), None)
                known.pop(str(value.name), None)
        elif node.graph is not None and not any(each.uses() or each.is_graph_output() for each in node.outputs):
            todo += [source for source in node.inputs if source is not None]
            graph.remove(node, safe=True)


def _is_there(value: ir.Value) -> bool:
    node = value.producer()
    return value.is_initializer() or value.is_graph_input() if node is None else node.graph is not None


class _Writer:
    """Writes a layer as operators in front of a node."""

    def __init__(
        self,
        graph: ir.Graph,
        before: ir.Node,
        values: dict[str, ir.Value],
        taken: set[str],
        edit: Substitute,
        matrix: bool,
        name: str,
    ) -> None:
        self.graph, self.before, self.values, self.taken, self.edit = graph, before, values, taken, edit
        self.matrix, self.name = matrix, name
        self.new: list[ir.Value] = []

    def register(self, listed: bool) -> None:
        """Enter the new weights, once the names that they take over are free; some stay, whose shape is asked for."""
        for value in self.new:
            old = self.values.get(str(value.name))
            if old is not None and _is_there(old):
                value.name = fresh(str(value.name), self.taken)
            self.taken.add(str(value.name))
            if listed:
                self.graph.inputs.append(value)
            self.graph.register_initializer(value)
            self.values[str(value.name)] = value

    def layer(self, layer: nn.Module, x: ir.Value) -> ir.Value:
        """The value of a layer that was emitted; pads of zeros are the convolution's own."""
        pads: list[int] | None = None
        if isinstance(layer, nn.Sequential):
            *before, layer = layer
            for pad in before:
                amounts = _onnx_pads(pad.padding)
                mode, number = _MODES[type(pad)], float(getattr(pad, "value", 0.0))
                if mode == "constant" and number == 0 and min(amounts) >= 0 and not layer.transposed:
                    pads = amounts
                else:
                    x = self.pad(x, amounts, mode)
        if isinstance(layer, nn.Linear):
            return self.linear(layer, x)
        assert isinstance(layer, _ConvNd)
        if isinstance(layer, ConvByRule):
            return self.same(layer, x)
        return self.conv(layer, x, pads)

    def same(self, layer: ConvByRule, x: ir.Value) -> ir.Value:
        """The operator that a layer is like, with other numbers."""
        of = self.values[dict(self.edit.layer.options)["path"]].producer()
        assert of is not None
        bias = [] if layer.bias is None else [self.weight(self.edit.bias, layer.bias)]
        options = {name: attribute.value for name, attribute in of.attributes.items()}
        return self.node(of.op_type, [x, self.weight(self.edit.weight, layer.weight), *bias], options)

    def conv(self, layer: _ConvNd, x: ir.Value, pads: list[int] | None) -> ir.Value:
        n = len(layer.kernel_size)
        if pads is None:
            pads = _onnx_pads(layer._reversed_padding_repeated_twice)
            if layer.transposed:
                pads = [int(p) for p in layer.padding] * 2
            elif layer.padding_mode != "zeros":
                mode = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[layer.padding_mode]
                x, pads = self.pad(x, pads, mode), [0] * 2 * n
        options: dict[str, Any] = {
            "dilations": list(layer.dilation), "kernel_shape": list(layer.kernel_size), "pads": pads,
            "strides": list(layer.stride), **({"group": layer.groups} if layer.groups > 1 else {}),
        }  # fmt: skip
        if layer.transposed:
            options["output_padding"] = list(layer.output_padding)
        inputs = [x, self.weight(self.edit.weight, layer.weight)]
        if layer.bias is not None:
            inputs.append(self.weight(self.edit.bias, layer.bias))
        return self.node("ConvTranspose" if layer.transposed else "Conv", inputs, options)

    def linear(self, layer: nn.Linear, x: ir.Value) -> ir.Value:
        bias = None if layer.bias is None else self.weight(self.edit.bias, layer.bias)
        if self.matrix:
            inputs = [x, self.weight(self.edit.weight, layer.weight), *([] if bias is None else [bias])]
            return self.node("Gemm", inputs, {"transB": 1})
        made = self.node("MatMul", [x, self.weight(self.edit.weight, layer.weight.t())], {})
        return made if bias is None else self.node("Add", [made, bias], {})

    def pad(self, x: ir.Value, amounts: list[int], mode: str) -> ir.Value:
        half = len(amounts) // 2
        whole = [0, 0, *amounts[:half], 0, 0, *amounts[half:]]
        if opset_of(self.graph.opset_imports) < 11:
            return self.node("Pad", [x], {"pads": whole, "mode": mode})
        return self.node("Pad", [x, self.initializer(f"{self.edit.weight}_pads", np.array(whole))], {"mode": mode})

    def node(self, kind: str, inputs: list[ir.Value], options: dict[str, Any]) -> ir.Value:
        told = {key: given for key, given in options.items() if key not in _DEFAULT or {*given} != {_DEFAULT[key]}}
        name = self.name if kind in _LAYERS else ""
        if name == "" and self.name:
            name = fresh(f"{self.name}/{kind}", self.taken)
            self.taken.add(name)
        node = ir.node(kind, inputs, told, name=name or None)
        node.outputs[0].name = fresh(f"{self.edit.path}/{kind}", self.taken)
        self.taken.add(node.outputs[0].name)
        node.outputs[0].type = self.before.outputs[0].type
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def weight(self, name: str, number: Tensor) -> ir.Value:
        tensor = number.detach().cpu().contiguous()
        if tensor.dtype is torch.bfloat16:
            array = tensor.view(torch.int16).numpy()
            return self._value(name, ir.Tensor(array.view(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16))
        return self._value(name, ir.tensor(tensor.numpy()))

    def initializer(self, name: str, array: Any) -> ir.Value:
        name = fresh(name, self.taken)
        self.taken.add(name)
        return self._value(name, ir.tensor(array))

    def _value(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        tensor.name = name
        self.new.append(value)
        return value


def _onnx_pads(amounts: Any) -> list[int]:
    """Leading, then trailing, first dimension first; torch has pairs, the last dimension first."""
    flat = [int(p) for p in amounts]
    return [*reversed(flat[0::2]), *reversed(flat[1::2])]
