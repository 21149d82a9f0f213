"""How the layers behind a node read its tensor: number of spatial dimensions, channels, which axis they stand on."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, Operation, argument, base_operation
from passes.graph.within import Within
from passes.laws.conv import contraction
from passes.laws.probe import ProbedForms
from passes.laws.regions import Contraction
from passes.laws.values import View
from passes.refusal import PROBED, RefusalError

__all__ = ["is_conv", "views", "weight_of"]


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
    if operation is None or operation.kind not in _DEMANDING or operation.id == "bmm":
        return None
    if module is not None:
        channels = module.in_features if operation.kind is Kind.LINEAR else module.in_channels
        return _view(graph, operation, entry), int(channels)  # type: ignore[arg-type]
    weight = weight_of(flow, node)
    if weight not in flow.constant:
        return None
    try:
        shape = flow.planned.value(weight).shape
    except RefusalError:
        return None
    if operation.id in ("matmul", "addmm"):
        if len(shape) != 2 or weight is not node.args[0]:
            return (_view(graph, operation, entry), int(shape[0])) if len(shape) == 2 else None
        # A 1x1 of (batch, channels, positions), if there are so many dimensions: the product itself takes any number.
        return (View(1), int(shape[1])) if graph.rank(node.args[1]) == 3 else None  # type: ignore[arg-type]
    if operation.kind is Kind.CONV:
        groups = argument(node, 6, "groups", 1)
        return _view(graph, operation, entry), int(shape[1]) * (groups if isinstance(groups, int) else 1)
    return _view(graph, operation, entry), int(shape[0 if operation.kind is Kind.CONV_TRANSPOSE else 1])


def _einsum_demand(graph: Contraction, node: fx.Node, entry: fx.Node) -> tuple[View, int] | None:
    weight = weight_of(graph.flow, node)
    if weight not in graph.flow.constant:
        return None
    read = contraction(node.args[0], node.args[1:].index(weight)) if isinstance(node.args[0], str) else None
    if read is None:
        return None
    letters, w, result, at = read
    try:
        shape = graph.flow.planned.value(weight).shape
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


def weight_of(flow: Flow, node: fx.Node) -> Any:
    """What a call of a convolution, a linear layer or a product is given as its weight."""
    operation = flow.operations.get(node)
    id = "" if operation is None else operation.id
    if id == "einsum":  # either of the two: the one that is a constant
        return (
            next((given for given in node.args[1:3] if given in flow.constant), None) if len(node.args) == 3 else None
        )
    if id == "matmul":
        if len(node.args) == 2 and node.args[0] in flow.constant:
            return node.args[0]
        return argument(node, 1, "mat2" if "mat2" in node.kwargs else "other")
    return argument(node, 2, "mat2") if id == "addmm" else argument(node, 1, "weight")


def is_conv(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer."""
    operation = flow.operations.get(node)
    return operation is not None and operation.affine and operation.kind in _DEMANDING
