"""One weight under several calls: with other dilations, strides or paddings, each with a map per channel behind it.

Alone, none of the calls frees the weight, so no region of one call is a gain. Together they do. Where the same map
follows each of them, one layer holds the folded numbers and the others convolve with those; where the maps differ, each
call gets a layer of its own, if all of them hold no more numbers than there were. All are made, or none is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from passes.fold.candidates import Candidate, Tie, dying_constants, in_order
from passes.fold.cost import numbers_of
from passes.fold.spreads import held_by, layer_of, may_map, sources_of_node
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind
from passes.laws.layouts import is_conv
from passes.laws.regions import Contraction
from passes.laws.values import Signal
from passes.refusal import Reason, Refusal

__all__ = ["find_ties"]


def find_ties(graph: Contraction) -> tuple[list[tuple[Candidate, ...]], list[Refusal]]:
    """For each weight that several calls use, what all of them become; and why others stay."""
    found: list[tuple[Candidate, ...]] = []
    refusals: list[Refusal] = []
    calls: dict[frozenset[int], list[fx.Node]] = defaultdict(list)
    for node in graph.flow.nodes:
        if is_conv(graph.flow, node) and graph.is_alive(node) and node not in graph.regions:
            calls[_weights(graph.flow, node)].append(node)
    for nodes in calls.values():
        if len(nodes) > 1 and any(node.op != "call_module" for node in nodes):  # one layer, called again, is no other
            chains = [_chain(graph, node) for node in nodes]
            outcome = _tied(graph, chains) if all(len(chain) > 1 for chain in chains) else None
            if isinstance(outcome, Refusal):
                norms = (n for chain in chains for n in chain if graph.flow.operations[n].kind is Kind.NORM)
                refusals += [outcome.at(name) for name in dict.fromkeys(graph.flow.unit.name(n) for n in norms)]
            elif outcome is not None:
                found.append(outcome)
    return found, refusals


def _weights(flow: Flow, node: fx.Node) -> frozenset[int]:
    return frozenset(id(t) for n in held_by(flow, node) for t in flow.tensors.get(n, ()) if t.dim() > 1)


def _chain(graph: Contraction, node: fx.Node) -> list[fx.Node]:
    """A call, and the maps per channel behind it that alone read it."""
    chain = [node]
    while True:
        readers = [reader for reader in graph.readers(chain[-1]) if not graph.flow.shape_only(reader)]
        if len(readers) != 1 or not may_map(graph, readers[0]):
            return chain
        chain.append(readers[0])


def _tied(graph: Contraction, chains: list[list[fx.Node]]) -> tuple[Candidate, ...] | Refusal | None:
    flow = graph.flow
    nodes = [node for chain in chains for node in chain]
    constants = dying_constants(graph, nodes)
    values: list[tuple[Any, Signal]] = []
    for chain in chains:
        if len(sources_of_node(graph, chain[0])) != 1:
            return None
        interpreter = layer_of(graph, chain[0])[0]
        value = interpreter.value(chain[-1])
        if not isinstance(value, Signal) or value.is_moved or value.form.widened:
            return value if isinstance(value, Refusal) else None
        values.append((interpreter, value))
    signals = {
        node: signal
        for (interpreter, _), chain in zip(values, chains, strict=True)
        for node in chain
        if isinstance(signal := interpreter.value(node), Signal)
    }
    before = sum(numbers_of(values[0][0], nodes, signals, constants))
    one = len({_told(flow, chain) for chain in chains}) == 1
    after = sum(value.form.numbers for _, value in (values[:1] if one else values))
    if after >= before:
        said = f"its convolution's weight is used by {len(chains)} calls, other maps behind each"
        return Refusal(Reason.LARGER, f"{said}: their layers would hold {after} numbers instead of {before}")
    tie = Tie(tuple(nodes), one)
    return tuple(
        Candidate(
            interpreter.entry, chain[-1], interpreter.view, interpreter.channels, value.form, (),
            between=tuple(chain), dying=tuple(chain), constants=in_order(flow, constants),
            numbers=value.form.numbers + (0 if i else before - after),
            work=sum(signals[n].work * signals[n].form.rate for n in chain),
            computed=0, convs=frozenset(chain[:1]), gain=(True, 0.0, True, 0.0, 0), tie=tie,
        )
        for i, ((interpreter, value), chain) in enumerate(zip(values, chains, strict=True))
    )  # fmt: skip


def _told(flow: Flow, chain: list[fx.Node]) -> tuple[Any, ...]:
    """What decides about the numbers of a folded call: the tensors, and the operations of the maps."""
    told: list[Any] = []
    for node in chain:
        operation = flow.operations[node]
        told += [operation.id, *(id(t) for n in held_by(flow, node) for t in flow.tensors.get(n, ()))]
        if operation.kind is not Kind.CONV:
            told.append(repr([a for a in (*node.args, *sorted(node.kwargs.items())) if not isinstance(a, fx.Node)]))
    return tuple(told)
