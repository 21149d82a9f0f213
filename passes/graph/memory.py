"""Which values of a graph share memory, and which operations write into it.

Both are read from the table of operations; what torch alone knows, from its own schemas. Code that nobody knows (an
opaque module, a function of the user) may return what it is given, and may change it.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from passes.graph.opset import Kind, Operation, is_shape_query, is_torch
from passes.graph.within import Within

__all__ = ["Memory", "memory_of", "shared_by", "written_by"]


class Memory:
    """Values that may share memory, and who writes.

    A value is in memory of its own, or in that of values that it was made of; two may share memory if they may be in
    the same. That is no equivalence: what code that nobody knows makes of two tensors may be either, and still those
    two are apart.

    Args:
        written: the arguments that a node writes into.
        hidden: nodes of which it is not known whether they write.
    """

    def __init__(self) -> None:
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self.hidden: set[fx.Node] = set()
        self._places: dict[fx.Node, int] = {}  # one bit for each place that a value may be in
        self._own: dict[int, int] = {}  # the bit of a tensor that is read
        self._changes: dict[int, list[fx.Node]] = {}
        self._sharing: dict[int, list[fx.Node]] = {}

    def put(self, node: fx.Node, sources: Iterable[fx.Node], held: Any = None) -> None:
        """Enter a value that may be in memory of its own, or in that of ``sources``."""
        places = 1 << len(self._places)
        if held is not None:  # a tensor is read anew wherever it is used
            places = self._own.setdefault(id(held), places)
        for source in sources:
            places |= self._places[source]
        self._places[node] = places

    def changes(self, value: fx.Node) -> list[fx.Node]:
        """The nodes that may change ``value``, in order."""
        places = self._places[value]
        if places not in self._changes:
            self._changes[places] = self._in(places, self._writers)
        return self._changes[places]

    def sharing(self, value: fx.Node) -> list[fx.Node]:
        """The values that may share memory with ``value``, itself included, in order."""
        places = self._places[value]
        if places not in self._sharing:
            self._sharing[places] = self._in(places, self._values)
        return self._sharing[places]

    # What lies in each place, found when everything is entered: most values are alone in theirs.

    @functools.cached_property
    def _values(self) -> dict[int, list[fx.Node]]:
        return _by_place(self._places)

    @functools.cached_property
    def _writers(self) -> dict[int, list[fx.Node]]:
        masks = {node: [self._places[other] for other in into] for node, into in self.written.items()}
        return _by_place({node: functools.reduce(operator.or_, places, 0) for node, places in masks.items()})

    @functools.cached_property
    def _order(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self._places)}

    def _in(self, places: int, nodes: dict[int, list[fx.Node]]) -> list[fx.Node]:
        """The nodes of several places, each once, in order."""
        found = [nodes[place] for place in _bits(places) if place in nodes]
        if len(found) <= 1:
            return found[0] if found else []
        return sorted({node for some in found for node in some}, key=self._order.__getitem__)


def _bits(places: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest


def _by_place(masks: Mapping[fx.Node, int]) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node, places in masks.items():
        for place in _bits(places):
            found.setdefault(place, []).append(node)
    return found


def memory_of(
    nodes: Iterable[fx.Node],
    operations: Mapping[fx.Node, Operation],
    modules: Mapping[fx.Node, nn.Module],
    held: Mapping[fx.Node, Any],
    opaque: Mapping[str, Any],
) -> Memory:
    """How the values of a graph lie in memory; ``held`` is what ``get_attr`` nodes read."""
    memory = Memory()
    for node in nodes:
        operation = operations.get(node)
        outward = isinstance(node.target, type) and all(user.op == "output" for user in node.users)
        if node.op in ("placeholder", "get_attr", "output") or outward:  # or what holds the results on their way out
            memory.put(node, (), held.get(node))
            continue
        hidden = operation is None and not is_torch(node)
        hidden = hidden or (node.op == "call_module" and str(node.target) in opaque)
        hidden = hidden and not isinstance(modules.get(node), Within)  # seen to give a new tensor
        if hidden:
            memory.hidden.add(node)
        changed = node.all_input_nodes if hidden else written_by(node, operation, modules.get(node))
        if changed:
            memory.written[node] = list(changed)
        memory.put(node, [*changed, *(node.all_input_nodes if hidden else shared_by(node, operation))])
    return memory


# ------------------------------------------------------------------ who writes


def written_by(node: fx.Node, operation: Operation | None, module: nn.Module | None) -> list[fx.Node]:
    """The arguments that a known operation writes into."""
    out = _nodes(node.kwargs.get("out"))
    if node.op == "call_module":
        idle = isinstance(module, _DropoutNd) and not module.training
        return _first(node) if getattr(module, "inplace", False) and not idle else out
    in_place = operation is not None and node.target in operation.in_place
    if in_place or _says_in_place(node) or _asked_in_place(node):
        return [*_first(node), *out]
    return out


def _says_in_place(node: fx.Node) -> bool:
    """Torch spells what works in place with a trailing underscore; schemas say it outright."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    )


def _asked_in_place(node: fx.Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    target: Any = node.target
    if getattr(F, getattr(target, "__name__", ""), None) is not target or len(node.args) < 2:
        return False
    signature = _signature(target)
    try:
        return signature is not None and bool(signature.bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except TypeError:
        return False


@functools.cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    return signature if "inplace" in signature.parameters else None


# ------------------------------------------------------------------ who shares


def shared_by(node: fx.Node, operation: Operation | None) -> list[fx.Node]:
    """The arguments whose memory the result of a known operation may be."""
    if operation is not None:
        question = operation.kind is Kind.SHAPE or is_shape_query(node.op, node.target, node.args)
        return _first(node) if operation.view and not question else []
    if node.op == "call_module":
        return []
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return list(node.all_input_nodes) if _may_view(name) else []


@functools.cache
def _may_view(name: str) -> bool:
    """Whether torch says of any operator of this name that its result aliases an input."""
    if hasattr(F, name):
        return False
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return not schemas or any(value.alias_info is not None for schema in schemas for value in schema.returns)


def _first(node: fx.Node) -> list[fx.Node]:
    return _nodes(next(iter([*node.args, *node.kwargs.values()]), None))


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found
