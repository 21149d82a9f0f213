"""Mean and variance that each batch norm of a block would divide by, on a sample of the batch.

The branches are read once, and run as far as a norm stands. Norms whose input needs the same number of others first are
measured together, so that :class:`torch.nn.SyncBatchNorm`, which shares what it measures among processes, takes one
small reduction for all of them: one for ``acb``, two for ``dbb``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.blocks.kit.layers import BranchSum
from passes.refusal import Reason, RefusalError

__all__ = ["shared", "statistics_code"]

Moments = tuple[Tensor, Tensor]


class _Branches(fx.Tracer):
    """Reads a block down to the modules that hold no batch norm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or not any(isinstance(child, _BatchNorm) for child in m.modules())


def statistics_code(block: BranchSum, norms: tuple[str, ...]) -> Any:
    """A function of a block and a sample that gives mean and variance for each of its norms, in their order.

    What only the sum needs is left out: the last norm of a branch is measured and not run.
    """
    graph = _Branches().trace(block)
    depth: dict[fx.Node, int] = {}
    """How many norms stand before each value."""
    calls: dict[str, fx.Node] = {}
    for node in graph.nodes:
        depth[node] = max((depth[each] for each in node.all_input_nodes), default=0)
        if node.op == "call_module" and str(node.target) in norms:
            if str(node.target) in calls:
                raise RefusalError(Reason.BLOCK, f"its norm {node.target} is called twice: it cannot be sampled")
            calls[str(node.target)], depth[node] = node, depth[node] + 1
    if missing := [path for path in norms if path not in calls]:
        raise RefusalError(Reason.BLOCK, f"nothing calls its norm {missing[0]}: it cannot be sampled")
    output = graph.output_node()
    for node in sorted(graph.nodes, key=depth.__getitem__):  # a stable sort, so that values stay behind their inputs
        if node is not output:
            output.prepend(node)
    measured: dict[str, fx.Node] = {}
    for level in sorted({depth[node] for node in calls.values()}):
        here = {path: node for path, node in calls.items() if depth[node] == level}
        with graph.inserting_before(min(here.values(), key=list(graph.nodes).index)):
            held = {path: graph.get_attr(path) for path in here}
            inputs = tuple(node.args[0] for node in here.values())
            found = graph.call_function(statistics, (tuple(held.values()), inputs))
            for i, path in enumerate(here):
                measured[path] = graph.call_function(_item, (found, i))
        for path, node in here.items():
            with graph.inserting_before(node):
                normed = graph.call_function(normalised, (held[path], node.args[0], measured[path]))
            node.replace_all_uses_with(normed)
            graph.erase_node(node)
    output.args = ([measured[path] for path in norms],)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(code.src, names)
    return names["forward"]


def shared(norms: Iterable[_BatchNorm]) -> bool:
    """Whether one of these norms shares its statistics with other processes."""
    several = distributed.is_available() and distributed.is_initialized()
    return several and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def _item(found: Any, i: int) -> Any:
    return found[i]


def statistics(norms: tuple[_BatchNorm, ...], xs: tuple[Tensor, ...]) -> list[Moments]:
    """Mean and variance with which each norm divides its ``(N, C, ...)``; the running ones of norms in training move.

    In evaluation they are its own. Half precision is measured in float32, as torch does.
    """
    found: list[Any] = [(norm.running_mean, norm.running_var) for norm in norms]
    counts: dict[int, Any] = {}
    for i, (norm, x) in enumerate(zip(norms, xs, strict=True)):
        if norm.training:
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            found[i], counts[i] = _moments(x), x.numel() // x.shape[1]
    wide = [i for i in counts if shared([norms[i]])]
    for group in {id(group): group for group in (norms[i].process_group for i in wide)}.values():
        mine = [i for i in wide if norms[i].process_group is group]
        every = _over_processes([found[i] for i in mine], [counts[i] for i in mine], group)
        for i, (mean, var, count) in zip(mine, every, strict=True):
            found[i], counts[i] = (mean, var), count
    for i, count in counts.items():
        mean, var = found[i]
        _move(norms[i], mean.detach(), var.detach(), count)
    return found


def _moments(x: Tensor) -> Moments:
    """Mean and variance per channel of ``(N, C, ...)``."""
    over = [0, *range(2, x.dim())]
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, over, correction=0)
        return mean, var
    # On the CPU var_mean goes through the numbers one by one, and takes longer than two passes.
    mean = x.mean(over, keepdim=True)
    return mean.flatten(), (x - mean).square().mean(over)


def normalised(norm: _BatchNorm, x: Tensor, moments: Moments) -> Tensor:
    """What a norm gives, with the mean and variance that were measured."""
    mean, var = moments
    factor: Tensor = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -mean * factor if norm.bias is None else norm.bias - mean * factor
    sizes = (-1, *(1,) * (x.dim() - 2))
    return torch.addcmul(shift.reshape(sizes), x, factor.reshape(sizes)).to(x.dtype)


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
    if norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        counter = norm.num_batches_tracked
        if counter is not None:
            counter.add_(1)
        momentum: Any = norm.momentum
        if momentum is None:
            momentum = 1.0 if counter is None else (1.0 / counter).to(mean.dtype)
        unbiased = var * (count / (count - 1 if isinstance(count, Tensor) else max(count - 1, 1)))
        for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.mul_(1 - momentum).add_((momentum * now).to(running.dtype))
