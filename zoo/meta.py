"""Architectures without numbers: networks on the meta device, where building one costs neither memory nor drawing."""

from __future__ import annotations

import torch
from torch import nn

from reparam import sources

__all__ = ["parameters_of", "skeleton"]


def skeleton(spec: str) -> nn.Module:
    """The network on the meta device, in eval mode.

    Raises whatever its constructor raises: some ask their weights for values, which are not there.
    """
    with torch.device("meta"):
        return sources.create(spec).eval()


def parameters_of(spec: str) -> int | None:
    """How many parameters an architecture has; None if that cannot be told without building it."""
    try:
        model = skeleton(spec)
    # A constructor may need real numbers, and then fail in any way.
    except Exception:
        return None
    return sum(parameter.numel() for parameter in model.parameters())
