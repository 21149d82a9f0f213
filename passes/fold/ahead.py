"""Maps per channel that go into the layers behind them: a norm before pooling or flattening and a linear layer.

Looked for among the maps that no layer before them took over. Walked down from the map through operations that stay,
and that give values of one channel each or means of them, every path has to end at a layer. Each layer takes the map of
what it reads in front of its own, W (s x + t) + b, so nobody else may read what the map gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from passes.algebra.conv_form import Form
from passes.fold.candidates import Candidate, altered
from passes.fold.spreads import held_by, is_layer, layer_of, maps, sources_of_node, takes_maps, weighed
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind
from passes.laws.interpreter import Interpreter, behind_map, read_behind, values_behind
from passes.laws.regions import Contraction, Spread
from passes.laws.values import Signal, View
from passes.refusal import Reason, Refusal, RefusalError

__all__ = ["find_ahead"]


def find_ahead(graph: Contraction) -> tuple[list[Candidate], list[Refusal]]:
    """All maps that the layers behind them could take over, in order of execution, and why others cannot be."""
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    for mapped in maps(graph):
        said: list[Refusal] = []
        for lies in _ways(graph, mapped):
            try:
                candidate = _ahead(graph, mapped, lies)
            except RefusalError as error:
                said.append(error.refusal)
            else:
                found += [] if candidate is None else [candidate]
                said.clear()
                break
        if any(graph.flow.operations[node].kind is Kind.NORM for node in mapped):
            name = graph.flow.unit.name(mapped[0])
            told = (refusal.message if refusal.layer in ("", name) else str(refusal) for refusal in said[:1])
            refusals += [Refusal(Reason.NO_LAYER_BEHIND, message, name) for message in told]
    return found, refusals


def _ways(graph: Contraction, mapped: list[fx.Node]) -> Iterator[tuple[View, int]]:
    """How the value of a map may lie, and its channels: as many as it holds numbers of a kind."""
    flow = graph.flow
    (source,) = sources_of_node(graph, mapped[0])
    held = [t for node in mapped for n in held_by(flow, node) for t in flow.tensors.get(n, ())]
    channels = max((t.numel() for t in held), default=0)
    norms = [flow.operations[node] for node in mapped if flow.operations[node].kind is Kind.NORM]
    rank = next((norm.n + 2 for norm in norms if norm.n is not None), graph.rank(source))
    if rank is None or rank < 2 or not channels:
        return
    if rank > 2:
        yield View(rank - 2), channels
    if rank == 2 or not norms:
        yield View(0, last=True, rank=rank), channels


def _ahead(graph: Contraction, mapped: list[fx.Node], lies: tuple[View, int]) -> Candidate | None:
    """The map's region with what the layers become; None where no layer is behind it, and where nothing is gained."""
    flow, result = graph.flow, mapped[-1]
    (source,) = sources_of_node(graph, mapped[0])
    values = values_behind(graph, source, result, lies, None)
    heads, others = _readers(graph, result, values[0])
    if others and (heads or others[0].refusal.reason is not Reason.SHARED):
        raise others[0]
    if not heads or (len(heads) == 1 and heads[0][1] is result):
        return None  # a region of one layer: what was said of it holds
    layers = {head: layer_of(graph, head) for head, _ in heads}
    reads = [layers[head][0].view for head, _ in heads]
    counts = [layers[head][0].channels for head, _ in heads]
    forms: dict[fx.Node, Form] = {}
    for (head, entry), view, count in zip(heads, reads, counts, strict=True):
        try:
            form, columns = read_behind(values, entry, view, count)
        except RefusalError as error:
            raise RefusalError(error.refusal.reason, error.refusal.message, flow.unit.name(head)) from error
        own = form.sources[:, columns] < lies[1]
        if not bool((own == own[0]).logical_or(form.sources[:, columns] < 0).all()):
            raise RefusalError(Reason.OTHER_INPUT, f"{flow.unit.name(head)} reads the sum of that and of what it reads")
        number = layers[head][1].form.weight.new_zeros(count)
        forms[head] = behind_map(layers[head][1].form, number, number)
    nodes = tuple(head for head, _ in heads), tuple(entry for _, entry in heads)
    spread = Spread(nodes[0], tuple(reads), tuple(counts), source, tuple(mapped), (), nodes[1], lies)
    before = tuple(graph.regions[n] for n in altered(flow, spread) if n in graph.regions and graph.regions[n].is_alias)
    spread = Spread(nodes[0], tuple(reads), tuple(counts), source, tuple(mapped), before, nodes[1], lies)
    return weighed(graph, spread, layers, forms, values[0])


def _readers(
    graph: Contraction, result: fx.Node, values: Interpreter
) -> tuple[list[tuple[fx.Node, fx.Node]], list[RefusalError]]:
    """The layers behind a map, each with what it reads, and why something else that reads it does not take it over."""
    flow, heads, others, todo, seen = (
        graph.flow,
        list[tuple[fx.Node, fx.Node]](),
        list[RefusalError](),
        [result],
        {result},
    )
    while todo:
        node = todo.pop()
        readers = [reader for reader in graph.readers(node) if not flow.shape_only(reader)]
        for reader in readers:
            if reader in seen:
                continue
            seen.add(reader)
            region = graph.regions.get(reader)
            if is_layer(flow, reader) if region is None else takes_maps(region):
                heads.append((reader, node))
                continue
            value = None if reader.op == "output" else values.value(reader)
            if _is_made(value):
                todo.append(reader)
            elif isinstance(value, Refusal) and value.reason not in (Reason.NOT_AFFINE, Reason.OTHER_INPUT):
                others.append(RefusalError(value.reason, value.message, value.layer))
            else:
                others.append(_kept(flow, node, "the output" if reader.op == "output" else flow.unit.name(reader)))
    return sorted(heads), others


def _kept(flow: Flow, node: fx.Node, reader: str) -> RefusalError:
    return RefusalError(Reason.SHARED, f"the output of {flow.unit.name(node)} is used by {reader}, which is no layer")


def _is_made(value: Any) -> bool:
    """Whether this is made of the map's value alone, channel by channel."""
    if isinstance(value, tuple):
        return all(_is_made(part) for part in value)
    return isinstance(value, Signal)
