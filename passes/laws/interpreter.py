"""The values behind one entry, each an affine function of it: abstract interpretation of the graph by the laws.

On meta tensors to plan, in float64 to fold; both run the same laws. Only the entry is given, so what holds for a value
holds wherever the entry's value comes from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from passes.algebra.conv_form import ConvForm, Form
from passes.graph.dataflow import Constants, Flow
from passes.laws.laws import law_of
from passes.laws.probe import ProbedForms
from passes.laws.regions import Contraction, Region
from passes.laws.values import Dim, Signal, View
from passes.refusal import PROBED, Reason, Refusal, RefusalError

__all__ = ["Interpreter", "form_of"]


def form_of(flow: Flow, region: Region, dtype: torch.dtype = torch.float64) -> Form:
    """The region's form in numbers, its block structure found again; refuses where only numbers tell."""
    graph = Contraction(flow, region.inner)
    value = Interpreter(graph, region.entry, region.view, region.channels, dtype).value(region.result)
    if isinstance(value, Refusal):
        raise RefusalError(value.reason, value.message, value.layer)
    form: Form = value.form
    return form.narrowed()


class Interpreter:
    """Values of the nodes behind one entry, each an affine function of it or a refusal.

    On meta tensors (``dtype`` None) all of them are kept; in numbers, those that were asked for.
    """

    def __init__(
        self, graph: Contraction, entry: fx.Node, view: View, channels: int, dtype: torch.dtype | None = None
    ) -> None:
        self.graph, self.flow = graph, graph.flow
        self.entry = entry
        self.view = view
        self.channels = channels
        self.dtype = dtype
        self.constants = Constants(self.flow, dtype)
        device = next((t.device for t in self.flow.unit.root.parameters()), torch.device("cpu"))
        on = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        like = torch.empty(0, dtype=dtype or torch.float64, device="meta" if dtype is None else on)
        identity = ConvForm.identity(channels, view.n, like=like)
        self._values: dict[fx.Node, Any] = {entry: Signal(identity, view, untouched=True)}

    def value(self, node: fx.Node) -> Any:
        """A signal, a size, a constant or a tuple of them; or the refusal that says why not."""
        if node not in self._values:
            before = self._before(node)
            last = {source: reader for reader in before for source in self.graph.sources(reader)}
            for reached in before:
                try:
                    self._values[reached] = self._evaluate(reached)
                except RefusalError as error:
                    self._values[reached] = error.refusal.at(self.flow.unit.name(reached))
                if self.dtype is None:
                    continue
                for read in self.graph.sources(reached):
                    # As numbers each value is a kernel: none outlives its last reader.
                    if last[read] is reached and read is not self.entry:
                        self._values.pop(read, None)
        return self._values[node]

    def _before(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` depends on, in order of execution: affine chains are longer than Python recurses."""
        found, todo = {node}, [node]
        while todo:
            reached = todo.pop()
            if reached in self.flow.constant or self._is_outside(reached):
                continue
            for source in self.graph.sources(reached):
                if source not in found and source not in self._values:
                    found.add(source)
                    todo.append(source)
        return sorted(found, key=lambda n: self.flow.order[n])

    def _is_outside(self, node: fx.Node) -> bool:
        return self.flow.order[node] <= self.flow.order[self.entry] or node.op in ("placeholder", "output")

    def _evaluate(self, node: fx.Node) -> Any:
        if node in self.flow.constant:
            return self.constants.value(node)
        if self._is_outside(node):
            raise RefusalError(Reason.OTHER_INPUT)
        region = self.graph.regions.get(node)
        if region is not None:
            return self._apply(region, self._input(region.entry))
        law = self._law(node)
        args, kwargs = fx.map_arg(node.args, self._input), fx.map_arg(node.kwargs, self._input)
        if not _any_signal((args, kwargs)):
            return _plain_call(node, args, kwargs)
        if law is None:
            raise RefusalError(Reason.NOT_AFFINE)
        try:
            return law(*args, **kwargs)
        except RefusalError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            # The layer would not take the region's example; on the model's own tensors it may mean something else.
            raise RefusalError(Reason.ATTRIBUTE, f"{Reason.ATTRIBUTE.value}: {error}".splitlines()[0]) from error

    def _apply(self, region: Region, x: Any) -> Signal:
        """The value of a contracted region."""
        if not isinstance(x, Signal):
            raise RefusalError(Reason.OTHER_INPUT)
        if region.moved:
            raise RefusalError(Reason.LAYOUT)
        if (x.view.last, x.view.n) != (region.view.last, region.view.n) or x.is_moved:
            raise RefusalError(Reason.LAYOUT)
        form = region.form if self.dtype is None else form_of(self.flow, region, self.dtype)
        return x.with_form(form if x.untouched else x.form.then(form), work=form.weight.numel(), conv=True)

    def _law(self, node: fx.Node) -> Callable[..., Any] | None:
        if node.op == "call_module":
            path = str(node.target)
            if path in self.flow.unit.opaque:
                return self._probed(node, self.flow.unit.opaque[path])
            if id(self.flow.modules[node]) in self.flow.unit.pinned:
                raise RefusalError(Reason.SHARED)
        if node in self.flow.refused:
            refusal = self.flow.refused[node]
            raise RefusalError(refusal.reason, refusal.message)
        if node not in self.flow.affine:
            return None
        return law_of(self.flow.operations.get(node), self.flow.modules.get(node), self.constants.read)

    def _probed(self, node: fx.Node, refusal: Refusal) -> Callable[..., Any]:
        if refusal.reason not in PROBED:
            raise RefusalError(refusal.reason, refusal.message)
        return lambda x: ProbedForms.of(self.flow.unit).apply(self.flow.modules[node], x)

    def _input(self, node: fx.Node) -> Any:
        value = self._values[node]
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        return value


def _any_signal(value: Any) -> bool:
    if isinstance(value, Signal):
        return True
    if isinstance(value, dict):
        return any(_any_signal(v) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_any_signal(v) for v in value)


def _plain_call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Arithmetic on sizes."""
    if node.target in (operator.is_, operator.is_not):
        raise RefusalError(Reason.NOT_AFFINE)
    if node.op == "call_function" and any(isinstance(a, (Dim, int, tuple, list)) for a in args):
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except RefusalError:
            raise
        # Any function at all, which was written for numbers.
        except Exception as error:
            raise RefusalError(Reason.NOT_AFFINE) from error
    raise RefusalError(Reason.OTHER_INPUT)
