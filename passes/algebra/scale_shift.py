"""A scale and a shift per channel: what a batch norm is in evaluation, in half of its numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ScaleShift"]


class ScaleShift(nn.Module):
    """``weight * x + bias``, one number of each per channel.

    Args:
        channels: C, the size of dimension 1 of the input.
        dims: n, how many dimensions stand behind it.
        device: of the numbers.

    Shape: ``(N, C, *n)`` to the same; weight and bias are ``(C, 1, ...)`` with n ones. The result has the wider of the
    dtypes of input and numbers, as any arithmetic of torch, under autocast too.
    """

    def __init__(self, channels: int, dims: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.channels, self.dims = channels, dims
        shape = channels, *(1,) * dims
        self.weight = nn.Parameter(torch.ones(shape, device=device))
        self.bias = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.channels}, dims={self.dims}"
