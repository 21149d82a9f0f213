"""ONNX files, from any exporter: fold them, explain what would fold, compare them with each other or with a network.

    import reparam.onnx
    model = reparam.onnx.collapse("model.onnx")
    reparam.onnx.save(model, "deployed.onnx")

Needs the packages of ``pip install 'reparam[onnx]'``. Source of the folds: as for :func:`reparam.collapse`.
"""

from __future__ import annotations

import filecmp
import functools
import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reparam import Explanation, ReparamError
from reparam.disk import FileError, beside, make_folder, move_file, replace_file
from reparam.exhausted import causes

try:
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    from passes.onnx import files
    from passes.onnx.collapse import collapse_model, compare_models, compare_with_module, explain_model
    from passes.onnx.constants import constant_of, opset_of
    from passes.onnx.files import fits_one_message, graphs_of, in_memory, tensors_of, write_beside
    from passes.onnx.read import tensor_of
except ModuleNotFoundError as missing:
    raise ReparamError(
        f"ONNX files need {missing.name}, which is not installed: pip install 'reparam[onnx]'"
    ) from missing

from passes.fold.rules import rules_of
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
    cost: str = "numbers",
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
        cost: as for :func:`reparam.collapse`. Its ``norms`` is not offered: a batch norm is one operator, a scale and
            shift would be two.

    Raises:
        FileError: no ONNX, truncated, contradictory or unknown to the installed onnx; the message names the file.
        EquivalenceError: the result differs, or, with ``strict``, one fold does.
    """
    return collapse_with_report(model, inputs=inputs, verify=verify, strict=strict, cost=cost)[0]


def collapse_with_report(
    model: str | os.PathLike[str] | ir.Model,
    *,
    inputs: Mapping[str, Any] | None = None,
    verify: bool | str = True,
    strict: bool = False,
    cost: str = "numbers",
) -> tuple[ir.Model, Explanation]:
    """As :func:`collapse`, with what was folded, what was refused and why, counts, errors and seconds."""
    if verify not in (True, False, "folds"):
        raise ReparamError(f"verify= is True, 'folds' or False, got {verify!r}")
    rules = rules_of("keep", cost)
    return collapse_model(_loaded(model), inputs=inputs, verify=verify, strict=strict, rules=rules)


def explain(model: str | os.PathLike[str] | ir.Model, *, cost: str = "numbers") -> Explanation:
    """Which regions would fold, into what, and why the others do not. Raises as :func:`collapse` for bad files."""
    return explain_model(_loaded(model), rules_of("keep", cost))


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
    model = _read(path)
    if model.ir_version is None or not list(model.graph):
        raise FileError(f"{path} holds no ONNX graph")
    _check_opset(path, model)
    _check_external(path, model)
    _check_numbers(path, model)
    _check_order(path, model)
    try:
        onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        if "InferenceError" in str(error):  # an operator that it does not know is no contradiction
            raise FileError(f"{path} contradicts itself: {_line(error)}") from error
    model.meta["path"] = path
    return model


def _read(path: Path) -> ir.Model:
    """What a file says, whatever it is worth."""
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        _check_kept(path, proto)
        model = ir.from_proto(proto)
        model.meta["told"] = files.told_in(proto)
    except (
        DecodeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is no ONNX file, or a damaged one ({_line(list(causes(error))[-1])})") from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    for _, tensor in tensors_of(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
        elif isinstance(tensor, ir.serde.TensorProtoTensor):
            tensor.raw.ClearField("metadata_props")  # onnx-ir has read them, and would write them twice
    return model


def _check_kept(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse what onnx-ir drops or does not know: it would be missing in the result."""
    if proto.training_info:
        raise FileError(f"{path} says how it is trained (training_info), which would be lost: clear that field first")
    todo = [proto.graph, *proto.functions]
    while todo:
        graph = todo.pop()
        sparse = [each.values.name for each in getattr(graph, "sparse_initializer", ())]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    sparse.append(node.output[0])
                todo += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        if sparse:
            name = f"{sparse[0]!r:.80}"
            raise FileError(f"{path}: the tensor {name} is sparse, which onnx-ir drops: write it as a dense one")


def _check_opset(path: Path, model: ir.Model) -> None:
    version, newest = opset_of(model.opset_imports, 0), onnx.defs.onnx_opset_version()
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
    for name, number in tensors_of(model):
        if not isinstance(number, ir.ExternalTensor):
            continue
        location = os.fspath(number.location)
        target = (folder / location).resolve()
        if os.path.isabs(location) or not target.is_relative_to(folder):
            raise FileError(f"{path}: the weight {name!r:.80} is to come from outside of its folder: {location!r:.80}")
        if not target.is_file():
            raise FileError(f"{path}: the file {location!r:.80} with the weight {name!r:.80} is missing")
        if target.stat().st_size < (number.offset or 0) + number.nbytes:
            raise FileError(f"{path}: the file {location!r:.80} is too short for the weight {name!r:.80}")


def _check_numbers(path: Path, model: ir.Model) -> None:
    for name, number in tensors_of(model):
        try:
            if isinstance(number, ir.serde.TensorProtoTensor):
                number.numpy()
        except (ValueError, TypeError) as error:
            shape = "x".join(map(str, number.shape))
            raise FileError(f"{path}: the weight {name!r:.80} is no {shape} numbers ({_line(error)})") from error


def _check_order(path: Path, model: ir.Model) -> None:
    for graph in graphs_of(model):
        seen = set[ir.Node]()
        for node in graph:
            for value in node.inputs:
                producer = None if value is None else value.producer()
                reader = f"{node.op_type} {node.name or ' '.join(str(v.name) for v in node.outputs)!r:.80}"
                if producer is not None and producer.graph is graph and producer not in seen:
                    raise FileError(f"{path}: {reader} reads what only comes later; the graph has a cycle")
                if value is not None and not _is_given(value):
                    raise FileError(f"{path}: {reader} reads {value.name!r:.80}, which nothing in the file gives")
            seen.add(node)
        for value in graph.outputs:
            if not _is_given(value):
                raise FileError(f"{path}: nothing in the file gives its output {value.name!r:.80}")


def _is_given(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model, whole or not at all.

    Over 2 GB, or where its weights lay in another file, they go into ``path`` with ``.data`` behind it, with a number
    before that where another model reads the file of that name. A model in which nothing was folded is its file, byte
    for byte, with the files that it reads.

    Raises:
        FileError: the file cannot be written.
    """
    path, source = Path(path), model.meta.get("path")
    if isinstance(source, Path) and _is_still(source, model):
        _copy(source, path, model)
    elif fits_one_message(model):
        replace_file(path, lambda target: files.write(model, target))
    else:
        data, weights = _free(path, model), beside(path)

        def write(target: Path) -> None:
            write_beside(model, target, weights, data.name)
            move_file(weights, data)

        try:
            replace_file(path, write)
        finally:
            weights.unlink(missing_ok=True)


def _is_still(source: Path, model: ir.Model) -> bool:
    """Whether a model is what is in a file."""
    if not source.is_file() or in_memory(model) >= files.LARGEST:
        return False
    return bool(ir.to_proto(model) == ir.to_proto(_read(source)))


def _copy(source: Path, path: Path, model: ir.Model) -> None:
    """Copy a file with those that it reads."""
    locations = {os.fspath(each.location) for _, each in tensors_of(model) if isinstance(each, ir.ExternalTensor)}
    theirs = {source.parent / each: path.parent / each for each in sorted(locations)}
    own = _read_by(path)
    for old, new in theirs.items():
        if new.exists() and new.resolve() not in own and not filecmp.cmp(old, new, shallow=False):
            raise FileError(f"{new} is there already, with other weights: write {path.name} into another folder")
    for old, new in theirs.items():
        if not new.exists() or not filecmp.cmp(old, new, shallow=False):
            make_folder(new.parent)
            replace_file(new, functools.partial(shutil.copyfile, old))
    replace_file(path, lambda target: shutil.copyfile(source, target))


def _free(path: Path, model: ir.Model) -> Path:
    """Where the weights of what is written to ``path`` go: over no file but that of the model that was there before."""
    own = _read_by(path) - _files_of(model)
    names = (path.with_name(f"{path.name}{f'.{i}' if i else ''}.data") for i in itertools.count())
    return next(name for name in names if not name.exists() or name.resolve() in own)


def _read_by(path: Path) -> set[Path]:
    """The files that a model reads; none if there is no model."""
    try:
        return _files_of(_read(path)) if path.is_file() else set()
    except FileError:
        return set()


def _files_of(model: ir.Model) -> set[Path]:
    return {Path(each.path).resolve() for _, each in tensors_of(model) if isinstance(each, ir.ExternalTensor)}


def _line(error: BaseException) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:200]
