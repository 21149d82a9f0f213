"""Mean and variance of what batch norms divide, without that they divide it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Affine", "Moments", "Padded", "affine", "measures", "per_channel", "shared", "statistics", "with_rows"]

Moments = tuple[Tensor, Tensor]
"""Mean and variance per channel."""

Affine = tuple[Tensor, Tensor]
"""Factor and shift per channel."""

Padded = tuple[Tensor, tuple[int, ...], Affine | None]
"""``shift + factor * pad(x)`` of a map ``x``, padded with zeros as :func:`torch.nn.functional.pad` takes it."""


def measures(norm: _BatchNorm) -> bool:
    """Whether a norm divides by what it finds in its batch: in evaluation mode too if it keeps nothing else."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def shared(norms: Iterable[_BatchNorm]) -> bool:
    """Whether one of these norms shares its statistics with other processes."""
    several = distributed.is_available() and distributed.is_initialized()
    return several and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def statistics(norms: tuple[_BatchNorm, ...], values: tuple[Padded, ...]) -> list[tuple[Moments, Tensor]]:
    """Mean and variance with which each norm divides its ``(N, C, ...)``; the running ones of norms in training move.

    In evaluation they are its own. Half precision is measured in float32, as torch does. Beside them stands each
    value's map, for whoever reads it behind the norm: autograd then has one gradient for both.
    """
    found: list[Any] = [(norm.running_mean, norm.running_var) for norm in norms]
    maps = [value[0] for value in values]
    counts: dict[int, Any] = {}
    for i, (norm, value) in enumerate(zip(norms, values, strict=True)):
        if measures(norm):
            norm._check_input_dim(value[0])
            maps[i], found[i], counts[i] = _measured(*value)
            if counts[i] == 1 and not shared([norm]):
                told = f"Expected more than 1 value per channel when training, got input size {value[0].shape}"
                raise ValueError(told)
    wide = [i for i in counts if shared([norms[i]])]
    for group in {id(group): group for group in (norms[i].process_group for i in wide)}.values():
        mine = [i for i in wide if norms[i].process_group is group]
        every = _over_processes([found[i] for i in mine], [counts[i] for i in mine], group)
        for i, (mean, var, count) in zip(mine, every, strict=True):
            found[i], counts[i] = (mean, var), count
    for i, count in counts.items():
        mean, var = found[i]
        _move(norms[i], mean.detach(), var.detach(), count)
    return list(zip(found, maps, strict=True))


def affine(norm: _BatchNorm, moments: Moments, before: Affine | None) -> Affine:
    """What a norm multiplies with and adds to a map, on which ``before`` was not applied yet."""
    mean, var = moments
    factor: Tensor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    if before is not None:
        mean = mean - before[1]
    shift = -mean * factor if norm.bias is None else norm.bias - mean * factor
    return (factor if before is None else factor * before[0]), shift


def per_channel(numbers: Tensor, n: int) -> Tensor:
    """``(C,)`` to go with ``(N, C, ...)`` of ``n`` more dimensions."""
    return numbers.reshape(-1, *(1,) * n)


def _measured(x: Tensor, pads: tuple[int, ...], before: Affine | None) -> tuple[Tensor, Moments, int]:
    """A map, mean and variance, and of how many positions: those of the map itself tell them for zeros around it."""
    # Derivatives forwards are those of its formulas; one that is written here could not be compiled.
    x, mean, var = _Moments.apply(x) if forward_ad._current_level < 0 else _Moments.forward(x)
    count, share = x.shape[0], 1.0
    for i, size in enumerate(reversed(x.shape[2:])):
        whole = size + (pads[2 * i] + pads[2 * i + 1] if 2 * i < len(pads) else 0)
        count, share = count * whole, share * (size / whole)
    if any(pads):
        mean, var = share * mean, share * (var + (1 - share) * mean.square())
    if before is not None:
        factor, shift = before
        mean, var = shift + factor * mean, factor.square() * var
    return x, (mean, var), count


class _Moments(torch.autograd.Function):
    """A map ``(N, C, ...)``, its mean and variance per channel: autograd keeps fewer maps than for formulas."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        over, wide, n = [0, *range(2, x.dim())], _wide(x), x.numel() // x.shape[1]
        if n == 0:  # one of several processes has no batch
            return x.view_as(x), wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
        if x.device.type != "cpu":
            var, mean = torch.var_mean(wide, over, correction=0)
            return x.view_as(x), mean, var
        # On the CPU var_mean goes through the numbers one by one, and takes longer than several passes.
        mean = wide.mean(over, keepdim=True)
        squares = (wide - mean).pow_(2).sum(over)
        return x.view_as(x), mean.flatten(), squares / n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output[:2])

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_mean: Tensor, of_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = max(x.numel() // x.shape[1], 1)
        factor = of_var * (2 / n)
        shift = of_mean / n - factor * mean
        factor, shift = (per_channel(each, x.dim() - 2) for each in (factor, shift))
        # One pass; on the CPU it takes longer than two.
        own = (_wide(x) * factor).add_(shift) if x.is_cpu else torch.addcmul(shift, _wide(x), factor)
        return own.add_(of_x).to(x.dtype)


def with_rows(x: Tensor, step: int, rows: int) -> tuple[Tensor, Tensor]:
    """A batch ``(N, ...)`` to be read by one operation that makes a gradient of its own, and some rows of it."""
    if rows == x.shape[0] or forward_ad._current_level >= 0:
        return x, x[::step][:rows]
    whole, some = _WithRows.apply(x, step, rows)
    return whole, some


class _WithRows(torch.autograd.Function):
    """A batch and rows of it: their gradient goes into that of the batch, where a slice would make a map of zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, step: int, rows: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x[::step][:rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.step, ctx.rows = inputs

    @staticmethod
    def backward(ctx: Any, of_whole: Tensor, of_rows: Tensor) -> tuple[Tensor, None, None]:
        of_whole[:: ctx.step][: ctx.rows].add_(of_rows)
        return of_whole, None, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _over_processes(found: list[Any], counts: list[int], group: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Means, variances and numbers of positions of all processes, of each process's own, in one reduction."""
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    like = found[0][0]
    own = torch.cat([torch.cat([*each, like.new_full((1,), n)]) for each, n in zip(found, counts, strict=True)])
    slots = torch.cat([like.new_zeros(rank, own.numel()), own[None], like.new_zeros(size - rank - 1, own.numel())])
    every, totals, at = _Sum.apply(slots, group), [], 0
    for mean, _ in found:
        channels = mean.numel()
        means, variances, numbers = every[:, at : at + 2 * channels + 1].split([channels, channels, 1], 1)
        share, at = numbers / numbers.sum(), at + 2 * channels + 1
        whole = (share * means).sum(0)
        totals.append((whole, (share * (variances + (means - whole).square())).sum(0), numbers.sum()))
    return totals


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is one too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


def _move(norm: _BatchNorm, mean: Tensor, var: Tensor, count: Any) -> None:
    """Move a norm's running statistics as its own forward does."""
    if norm.running_mean is None or norm.running_var is None or not norm.track_running_stats:
        return
    with torch.no_grad():
        counter = norm.num_batches_tracked
        if counter is not None:
            counter.add_(1)
        momentum: Any = norm.momentum
        if momentum is None:
            momentum = 0.0 if counter is None else (1.0 / counter).to(mean.dtype)
        unbiased = var * (count / (count - 1 if isinstance(count, Tensor) else max(count - 1, 1)))
        for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.mul_(1 - momentum).add_((momentum * now).to(running.dtype))
