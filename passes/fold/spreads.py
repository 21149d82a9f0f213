"""Maps per channel that go into several layers: a norm behind a sum, a concatenation or a part of what layers give.

Looked for among the maps that no region of a single layer took in. Walked up from the map through operations that stay,
every path has to end at a layer. Each layer takes the factors of the channels that it gives to the map, and one of the
layers whose values are added takes the shift; that is exact if what the map is given, nobody else reads.

The map's own region is a :class:`Candidate` with :attr:`parts`: what each of the layers becomes. They hold together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from passes.algebra.conv_form import Form
from passes.fold.candidates import Candidate, between_of, dying_constants, in_order
from passes.fold.cost import numbers_of, staying_numbers
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, argument
from passes.laws.deform import deformed
from passes.laws.interpreter import Interpreter, sources_of
from passes.laws.layouts import is_conv, views
from passes.laws.regions import Contraction, Region, Spread
from passes.laws.values import Signal, View
from passes.refusal import Reason, Refusal, RefusalError

__all__ = [
    "find_spreads", "held_by", "is_layer", "layer_of", "maps", "may_map", "sources_of_node", "takes_maps", "weighed",
]  # fmt: skip


def find_spreads(graph: Contraction) -> tuple[list[Candidate], list[Refusal]]:
    """All maps that several layers could take over, in order of execution, and why others cannot be."""
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    for mapped in maps(graph):
        try:
            candidate = _spread(graph, mapped)
        except RefusalError as error:
            # All values are followed in one size, and one may be pooled on the way: that says nothing of the norm.
            followed = error.refusal.reason is not Reason.ATTRIBUTE
            if followed and any(graph.flow.operations[node].kind is Kind.NORM for node in mapped):
                refusals.append(_said(error.refusal, graph.flow.unit.name(mapped[0])))
        else:
            found += [] if candidate is None else [candidate]
    return found, refusals


def _said(refusal: Refusal, layer: str) -> Refusal:
    """A refusal of a law speaks of what it was given; here that are the values of several layers."""
    where = f"{refusal.layer}: " if refusal.layer not in ("", layer) else ""
    if refusal.reason not in _OF_LAWS:
        return Refusal(refusal.reason, f"{where}{refusal.message}", layer)
    message = f"the layers before it cannot take it over: {where}{refusal.message}"
    return Refusal(Reason.NO_CONVOLUTION, message, layer)


_OF_LAWS = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.CHANNELS, Reason.LAYOUT, Reason.CAST, Reason.NOT_PER_CHANNEL}


def maps(graph: Contraction) -> Iterator[list[fx.Node]]:
    """Operations on one value and constants that may be maps per channel, those in a row together."""
    flow, rows = graph.flow, dict[fx.Node, list[fx.Node]]()
    for node in flow.nodes:
        if not may_map(graph, node):
            continue
        (source,) = sources_of_node(graph, node)
        row = rows.pop(source, []) if len(graph.readers(source)) == 1 else []
        rows[node] = [*row, node]
    for row in rows.values():
        norms = any(flow.operations[node].kind is Kind.NORM for node in row)
        if norms or any(flow.tensors.get(n) for node in row for n in held_by(flow, node)):
            yield row


def may_map(graph: Contraction, node: fx.Node) -> bool:
    """Whether this may be a map per channel, by what it is called with."""
    flow, operation = graph.flow, graph.flow.operations.get(node)
    if operation is None or node in graph.regions or not graph.is_alive(node) or node not in flow.affine:
        return False
    return operation.id in _MAPS and len(sources_of_node(graph, node)) == 1


_MAPS = frozenset(
    ("batch_norm", "batch_norm2d", "batch_norm3d", "instance_norm", "add", "sub", "rsub", "mul", "div", "addcmul")
)


def held_by(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """A node, and the weight expressions that it reads."""
    found, todo = [node], [c for c in node.all_input_nodes if c in flow.constant]
    while todo:
        found.append(todo.pop())
        todo += found[-1].all_input_nodes
    return found


def sources_of_node(graph: Contraction, node: fx.Node) -> list[fx.Node]:
    """What a node reads that is no constant; of a cast or a move, what is cast or moved."""
    operation, given = graph.flow.operations.get(node), argument(node, 0, "input")
    one = operation is not None and operation.kind in (Kind.CAST, Kind.MOVEMENT) and isinstance(given, fx.Node)
    return [s for s in graph.sources(node) if s not in graph.flow.constant and (not one or s is given)]


# ------------------------------------------------------------------ one map


def _spread(graph: Contraction, mapped: list[fx.Node]) -> Candidate | None:
    """The map's region with what the layers become; None behind no layer at all, and where nothing is gained."""
    flow = graph.flow
    (source,) = sources_of_node(graph, mapped[0])
    heads, homeless = _heads(graph, source)
    if not heads or (homeless and source is homeless[0]):
        return None
    if heads == [source] and deformed(flow, source, None) is None:
        return None  # a region of one layer: what was said of it holds
    if homeless:
        names = ", ".join(dict.fromkeys(flow.unit.name(node) for node in homeless[:3]))
        raise RefusalError(Reason.NO_CONVOLUTION, f"part of what it reads comes from {names}, where no layer takes it")
    layers = {head: layer_of(graph, head) for head in heads}
    by_bias = sorted(heads, key=lambda head: layers[head][1].form.bias is None)
    spread = Spread(
        tuple(by_bias),
        tuple(layers[head][1].view for head in by_bias),
        tuple(layers[head][1].form.out_channels for head in by_bias),
        source,
        tuple(mapped),
        tuple(graph.regions[n] for n in [*between_of(graph, by_bias, source), source] if _is_alias(graph, n)),
    )
    try:
        sources, values = sources_of(graph, spread)
    except RefusalError as error:
        if len(heads) == 1 and error.refusal.reason in _OF_LAWS:  # told as of any norm behind one layer
            return None
        raise
    _check_readers(graph, spread, set(sources.flatten().tolist()), values)
    bearers = torch.where(sources >= 0, sources, sum(spread.channels)).amin(0)
    forms = {}
    for head, start in zip(spread.heads, _starts(spread), strict=True):
        form = layers[head][1].form
        bears = bool(((bearers >= start) & (bearers < start + form.out_channels)).any())
        forms[head] = form.affine(None, form.weight.new_zeros(form.out_channels)) if bears else form
    return weighed(graph, spread, layers, forms, values)


def _heads(graph: Contraction, source: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The layers that give the source, and what else it is made of."""
    heads, homeless, seen, todo = [], [], {source}, [source]
    while todo:
        node = todo.pop()
        region = graph.regions.get(node)
        if is_layer(graph.flow, node) if region is None else takes_maps(region):
            heads.append(node)
            continue
        sources, known = sources_of_node(graph, node), region is None or region.is_alias
        if not known or node not in graph.flow.affine or not graph.is_alive(node) or not sources:
            homeless.append(node)
            continue
        todo += [s for s in sources if s not in seen]
        seen.update(sources)
    return sorted(heads), sorted(homeless)


def takes_maps(region: Region) -> bool:
    """Whether a region is a layer of its own, not one of several that hold the same numbers."""
    return isinstance(region, Candidate) and not region.is_alias and region.tie is None and region.head is None


def _is_alias(graph: Contraction, node: fx.Node) -> bool:
    return node in graph.regions and graph.regions[node].is_alias


def is_layer(flow: Flow, node: fx.Node) -> bool:
    """Whether a node may be a layer that takes maps per channel."""
    probed = node in flow.modules and node in flow.affine and node not in flow.operations
    return probed or is_conv(flow, node) or deformed(flow, node, None) is not None


def layer_of(graph: Contraction, head: fx.Node) -> tuple[Interpreter, Signal]:
    """The layer that gives a value, alone, behind what it reads."""
    region, flow = graph.regions.get(head), graph.flow
    if region is None and (own := deformed(flow, head, None)) is not None:
        entry = argument(head, 0, "input")
        interpreter = Interpreter(graph, entry, View(2), own.in_channels)
        return interpreter, Signal(own, View(2), work=own.weight.numel(), conv=True)
    if region is not None:
        interpreters = [Interpreter(graph, region.entry, region.view, region.channels)]
    else:
        entries = sources_of_node(graph, head)
        around = views(graph, entries[0]) if len(entries) == 1 else []
        interpreters = [Interpreter(graph, entries[0], view, channels) for view, channels in around]
    why = Refusal(Reason.NO_CONVOLUTION, "it takes no map per channel")
    for interpreter in interpreters:
        value = interpreter.value(head)
        if isinstance(value, Signal) and not value.is_moved:
            rank = graph.rank(head) if value.view.last else None
            view = value.view if rank is None else _with_rank(value, rank)
            return interpreter, Signal(value.form, view, work=value.work, conv=True, bias=value.bias)
        if isinstance(value, Refusal):
            why = value
    raise RefusalError(why.reason, f"{flow.unit.name(head)}: {why.message}")


def _with_rank(value: Signal, rank: int) -> Any:
    return type(value.view)(value.view.n, value.view.last, rank)


def _check_readers(graph: Contraction, spread: Spread, touched: set[int], values: Interpreter) -> None:
    """Nobody else may read what the layers now give otherwise."""
    flow, inside = graph.flow, {*between_of(graph, spread.heads, spread.source), spread.source}
    todo, seen = list(spread.heads), set(spread.heads)
    while todo:
        node = todo.pop()
        for reader in graph.readers(node):
            if reader in seen or flow.shape_only(reader) or reader is spread.mapped[0]:
                continue
            seen.add(reader)
            value = None if reader.op == "output" else values.value(reader)
            taken = _taken(value)
            if taken is not None and touched.isdisjoint(taken):
                continue
            if reader in inside or (taken is not None and isinstance(value, tuple)):
                todo.append(reader)
                continue
            other = "the output" if reader.op == "output" else flow.unit.name(reader)
            raise RefusalError(Reason.SHARED, f"the output of {flow.unit.name(node)} is used by {other} as well")


def _taken(value: Any) -> set[int] | None:
    """Which channels of the layers' values a value holds; None if it is not known."""
    if isinstance(value, tuple):
        parts = [_taken(part) for part in value]
        return None if any(part is None for part in parts) else set().union(*(part or () for part in parts))
    return set(value.form.sources.flatten().tolist()) - {-1} if isinstance(value, Signal) else None


def weighed(
    graph: Contraction,
    spread: Spread,
    layers: dict[fx.Node, tuple[Interpreter, Signal]],
    forms: dict[fx.Node, Form],
    values: Interpreter,
) -> Candidate | None:
    """The candidate, if its layers, which get these ``forms``, hold fewer numbers than they and the map do."""
    flow, mapped = graph.flow, list(spread.mapped)
    constants = dying_constants(graph, mapped)
    saved = sum(numbers_of(values, mapped, {}, constants))
    parts = []
    for head, form in forms.items():
        interpreter, signal = layers[head]
        region = graph.regions.get(head)
        own = dying_constants(graph, [head])
        held, computed = numbers_of(interpreter, [head], {head: signal}, own)
        saved -= form.numbers - held - computed
        inner = (region,) if isinstance(region, Candidate) else ()
        parts.append(Candidate(
            interpreter.entry, head, signal.view if region is None else region.view, interpreter.channels, form, inner,
            between=in_order(flow, [head], *(r.between for r in inner)),
            dying=in_order(flow, [head], *(r.dying for r in inner)),
            constants=in_order(flow, own, *(r.constants for r in inner)),
            numbers=form.numbers, work=form.multiply_adds, computed=computed,
            convs=frozenset({head} - graph.regions.keys()).union(*(r.convs for r in inner)),
            gain=(True, 0.0, True, 0.0, 0), spread=spread, sized=frozenset().union(*(r.sized for r in inner)),
        ))  # fmt: skip
    after = sum(part.form.numbers for part in parts)
    if saved < 0:
        for head in forms:
            if staying_numbers(graph, [head], dying_constants(graph, [head])):
                told = f"the weights of {flow.unit.name(head)} are used in several places"
                raise RefusalError(Reason.SHARED, told)
        raise RefusalError(Reason.LARGER, f"its layers would hold {after} numbers instead of {after + saved}")
    if saved == 0:
        return None
    mapped_value = values.value(spread.result)
    work = parts[0].work + parts[0].form.rate * mapped_value.form.out_channels
    parts[0] = replace(parts[0], numbers=parts[0].numbers + saved, work=work)  # all that goes is told of once
    return Candidate(
        spread.source, spread.result, spread.views[0], spread.channels[0], parts[0].form, (),
        between=tuple(mapped), dying=tuple(mapped), constants=tuple(constants), numbers=saved, work=0.0, computed=0,
        convs=frozenset(), gain=(True, float(saved), True, 0.0, 0), spread=spread, parts=tuple(parts),
    )  # fmt: skip


def _starts(spread: Spread) -> list[int]:
    return [sum(spread.channels[:i]) for i in range(len(spread.channels))]
