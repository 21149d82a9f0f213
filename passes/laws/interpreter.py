"""The values behind one entry, each an affine function of it: abstract interpretation of the graph by the laws.

On meta tensors to plan, in float64 to fold; both run the same laws. Only the entry is given, so what holds for a value
holds wherever the entry's value comes from.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from passes.algebra.conv_form import ConvForm, Form
from passes.algebra.kernels import divisors
from passes.algebra.sparse_form import SparseForm
from passes.graph.dataflow import Constants, Flow
from passes.graph.opset import Kind
from passes.graph.within import Within
from passes.laws.deform import deformed
from passes.laws.laws import law_of
from passes.laws.probe import ProbedForms
from passes.laws.regions import Contraction, Region, Spread, form_device
from passes.laws.values import Dim, Signal, View, channels_along, settle
from passes.laws.within import InnerGraph, around_form
from passes.refusal import PROBED, Reason, Refusal, RefusalError

__all__ = [
    "Interpreter", "Share", "behind_map", "form_of", "read_behind", "shares_of", "sources_of",
    "values_behind",
]  # fmt: skip


def form_of(flow: Flow, region: Region, dtype: torch.dtype = torch.float64) -> Form:
    """The region's form in numbers, its block structure found again; refuses where only numbers tell."""
    graph = Contraction(flow, region.inner)
    form: Form
    if (own := deformed(flow, region.result, dtype)) is not None and not region.inner:
        form = own
    else:
        form = _signal(Interpreter(graph, region.entry, region.view, region.channels, dtype), region.result).form
    form = form.narrowed()
    if region.spread is None:
        return form
    share = shares_of(flow, region.spread, dtype)[region.result]
    return behind_map(form, *share) if region.spread.ahead else form.affine(*share)


def behind_map(form: Form, scale: Tensor, shift: Tensor | None) -> ConvForm:
    """The form behind a map per channel of its input."""
    return ConvForm.identity(form.in_channels, form.n, like=form.weight).affine(scale, shift).then(form)


Share = tuple[Tensor, "Tensor | None"]


def shares_of(flow: Flow, spread: Spread, dtype: torch.dtype | None = torch.float64) -> dict[fx.Node, Share]:
    """The factor and the shift of each channel that each layer takes over; a layer without any shift has None.

    With ``dtype`` None only their shapes. Where one channel meets two numbers of the map, it refuses.

    With S what joins the layers' values x, and y = a (S x + b) + c: a factor s of x with s = a wherever S is not zero,
    and a shift t of x with S t = c + (a - 1) b. Behind the map, y = S (a x + c) + b, which is s (S x + b) + t.
    """
    if spread.lies is not None:
        return _shares_ahead(flow, spread, spread.lies, dtype)
    joined = _joined(flow, spread, dtype)
    mapped = _mapped(flow, spread, joined, dtype)
    a, c = mapped.form.factors[0], mapped.form.shift
    total, at = sum(spread.channels), joined.form.sources
    there, device = at >= 0, a.device
    first = torch.where(there, at, total).argmin(0)  # those that rather take a shift have the lower numbers
    bearer = at.gather(0, first[None])[0]
    scale, shift = a.new_ones(total), a.new_zeros(total)
    if not a.is_meta:
        term, out = (index.to(device) for index in there.nonzero(as_tuple=True))
        number = at[there].to(device)
        scale[number] = a[out]
        b = c + (a - 1) * joined.form.shift
        shift[bearer.to(device)] = b / joined.form.factors[first.to(device), torch.arange(len(a), device=device)]
        given = torch.zeros_like(b).index_add(0, out, joined.form.factors[term, out] * shift[number])
        if not torch.equal(scale[number], a[out]) or not torch.allclose(given, b, rtol=1e-12, atol=1e-300):
            raise RefusalError(Reason.NOT_PER_CHANNEL, "a channel of one layer meets several numbers of the map")
    borne = {spread.heads[i] for i in _owner(spread)[bearer].unique().tolist()}
    parts = zip(spread.heads, scale.split(spread.channels), shift.split(spread.channels), strict=True)
    return {head: (s, t if head in borne else None) for head, s, t in parts}


def _shares_ahead(
    flow: Flow, spread: Spread, lies: tuple[View, int], dtype: torch.dtype | None
) -> dict[fx.Node, Share]:
    view, channels = lies
    like = torch.empty(0, dtype=dtype or torch.float64, device=form_device(flow, dtype))
    joined = Signal(SparseForm.identity(0, channels, view.n, like=like), view)
    mapped = _mapped(flow, spread, joined, dtype).form
    # Behind them, channels of the source itself: the map does not act on those.
    a, c = torch.cat([mapped.factors[0], like.new_ones(channels)]), torch.cat([mapped.shift, like.new_zeros(channels)])
    behind = values_behind(Contraction(flow, spread.before), spread.source, spread.result, lies, dtype)
    found: dict[fx.Node, Share] = {}
    for head, entry, reads, count in zip(spread.heads, spread.entries, spread.views, spread.channels, strict=True):
        form, columns = read_behind(behind, entry, reads, count)
        there, at = (part.to(a.device) for part in (form.sources >= 0, form.sources.clamp(min=0)))
        scale = a[at[0]]
        if not a.is_meta and not bool(((a[at] == scale) | ~there).all()):
            raise RefusalError(Reason.NOT_PER_CHANNEL, "a channel of one layer is made of several of the map's")
        shift = (form.factors * c[at]).sum(0) + form.shift - scale * form.shift
        found[head] = scale[columns.to(a.device)], shift[columns.to(a.device)]
    return found


_EXAMPLES = ((11, 13, 11, 7), (11, 19, 17, 23))
"""Sizes in which what stays behind a map is followed, the batch's first; where they matter, the two differ."""

_LARGEST = 1 << 22
"""Numbers of a value that a graph was written for, which is followed in its own size."""


def values_behind(
    graph: Contraction, source: fx.Node, result: fx.Node, lies: tuple[View, int], dtype: torch.dtype | None
) -> list[Interpreter]:
    """The values behind a map as channels of its result, in several sizes; behind those come channels of its source."""
    view, channels = lies
    own = graph.flow.unit.sizes(source) if graph.flow.unit.sizes is not None else None
    before = (view.rank or 2) - 1 if view.last else 1
    shapes = [(*e[:before], channels, *e[1 : 1 + view.n]) for e in _EXAMPLES]
    if own is not None and math.prod(own) <= _LARGEST:
        if len(own) != len(shapes[0]) or own[view.channel_axis] != channels:
            raise RefusalError(Reason.CHANNELS)
        shapes = [own]
    like = torch.empty(0, dtype=dtype or torch.float64, device=form_device(graph.flow, dtype))
    found = []
    for shape in shapes:
        given = {
            node: Signal(SparseForm.identity(start, channels, view.n, like=like, example=shape), view)
            for node, start in ((source, channels), (result, 0))
        }
        found.append(Interpreter.behind(graph, given, dtype))
    return found


def read_behind(values: Sequence[Interpreter], entry: fx.Node, view: View, count: int) -> tuple[SparseForm, Tensor]:
    """What a layer behind a map reads: a form, and which of its channels each of the layer's ``count`` inputs is."""
    signals = [_signal(interpreter, entry) for interpreter in values]
    lines = [channels_along(signal, view) for signal in signals]
    if all(torch.equal(line, lines[0]) for line in lines) and len(lines[0]) == count:
        return signals[0].form, lines[0]
    if len(lines) > 1:  # positions of a channel lie in a row, or the channels of a position: there are as many as fit
        for each in (_blocks, _period):
            parts = [each(line) for line in lines]
            if all(torch.equal(part, parts[0]) for part in parts) and count % len(parts[0]) == 0:
                times = count // len(parts[0])
                return signals[0].form, parts[0].repeat_interleave(times) if each is _blocks else parts[0].repeat(times)
    raise RefusalError(Reason.LAYOUT, "which channel it reads where depends on the size of the input")


def _blocks(line: Tensor) -> Tensor:
    """One of each block of equal numbers, all blocks being of one length, the largest that fits."""
    length = math.gcd(*torch.unique_consecutive(line, return_counts=True)[1].tolist())
    return line[::length]


def _period(line: Tensor) -> Tensor:
    """The shortest part that makes the whole when it is repeated."""
    return next(part for n in divisors(len(line)) if torch.equal((part := line[:n]).repeat(len(line) // n), line))


def sources_of(graph: Contraction, spread: Spread) -> tuple[Tensor, Interpreter]:
    """Which channels of the layers' values the map acts on, ``(terms, channels)``; and all values on the way."""
    interpreter = _over(graph, spread, None)
    joined = _signal(interpreter, spread.source)
    _mapped(graph.flow, spread, joined, None)
    sources: Tensor = joined.form.sources
    return sources, interpreter


def _owner(spread: Spread) -> Tensor:
    """Which of the layers each channel belongs to."""
    owners = torch.arange(len(spread.heads), device="cpu")
    return owners.repeat_interleave(torch.tensor(spread.channels, device="cpu"))


def _over(graph: Contraction, spread: Spread, dtype: torch.dtype | None) -> Interpreter:
    like = torch.empty(0, dtype=dtype or torch.float64, device=form_device(graph.flow, dtype))
    starts = itertools.accumulate(spread.channels, initial=0)
    given = {
        head: Signal(SparseForm.identity(start, channels, view.n, like=like), view)
        for head, view, channels, start in zip(spread.heads, spread.views, spread.channels, starts, strict=False)
    }
    return Interpreter.behind(graph, given, dtype)


def _joined(flow: Flow, spread: Spread, dtype: torch.dtype | None) -> Signal:
    joined = _signal(_over(Contraction(flow, spread.before), spread, dtype), spread.source)
    if bool((joined.form.sources < 0).all(0).any()):
        raise RefusalError(Reason.LAYOUT)
    return joined


def _mapped(flow: Flow, spread: Spread, joined: Signal, dtype: torch.dtype | None) -> Signal:
    """The map alone, on what the layers give together."""
    identity = SparseForm.identity(0, joined.form.out_channels, joined.view.n, like=joined.form.factors)
    given = {spread.source: replace(joined, form=identity)}
    mapped = _signal(Interpreter.behind(Contraction(flow), given, dtype), spread.result)
    same = mapped.is_moved is joined.is_moved and (not joined.is_moved or torch.equal(mapped.ids, joined.ids))
    if not same or not torch.equal(mapped.form.sources, identity.sources):
        raise RefusalError(Reason.NOT_PER_CHANNEL)
    return mapped


def _signal(interpreter: Interpreter, node: fx.Node) -> Signal:
    value = interpreter.value(node)
    if isinstance(value, Refusal):
        raise RefusalError(value.reason, value.message, value.layer)
    if not isinstance(value, Signal):
        raise RefusalError(Reason.NOT_AFFINE)
    return value


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
        self.constants = self.flow.planned if dtype is None else Constants(self.flow, dtype)
        like = torch.empty(0, dtype=dtype or torch.float64, device=form_device(self.flow, dtype))
        identity = ConvForm.identity(channels, view.n, like=like)
        self._given: dict[fx.Node, Signal] = {entry: Signal(identity, view, untouched=True)}
        self._values: dict[fx.Node, Any] = {**self._given}

    @classmethod
    def behind(cls, graph: Contraction, given: dict[fx.Node, Signal], dtype: torch.dtype | None) -> Interpreter:
        """Of the values behind several nodes, whose own are given."""
        first = min(given, key=graph.flow.order.__getitem__)
        interpreter = cls(graph, first, given[first].view, 1, dtype)
        interpreter._given = given
        interpreter._values = {**given}
        return interpreter

    def value(self, node: fx.Node) -> Any:
        """A signal, a size, a constant or a tuple of them; or the refusal that says why not."""
        if node not in self._values:
            before, last = self._before(node), dict[fx.Node, fx.Node]()
            if self.dtype is not None:
                last = {source: reader for reader in before for source in self.graph.sources(reader)}
            for reached in before:
                try:
                    self._values[reached] = self._evaluate(reached)
                except RefusalError as error:
                    told = error.refusal
                    self._values[reached] = told if told.layer else told.at(self.flow.unit.name(reached))
                if self.dtype is None:
                    continue
                for read in self.graph.sources(reached):
                    # As numbers each value is a kernel: none outlives its last reader.
                    if last[read] is reached and read not in self._given:
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
        return sorted(found, key=self.flow.order.__getitem__)

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
        law, operation = self._law(node), self.flow.operations.get(node)
        only = operation is not None and operation.kind is Kind.CAST  # to which dtype, has been looked at
        args = fx.map_arg(node.args[:1] if only else node.args, self._input)
        kwargs = fx.map_arg({} if only else node.kwargs, self._input)
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
        if region.is_alias:
            return replace(x, work=0, conv=False, bias=0)
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
        module = self.flow.modules[node]
        if isinstance(module, Within):
            return lambda x: self._within(module, x)
        return lambda x: ProbedForms.of(self.flow.unit).apply(module, x)

    def _within(self, module: Within, x: Any) -> Signal:
        """The value of a block inside a layer's own forward."""
        inside = module.inside
        assert inside is not None
        view = View(inside.geometry.n)
        if not isinstance(x, Signal) or settle(x).view != view:
            raise RefusalError(Reason.LAYOUT)
        own = InnerGraph.of(self.flow.unit, module)
        value = Interpreter(own.graph, own.entry, view, inside.geometry.in_channels, self.dtype).value(own.result)
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        form = around_form(module, value.form)
        return x.with_form(form if x.untouched else settle(x).form.then(form), work=form.weight.numel(), conv=True)

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
