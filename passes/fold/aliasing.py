"""The guard for tensors that are changed in place: a fold computes without them what was computed with them.

Each rule speaks of tensors that share memory (a view, the result of an in-place operation) and of the order of the
original operations. They hold for every region, whatever its laws.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from passes.fold.regions import Region, origin
from passes.graph.dataflow import Flow
from passes.refusal import Reason, Refusal

__all__ = ["Memory"]

_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze", "chunk", "split",
    "tensor_split", "narrow", "select", "getitem", "contiguous", "movedim", "moveaxis", "swapaxes", "swapdims",
    "expand", "unbind", "detach", "view_as", "reshape_as", "expand_as", "to", "float", "double", "type_as", "t",
    "unfold", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "stochastic_depth",
}  # fmt: skip
"""What may give its input back, or a part of it, without a copy."""

_AUGMENTED = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}


class Memory:
    """Which values of a unit share memory, and who changes it. Read before any region is contracted."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.reads = {node: [] if flow.shape_only(node) else list(node.all_input_nodes) for node in flow.nodes}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, values in self.reads.items():
            for value in values:
                self.readers[value].append(node)
        self.base: dict[fx.Node, fx.Node] = {}
        self.changes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in flow.nodes:
            changed = _changed(node, flow.modules.get(node))
            shared = changed or _viewed(node, flow.modules.get(node))
            self.base[node] = node if shared is None else self.base[shared]
            if changed is not None:
                self.changes[self.base[node]].append(node)
        self.sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, base in self.base.items():
            if base in self.changes:
                self.sharing[base].append(node)

    def refusal(self, region: Region) -> Refusal | None:
        """A refusal if the region's value, or a value that stays, depends on when something is changed in place."""
        if not self.changes:
            return None
        order, result = self.flow.order, origin(region.result)
        inside = {*_expanded(region.between), *region.dying}
        dying = set(region.dying)
        # Rule 1: what the fold reads is what the algebra takes it for, not changed since it was computed.
        for user in inside:
            for value in self.reads.get(user, ()):
                for change in self._changes_of(value):
                    if order[value] < order[change] < order[user]:
                        return self._say(change, "changes a tensor before the fold reads it")
        # The fold itself may read its entry as late as where its result was computed.
        entry = origin(region.entry)
        for change in self._changes_of(entry):
            if change not in dying and order[entry] < order[change] < order[result]:
                return self._say(change, "changes a tensor before the fold reads it")
        # Rule 2: a change that vanishes must not be seen by anyone else.
        for change in dying:
            base = self.base[change]
            if change not in self.changes.get(base, ()):
                continue
            if base.op in ("placeholder", "get_attr"):
                return self._say(change, "changes a tensor that its caller holds")
            for value in self.sharing[base]:
                seen = any(u not in dying and order[u] > order[change] for u in self.readers[value])
                if seen and value is not result:
                    return self._say(change, "changes a tensor that is read again later")
        # Rule 3: the fold's result is a new tensor, so a later change no longer reaches the old one.
        older = [v for v in self.sharing.get(self.base[result], ()) if v not in dying and order[v] < order[result]]
        for change in self.changes.get(self.base[result], ()) if older else ():
            if order[change] > order[result]:
                return self._say(change, "changes two values at once")
        return None

    def _changes_of(self, value: fx.Node) -> list[fx.Node]:
        return self.changes.get(self.base[value], [])

    def _say(self, change: fx.Node, what: str) -> Refusal:
        return Refusal(Reason.IN_PLACE, f"{self.flow.unit.name(change)} {what}")


def _expanded(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The traced nodes, those of folds already planned included."""
    for node in nodes:
        region = node.meta.get("region")
        if isinstance(region, Region):
            yield from _expanded(region.between)
        else:
            yield node


def _viewed(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """The input whose memory the result may share."""
    if node.op == "call_module":
        known = isinstance(module, (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd))
    else:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        known = node.op in ("call_method", "call_function") and name in _VIEWS
    return _first(node) if known else None


def _changed(node: fx.Node, module: nn.Module | None) -> fx.Node | None:
    """The input that is changed in place."""
    first = _first(node)
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


def _first(node: fx.Node) -> fx.Node | None:
    return next((a for a in [*node.args, *node.kwargs.values()] if isinstance(a, fx.Node)), None)


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
