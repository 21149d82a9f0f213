"""Make an untrained network a meaningful test of a fold.

At initialisation a batch norm is almost the identity, residual branches end in a zero gamma and layer scales are
1e-5: a fold that forgot any of them would pass. Here each of them gets a value that matters, from a seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["randomise_"]

TINY = 0.1
"""A constant parameter smaller than this (a layer scale) would hide its branch, so it is not kept as the centre."""


@torch.no_grad()
def randomise_(model: nn.Module, seed: int, example_inputs: Sequence[Any] | None = None) -> nn.Module:
    """Give batch norms random statistics and every constant parameter non-constant values; returns ``model``.

    Weights keep their initialisation. A parameter whose elements are all equal (gamma and beta of norms, biases,
    layer scales, a classifier that starts at zero) was not initialised at random, and is recognised by that,
    whatever its name.

    Args:
        model: changed in place; put in eval mode.
        seed: the same seed gives the same values, whatever the global generator's state.
        example_inputs: if given, running statistics are near those of a forward pass on these inputs, times random
            factors, so that neither signals nor rounding explode on the way through a deep network.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in _constants(model):
        parameter.copy_(_scattered(parameter, generator))
    norms = list(_norms(model))
    for norm in norms:
        norm.running_mean.copy_(_normal(norm.running_mean, generator) * 0.1)
        norm.running_var.copy_(_uniform(norm.running_var, generator, 0.5, 2.0))
    model.eval()
    if example_inputs is not None:
        _calibrate(model, norms, example_inputs)
        for norm in norms:
            # Samples grow alike on their way through a deep random network. A norm that blows up what is left of their
            # difference blows up rounding as well, until outputs prove nothing: so it divides by the spread about zero.
            spread = norm.running_var.add_(norm.running_mean.square()).sqrt()
            norm.running_mean.add_(_normal(norm.running_mean, generator).to(spread) * 0.3 * spread)
            norm.running_var.mul_(_uniform(norm.running_var, generator, 0.5, 2.0).to(spread)).clamp_(min=1e-3)
    return model


def _norms(model: nn.Module) -> Iterator[Any]:
    """Batch norms of any class, known by their running statistics."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            yield module


def _constants(model: nn.Module) -> Iterator[Tensor]:
    """Floating parameters (and frozen norms' affine buffers) whose elements are all equal, each once."""
    frozen = [norm.get_buffer(name) for norm in _norms(model) for name in ("weight", "bias") if name in norm._buffers]
    for value in [*model.parameters(), *frozen]:
        if value.is_floating_point() and value.numel() and bool((value == value.flatten()[0]).all()):
            yield value


def _scattered(constant: Tensor, generator: torch.Generator) -> Tensor:
    """Random values around a constant: small around zero, within a factor of 1.5 elsewhere, never tiny."""
    centre = float(constant.flatten()[0])
    if centre == 0.0:
        return _normal(constant, generator) * 0.2
    if abs(centre) < TINY:
        return _uniform(constant, generator, 0.2, 0.5)
    return centre * _uniform(constant, generator, 0.5, 1.5)


def _calibrate(model: nn.Module, norms: Sequence[Any], example_inputs: Sequence[Any]) -> None:
    """Set running statistics to those of one forward pass, through the batch norms' own training mode."""
    trainable = [norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in trainable]
    for norm in trainable:
        norm.train()
        norm.momentum = 1.0
    try:
        model(*example_inputs)
    finally:
        for norm, momentum in zip(trainable, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _uniform(like: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    return torch.rand(like.shape, generator=generator) * (high - low) + low
