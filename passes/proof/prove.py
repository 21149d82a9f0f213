"""The numeric proof of one fold; it needs no example input.

Two things are checked, which together leave no room for a tolerance that hides something: each number of the emitted
layer is the exact one rounded once, to its dtype; and the emitted layer with the exact numbers in it computes in
float64 what the original layers compute, on random tensors of several sizes.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.algebra.conv_form import Form
from passes.algebra.kernels import divisors
from passes.algebra.lowering import Target, emit
from passes.algebra.opaque import OpaqueForm
from passes.graph.copies import deep_copy
from passes.graph.dataflow import Constants, Flow
from passes.graph.opset import operation_of_layer
from passes.laws.deform import deformed, given_to, is_deforming_call
from passes.laws.interpreter import Share, shares_of
from passes.laws.regions import Region, Spread
from passes.laws.values import View
from passes.proof.compare import FLOAT64_TOLERANCE, EquivalenceError
from passes.refusal import Reason, RefusalError

__all__ = ["prove", "prove_spread"]


ROWS = 64
"""Output channels whose numbers are compared at a time."""

LARGEST = 1 << 22
"""Numbers of an input of the sizes that a graph was written for."""


def prove(flow: Flow, region: Region, form: Form, layer: nn.Module, name: str) -> float:
    """Largest error of ``layer`` against the region's original layers, relative to the largest output.

    Raises :class:`EquivalenceError`, under ``name``, if the difference is more than rounding. One float64 copy of
    the weight is held beside ``form`` at a time: that of the original layers, then the exact one, then the shipped one.
    """
    device = form.weight.device
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu").to(device)
        for shape in _shapes(flow, region, form)
    ]
    worst = 0.0
    with torch.no_grad():
        beside = [_beside(flow, region, form, x, generator) for x in inputs]
        given = inputs
        for share in _shares(flow, region, ahead=True):
            given = [_mapped(x, region.view, *share) for x in given]
        wanted = _wanted(
            flow, [{region.entry: x, **more} for x, more in zip(given, beside, strict=True)], region.result
        )
        for share in _shares(flow, region, ahead=False):
            wanted = [(_mapped(y, region.view, *share), peak) for y, peak in wanted]
        double = _exact(name, form, layer)
        for got, (want, peak) in zip(_folded(flow, region, double, inputs, beside), wanted, strict=True):
            _check_output(name, got, want, FLOAT64_TOLERANCE * peak)
        for key, rounded in layer.named_parameters():
            double.get_parameter(key).data.copy_(rounded)
        for got, (want, _) in zip(_folded(flow, region, double, inputs, beside), wanted, strict=True):
            gap, scale = float((got - want).abs().max()), float(want.abs().max())
            worst = max(worst, gap / scale if scale else gap)
    return worst


def prove_spread(flow: Flow, region: Region, name: str) -> None:
    """What the map makes of all that its layers give is what is made of their values with their parts of it.

    Behind it: what its layers read is what is made without it, with their parts. Raises :class:`EquivalenceError`. That
    each layer gives its value with its part of the map, its own proof says.
    """
    spread = region.spread
    assert spread is not None
    taken = {region.result: region.entry for region in spread.before}
    if taken and flow.unit.replay is not None:
        raise RefusalError(Reason.CODE, "the map before it stands in the graph that would be replayed")
    generator, why = torch.Generator().manual_seed(0), ""
    with torch.no_grad():
        shares = shares_of(flow, spread)
        if spread.lies is not None:
            _prove_ahead(flow, spread, spread.lies, shares, taken, name)
            return
        for shapes in _fitting(spread):
            numbers = [torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") for shape in shapes]
            given = {head: x.to(shares[head][0].device) for head, x in zip(spread.heads, numbers, strict=True)}
            try:
                ((want, peak),) = _wanted(flow, [given], spread.result, taken)
            except (RuntimeError, RefusalError) as error:  # maps of these sizes do not go together
                why = str(error).splitlines()[0]
                continue
            mapped = {h: _mapped(given[h], v, *shares[h]) for h, v in zip(spread.heads, spread.views, strict=True)}
            ((got, _),) = _run(flow, [mapped], spread.source, taken)
            _check_output(name, got, want, FLOAT64_TOLERANCE * peak)
            return
    raise RefusalError(Reason.LAYOUT, f"no maps were found that go together behind its layers: {why}")


def _prove_ahead(
    flow: Flow,
    spread: Spread,
    lies: tuple[View, int],
    shares: Mapping[fx.Node, Share],
    taken: Mapping[fx.Node, fx.Node],
    name: str,
) -> None:
    generator, why = torch.Generator().manual_seed(0), ""
    device = next(iter(shares.values()))[0].device
    for shape in _sizes_ahead(flow, spread, lies):
        x = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu").to(device)
        try:
            pairs = []
            for head, entry, view in zip(spread.heads, spread.entries, spread.views, strict=True):
                wanted = _wanted(flow, [{spread.source: x}], entry, taken)
                ((got, _),) = _run(flow, [{spread.source: x, spread.result: x}], entry, taken)
                if got.shape[view.channel_axis] != len(shares[head][0]):
                    raise RefusalError(Reason.CHANNELS)
                pairs += [(_mapped(got, view, *shares[head]), want, peak) for want, peak in wanted]
        except (RuntimeError, RefusalError) as error:  # its layers read maps of another size
            why = str(error).splitlines()[0]
            continue
        for got, want, peak in pairs:
            _check_output(name, got, want, FLOAT64_TOLERANCE * peak)
        return
    raise RefusalError(Reason.LAYOUT, f"no size was found that the layers behind it read: {why}")


def _sizes_ahead(flow: Flow, spread: Spread, lies: tuple[View, int]) -> Iterator[tuple[int, ...]]:
    """Shapes of what the map is given: any, and those of which a layer behind it reads every position."""
    view, channels = lies
    own = flow.unit.sizes(spread.source) if flow.unit.sizes is not None else None
    if own is not None and math.prod(own) <= LARGEST:
        yield own
        return
    if view.last:
        yield (*(2, 3, 5, 7)[: (view.rank or 2) - 1], channels)
        return
    yield (2, channels, *_PLACES[: view.n])
    for count in dict.fromkeys(c // channels for c in spread.channels):
        sides = itertools.product(divisors(count), repeat=view.n)
        for side in sorted((s for s in sides if math.prod(s) == count), key=max):
            for factor in _LARGER:
                yield (2, channels, *(size * factor for size in side))


_PLACES = (13, 11, 7)
"""Those of the example that the laws follow."""

_LARGER = (1, 2, 4, 8)
"""How many times as large the maps of some layers are tried, where others are enlarged before they meet."""


def _fitting(spread: Spread) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what the layers give, that may go together."""
    factors = _LARGER if len(spread.heads) <= 3 else (1,)
    for larger in itertools.product(factors, repeat=len(spread.heads)):
        if 1 in larger:
            yield [
                (*(2, 3, 5, 7)[: (view.rank or 2) - 1], channels)
                if view.last
                else (2, channels, *(size * factor for size in _PLACES[: view.n]))
                for view, channels, factor in zip(spread.views, spread.channels, larger, strict=True)
            ]


def _mapped(value: Tensor, view: View, scale: Tensor, shift: Tensor | None) -> Tensor:
    shape = (-1,) if view.last else (-1, *(1,) * view.n)
    return value * scale.reshape(shape) + (0 if shift is None else shift.reshape(shape))


def _shares(flow: Flow, region: Region, *, ahead: bool) -> list[Share]:
    """What a layer takes over of maps behind it, or of those ahead of it, the first to act first."""
    inner = [share for r in region.inner if r.result is region.result for share in _shares(flow, r, ahead=ahead)]
    spread = region.spread
    if spread is None or spread.ahead is not ahead:
        return inner
    own = shares_of(flow, spread)[region.result]
    return [own, *inner] if ahead else [*inner, own]


Given = list[dict[fx.Node, Tensor]]


def _wanted(
    flow: Flow, given: Given, result: fx.Node, taken: Mapping[fx.Node, fx.Node] | None = None
) -> list[tuple[Tensor, float]]:
    """What the original makes of values; what runs the operators of a graph does not know all of them."""
    if flow.unit.replay is None:
        return _run(flow, given, result, taken)
    try:
        return flow.unit.replay(given, result)
    except (MemoryError, torch.OutOfMemoryError, RefusalError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        raise RefusalError(Reason.ATTRIBUTE, f"cannot be replayed: {said or type(error).__name__}") from error


def _beside(flow: Flow, region: Region, form: Form, x: Tensor, generator: torch.Generator) -> dict[fx.Node, Tensor]:
    """Offsets, and a mask, for a deformable convolution: any that are of the right size."""
    if deformed(flow, region.result, None) is None:
        return {}
    assert isinstance(form, OpaqueForm)
    layer: Any = form.layer
    names, given = ("offset", "mask"), given_to(region.result)
    taps = math.prod(form.kernel)
    size = [
        (x.shape[2 + i] + 2 * layer.padding[i] - form.dilation[i] * (form.kernel[i] - 1) - 1) // form.stride[i] + 1
        for i in range(2)
    ]
    return {
        node: torch.randn(len(x), number * taps, *size, dtype=x.dtype, generator=generator, device="cpu").to(x.device)
        for name, number in zip(names, (2, 1), strict=True)
        if isinstance(node := given.get(name), fx.Node)
    }


def _folded(
    flow: Flow, region: Region, layer: nn.Module, inputs: list[Tensor], beside: list[dict[fx.Node, Tensor]]
) -> list[Tensor]:
    """What the region gives with the layer in its place, and what moves the layer's value behind it."""
    if region.head is None:
        return [_called(flow, layer, region, x, more) for x, more in zip(inputs, beside, strict=True)]
    made = [{region.entry: x, region.head: layer(x)} for x in inputs]
    return [value for value, _ in _run(flow, made, region.moved[-1])]


def _called(flow: Flow, layer: nn.Module, region: Region, x: Tensor, beside: Mapping[fx.Node, Tensor]) -> Tensor:
    given = {region.entry: x, **beside}
    if is_deforming_call(flow, region.result):
        own = given_to(region.result)
        numbers = {own[name]: value for name, value in layer.named_parameters()}
        ((called, _),) = _run(flow, [{**given, **numbers}], region.result)
        return called
    args, kwargs = fx.map_arg((region.result.args, region.result.kwargs), given.__getitem__) if beside else ((x,), {})
    result: Tensor = layer(*args, **kwargs)
    return result


def _exact(name: str, form: Form, layer: nn.Module) -> nn.Module:
    """The emitted layer with the form's float64 numbers, once its own are seen to be those, rounded."""
    device = form.weight.device
    wanted = emit(form, Target(torch.float64, device, False, False))
    numbers = dict(wanted.named_parameters())
    if numbers.keys() != dict(layer.named_parameters()).keys():
        raise _wrong(name, f"holds other parameters than {', '.join(numbers)}")
    for key, rounded in layer.named_parameters():
        number = numbers[key]
        if rounded.shape != number.shape:
            raise _wrong(name, f"has a {key} of shape {tuple(rounded.shape)} instead of {tuple(number.shape)}")
        worst = _beyond_rounding(rounded.detach(), number)
        if worst is not None:
            raise _wrong(name, f"has a {key} that is off by {worst:.3g}, more than rounding", worst)
    exact = copy.deepcopy(layer)
    for key, number in numbers.items():
        exact.get_parameter(key).data = number.data
    return exact.to(device, torch.float64)


def _beyond_rounding(rounded: Tensor, number: Tensor) -> float | None:
    """The largest difference of numbers that are not the exact ones rounded once, NaN included; None if there is none.

    Some rows at a time: whole, the differences would be several more copies of the weight.
    """
    info = torch.finfo(rounded.dtype)
    floor = info.tiny if info.tiny < 1e-30 else info.tiny * info.eps
    found = None
    for part, exact in zip(torch.atleast_1d(rounded).split(ROWS), torch.atleast_1d(number).split(ROWS), strict=True):
        gap = (part.to(exact.device, torch.float64) - exact).abs()
        if not bool((gap <= info.eps * exact.abs() + floor).all()):  # also false for NaN
            found = float(gap.max()) if found is None else max(found, float(gap.max()))
    return found


def _check_output(name: str, got: Tensor, wanted: Tensor, allowed: float) -> None:
    if got.shape != wanted.shape:
        raise _wrong(name, f"gives shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    gap = float((got - wanted).abs().max())
    if not gap <= allowed:  # also false for NaN
        scale = max(float(wanted.abs().max()), 1e-300)
        message = f"differs from the original layers by {gap:.3g} (relative {gap / scale:.3g})"
        raise _wrong(name, message, gap / scale)


def _wrong(name: str, message: str, error: float = math.nan) -> EquivalenceError:
    return EquivalenceError(f"{name}: the fold {message}", layer=name, error=error)


def _shapes(flow: Flow, region: Region, form: Form) -> list[tuple[int, ...]]:
    own = flow.unit.sizes(region.entry) if flow.unit.sizes is not None else None
    if own is not None and (region.view.last or region.moved) and math.prod(own) <= LARGEST:
        return [own]
    if region.view.last:
        channels = form.in_channels
        if region.view.rank:
            return [(*(2, 3, 5, 7)[: region.view.rank - 1], channels)]
        # It must hold for one more dimension too, and there with as many rows as channels: a layer that takes one for
        # the other runs, and is seen.
        rank, rows = _least_rank(flow, region), channels if channels <= ROWS else 3
        return [(*(2, 3, 5, 7)[: rank - 1], channels), (2, *[rows] * (rank - 1), channels)]
    least = [_least_size(form, i) for i in range(form.n)]
    small = form.weight.numel() < 1 << 16
    shapes = [(2 if small else 1, form.in_channels, *(s + i for i, s in enumerate(least)))]
    if small or any(s > 1 for s in form.stride):  # what a stride leaves over depends on the size
        shapes.append((1, form.in_channels, *(s + form.n - i for i, s in enumerate(least))))
    return shapes


def _least_size(form: Form, i: int) -> int:
    """Just large enough that every tap reads inside for some pixel and, with padding, outside for another."""
    if isinstance(form, OpaqueForm):
        return form.dilation[i] * (form.kernel[i] - 1) + 2 * form.stride[i] + 8
    reach = form.dilation[i] * (form.kernel[i] - 1) + 1
    pads = form.lead[i], form.trail[i]
    return max(*pads, *(-p for p in pads), *(reach - p for p in pads)) + 2 * form.stride[i]


def _least_rank(flow: Flow, region: Region) -> int:
    """Where the rank is not known: a constant (1, 1, C) is for maps of three dimensions."""
    inside = _needed({region.entry}, region.result)
    read = {c for n in inside - flow.constant for c in n.all_input_nodes if c in flow.constant}
    return max(2, *(value.dim() for c in read if isinstance(value := flow.planned.value(c), Tensor)), 0)


def _run(
    flow: Flow, given: Given, result: fx.Node, taken: Mapping[fx.Node, fx.Node] | None = None
) -> list[tuple[Tensor, float]]:
    """Run the original layers in float64, from values that are given; also the largest magnitude on the way.

    Each of several runs is given values of the same nodes. All pass a layer together: it is copied once, and its copy
    is gone before the next. A node that is ``taken`` for another gives that one's value.
    """
    taken = taken or {}
    constants = [Constants(flow, torch.float64) for _ in given]
    values: list[dict[fx.Node, Any]] = [{n: x.clone() for n, x in each.items()} for each in given]  # changed in place
    device = next(iter(given[0].values())).device
    for node in sorted(_needed(given[0], result), key=lambda n: flow.order[n]):  # in the original order, for the same
        function = None if node in flow.constant or node in taken else _function(flow, node, device)
        for known, numbers in zip(values, constants, strict=True):
            if node in taken:
                known[node] = known[taken[node]]
            elif function is None:
                known[node] = numbers.value(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = function(*args, **kwargs)
    return [(known[result], _peak(known.values())) for known in values]


def _function(flow: Flow, node: fx.Node, device: torch.device) -> Callable[..., Any]:
    """What a node calls, a module in float64."""
    if node.op == "call_module":
        return _in_double(flow.modules[node], device)
    if node.op == "call_method":
        return lambda x, *args, **kwargs: getattr(x, str(node.target))(*args, **kwargs)
    if node.op == "call_function" and callable(node.target):
        return node.target
    raise RefusalError(Reason.OTHER_INPUT, f"{node.name} is not part of the region")


def _in_double(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy in float64; of a layer whose forward is torch's own, only what holds its numbers is copied."""
    if module._modules or operation_of_layer(module) is None:
        return deep_copy(module).to(device, torch.float64)
    layer = copy.copy(module)
    for name in ("_parameters", "_buffers"):
        table: dict[str, Tensor | None] = vars(module)[name]
        vars(layer)[name] = {key: None if t is None else _number(t, device) for key, t in table.items()}
    return layer


def _number(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _peak(values: Iterable[Any]) -> float:
    computed = [t for t in values if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    return max(float(t.abs().max()) for t in computed)


def _needed(given: Collection[fx.Node], result: fx.Node) -> set[fx.Node]:
    """The traced nodes that the result depends on, back to those that are given."""
    if result in given:
        return set()
    seen, todo = {result}, [result]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in given and node not in seen:
                seen.add(node)
                todo.append(node)
    return seen
