"""Running parts of an ONNX graph: regions in float64 by onnx's reference evaluator, whole files by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from passes.onnx.constants import Constants
from passes.onnx.files import fits_one_message, write_beside
from passes.onnx.read import with_pads
from passes.programs import needed_for

__all__ = ["Region", "run_file"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class _Norm(OpRun):
    """Batch norm in inference: before operator set 14 the evaluator takes its momentum for a wish to train."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, shift: Any, mean: Any, var: Any, epsilon: float = 1e-5, **_: Any) -> Any:
        scale, shift, mean, var = (each.reshape(-1, *(1,) * (x.ndim - 2)) for each in (scale, shift, mean, var))
        return (scale * (x - mean) / np.sqrt(var + epsilon) + shift,)


_Norm.__name__ = "BatchNormalization"  # by which the evaluator finds it


class Region:
    """The operators between values and one, as a model of its own in float64, with the constants of the graph."""

    def __init__(self, model: ir.Model, constants: Constants, given: Sequence[ir.Value], result: ir.Value) -> None:
        self.result = str(result.name)
        needed = needed_for(result, given, lambda value: [] if constants.of(value) is not None else _sources(value))
        nodes = [node for node in model.graph if any(value in needed for value in node.outputs)]
        numbers: dict[str, Any] = {}
        protos = []
        for node in nodes:
            for value in node.inputs:
                number = constants.of(value)
                if value is not None and number is not None and value not in given:
                    numbers[str(value.name)] = _number(number)
            if all(constants.of(value) is None for value in node.outputs):
                protos.append(_in_double(with_pads(node, constants)))
        self.outputs = [name for proto in protos for name in proto.output if name]
        graph = onnx.helper.make_graph(
            protos,
            "region",
            [onnx.helper.make_tensor_value_info(str(v.name), onnx.TensorProto.DOUBLE, None) for v in given],
            [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None) for name in self.outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()],
        )
        versions = {**model.opset_imports, "": constants.opset}
        opsets = [onnx.helper.make_opsetid(name, version) for name, version in versions.items()]
        self._evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets), new_ops=[_Norm])

    def run(self, given: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """The result's value, and the largest magnitude on the way."""
        inputs = {name: x.numpy() for name, x in given.items()}
        found = dict(zip(self.outputs, self._evaluator.run(None, inputs), strict=True))
        floats = [value for value in found.values() if isinstance(value, np.ndarray) and value.dtype == np.float64]
        peak = max(float(np.abs(value).max()) for value in [*inputs.values(), *floats] if value.size)
        return torch.from_numpy(np.array(found[self.result], dtype=np.float64)), peak


def _sources(value: ir.Value) -> list[ir.Value]:
    node = value.producer()
    return [] if node is None else [source for source in node.inputs if source is not None]


def _number(number: ir.TensorProtocol) -> Any:
    array = np.asarray(number.numpy())
    return array.astype(np.float64) if number.dtype in _FLOATS else array


def _in_double(proto: onnx.NodeProto) -> onnx.NodeProto:
    """The operator among others in float64: a cast from one kind of floats to another is none."""
    for attribute in proto.attribute:
        if proto.op_type == "Cast" and attribute.name == "to" and ir.DataType(attribute.i) in _FLOATS:
            attribute.i = onnx.TensorProto.DOUBLE
    return proto


def run_file(model: ir.Model, inputs: Mapping[str, Any]) -> Sequence[Any]:
    """What a model returns, run by onnxruntime as it stands, without its optimisations.

    Raises whatever onnxruntime raises; ImportError where it is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if fits_one_message(model):
        given: Any = ir.to_proto(model).SerializeToString()
        return _run(onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"]), inputs)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_beside(model, path, path.with_name("weights"), "weights")
        return _run(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), inputs)


def _run(session: Any, inputs: Mapping[str, Any]) -> Sequence[Any]:
    return session.run(None, dict(inputs))  # type: ignore[no-any-return]
