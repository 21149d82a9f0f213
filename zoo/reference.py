"""What a network computes before it is changed, in float64, and how a changed network is compared with that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from passes.proof.compare import coarsest_dtype, distance, tolerance
from passes.proof.run import Double
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
    return Reference(wanted, noise, other, max(tolerance(noise, coarsest_dtype(model)), 10 * noise))


def in_double(model: nn.Module, view: View) -> list[Tensor]:
    """Outputs in float64; the model stays as it is: a copy of it in float64 would be twice its size."""
    try:
        with Double():
            return view.run(model, tuple(x.double() for x in view.inputs(1)))
    finally:
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Networks that keep what they computed in eval mode, in the dtype of then, drop it when training begins."""
    model.train()
    model.eval()


def weakness(reference: Reference) -> str:
    """Why a comparison with these outputs says little."""
    if reference.allowed > LOOSE:
        return f"the network amplifies rounding to {reference.noise:.0e}: the proofs of its folds say more"
    return "the outputs hardly depend on the input" if reference.other < 1e-6 else ""
