"""How the layers behind a node read its tensor: number of spatial dimensions, channels, which axis they stand on."""

from __future__ import annotations

import operator

from torch import fx

from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, Operation, argument, base_operation
from passes.graph.within import Within
from passes.laws.conv import contraction
from passes.laws.probe import ProbedForms
from passes.laws.regions import Contraction
from passes.laws.values import View
from passes.refusal import PROBED, RefusalError

__all__ = ["is_conv", "views"]


def views(graph: Contraction, entry: fx.Node) -> list[tuple[View, int]]:
    """How the layers behind ``entry`` read its tensor: spatial dimensions and channels.

    A layer behind a slice, a split or a reshape does not say how many channels the entry has: that must be known from
    what made the entry, or the entry is not read that way.
    """
    flow = graph.flow
    found: dict[View, int] = {}
    todo: list[tuple[fx.Node, tuple[fx.Node, ...], int]] = [(entry, (), 0)]
    seen = {(entry, False)}
    known, rank = graph.channels(entry), graph.rank(entry)
    while todo:
        node, path, depth = todo.pop(0)
        for user in graph.readers(node):
            if (user, bool(path)) in seen or user not in flow.affine or flow.shape_only(user):
                continue
            seen.add((user, bool(path)))
            demand = _demand(graph, user, entry)
            if demand is None:
                if depth < 6:
                    todo.append((user, (*path, user) if _resizes(flow, user) else path, depth + 1))
                continue
            view, count = demand
            if not view.last and rank not in (None, view.n + 2):
                continue
            if any(_drops_channels(step, view) for step in path):
                count = known if known is not None and not view.last and rank is not None else 0
            elif known is not None and not view.last:
                count = known
            if count:
                found.setdefault(view, count)
    return list(found.items())


def _resizes(flow: Flow, node: fx.Node) -> bool:
    """Whether an operation may change how many channels there are, or which dimension holds them."""
    operation = flow.operations.get(node)
    return operation is not None and operation.resizes


def _drops_channels(node: fx.Node, view: View) -> bool:
    """Whether the layers behind may see fewer channels than there are; a crop along space leaves them all."""
    if node.target is not operator.getitem or view.last:
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if None in index:
        return True
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *(slice(None),) * (view.n + 3 - len(index)), *index[at + 1 :])
    return any(item != slice(None) for item in index[:2])


def _demand(graph: Contraction, node: fx.Node, entry: fx.Node) -> tuple[View, int] | None:
    flow, region = graph.flow, graph.regions.get(node)
    if region is not None:
        return None if region.is_alias else (region.view, region.channels)
    module, operation = flow.modules.get(node), flow.operations.get(node)
    if module is not None and operation is None:
        refusal = flow.unit.opaque.get(str(node.target))
        if refusal is None or refusal.reason not in PROBED:  # one with a hook must not be run
            return None
        if isinstance(module, Within) and module.inside is not None:
            return View(module.inside.geometry.n), module.inside.geometry.in_channels
        operation = base_operation(module)  # what it computes is tried, how it reads its input is told by its base
        if operation is None or operation.kind not in (Kind.CONV, Kind.CONV_TRANSPOSE):
            return ProbedForms.of(flow.unit).demand(module)
    if operation is not None and operation.id == "einsum":
        return _einsum_demand(graph, node, entry)
    if operation is None or operation.kind not in _DEMANDING or operation.id in ("matmul", "addmm", "bmm", "einsum"):
        return None
    if module is not None:
        channels = module.in_features if operation.kind is Kind.LINEAR else module.in_channels
        return _view(graph, operation, entry), int(channels)  # type: ignore[arg-type]
    weight = argument(node, 1, "weight")
    if not isinstance(weight, fx.Node) or weight not in flow.constant:
        return None
    try:
        shape = flow.planned.value(weight).shape
    except RefusalError:
        return None
    if operation.kind is Kind.CONV:
        groups = argument(node, 6, "groups", 1)
        return _view(graph, operation, entry), int(shape[1]) * (groups if isinstance(groups, int) else 1)
    return _view(graph, operation, entry), int(shape[0 if operation.kind is Kind.CONV_TRANSPOSE else 1])


def _einsum_demand(graph: Contraction, node: fx.Node, entry: fx.Node) -> tuple[View, int] | None:
    equation, operands = node.args[0], node.args[1:]
    read = contraction(equation) if isinstance(equation, str) and len(operands) == 2 else None
    weight = operands[read[3]] if read is not None else None
    if read is None or weight not in graph.flow.constant:
        return None
    letters, w, result, _, at = read
    try:
        shape = graph.flow.planned.value(weight).shape  # type: ignore[arg-type]
    except RefusalError:
        return None
    rank = graph.rank(entry) if "~" in letters else len(letters)
    if len(shape) != 2:
        return None
    channels = int(shape[0 if w[0] not in result else 1])
    if at == len(letters) - 1:
        return View(0, last=True, rank=rank), channels
    return None if rank is None or at != 1 else (View(rank - 2), channels)


_DEMANDING = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR)


def _view(graph: Contraction, operation: Operation, entry: fx.Node) -> View:
    return View(0, last=True, rank=graph.rank(entry)) if operation.n is None else View(operation.n)


def is_conv(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer."""
    operation = flow.operations.get(node)
    return operation is not None and operation.affine and operation.kind in _DEMANDING
