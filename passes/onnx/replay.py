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
from passes.onnx.pads import transposed_pads, with_pads
from passes.programs import needed_for

__all__ = ["Region", "run_file"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class _Norm(OpRun):
    """Batch norm in inference: before operator set 14 the evaluator takes its momentum for a wish to train."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, shift: Any, mean: Any, var: Any, epsilon: float = 1e-5, **_: Any) -> Any:
        scale, shift, mean, var = (each.reshape(-1, *(1,) * (x.ndim - 2)) for each in (scale, shift, mean, var))
        return (scale * (x - mean) / np.sqrt(var + epsilon) + shift,)


class _Transposed(OpRun):
    """A transposed convolution: the evaluator takes neither groups nor a wanted size without a rule."""

    op_domain = ""

    def _run(self, x: Any, weight: Any, bias: Any = None, **given: Any) -> Any:
        options = {name: value for name, value in given.items() if value is not None}
        kernel, sizes, groups = weight.shape[2:], x.shape[2:], options.get("group", 1)
        n = len(kernel)
        ones, zeros = [1] * n, [0] * n
        defaults = {"strides": ones, "dilations": ones, "output_padding": zeros, "pads": None, "output_shape": None}
        options = {**defaults, "auto_pad": "NOTSET", **options}
        strides, steps = options["strides"], options["dilations"]
        whole = [s * (size - 1) + d * (k - 1) + 1 for s, size, d, k in zip(strides, sizes, steps, kernel, strict=True)]
        made = np.zeros((x.shape[0], weight.shape[1] * groups, *whole))
        parts, kernels = np.split(x, groups, 1), np.split(weight, groups, 0)
        for tap in np.ndindex(*kernel):
            at: Any = (..., *tap)
            each = [np.einsum("ni...,io->no...", part, k[at]) for part, k in zip(parts, kernels, strict=True)]
            steps_to = zip(tap, steps, strides, sizes, strict=True)
            spans: Any = (..., *(slice(t * d, t * d + s * (size - 1) + 1, s) for t, d, s, size in steps_to))
            made[spans] += np.concatenate(each, 1)
        lead, trail = transposed_pads(kernel, options, sizes)
        more = [extra - crop for extra, crop in zip(options["output_padding"], trail, strict=True)]
        for i in range(n):
            made = np.pad(made, [(0, max(more[i], 0)) if axis == i + 2 else (0, 0) for axis in range(n + 2)])
            made = made.take(range(lead[i], made.shape[i + 2] + min(more[i], 0)), i + 2)
        return (made if bias is None else made + bias.reshape(-1, *(1,) * n),)


_Norm.__name__, _Transposed.__name__ = "BatchNormalization", "ConvTranspose"  # by which the evaluator finds them


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
        self._evaluator = ReferenceEvaluator(
            onnx.helper.make_model(graph, opset_imports=opsets), new_ops=[_Norm, _Transposed]
        )

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
    """The operator among others in float64: a cast from one kind of floats to another is none.

    The evaluator takes the ``Resize`` of operator set 10 for a later one, which has one more input.
    """
    if proto.op_type == "Resize" and len(proto.input) == 2:
        proto.input.insert(1, "")
        options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        proto.attribute.extend(onnx.helper.make_attribute(*each) for each in options.items())
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
