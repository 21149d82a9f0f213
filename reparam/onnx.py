"""ONNX files, from any exporter: fold them, explain what would fold, compare them with each other or with a network.

    import reparam.onnx
    model = reparam.onnx.collapse("model.onnx")
    reparam.onnx.save(model, "deployed.onnx")

Needs the packages of ``pip install 'reparam[onnx]'``. Source of the folds: as for :func:`reparam.collapse`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reparam import Explanation, ReparamError
from reparam.disk import FileError, beside, move_file, replace_file

try:
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    from passes.onnx.collapse import collapse_model, compare_models, compare_with_module, explain_model
    from passes.onnx.constants import constant_of
    from passes.onnx.read import tensor_of
    from passes.onnx.replay import fits_one_message
except ModuleNotFoundError as missing:
    raise ReparamError(
        f"ONNX files need {missing.name}, which is not installed: pip install 'reparam[onnx]'"
    ) from missing

from passes.proof.check import Checked

__all__ = ["collapse", "collapse_with_report", "explain", "load", "save", "verify", "weights"]

OLDEST = 7
"""Before this operator set, arithmetic broadcast by rules of its own."""


def collapse(
    model: str | os.PathLike[str] | ir.Model,
    *,
    inputs: Mapping[str, Any] | None = None,
    verify: bool | str = True,
    strict: bool = False,
) -> ir.Model:
    """Fold every region of an ONNX model that acts as one convolution or linear layer into that one operator.

    All else stays as it is: names, order, metadata, operators of other domains; what a region gave keeps its name.

    Args:
        model: a file, or a model of onnx-ir, which is not changed.
        inputs: NumPy arrays by name of the input to compare the whole model on; made up from the shapes that the file
            declares otherwise.
        verify: ``True``: replay each region in float64 by onnx's reference evaluator, and run the whole file before and
            after by onnxruntime; ``"folds"``: the regions only; ``False``: neither.
        strict: raise where a fold does not hold, instead of taking it back alone with a warning.

    Raises:
        FileError: no ONNX, truncated, contradictory or unknown to the installed onnx; the message names the file.
        EquivalenceError: the result differs, or, with ``strict``, one fold does.
    """
    return collapse_with_report(model, inputs=inputs, verify=verify, strict=strict)[0]


def collapse_with_report(
    model: str | os.PathLike[str] | ir.Model,
    *,
    inputs: Mapping[str, Any] | None = None,
    verify: bool | str = True,
    strict: bool = False,
) -> tuple[ir.Model, Explanation]:
    """As :func:`collapse`, with what was folded, what was refused and why, counts, errors and seconds."""
    if verify not in (True, False, "folds"):
        raise ReparamError(f"verify= is True, 'folds' or False, got {verify!r}")
    return collapse_model(_loaded(model), inputs=inputs, verify=verify, strict=strict)


def explain(model: str | os.PathLike[str] | ir.Model) -> Explanation:
    """Which regions would fold, into what, and why the others do not. Raises as :func:`collapse` for bad files."""
    return explain_model(_loaded(model))


def verify(reference: Any, candidate: Any, inputs: Mapping[str, Any] | None = None) -> Checked:
    """Run two models on the same inputs and compare what they return.

    Args:
        reference: a file, a model of onnx-ir, or a ``torch.nn.Module``.
        candidate: the same; one of the two is ONNX.
        inputs: NumPy arrays by name of the file's input; made up otherwise.

    Returns:
        The verdict, with what was compared; what rounding alone does to the reference is allowed ten times, and a
        hundredth at most.

    Raises:
        ReparamError: one of them rejects the inputs.
    """
    first, second = (_loaded(each) if isinstance(each, (str, os.PathLike)) else each for each in (reference, candidate))
    if isinstance(first, ir.Model) and isinstance(second, ir.Model):
        return compare_models(first, second, inputs)
    return compare_with_module(first, second, inputs)


def weights(model: ir.Model) -> dict[str, torch.Tensor]:
    """Initialisers and the numbers of ``Constant`` operators by name, of the kinds that torch has."""
    values = [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]
    found = {str(value.name): number for value in values if (number := constant_of(value)) is not None}
    tensors = {name: tensor_of(number, anything=True) for name, number in found.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _loaded(model: str | os.PathLike[str] | ir.Model) -> ir.Model:
    return load(model) if isinstance(model, (str, os.PathLike)) else model


# ------------------------------------------------------------------ files


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model in a file; weights in files beside it stay there until they are read.

    Raises:
        FileError: there is none, it is no ONNX, truncated, of an unknown operator set, contradicts itself, or wants
            weights from a file that is missing, too short or outside of its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path} is not there" if not path.exists() else f"{path} is no file")
    try:
        model = ir.load(path)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise FileError(f"{path} is no ONNX file, or a damaged one ({_line(error)})") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if model.ir_version is None or not list(model.graph):
        raise FileError(f"{path} holds no ONNX graph")
    _check_opset(path, model)
    _check_external(path, model)
    _check_order(path, model)
    try:
        onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        if "InferenceError" in str(error):  # an operator that it does not know is no contradiction
            raise FileError(f"{path} contradicts itself: {_line(error)}") from error
    model.meta["path"] = path
    return model


def _check_opset(path: Path, model: ir.Model) -> None:
    version, newest = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if version > newest:
        raise FileError(
            f"{path} is of operator set {version}; the installed onnx knows up to {newest}: pip install -U onnx"
        )
    if 0 < version < OLDEST:
        raise FileError(
            f"{path} is of operator set {version}, from before {OLDEST}: convert it with onnx.version_converter"
        )


def _check_external(path: Path, model: ir.Model) -> None:
    folder = path.parent.resolve()
    for value in model.graph.initializers.values():
        number = value.const_value
        if not isinstance(number, ir.ExternalTensor):
            continue
        location = os.fspath(number.location)
        target = (folder / location).resolve()
        if os.path.isabs(location) or not target.is_relative_to(folder):
            raise FileError(
                f"{path}: the weight {value.name!r:.80} is to come from outside of its folder: {location!r:.80}"
            )
        if not target.is_file():
            raise FileError(f"{path}: the file {location!r:.80} with the weight {value.name!r:.80} is missing")
        if target.stat().st_size < (number.offset or 0) + number.nbytes:
            raise FileError(f"{path}: the file {location!r:.80} is too short for the weight {value.name!r:.80}")


def _check_order(path: Path, model: ir.Model) -> None:
    seen = set[ir.Node]()
    for node in model.graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.graph is model.graph and producer not in seen:
                raise FileError(
                    f"{path}: {node.op_type} {node.name!r:.80} reads what only comes later; the graph has a cycle"
                )
        seen.add(node)


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model, whole or not at all; over 2 GB the weights go into ``path`` with ``.data`` behind it.

    A model in which nothing was folded is its file, byte for byte.

    Raises:
        FileError: the file cannot be written.
    """
    path, source, small = Path(path), model.meta.get("path"), fits_one_message(model)
    if isinstance(source, Path) and source.is_file() and small and ir.to_proto(model) == ir.to_proto(ir.load(source)):
        replace_file(path, lambda target: shutil.copyfile(source, target))
        return
    if small:
        replace_file(path, lambda target: ir.save(model, target, format="protobuf"))
        return
    weights = beside(path)
    try:

        def write(target: Path) -> None:
            ir.save(model, target, format="protobuf", external_data=weights.name)
            proto = onnx.load_model(target, load_external_data=False)
            for tensor in proto.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = f"{path.name}.data"
            target.write_bytes(proto.SerializeToString())
            move_file(weights, path.with_name(f"{path.name}.data"))

        replace_file(path, write)
    finally:
        weights.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200]
