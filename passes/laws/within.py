"""What a block computes where the forward of a class of its own convolves, as a graph of its own.

The block is read by itself, with the convolution's input as its entry. What comes of it is one convolution with the
options of the layer's own; then its numbers are all that the layer needs to be that layer again.
"""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

from torch import fx

from passes.algebra.conv_form import ConvForm, Form
from passes.algebra.opaque import OpaqueForm
from passes.graph.capture import Unit, trace_units
from passes.graph.dataflow import Flow
from passes.graph.modes import kept_modes
from passes.graph.within import Inner, Within
from passes.laws.regions import Contraction
from passes.refusal import Reason, RefusalError

__all__ = ["InnerGraph", "around_form"]


class InnerGraph:
    """The graph of :meth:`Within.inner` of one module; traced once per module of a unit."""

    _of: ClassVar[WeakKeyDictionary[Unit, dict[int, InnerGraph]]] = WeakKeyDictionary()

    def __init__(self, module: Within) -> None:
        holder = Inner(module)
        with kept_modes(holder):
            units, untraced = trace_units(holder)
        if not units or units[0].path:
            raise RefusalError(Reason.UNTRACEABLE, untraced[0].message if untraced else Reason.UNTRACEABLE.value)
        flow = Flow(units[0], {})
        self.graph = Contraction(flow)
        self.entry = next(n for n in flow.nodes if n.op == "placeholder")
        self.result: fx.Node = flow.nodes[-1].args[0]  # type: ignore[assignment]

    @classmethod
    def of(cls, unit: Unit, module: Within) -> InnerGraph:
        known = cls._of.setdefault(unit, {})
        if id(module) not in known:
            known[id(module)] = cls(module)
        return known[id(module)]


def around_form(module: Within, form: Form) -> OpaqueForm:
    """The layer around a block with the numbers of what the block computes inside."""
    layer, inside = module.around, module.inside
    assert layer is not None
    assert inside is not None
    if not isinstance(form, ConvForm) or not inside.geometry.matches(form):
        raise RefusalError(Reason.GEOMETRY, "the block is no convolution of the geometry of the layer around it")
    if form.bias is not None and not inside.biased:
        raise RefusalError(Reason.OWN_FORWARD, f"{type(layer).__name__} has no place for the block's bias")
    return OpaqueForm(layer, form.weight, form.bias, inside.takes_norm)  # type: ignore[arg-type]
