"""A network as a file that runs without this library: torch.export's (``.pt2``), or ONNX.

Each file is written beside its place, read again, run, and compared with the network before it gets its name.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import reparam
from passes.graph.inputs import declared_shape
from reparam import ReparamError, Verdict
from reparam.disk import replace_file
from reparam.networks import UsageError

__all__ = ["DIMENSIONS", "SUFFIXES", "inputs_for", "parse_dynamic", "write_program"]

SUFFIXES = (".pt2", ".onnx")
DIMENSIONS = {"batch": 0, "height": 2, "width": 3}
"""Which dimensions of the images may be left open, by name."""
OTHER = {"batch": 1, "height": 32, "width": 64}
"""How much larger an open dimension is in the second comparison."""


def parse_dynamic(text: str) -> tuple[str, ...]:
    """Names of open dimensions, comma-separated. Raises :class:`UsageError` for another name."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown:
        raise UsageError(f"--dynamic takes {', '.join(DIMENSIONS)}, got {unknown[0]!r}")
    return names


def inputs_for(model: nn.Module, shape: tuple[int, ...] = (), dynamic: Collection[str] = ()) -> tuple[Tensor, ...]:
    """Inputs to export a network with: of the size that it was trained on or is made for, else of one that it takes."""
    wanted = shape or declared_shape(model)
    batch = 2 if "batch" in dynamic else 1
    if not wanted:
        guessed = reparam.guess_inputs(model)
        if not all(isinstance(x, Tensor) for x in guessed):
            raise ReparamError(
                "the network takes more than tensors by their place; export it in Python, by your inputs"
            )
        return tuple(x[:batch] for x in guessed)
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, *wanted, generator=generator).to(first.device, first.dtype),)


def write_program(model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: Collection[str] = ()) -> str:
    """Write a network in evaluation, and say what was compared.

    Args:
        model: the network.
        path: ends in one of :data:`SUFFIXES`; its folder must exist.
        inputs: of the sizes that the file is for.
        dynamic: names of dimensions that stay open, of :data:`DIMENSIONS`.

    Raises:
        ReparamError: the exporter cannot export the network, or not with these dimensions open.
        EquivalenceError: the file computes something else.
        FileError: the file system refuses.
    """
    said: list[str] = []
    write = _write_onnx if path.suffix == ".onnx" else _write_pt2
    replace_file(path, lambda target: said.append(write(model.eval(), target, inputs, tuple(dynamic))))
    return said[0]


def _write_pt2(model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: tuple[str, ...]) -> str:
    try:
        with torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=_open(inputs, dynamic))
    # The exporter runs the network's own code, and may fail in any way.
    except Exception as error:
        raise ReparamError(_why("torch.export", error, dynamic)) from error
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        read = torch.export.load(file)
    for each in _tries(inputs, dynamic):
        reparam.verify(model, read, each).raise_if_different()
    return f"the file was read again and gives the same for {_shapes(inputs, dynamic)}"


def _write_onnx(model: nn.Module, path: Path, inputs: tuple[Tensor, ...], dynamic: tuple[str, ...]) -> str:
    import onnx_ir

    from passes.onnx.collapse import compare_with_module

    try:
        program = torch.onnx.export(
            model, inputs, dynamo=True, dynamic_shapes=_open(inputs, dynamic), verbose=False, external_data=False
        )
    # The exporter runs the network's own code, and may fail in any way.
    except Exception as error:
        raise ReparamError(_why("the ONNX exporter", error.__cause__ or error, dynamic)) from error
    assert program is not None
    program.save(path)
    read = onnx_ir.load(path, format="protobuf")
    names = [str(value.name) for value in read.graph.inputs]
    for each in _tries(inputs, dynamic):
        found = compare_with_module(model, read, dict(zip(names, (x.cpu().numpy() for x in each), strict=True)))
        found.raise_if_different()
        if found.verdict is Verdict.INCONCLUSIVE:
            return str(found)
    return f"onnxruntime gives the same for {_shapes(inputs, dynamic)}"


def _open(inputs: tuple[Tensor, ...], dynamic: tuple[str, ...]) -> Any:
    """Dimensions that must stay open: the exporter raises where the network fixes one."""
    if not dynamic:
        return None
    return tuple({DIMENSIONS[name]: Dim.DYNAMIC for name in dynamic if DIMENSIONS[name] < x.dim()} for x in inputs)


def _tries(inputs: tuple[Tensor, ...], dynamic: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
    """The inputs, and others in which every open dimension is larger."""
    if not dynamic:
        return [inputs]
    larger = []
    for x in inputs:
        shape = list(x.shape)
        for name in dynamic:
            if DIMENSIONS[name] < x.dim():
                shape[DIMENSIONS[name]] += OTHER[name]
        larger.append(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype))
    return [inputs, tuple(larger)]


def _shapes(inputs: tuple[Tensor, ...], dynamic: tuple[str, ...]) -> str:
    tried = [", ".join("x".join(map(str, x.shape)) for x in each) for each in _tries(inputs, dynamic)]
    return " and ".join(tried)


def _why(who: str, error: BaseException, dynamic: tuple[str, ...]) -> str:
    line = " ".join(str(error).split())[:300] or type(error).__name__
    fix = f"; leave out what it fixes of --dynamic {','.join(dynamic)}" if dynamic else ""
    return f"{who} cannot export the network: {line}{fix}"
