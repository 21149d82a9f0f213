"""Which layer of one network stands where one of another does, told by their graphs instead of by names.

A publisher's deployed class computes what a collapsed network does, with other names. Both are traced, and every
operation is described by what it is and by all that lies before and behind it (colour refinement, Weisfeiler and Leman,
1968). Operations that look the same from everywhere are interchangeable; one pair of them is fixed at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry
from passes.graph.capture import Unit, join, trace_units
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind

__all__ = ["renamed"]

MAX_TIES = 1000
"""Most pairs of interchangeable operations that are fixed; each takes another look at the whole graph."""


@dataclass(frozen=True)
class _Step:
    """An operation: what it is, what it reads, and the path of the layer or tensor that it uses."""

    label: tuple[Any, ...]
    sources: tuple[int, ...]
    ordered: bool
    path: str


def renamed(have: nn.Module, wanted: nn.Module) -> dict[str, Tensor] | None:
    """The state of ``have`` under the names of the layers of ``wanted`` at the same places; None if they differ."""
    (ours, _), (theirs, _) = trace_units(have), trace_units(wanted)
    if len(ours) != len(theirs):
        return None
    names: dict[str, str] = {}
    for a, b in zip(ours, theirs, strict=True):
        first, second = _steps(a), _steps(b)
        pairs = _paired(first, second)
        if pairs is None:
            return None
        for i, j in pairs:
            old, new = first[i].path, second[j].path
            if old and new and names.setdefault(old, new) != new:
                return None  # one layer stands in two places, and there are two there
    state = have.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        new = names.get(name) or (join(names[path], last) if path in names else name)
        if found.setdefault(new, tensor) is not tensor:
            return None
    return found


def _steps(unit: Unit) -> list[_Step]:
    flow = Flow(unit, {})
    live = set[fx.Node]()
    for node in reversed(flow.nodes):
        if node.op == "output" or not live.isdisjoint(node.users):
            live.add(node)
    number: dict[fx.Node, int] = {}
    steps: list[_Step] = []
    for node in filter(live.__contains__, flow.nodes):
        operation = flow.operations.get(node)
        nothing = operation is not None and (operation.kind is Kind.DROPOUT or operation.id == "identity")
        if nothing and node.all_input_nodes[0] in number:
            number[node] = number[node.all_input_nodes[0]]  # in evaluation
            continue
        read = tuple(number[n] for n in node.all_input_nodes if n in number)
        number[node] = len(steps)
        named = node.op in ("call_module", "get_attr")
        steps.append(
            _Step(
                ("input", len(steps)) if node.op == "placeholder" else _label(flow, node),
                read,
                operation is None or operation.id not in ("add", "mul"),
                join(unit.path, str(node.target)) if named else "",
            )
        )
    return steps


def _label(flow: Flow, node: fx.Node) -> tuple[Any, ...]:
    """What an operation is, apart from names; whatever else it may do is seen when the networks are compared."""
    module, held, operation = flow.modules.get(node), flow.held.get(node), flow.operations.get(node)
    if isinstance(module, _ConvNd):
        kind = "conv_transpose" if module.transposed else "conv"
        return kind, Geometry.of(module), tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        return "linear", tuple(module.weight.shape)
    if isinstance(held, Tensor):
        return "tensor", tuple(held.shape), held.dtype
    if module is not None:
        shapes = tuple(sorted((name, tuple(t.shape)) for name, t in module.state_dict().items()))
        opaque = str(node.target) in flow.unit.opaque
        kind = type(module).__name__ if operation is None or opaque else operation.id
        return "module", kind, () if opaque and next(module.children(), None) is not None else shapes
    if operation is not None:
        return ("module", operation.id, ())
    return (node.op, str(node.target))


def _paired(first: Sequence[_Step], second: Sequence[_Step]) -> list[tuple[int, int]] | None:
    """Which steps of two graphs are the same; None if the graphs are not."""
    fixed: list[tuple[int, int]] = []
    for _ in range(MAX_TIES):
        a, b = (_colours(steps, [pair[k] for pair in fixed]) for k, steps in enumerate((first, second)))
        if Counter(a) != Counter(b):
            return None
        places: dict[int, list[int]] = defaultdict(list)
        for j, colour in enumerate(b):
            places[colour].append(j)
        tie = next((i for i, colour in enumerate(a) if len(places[colour]) > 1), None)
        if tie is None:
            return [(i, places[colour][0]) for i, colour in enumerate(a)]
        fixed.append((tie, places[a[tie]][0]))
    return None


def _colours(steps: Sequence[_Step], fixed: Sequence[int]) -> list[int]:
    """A number for each step, the same for steps that look the same from everywhere; ``fixed`` ones stand out."""
    own: list[Any] = [step.label for step in steps]
    for number, i in enumerate(fixed):
        own[i] = (own[i], number)
    before: list[int] = []
    for step, label in zip(steps, own, strict=True):
        read = [before[i] for i in step.sources]
        before.append(hash((label, tuple(read if step.ordered else sorted(read)))))
    readers: list[list[tuple[int, int]]] = [[] for _ in steps]
    both = [0] * len(steps)
    for i in reversed(range(len(steps))):
        both[i] = hash((before[i], tuple(sorted(readers[i]))))
        for place, source in enumerate(steps[i].sources):
            readers[source].append((both[i], place if steps[i].ordered else 0))
    return both
