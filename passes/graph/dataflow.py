"""The dataflow of one traced unit: what each node does, what is constant, who holds which weight."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx

from passes.graph.capture import Unit
from passes.graph.constants import Constants, find_constants, holder_tensors
from passes.graph.memory import memory_of
from passes.graph.opset import SLOPED, Kind, Operation, argument, is_shape_query, operation_of
from passes.graph.shapes import cast_to, shapes_of
from passes.refusal import PROBED, Reason, Refusal

__all__ = ["Constants", "Flow", "holder_tensors"]


class Flow:
    """Facts about a unit's graph that every region needs.

    Args:
        unit: the traced unit.
        owners: how many places of the whole model register the tensor of an id.
        ranks: numbers of dimensions of the unit's placeholders, None where unknown.
    """

    def __init__(self, unit: Unit, owners: dict[int, int], ranks: Iterable[int | None] = ()) -> None:
        self.unit = unit
        self.owners = owners
        self.nodes: list[fx.Node] = list(unit.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.sources: dict[fx.Node, list[fx.Node]] = {node: node.all_input_nodes for node in self.nodes}
        self.questions = {node for node in self.nodes if is_shape_query(node.op, node.target, node.args)}
        self.modules = {n: unit.module(n) for n in self.nodes if n.op == "call_module"}
        self.held = {n: unit.attribute(str(n.target)) for n in self.nodes if n.op == "get_attr"}
        self.operations: dict[fx.Node, Operation] = {
            n: op for n in self.nodes if (op := operation_of(n, self.modules.get(n))) is not None
        }
        self.memory = memory_of(self.nodes, self.operations, self.modules, self.held, unit.opaque)
        written = self._written()
        self.constant = find_constants(unit, self.operations, self.held, written)
        self.tensors = {n: holder_tensors(value) for n, value in [*self.modules.items(), *self.held.items()]}
        self.tensors |= {n: [] for n in self.held if "looked" in n.meta}  # for what else the layer says of itself
        self.holders: dict[int, set[fx.Node]] = defaultdict(set)
        for node, tensors in self.tensors.items():
            for tensor in tensors:
                self.holders[id(tensor)].add(node)
        shapes = shapes_of(self.nodes, self.operations, self.modules, self.held, self.constant, ranks)
        self.rank, self.channels, self.dtype = shapes.rank, shapes.channels, shapes.dtype
        self.refused = self._refused(written)
        self.affine = {n for n in self.nodes if self._has_law(n) or self._may_be_probed(n) or self._is_unread_layer(n)}

    @functools.cached_property
    def planned(self) -> Constants:
        """Constants as they are for planning, each computed once."""
        return Constants(self, None)

    def sharers(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that hold one of the weights that ``node`` holds."""
        return {other for t in self.tensors.get(node, ()) for other in self.holders[id(t)]}

    def shape_only(self, user: fx.Node) -> bool:
        """Whether ``user`` asks only for its input's shape."""
        return user in self.questions

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that ``node`` depends on, for their data or their shape; constants left out."""
        return [n for n in self.sources[node] if n not in self.constant]

    def _has_law(self, node: fx.Node) -> bool:
        operation = self.operations.get(node)  # graphs of aten calls are not read yet
        if operation is not None and operation.id in SLOPED and not self._is_straight(node):
            return False
        return operation is not None and operation.affine and not isinstance(node.target, torch._ops.OpOverload)

    def _is_straight(self, node: fx.Node) -> bool:
        """Whether an activation's slope below zero is that above."""
        module, slope = self.modules.get(node), argument(node, 1, "negative_slope", 0.01)
        if module is not None:
            slope = getattr(module, "negative_slope", None) if "weight" not in module._parameters else module.weight
        elif isinstance(slope, fx.Node) or "weight" in node.kwargs:
            weight = node.kwargs.get("weight", slope)
            slope = self.held.get(weight) if isinstance(weight, fx.Node) else None
        if isinstance(slope, torch.Tensor):
            return not slope.is_meta and bool((slope == 1).all())
        return isinstance(slope, (int, float)) and slope == 1

    def _may_be_probed(self, node: fx.Node) -> bool:
        refusal = self.unit.opaque.get(str(node.target)) if node.op == "call_module" else None
        alone = len(node.args) == 1 and not node.kwargs
        return refusal is not None and refusal.reason in PROBED and alone

    def _is_unread_layer(self, node: fx.Node) -> bool:
        """Whether this is a layer with options that no law knows, which is worth saying."""
        return "refusal" in node.meta and node.meta["refusal"].reason is not Reason.NOT_AFFINE

    def _written(self) -> set[fx.Node]:
        """Values made of weights that the forward changes, and those read under an older name after a change."""
        found: set[fx.Node] = set()
        for change, into in self.memory.written.items():
            for values in (self.memory.sharing(value) for value in into):
                stale = any(
                    self.order[user] > self.order[change] > self.order[value]
                    for value in values
                    for user in value.users
                )
                if stale or any(value.op == "get_attr" for value in values):
                    found.update(values)
        return found

    def _refused(self, written: set[fx.Node]) -> dict[fx.Node, Refusal]:
        """What must not be folded although it has a law: casts, promotions, weights that the forward changes."""
        refused: dict[fx.Node, Refusal] = {n: n.meta["refusal"] for n in self.nodes if "refusal" in n.meta}
        changed = {id(self.held[n]) for n in written if n in self.held}
        for node in self.nodes:
            operation = self.operations.get(node)
            if node in refused:
                continue
            if changed and any(id(t) in changed for t in self.tensors.get(node, ())):
                refused[node] = Refusal(Reason.IN_PLACE, "its weights are changed by a forward")
            elif operation is not None and operation.kind is Kind.CAST and not self._is_no_cast(node, operation):
                refused[node] = Refusal(Reason.CAST, "a cast or a move between devices")
            elif operation is not None and operation.kind is Kind.ARITHMETIC and node in self.dtype:
                given = {self.dtype.get(n) for n in self.inputs(node)} - {None, self.dtype[node]}
                if given and operation.affine:
                    refused[node] = Refusal(Reason.CAST, f"gives {self.dtype[node]} for {given.pop()}")
        return refused

    def _is_no_cast(self, node: fx.Node, operation: Operation) -> bool:
        """Whether a cast is to the dtype that its input has anyway."""
        given = [*node.args[1:], *(v for k, v in node.kwargs.items() if k != "memory_format")]
        wanted, value = cast_to(node, operation, self.dtype), argument(node, 0, "self")
        return (not given and operation.id == "to") or (wanted is not None and wanted == self.dtype.get(value))
