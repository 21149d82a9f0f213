"""Batch norms that are left over as one scale and shift each: 2C numbers in the place of 4C (``norms="affine"``)."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import replace

from torch import Tensor, fx

from passes.algebra.conv_form import ConvForm
from passes.fold.candidates import Candidate, dying_constants
from passes.fold.cost import numbers_of
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, argument
from passes.laws.interpreter import Interpreter
from passes.laws.regions import Contraction
from passes.laws.values import Signal, View
from passes.refusal import Reason, Refusal

__all__ = ["left_over"]


def left_over(flow: Flow, gone: Set[fx.Node]) -> Iterator[Candidate | Refusal]:
    """For each norm with running statistics that is not ``gone``: it as a region, or why it stays a norm."""
    for node in flow.nodes:
        operation = flow.operations.get(node)
        if node in gone or node in flow.constant or operation is None or operation.kind is not Kind.NORM:
            continue
        if operation.affine and (mean := _mean(flow, node)) is not None:
            outcome = _region(flow, node, mean.numel())
            yield outcome.at(flow.unit.name(node)) if isinstance(outcome, Refusal) else outcome


def _mean(flow: Flow, node: fx.Node) -> Tensor | None:
    """The running mean of a norm."""
    module, given = flow.modules.get(node), argument(node, 1, "running_mean")
    held = module._buffers.get("running_mean") if module is not None else flow.held.get(given)
    return held if isinstance(held, Tensor) else None


def _region(flow: Flow, node: fx.Node, channels: int) -> Candidate | Refusal:
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or source in flow.constant:
        return Refusal(Reason.OTHER_INPUT, "its input is no value of the network")
    n = flow.operations[node].n
    rank = n + 2 if n is not None else flow.rank.get(source)
    if rank is None:
        return Refusal(Reason.RANK_UNKNOWN, Reason.RANK_UNKNOWN.value)
    held = {t.dtype for n in (node, *node.all_input_nodes) if n is not source for t in flow.tensors.get(n, ())}
    given = {flow.dtype[source]} if source in flow.dtype else {p.dtype for p in flow.unit.root.parameters()}
    if len(held | {d for d in given if d.is_floating_point}) > 1:
        return Refusal(
            Reason.CAST, "its numbers are of another dtype than its input: arithmetic would give the wider one"
        )
    view = View(rank - 2) if rank > 2 else View(0, last=True, rank=2)
    graph = Contraction(flow)
    interpreter = Interpreter(graph, source, view, channels)
    value = interpreter.value(node)
    if isinstance(value, Refusal):
        return value
    if not isinstance(value, Signal) or not isinstance(value.form, ConvForm):
        return Refusal(Reason.ATTRIBUTE, Reason.ATTRIBUTE.value)
    form, constants = replace(value.form, channelwise=True), dying_constants(graph, [node])
    numbers, _ = numbers_of(interpreter, [node], {node: value}, constants)
    if form.numbers >= numbers:
        if flow.sharers(node) - {node, *constants} or any(flow.owners.get(id(t), 1) > 1 for t in flow.tensors[node]):
            return Refusal(Reason.SHARED, "its numbers are used in several places")
        return Refusal(Reason.LARGER, f"a scale and shift would hold {form.numbers} numbers instead of {numbers}")
    return Candidate(
        source, node, view, channels, form, (),
        between=(node,),
        dying=(node,),
        constants=tuple(sorted(constants, key=flow.order.__getitem__)),
        numbers=numbers,
        work=value.work * form.rate,
        computed=0,
        convs=frozenset(),
        gain=(True, 0, True, 0, 0),
    )  # fmt: skip
