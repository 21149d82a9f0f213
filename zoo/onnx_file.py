"""A collapsed network as an ONNX file, which onnxruntime has run before it gets its name.

The file takes batches of any size where the network does: it is exported with a batch of two and run with a batch of
one. A network that fixes its batch is exported, and run, with one sample. The sample has the size that the network is
made for.

What the file computes may differ from the network by what the proof allows its outputs
(:func:`passes.proof.compare.tolerance` of the network's own noise floor): onnxruntime adds in another order than
torch, in the same dtype.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.proof.compare import distance
from reparam import ReparamError
from reparam.disk import replace_file
from reparam.networks import UsageError
from zoo.inputs import View, native_view
from zoo.job import Ended, one_line
from zoo.measure import size_of
from zoo.outcome import Mismatch

__all__ = ["ExportError", "check_packages", "write_onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2 << 30
"""Bytes that one file can hold: it is a protobuf message."""


class ExportError(ReparamError):
    """The network cannot be written as ONNX; the message says why."""


def check_packages() -> None:
    """Ask for what writing and running ONNX files needs.

    Raises:
        UsageError: it is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX files (--onnx) need {', '.join(missing)}, which is not installed: pip install 'reparam[onnx]'"
        )


def write_onnx(model: nn.Module, view: View, allowed: float, path: Path) -> str:
    """Write ``model``, in eval mode, to ``path``, once the file computes what the model does.

    Args:
        model: float32, on the CPU.
        view: of its whole outputs, of any size that the network takes.
        allowed: largest relative difference of the file's outputs from the model's.
        path: ends in ``.onnx``; its folder must exist.

    Returns:
        What is worth knowing of the file; empty if it takes any batch.

    Raises:
        ExportError: the exporter cannot export it, or onnxruntime cannot run what it made.
        Ended: the file computes something else (:class:`zoo.outcome.Mismatch`).
        FileError: the file system refuses.
    """
    size = size_of(model).bytes
    if size >= LARGEST:
        raise ExportError(f"one file cannot hold {size / 1e9:.1f} GB")
    view = _usual(model, view)
    try:
        replace_file(path, lambda temporary: _fill(temporary, model, view, 2, allowed))
    except ExportError as error:
        replace_file(path, lambda temporary: _fill(temporary, model, view, 1, allowed))
        return f"the ONNX file takes one sample at a time: with any batch, {error}"
    return ""


def _usual(model: nn.Module, view: View) -> View:
    """The view at the size that the network is made for, unless that is a wrong guess."""
    native = native_view(model, view)
    try:
        native.run(model, native.inputs(1))
    # Any exception means that the network does not take this size.
    except Exception:
        return view
    return native


def _fill(path: Path, model: nn.Module, view: View, batch: int, allowed: float) -> None:
    """Write the file, with a fixed batch if that is one, and run it."""
    import onnx

    onnx.save(_exported(model, view.inputs(batch)), path)
    inputs = view.inputs(1)
    error = distance(_run(path, inputs), view.run(model, inputs))[1]
    if not error <= allowed:
        message = "the ONNX file computes something else than the collapsed network"
        raise Ended(Mismatch, error=error, allowed=allowed, layer="", message=message)


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The model as an ONNX message, for any batch if ``inputs`` have more than one sample."""
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs) if len(inputs[0]) > 1 else None
    try:
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        assert program is not None
        return program.model_proto
    # The exporter runs the network's own code, and may fail in any way; its own errors say why in their cause.
    except Exception as error:
        raise ExportError(f"the ONNX exporter fails: {one_line(error.__cause__ or error)}") from error


def _run(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, too
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, fed)]
    # Its errors have no class in common but this one.
    except Exception as error:
        raise ExportError(f"onnxruntime fails: {one_line(error)}") from error
