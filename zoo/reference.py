"""What a network computes before it is changed, in float64, and how a changed network is compared with that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from passes.differ import coarsest_dtype, distance, tolerance
from zoo.inputs import View

__all__ = ["Reference", "in_double", "reference_of", "weakness"]

LOOSE = 1e-2
"""Relative error from which an allowance would let a wrong fold pass."""


@dataclass
class Reference:
    """What the network computed before: outputs in float64, how far its own dtype is from them, and another input."""

    outputs: list[Tensor]
    noise: float
    other: float
    allowed: float


def reference_of(model: nn.Module, view: View) -> Reference | None:
    """None where float32 and float64 give other shapes, as a selection of boxes does, or no finite numbers."""
    wanted = in_double(model, view)
    noise, other = (distance(view.run(model, view.inputs(1, seed)), wanted)[1] for seed in (0, 1))
    _forget(model)
    if not math.isfinite(noise):
        return None
    return Reference(wanted, noise, other, tolerance(noise, coarsest_dtype(model)))


def in_double(model: nn.Module, view: View) -> list[Tensor]:
    """Outputs in float64. The model is cast in place and back, which gives each number back exactly."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        inputs = tuple(x.double() for x in view.inputs(1))
        try:
            return view.run(model, inputs)
        except RuntimeError:  # of two dtypes: it makes tensors of its own, and asks for float32
            with _all_double():
                return view.run(model, inputs)
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        _forget(model)


@contextmanager
def _all_double() -> Iterator[None]:
    """Inside, what would be made in float32, by default or because it is asked for, is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs or {}))
        return (Tensor.double if func is Tensor.float else func)(*given[0], **given[1])


def _forget(model: nn.Module) -> None:
    """Networks that keep what they computed in eval mode, in the dtype of then, drop it when training begins."""
    model.train()
    model.eval()


def weakness(reference: Reference) -> str:
    """Why a comparison with these outputs says little."""
    if reference.allowed > LOOSE:
        return f"the network amplifies rounding to {reference.noise:.0e}: the proofs of its folds say more"
    return "the outputs hardly depend on the input" if reference.other < 1e-6 else ""
