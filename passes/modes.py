"""Training and evaluation mode, borrowed for a while and given back module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["kept_modes"]


@contextmanager
def kept_modes(*models: nn.Module, training: bool | None = False) -> Iterator[None]:
    """Put models into evaluation mode (or training mode; None: neither), and every module back into its own after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        if training is not None:
            for model in models:
                model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
