"""What a network computes before it is changed, in float64, and how a changed network is compared with that."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from passes.proof.compare import coarsest_dtype, distance, tolerance
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
    """Outputs in float64; the model stays as it is. See :class:`_Double`."""
    inputs = tuple(x.double() for x in view.inputs(1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            return view.run(model, inputs)
    finally:
        torch.set_default_dtype(before)
        _forget(model)


class _Double(TorchFunctionMode):
    """Inside, each function works in float64, also where a network asks for float32.

    A cast copy of the network would be twice its size; here a weight is cast where it is used, and its copy is gone
    with the function's call.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CASTS:
            return args[0].double()
        # What is changed in place must be the tensor itself.
        kept = args[:1] if _IN_PLACE.fullmatch(getattr(func, "__name__", "")) else ()
        return func(*kept, *tree_map(_double, args[len(kept) :]), **tree_map(_double, kwargs or {}))


_COARSE = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_IN_PLACE = re.compile(r"(?!__).*(?<!_)_|__(setitem|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor))__")


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _COARSE else value
    return torch.float64 if value in _COARSE else value


def _forget(model: nn.Module) -> None:
    """Networks that keep what they computed in eval mode, in the dtype of then, drop it when training begins."""
    model.train()
    model.eval()


def weakness(reference: Reference) -> str:
    """Why a comparison with these outputs says little."""
    if reference.allowed > LOOSE:
        return f"the network amplifies rounding to {reference.noise:.0e}: the proofs of its folds say more"
    return "the outputs hardly depend on the input" if reference.other < 1e-6 else ""
