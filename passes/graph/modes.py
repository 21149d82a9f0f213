"""Training and evaluation mode, borrowed for a while and given back module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["kept_modes"]


@contextmanager
def kept_modes(*models: nn.Module, training: bool = False) -> Iterator[None]:
    """Put models into evaluation mode (or training mode), and every module back into its own after.

    Only the flags are set: a model's own ``train`` may do more than that, and would not be undone.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode
