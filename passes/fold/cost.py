"""What the layers of a region hold, in numbers.

A weight that is computed counts as what the network runs: a kernel that is a product of smaller ones, or of low rank,
is there in full in every forward, whatever its parameters are. It counts as the more of the two, the kernel's numbers
and its parameters'; parameters that stay for another use do not count. A file may grow by that; what is in memory and
what is multiplied while the network runs does not. What only repeats numbers (``expand``) is never there in full, and
counts as what it repeats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, fx

from passes.algebra.conv_form import ConvForm, Form
from passes.laws.interpreter import Interpreter
from passes.laws.regions import Contraction
from passes.laws.values import Signal

__all__ = ["calls_of", "numbers_of", "staying_numbers"]


def calls_of(form: Form) -> int:
    """How many operations of torch the layer of a form is: one, and a pad where torch has none that is uneven."""
    uneven = isinstance(form, ConvForm) and not any(u != 1 for u in form.up) and form.lead != form.trail
    return 1 + (uneven or (isinstance(form, ConvForm) and any(p < 0 for p in form.lead)))


def numbers_of(
    interpreter: Interpreter, dying: list[fx.Node], signals: Mapping[fx.Node, Signal], constants: list[fx.Node]
) -> tuple[int, int]:
    """Numbers that the region's own weights hold, and how many more those have that are computed of them.

    Args:
        interpreter: of the region's entry, on meta tensors.
        dying: the nodes that would vanish.
        signals: their values.
        constants: the weight expressions that only they read.
    """
    graph, flow = interpreter.graph, interpreter.flow
    here = {*dying, *constants}
    layers = [n for n in dying if n not in graph.regions]
    held = {id(t): t for n in [*layers, *constants] for t in flow.tensors.get(n, ())}
    # What another node or another place of the model uses stays.
    own = {key: t for key, t in held.items() if _only(graph, here, key) and flow.owners.get(key, 1) == 1}
    more = 0
    for node, signal in signals.items():  # layers whose weight is behind a parametrization
        tensors = flow.tensors.get(node, ()) if node not in graph.regions and node in flow.operations else ()
        if signal.conv and tensors and all(id(t) in own for t in tensors):
            more += max(signal.work + signal.bias - _total(tensors), 0)
    kernels, parameters = 0, dict[int, Tensor]()
    for node in {c for n in layers for c in n.all_input_nodes if c.op != "get_attr"}.intersection(constants):
        value = interpreter.value(node)
        if isinstance(value, Tensor) and value.is_floating_point():
            kernels += min(value.numel(), value.untyped_storage().nbytes() // value.element_size())
            parameters |= _beneath(graph, node)
    more += max(kernels - _total(parameters.values()), 0)
    regions = [graph.regions[n] for n in dying if n in graph.regions]
    return _total(own.values()) + sum(region.form.numbers for region in regions if not region.is_alias), more


def _only(graph: Contraction, here: Collection[fx.Node], key: int) -> bool:
    """Whether what is gone or goes here is all that holds a tensor."""
    return all(node in here or node in graph.gone for node in graph.flow.holders[key])


def staying_numbers(graph: Contraction, dying: Collection[fx.Node], constants: Collection[fx.Node]) -> int:
    """Numbers of layers that would vanish, but are held by others as well."""
    flow, here = graph.flow, {*dying, *constants}
    held = {id(t): t for n in [*dying, *constants] if n not in graph.regions for t in flow.tensors.get(n, ())}
    return _total(t for key, t in held.items() if not _only(graph, here, key) or flow.owners.get(key, 1) > 1)


def _beneath(graph: Contraction, node: fx.Node) -> dict[int, Tensor]:
    """The weights that an expression is made of."""
    found, todo, seen = dict[int, Tensor](), [node], {node}
    while todo:
        reached = todo.pop()
        found |= {id(t): t for t in graph.flow.tensors.get(reached, ())}
        todo += [source for source in reached.all_input_nodes if source not in seen]
        seen.update(reached.all_input_nodes)
    return found


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)
