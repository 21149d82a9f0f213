"""Regions, and the values inside one: each node behind an entry as an affine function of it.

A region lies between an entry and a result that the entry dominates. Its form is evaluated from the entry alone, on
meta tensors while planning and in float64 when it is folded; both run the same laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from passes.algebra.conv_form import ConvForm
from passes.graph.capture import call_of
from passes.graph.dataflow import Constants, Flow
from passes.laws.laws import law_of
from passes.laws.probe import ProbedForms
from passes.laws.values import Dim, Signal, View
from passes.refusal import Reason, Refusal, RefusalError
from passes.report import Fold

__all__ = ["Region", "Sweep", "cost_message", "fold_of", "origin"]


@dataclass(eq=False)
class Region:
    """A part of the graph that acts as one convolution, read from ``entry`` and giving ``result``."""

    flow: Flow
    entry: fx.Node
    result: fx.Node
    view: View
    channels: int
    form: ConvForm
    between: list[fx.Node]
    dying: list[fx.Node]
    constants: list[fx.Node]
    numbers_saved: int
    work_saved: float
    biases: int
    conv_first: bool
    after_conv: bool
    convs: set[fx.Node]
    node: fx.Node | None = None
    placement: Any = None
    inner: list[Region] = field(default_factory=list)

    @property
    def gain(self) -> tuple[bool, float, bool, float, int]:
        """What orders regions.

        A batch norm between two convolutions belongs to the one before it; then count the numbers saved, biases
        aside, then multiply-adds, then the fewer nodes touched, but rather with a functional pad than without: left
        alone, it would keep the code around it from becoming one layer.
        """
        pads = sum(n.op == "call_function" and n.target is F.pad for n in self.dying)
        return (
            self.conv_first or not self.after_conv,
            self.numbers_saved - self.biases - self.form.weight.numel(),
            self.conv_first,
            self.work_saved - self.form.multiply_adds,
            2 * pads - len(self.dying),
        )

    @property
    def key(self) -> tuple[str, ...]:
        """Names that find this region again in a fresh graph of the same unit."""
        return origin(self.entry).name, *self.layers()

    def numeric(self) -> ConvForm:
        """The form in float64, its block structure found again."""
        sweep = Sweep(self.flow, self.entry, self.view, self.channels, torch.float64)
        value = sweep.value(self.result)
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        form: ConvForm = value.form.narrowed()
        if form.numbers > self.numbers_saved or form.multiply_adds > self.work_saved:
            raise RefusalError(Reason.LARGER, cost_message(form, self.numbers_saved, self.work_saved))
        return form

    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that vanish, in order of execution."""
        flow = self.flow
        owners = {call_of(n) for n in self.constants}  # modules that hold weights: their names say enough
        order = sorted([*self.constants, *self.dying], key=lambda n: flow.order[n])
        named = [
            n
            for n in order
            if not flow.shape_only(n)
            and not isinstance(flow.modules.get(n), nn.Identity)
            and (n.op not in ("call_function", "call_method") or call_of(n) not in owners)
        ]
        return tuple(dict.fromkeys(flow.unit.name(n) for n in named or order))


def origin(node: fx.Node) -> fx.Node:
    """The traced node whose value ``node`` has; a fold stands for the result that it replaced."""
    while isinstance(region := node.meta.get("region"), Region):
        node = region.result
    return node


class Sweep:
    """Values of the nodes behind one entry, each an affine function of it or a refusal.

    On meta tensors (``dtype`` None) all of them are kept; in numbers, those that were asked for.
    """

    def __init__(self, flow: Flow, entry: fx.Node, view: View, channels: int, dtype: torch.dtype | None = None) -> None:
        self.flow = flow
        self.entry = entry
        self.view = view
        self.channels = channels
        self.dtype = dtype
        self.constants = Constants(flow, dtype)
        device = next((t.device for t in flow.unit.root.parameters()), torch.device("cpu"))
        on = torch.device("cpu") if device.type == "mps" else device  # no float64 there
        like = torch.empty(0, dtype=dtype or torch.float64, device="meta" if dtype is None else on)
        identity = ConvForm.identity(channels, view.n, like=like)
        self._values: dict[fx.Node, Any] = {entry: Signal(identity, view, untouched=True)}

    def value(self, node: fx.Node) -> Any:
        """A signal, a size, a constant or a tuple of them; or the refusal that says why not."""
        if node not in self._values:
            behind = self._behind(node)
            last = {source: reader for reader in behind for source in reader.all_input_nodes}
            for source in behind:
                try:
                    self._values[source] = self._evaluate(source)
                except RefusalError as error:
                    self._values[source] = error.refusal.at(self.flow.unit.name(origin(source)))
                if self.dtype is None:
                    continue
                for read in source.all_input_nodes:  # as numbers each value is a kernel: none outlives its last reader
                    if last[read] is source and read is not self.entry:
                        self._values.pop(read, None)
        return self._values[node]

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """What ``node`` depends on, in order of execution: affine chains are longer than Python recurses."""
        found, todo = {node}, [node]
        while todo:
            reached = todo.pop()
            if reached in self.flow.constant or self._is_outside(reached):
                continue
            for source in reached.all_input_nodes:
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

    def _law(self, node: fx.Node) -> Callable[..., Any] | None:
        region = node.meta.get("region")
        if isinstance(region, Region):
            form = region.numeric() if self.dtype is not None else region.form
            return lambda x: _then_region(x, region, form)
        if node.op == "call_module":
            module = self.flow.modules[node]
            path = str(node.target)
            if path in self.flow.unit.opaque:
                return self._probed(module, self.flow.unit.opaque[path])
            if id(module) in self.flow.unit.pinned:
                raise RefusalError(Reason.SHARED)
        if node in self.flow.refused:
            refusal = self.flow.refused[node]
            raise RefusalError(refusal.reason, refusal.message)
        if node not in self.flow.affine:
            return None
        return law_of(self.flow.operations.get(node), self.flow.modules.get(node), self.constants.read)

    def _probed(self, module: nn.Module, refusal: Refusal) -> Callable[..., Any]:
        if refusal.reason is not Reason.UNTRACEABLE:
            raise RefusalError(refusal.reason, refusal.message)

        return lambda x: ProbedForms.of(self.flow.unit).apply(module, x)

    def _input(self, node: fx.Node) -> Any:
        value = self._values[node]
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        return value


def _then_region(x: Signal, region: Region, form: ConvForm) -> Signal:
    if (x.view.last, x.view.n) != (region.view.last, region.view.n) or x.ids is not None:
        raise RefusalError(Reason.LAYOUT)
    return x.with_form(x.form.then(form), work=form.weight.numel(), conv=True)


def _any_signal(value: Any) -> bool:
    if isinstance(value, Signal):
        return True
    if isinstance(value, dict):
        return any(_any_signal(v) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_any_signal(v) for v in value)


def _plain_call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Arithmetic on sizes."""
    if node.op == "call_function" and any(isinstance(a, (Dim, int, tuple, list)) for a in args):
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (TypeError, AttributeError, IndexError) as error:
            raise RefusalError(Reason.NOT_AFFINE) from error
    raise RefusalError(Reason.OTHER_INPUT)


def cost_message(form: ConvForm, numbers: int, work: float) -> str:
    """What a fold would cost, and what the layers cost that it would replace."""
    return (
        f"{Reason.LARGER.value}: {form.numbers} numbers and {form.multiply_adds:.0f} multiply-adds per position "
        f"instead of {numbers} and {work:.0f}"
    )


def fold_of(region: Region, where: str, error: float | None) -> Fold:
    """What is reported of a region whose layer now stands at ``where``."""
    form = region.form
    return Fold(
        region.layers(),
        _describe(region),
        where,
        region.numbers_saved,
        form.numbers,
        region.work_saved,
        form.multiply_adds,
        error,
    )


def _describe(region: Region) -> str:
    form = region.form
    kernel = "x".join(map(str, form.kernel))
    if form.n == 0:
        return f"Linear({form.in_channels} -> {form.out_channels})"
    kind = "ConvTranspose" if any(u != 1 for u in form.up) else "Conv"
    grouped = f", groups {form.groups}" if form.groups > 1 else ""
    stride = f", stride {'x'.join(map(str, form.stride))}" if any(s > 1 for s in form.stride) else ""
    return f"{kind}{form.n}d({form.in_channels} -> {form.out_channels}, {kernel}{stride}{grouped})"
