"""Guards that hold for every region, whatever its laws: tensors changed in place while someone still reads them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from passes.flow import Flow
from passes.refusal import Reason, Refusal
from passes.region import Region, origin

__all__ = ["in_place_refusal", "mutations"]

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "select", "getitem", "contiguous", "movedim", "swapaxes", "expand", "unbind", "detach",
}  # fmt: skip
_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}


def mutations(flow: Flow) -> dict[fx.Node, list[fx.Node]]:
    """For every node whose tensor is changed in place: who changes it."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in flow.nodes:
        target = _mutated(node, flow.modules.get(node))
        if target is not None:
            found.setdefault(_base(target), []).append(node)
    return found


def in_place_refusal(flow: Flow, region: Region, mutated: dict[fx.Node, list[fx.Node]]) -> Refusal | None:
    """A refusal if the region's value depends on when it is computed."""
    order = {node: flow.order[origin(node)] for node in [region.entry, *region.between]}
    inside = set(region.dying) | set(region.between)
    for node in [region.entry, *region.between]:
        for change in mutated.get(_base(origin(node)), ()):
            readers = [u for u in node.users if u is not change and u in inside]
            last = max((flow.order[u] for u in readers), default=-1)
            if change in inside:
                later = [u for u in origin(node).users if flow.order.get(u, -1) > flow.order[change]]
                if later and "region" not in later[0].meta:
                    return Refusal(
                        Reason.IN_PLACE, f"{flow.unit.name(change)} changes a tensor that is read again later"
                    )
            elif flow.order[change] < last and order[node] < flow.order[change]:
                return Refusal(Reason.IN_PLACE, f"{flow.unit.name(change)} changes its input in between")
    return None


def _mutated(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    first = next((a for a in node.args if isinstance(a, fx.Node)), None)
    if first is None:
        return None
    if node.op == "call_module":
        return first if getattr(module, "inplace", False) else None
    if node.op == "call_method":
        name = str(node.target)
        return first if name.endswith("_") and not name.endswith("__") else None
    if node.op != "call_function":
        return None
    name = getattr(node.target, "__name__", "")
    changes = name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))
    return first if changes or _asked_in_place(node) else None


def _asked_in_place(node: fx.Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    target: Any = node.target
    if getattr(F, getattr(target, "__name__", ""), None) is not target or len(node.args) < 2:
        return False
    try:
        assert callable(target)
        return bool(inspect.signature(target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):
        return False


def _base(node: fx.Node) -> fx.Node:
    """The tensor that a view looks at."""
    while True:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        first = next((a for a in node.args if isinstance(a, fx.Node)), None)
        is_view = node.op in ("call_method", "call_function") and name in _VIEWS
        if not is_view or first is None:
            return node
        node = first
