"""Where an ONNX model has its numbers, and how it is written: one message, or its weights in a file beside it.

Numbers are initialisers and attributes, of the graph, of the branches inside of operators and of functions; each may
lie in another file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

__all__ = ["fits_one_message", "graphs_of", "in_memory", "names_of", "tensors_of", "told_in", "write", "write_beside"]

LARGEST = 2 << 30
"""Bytes of one protobuf message; what is larger has its weights in a file beside it."""
SMALL = 256
"""Bytes up to which a tensor stays in the message all the same: runtimes want sizes there."""

_KINDS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The graph, the branches inside of its operators, and the same of each function."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from graph.subgraphs()


def tensors_of(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """All tensors that are written down in a model, each with the name of the value that it is for."""
    for graph in graphs_of(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
        for node in graph:
            for attribute in _attributes(node):
                tensors = [attribute.value] if attribute.type is ir.AttributeType.TENSOR else attribute.value
                yield from ((str(node.outputs[0].name if node.outputs else node.name), each) for each in tensors)


def names_of(model: ir.Model) -> set[str]:
    """The names of all values and operators, those inside of operators included: there an outer one would be hidden."""
    found = set[str | None]()
    for graph in graphs_of(model):
        found |= {*graph.initializers, *(value.name for value in [*graph.inputs, *graph.outputs])}
        for node in graph:
            found |= {node.name, *(value.name for value in node.outputs)}
    return {name for name in found if name}


def fits_one_message(model: ir.Model) -> bool:
    """Whether one protobuf message holds a model with its weights; none of them lies in another file."""
    return in_memory(model) < LARGEST and not any(isinstance(each, ir.ExternalTensor) for _, each in tensors_of(model))


def in_memory(model: ir.Model) -> int:
    """Bytes of the tensors that lie in no other file."""
    return sum(each.nbytes for _, each in tensors_of(model) if not isinstance(each, ir.ExternalTensor))


def told_in(model: onnx.ModelProto) -> frozenset[str]:
    """The values of which a file tells kind and shape: of weights it need not, but onnx-ir would for each of them."""
    return frozenset(value.name for graph in _graphs_in(model.graph) for value in graph.value_info)


def write(model: ir.Model, path: Path) -> None:
    """Write a model as one message, which tells of weights what the file told that it is from, and no more."""
    proto, told = ir.to_proto(model), model.meta.get("told")
    for graph in [] if told is None else _graphs_in(proto.graph):
        weights = {tensor.name for tensor in graph.initializer}.difference(told or ())
        kept = [v for v in graph.value_info if v.name not in weights or v.doc_string or v.metadata_props]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)
    path.write_bytes(proto.SerializeToString())


def _graphs_in(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from _graphs_in(inner)


def write_beside(model: ir.Model, path: Path, weights: Path, location: str) -> None:
    """Write a model to ``path`` and its weights to ``weights``, which the model will find under ``location``."""
    copy = model.clone()
    copy.meta.update(model.meta)
    found = {id(each): each for _, each in tensors_of(copy) if _goes_out(each)}
    written = ir.external_data.convert_tensors_to_external(list(found.values()), weights.parent, weights.name)
    new = {}
    for (key, old), put in zip(found.items(), written, strict=True):
        new[key] = ir.ExternalTensor(
            location, put.offset, put.length, old.dtype, shape=put.shape, name=str(old.name),
            doc_string=old.doc_string, metadata_props=dict(old.metadata_props),
        )  # fmt: skip
    _replace(copy, new)
    write(copy, path)


def _goes_out(tensor: ir.TensorProtocol) -> bool:
    if isinstance(tensor, ir.ExternalTensor):
        return True
    return tensor.dtype is not ir.DataType.STRING and tensor.nbytes > SMALL


def _replace(model: ir.Model, new: Mapping[int, ir.TensorProtocol]) -> None:
    """Put other tensors in the place of some, which are given by their id."""
    for graph in graphs_of(model):
        for value in graph.initializers.values():
            value.const_value = new.get(id(value.const_value), value.const_value)
        for node in graph:
            for old in list(_attributes(node)):
                one = old.type is ir.AttributeType.TENSOR
                put = new.get(id(old.value), old.value) if one else [new.get(id(each), each) for each in old.value]
                node.attributes[old.name] = ir.Attr(old.name, old.type, put, doc_string=old.doc_string)


def _attributes(node: ir.Node) -> Iterator[ir.Attr]:
    """The attributes that are tensors."""
    yield from (each for each in node.attributes.values() if each.type in _KINDS and not each.is_ref())
