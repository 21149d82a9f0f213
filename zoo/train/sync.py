"""Batch norms that take their statistics over the whole batch where several processes each have a part of it.

torch's SyncBatchNorm is for GPUs. On the CPU the same is had by replacing the one function that every batch norm calls:
for n numbers of a channel over all processes

    mean = sum(x) / n,   var = sum((x - mean)^2) / n,   y = (x - mean) / sqrt(var + eps) * weight + bias

and the running variance takes var n / (n - 1). The sums are differentiable all-reduces, so gradients cross processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["SharedNorms"]


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs (each uses the sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


class SharedNorms(TorchFunctionMode):
    """While active, batch norms in training share their statistics over all processes of the default group."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and (kwargs or {}).get("training"):
            return _batch_norm(*args, **kwargs)
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` in training, ``(N, C, ...)``, over the batches of all processes."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    count = _Sum.apply(x.new_tensor(x.numel() / x.shape[1]))
    mean = _Sum.apply(x.sum(axes)) / count
    centred = x - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * count / (count - 1), momentum)
    y = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
