"""Layers that a forward calls several times, and always one right after the other: a unit of their own.

A head that is shared by all levels of a pyramid calls one convolution and one norm for each of them. Folded in their
slots, once, they are folded for every call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from passes.graph.call import Call
from passes.graph.capture import Unit
from passes.graph.opset import is_shape_query
from passes.refusal import Reason, Refusal

__all__ = ["runs_of"]


def runs_of(unit: Unit) -> Iterator[Unit]:
    """For each row of layers that is called as a whole, several times: one call of it as a unit."""
    if unit.others:  # where sizes decide, another way may call them otherwise
        return
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in unit.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    behind = {at: target for at, nodes in calls.items() if (target := _always_next(nodes, calls)) is not None}
    for first in [at for at in behind if at not in behind.values()]:
        row = [first]
        while row[-1] in behind:
            row.append(behind[row[-1]])
        if all(len(node.args) == 1 and not node.kwargs for node in calls[first]):
            yield _unit_of(unit, [calls[target][0] for target in row])


def _always_next(nodes: list[fx.Node], calls: dict[str, list[fx.Node]]) -> str | None:
    """The layer that alone reads each of these values, and nothing else."""
    found = set()
    for node in nodes:
        readers = [user for user in node.users if not is_shape_query(user.op, user.target, user.args)]
        if len(readers) != 1 or readers[0].op != "call_module" or readers[0].args != (node,) or readers[0].kwargs:
            return None
        found.add(str(readers[0].target))
    if len(nodes) < 2 or len(found) != 1:
        return None
    (target,) = found
    return target if len(calls[target]) == len(nodes) else None


def _unit_of(unit: Unit, row: list[fx.Node]) -> Unit:
    graph = fx.Graph()
    value = graph.placeholder("given_to_" + row[0].name)
    call = Call("", unit.root, None, (value,))
    for node in row:
        value = graph.call_module(str(node.target), (value,))
        value.meta = {**node.meta, "call": call}
    call.output = value
    graph.output(value)
    for node in graph.nodes:
        node.meta["call"] = call
    # The code that calls them calls them for every one of its values: it stays.
    fixed = {call: Refusal(Reason.SHARED, "its layers are called more than once")}
    opaque = {path: refusal for path, refusal in unit.opaque.items() if path in {str(node.target) for node in row}}
    return Unit(unit.path, unit.root, graph, [call], {}, opaque, unit.pinned, unit.read, fixed, unit.asked, unit.looked)
