"""Drawings of folded regions as data: the layers of a network before its collapse, and the part of them that a fold is.

The graph is read before the collapse and kept as plain values, so that it holds on to no weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

from passes.graph.capture import Unit, call_of, join, trace_units
from reparam import Fold

__all__ = ["Drawings", "Sketch", "draw", "sketch"]

LARGEST = 80
"""Nodes of a drawing that a person can still read."""
MOST = 16
"""Drawings of one network."""


@dataclass(frozen=True)
class _Node:
    """One operation: its layer's path, what it is called in a report, and the numbers of the nodes that it reads."""

    name: str
    path: str
    label: str
    kind: str
    shape: str
    sources: tuple[int, ...]
    hidden: bool


@dataclass
class Sketch:
    """All operations of a network, in order; numbers are places in ``nodes``."""

    nodes: list[_Node] = field(default_factory=list)
    by_name: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Drawings:
    """Each distinct shape of a fold once, and for each fold the number of its shape, None where there is none."""

    regions: list[dict[str, Any]] = field(default_factory=list)
    of_fold: list[int | None] = field(default_factory=list)


def sketch(model: nn.Module) -> Sketch:
    """Read the graph of ``model``, which must be in eval mode."""
    result = Sketch()
    for unit in trace_units(model)[0]:
        _add_unit(result, unit)
    return result


def draw(before: Sketch, folds: Sequence[Fold]) -> Drawings:
    """The drawings of ``folds`` of the network that ``before`` was read from."""
    drawings, known = Drawings(), {}
    for fold in folds:
        graph, signature = _graph(before, fold.layers)
        number = known.get((signature, _layer(fold.into))) if graph else None
        if graph and number is None and len(drawings.regions) < MOST:
            number = known[signature, _layer(fold.into)] = len(drawings.regions)
            after = {
                "nodes": [
                    {"id": 0, "label": "input", "path": "", "kind": "input"},
                    {"id": 1, "label": fold.into, "path": fold.where, "kind": _kind_of(fold.into)},
                    {"id": 2, "label": "output", "path": "", "kind": "output"},
                ],
                "edges": [[0, 1], [1, 2]],
            }
            region = {"count": 0, "example": list(fold.layers), "before": graph, "after": after}
            drawings.regions.append(region)
        if number is not None:
            drawings.regions[number]["count"] += 1
        drawings.of_fold.append(number)
    return drawings


# ------------------------------------------------------------------------------------------------- reading


def _add_unit(result: Sketch, unit: Unit) -> None:
    numbers: dict[fx.Node, int] = {}
    constant: set[fx.Node] = set()
    returned = _returned(unit.graph)
    for node in unit.graph.nodes:
        if node not in returned:
            continue
        if _is_constant(unit, node, constant):
            constant.add(node)
            continue
        sources = tuple(dict.fromkeys(numbers[n] for n in node.all_input_nodes if n in numbers))
        number = numbers[node] = len(result.nodes)
        made = _read(unit, node, sources)
        result.nodes.append(made)
        result.by_name[made.name].append(number)
        if made.path != made.name:
            # A function that reads a module's weight is known to a report by that module's path.
            result.by_name[made.path].append(number)
        for source in sources:
            result.readers[source].append(number)


def _returned(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on; what only an assertion about the shape reads is not part of any drawing."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in live for user in node.users):
            live.add(node)
    return live


def _is_constant(unit: Unit, node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether ``node`` is a weight, or computed from weights alone."""
    if node.op == "get_attr":
        return isinstance(unit.attribute(str(node.target)), Tensor)
    return bool(node.all_input_nodes) and all(n in constant for n in node.all_input_nodes)


def _read(unit: Unit, node: fx.Node, sources: tuple[int, ...]) -> _Node:
    if node.op != "call_module":
        name = unit.name(node)
        label = name.rpartition(":")[2] if node.op in ("call_function", "call_method") else node.op
        weighted = any(n.op == "get_attr" for n in node.all_input_nodes)
        path = join(unit.path, call_of(node).path) if weighted else name
        kind = next((kind for word, kind in _WORDS.items() if word in label), "other")
        return _Node(name, path, label, kind, label, sources, hidden=False)
    module = unit.module(node)
    name = unit.name(node)
    label, shape, kind = _describe(module)
    return _Node(name, name, label, kind, shape, sources, isinstance(module, nn.Identity))


_WORDS = {"conv": "conv", "norm": "norm", "linear": "linear", "add": "add", "pool": "pool"}


def _describe(module: nn.Module) -> tuple[str, str, str]:
    """What a drawing says of a layer, the same without its channels, and its kind."""
    name = type(module).__name__
    if isinstance(module, _ConvNd):
        kernel = "x".join(map(str, module.kernel_size))
        stride = "" if set(module.stride) == {1} else f" stride {module.stride[0]}"
        groups = "" if module.groups == 1 else f" groups {module.groups}"
        channels = f"{module.in_channels}→{module.out_channels}"
        grouped = "" if module.groups == 1 else " grouped"
        return f"{name} {channels} {kernel}{stride}{groups}", f"{name} {kernel}{grouped}", "conv"
    if isinstance(module, _NormBase) or isinstance(getattr(module, "running_mean", None), Tensor):
        return f"{name} {getattr(module, 'num_features', '')}".strip(), name, "norm"
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}→{module.out_features}", name, "linear"
    kind = "pool" if isinstance(module, _AvgPoolNd | _AdaptiveAvgPoolNd) else "other"
    return name, name, kind


# ------------------------------------------------------------------------------------------------- drawing


def _graph(before: Sketch, layers: Iterable[str]) -> tuple[dict[str, Any], Any]:
    """The part of the network that ``layers`` names, and what makes it the same as another; empty if not found."""
    named = {number for layer in layers for number in before.by_name.get(layer, ())}
    inside = _connected(before, named)
    if not inside or len(inside) > LARGEST:
        return {}, None
    shown = [number for number in sorted(inside) if not before.nodes[number].hidden]
    entries = sorted({s for n in inside for s in before.nodes[n].sources if s not in inside})
    ids = {number: place for place, number in enumerate([*entries, *shown])}
    nodes = [{"id": ids[n], "label": "input", "path": before.nodes[n].name, "kind": "input"} for n in entries]
    for number in shown:
        node = before.nodes[number]
        nodes.append({"id": ids[number], "label": node.label, "path": node.path, "kind": node.kind})
    edges = [[ids[s], ids[n]] for n in shown for s in _seen_sources(before, inside, n)]
    ends = [n for n in shown if not before.readers[n] or any(not _within(before, inside, r) for r in before.readers[n])]
    output = len(nodes)
    nodes.append({"id": output, "label": "output", "path": "", "kind": "output"})
    edges += [[ids[n], output] for n in ends]
    shapes = tuple(before.nodes[n].shape for n in shown)
    return {"nodes": nodes, "edges": edges}, (len(entries), shapes, tuple(map(tuple, edges)))


def _connected(before: Sketch, named: set[int]) -> set[int]:
    """The named layers and what joins them; an operation of the same name elsewhere (another ``add``) is left out."""
    anchors = {n for n in named if ":" not in before.nodes[n].name} or named
    allowed = named | {n for n in _around(before, named) if before.nodes[n].hidden}
    found, todo = set(anchors), list(anchors)
    while todo:
        for other in _neighbours(before, todo.pop()):
            if other in allowed and other not in found:
                found.add(other)
                todo.append(other)
    return found


def _around(before: Sketch, numbers: set[int]) -> set[int]:
    """Nodes up to three steps away: layers that do nothing stand between those that a fold names."""
    reached = set(numbers)
    for _ in range(3):
        reached |= {other for n in reached for other in _neighbours(before, n) if before.nodes[other].hidden}
    return reached


def _neighbours(before: Sketch, number: int) -> list[int]:
    return [*before.nodes[number].sources, *before.readers[number]]


def _seen_sources(before: Sketch, inside: set[int], number: int) -> list[int]:
    """What a node reads, through layers that are not drawn."""
    found: list[int] = []
    for source in before.nodes[number].sources:
        if source in inside and before.nodes[source].hidden:
            found += _seen_sources(before, inside, source)
        else:
            found.append(source)
    return list(dict.fromkeys(found))


def _within(before: Sketch, inside: set[int], number: int) -> bool:
    """Whether a reader is part of the region; one that is not drawn is if what reads it is."""
    if number in inside and before.nodes[number].hidden:
        return bool(before.readers[number]) and all(_within(before, inside, r) for r in before.readers[number])
    return number in inside


def _layer(into: str) -> str:
    """The class and kernel of a fold's result, without its channels."""
    head, _, rest = into.partition("(")
    kernel = rest.partition("kernel_size=(")[2].partition(")")[0]
    return f"{head}({kernel})"


def _kind_of(into: str) -> str:
    return "linear" if into.startswith("Linear") else "conv"
