"""How the layers behind a node read its tensor: number of spatial dimensions, channels, which axis they stand on."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from passes.fold.regions import Region
from passes.graph.dataflow import Constants, Flow
from passes.laws.probe import ProbedForms
from passes.laws.values import View
from passes.refusal import Reason, RefusalError

__all__ = ["is_conv", "views"]

_CONVS = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)
_FUNCTIONS: dict[Any, int] = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_RESHAPES = {
    "getitem", "chunk", "split", "tensor_split", "narrow", "select", "index_select", "unbind", "cat", "concat",
    "concatenate", "stack", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
}  # fmt: skip


def views(flow: Flow, entry: fx.Node) -> list[tuple[View, int]]:
    """How the layers behind ``entry`` read its tensor: spatial dimensions and channels.

    A layer behind a slice, a split or a reshape does not say how many channels the entry has: that must be known from
    what made the entry, or the entry is not read that way.
    """
    found: dict[View, int] = {}
    todo: list[tuple[fx.Node, tuple[fx.Node, ...], int]] = [(entry, (), 0)]
    seen = {(entry, False)}
    known, rank = flow.channels.get(entry), flow.rank.get(entry)
    while todo:
        node, path, depth = todo.pop(0)
        for user in node.users:
            if (user, bool(path)) in seen or user not in flow.affine or flow.shape_only(user):
                continue
            seen.add((user, bool(path)))
            demand = _demand(flow, user, entry)
            if demand is None:
                if depth < 6:
                    todo.append((user, (*path, user) if _reshapes(flow, user) else path, depth + 1))
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


def _reshapes(flow: Flow, node: fx.Node) -> bool:
    """Whether an operation may change how many channels there are, or which dimension holds them."""
    if node.op == "call_module":
        return isinstance(flow.modules[node], (nn.Flatten, nn.Unflatten))
    return (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _RESHAPES


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


def _demand(flow: Flow, node: fx.Node, entry: fx.Node) -> tuple[View, int] | None:
    region = node.meta.get("region")
    if isinstance(region, Region):
        return region.view, region.channels
    module = flow.modules.get(node)
    if isinstance(module, nn.Linear):
        return View(0, last=True, rank=flow.rank.get(entry)), module.in_features
    if module is not None:
        n = next((i for i, kind in enumerate(_CONVS, start=1) if isinstance(module, kind)), None)
        if n is not None:
            return View(n), int(module.in_channels)  # type: ignore[arg-type]
        refusal = flow.unit.opaque.get(str(node.target))
        untraceable = refusal is not None and refusal.reason is Reason.UNTRACEABLE  # one with a hook must not be run
        return ProbedForms.of(flow.unit).demand(module) if untraceable else None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    n = {**_FUNCTIONS, **_TRANSPOSED}.get(node.target)
    if n is None or not isinstance(weight, fx.Node) or weight not in flow.constant:
        return None
    try:
        shape = Constants(flow, None).value(weight).shape
    except RefusalError:
        return None
    if n == 0:
        return View(0, last=True, rank=flow.rank.get(entry)), int(shape[1])
    if node.target in _TRANSPOSED:
        return View(n), int(shape[0])
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return View(n), int(shape[1]) * (groups if isinstance(groups, int) else 1)


def is_conv(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer, or stands for a region that folds into one."""
    function = node.target in _FUNCTIONS or node.target in _TRANSPOSED
    return "region" in node.meta or function or isinstance(flow.modules.get(node), (_ConvNd, nn.Linear))
