"""The numeric proof that a rewrite changed nothing.

A region needs no example input: random tensors of the right channels, of several sizes, go through the original
layers in float64 and through the emitted layer. What may differ is bounded, pixel by pixel, by the rounding of the
emitted weights: ``eps * conv(|x|, |W|)``. A whole model is compared on example inputs; its tolerance is ten times the
noise floor, which is how far the reference in its own dtype is from the reference in float64.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from passes.conv_form import ConvForm
from passes.flow import Constants
from passes.probe import CarriedForm
from passes.refusal import Reason, RefusalError, ReparamError
from passes.region import Region
from passes.surgery import origin

__all__ = ["Equivalence", "EquivalenceError", "compare", "compare_outputs", "outputs", "prove"]

FLOAT64_TOLERANCE = 1e-10
"""Largest relative difference between two float64 computations of the same thing."""


class EquivalenceError(ReparamError):
    """A rewrite changed what the network computes; the message names where and by how much."""


@dataclass(frozen=True)
class Equivalence:
    """Outcome of a comparison.

    Args:
        ok: whether the largest relative difference is within ``tolerance``.
        max_abs: largest absolute difference of any output, computed in float64.
        max_rel: the same relative to the largest magnitude of that output.
        tolerance: what ``max_rel`` may be.
        noise: relative distance of the reference in its own dtype from itself in float64; None for float64.
        first_difference: path of the module where the difference starts; None if there is none.
    """

    ok: bool
    max_abs: float
    max_rel: float
    tolerance: float
    noise: float | None = None
    first_difference: str | None = None

    def raise_if_different(self) -> None:
        """Raise :class:`EquivalenceError` unless ``ok``."""
        if not self.ok:
            where = f", first at {self.first_difference}" if self.first_difference is not None else ""
            raise EquivalenceError(
                f"the networks differ by {self.max_abs:.3g} (relative {self.max_rel:.3g}, allowed {self.tolerance:.3g}){where}"
            )


# ------------------------------------------------------------------ regions


def prove(region: Region, form: ConvForm, layer: nn.Module) -> float:
    """Largest error of ``layer`` against the region's original layers, relative to the largest output.

    Raises :class:`EquivalenceError`, naming the layers, if the difference is more than rounding.
    """
    weight = next(layer.parameters())
    exact = copy.deepcopy(layer).double()
    eps = torch.finfo(weight.dtype).eps
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for shape in _shapes(region, form):
        x = torch.randn(shape, dtype=torch.float64, generator=generator).to(form.weight.device)
        with torch.no_grad():
            wanted, got = _original(region, x), exact(x)
            bound = _rounding(form, x)
        error = _difference(got, wanted, eps * bound, region)
        worst = max(worst, error)
    return worst


def _difference(got: Tensor, wanted: Tensor, bound: Tensor, region: Region) -> float:
    layers = ", ".join(region.layers())
    if got.shape != wanted.shape:
        raise EquivalenceError(f"{layers}: the fold gives shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    gap, scale = (got - wanted).abs(), float(wanted.abs().max())
    allowed = bound + FLOAT64_TOLERANCE * max(scale, float(bound.max()))
    if not bool((gap <= allowed).all()):  # also false for NaN
        worst = float(gap.max())
        raise EquivalenceError(
            f"{layers}: the fold differs from the original layers by {worst:.3g} "
            f"(relative {worst / max(scale, 1e-300):.3g}), more than the rounding of its weights"
        )
    return float(gap.max()) / max(scale, 1e-300)


def _rounding(form: ConvForm, x: Tensor) -> Tensor:
    """How much the output may move per unit of relative rounding of weights and bias."""
    if isinstance(form, CarriedForm):
        per_channel = form.weight.abs().flatten(1).sum(1).max() * x.abs().max()
        return per_channel + (0.0 if form.bias is None else form.bias.abs().max())
    return form.apply(x, absolute=True)


def _shapes(region: Region, form: ConvForm) -> list[tuple[int, ...]]:
    if region.view.last:
        return [((2, 3, 5, 7)[: (region.view.rank or 2) - 1]) + (form.in_channels,)]
    span = [form.dilation[i] * (form.kernel[i] - 1) + 2 * form.stride[i] + 1 for i in range(form.n)]
    span = [s + 8 if isinstance(form, CarriedForm) else s for s in span]
    least = [max(s, 1 + max(abs(a), abs(b))) for s, a, b in zip(span, form.lead, form.trail, strict=True)]
    batch = 2 if form.weight.numel() < 1 << 16 else 1
    return [
        (batch, form.in_channels, *(s + i for i, s in enumerate(least))),
        (1, form.in_channels, *(s + form.n - i for i, s in enumerate(least))),
    ]


def _original(region: Region, x: Tensor) -> Any:
    """Run the region's own layers on ``x`` in float64, module by module."""
    flow = region.flow
    constants = Constants(flow, numeric=True)
    entry, result = origin(region.entry), origin(region.result)
    values: dict[fx.Node, Any] = {entry: x}

    def value(node: fx.Node) -> Any:
        node = origin(node)
        if node not in values:
            values[node] = constants.value(node) if node in flow.constant else run(node)
        return values[node]

    def run(node: fx.Node) -> Any:
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return copy.deepcopy(flow.modules[node]).to(x.device, torch.float64)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_function" and callable(node.target):
            return node.target(*args, **kwargs)
        raise RefusalError(Reason.OTHER_INPUT, f"{node.name} is not part of the region")

    return value(result)


# ------------------------------------------------------------------ whole models


def outputs(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = torch.float64) -> list[Tensor]:
    """All tensors that ``model`` returns, run on a copy in eval mode and in ``dtype`` (None: as it is)."""
    runner = copy.deepcopy(model).eval()
    if dtype is not None:
        runner = runner.to(dtype)
        inputs = _cast(inputs, dtype)
    with torch.no_grad():
        return [t for t in tree_leaves(runner(*inputs)) if isinstance(t, Tensor)]


def compare(reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...]) -> Equivalence:
    """Compare two models on ``inputs``, in float64; see :class:`Equivalence`."""
    wanted = outputs(reference, inputs)
    result = compare_outputs(reference, wanted, candidate, inputs)
    if result.ok:
        return result
    first = _first_difference(reference, candidate, inputs, result.tolerance)
    return Equivalence(False, result.max_abs, result.max_rel, result.tolerance, result.noise, first)


def compare_outputs(
    reference: nn.Module, wanted: list[Tensor], candidate: nn.Module, inputs: tuple[Any, ...]
) -> Equivalence:
    """As :func:`compare`, with the reference's float64 outputs already at hand."""
    got = outputs(candidate, inputs)
    max_abs, max_rel = distance(got, wanted)
    dtype = _dtype(candidate)
    if dtype == torch.float64:
        noise, tolerance = None, FLOAT64_TOLERANCE
    else:
        noise = distance([t.double() for t in outputs(reference, _cast(inputs, dtype), None)], wanted)[1]
        tolerance = max(10 * noise, 64 * torch.finfo(dtype).eps) if math.isfinite(noise) else 64 * torch.finfo(dtype).eps
    return Equivalence(max_rel <= tolerance, max_abs, max_rel, tolerance, noise)


def distance(got: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """Largest absolute and relative difference; infinite for different shapes or where either is not finite."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return math.inf, math.inf
    max_abs = max_rel = 0.0
    for g, w in zip(got, wanted, strict=True):
        if not w.is_floating_point():
            gap = 0.0 if torch.equal(g, w) else math.inf
            max_abs, max_rel = max(max_abs, gap), max(max_rel, gap)
        elif w.numel():
            gap = float((g.double() - w.double()).abs().max())
            if not math.isfinite(gap):
                return math.inf, math.inf
            max_abs = max(max_abs, gap)
            max_rel = max(max_rel, gap / max(float(w.abs().max()), 1e-300))
    return max_abs, max_rel


def _first_difference(reference: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], tolerance: float) -> str:
    """The module where a difference starts and is not healed.

    A folded convolution gives what its batch norm gave, so it differs from the original convolution, and the next
    module heals that: different input, same output. What is left is where the networks part.
    """
    wanted, got = _record(reference, inputs), _record(candidate, inputs)
    open_ends: list[str] = []
    order = [name for name in got if name in wanted]
    for name in order:
        same_in = distance(got[name][0], wanted[name][0])[1] <= tolerance
        same_out = distance(got[name][1], wanted[name][1])[1] <= tolerance
        if same_in and not same_out and not any(o == name or o.startswith(name + ".") for o in open_ends):
            open_ends.append(name)
        elif same_out:
            open_ends = [o for o in open_ends if not o.startswith(name + ".")] if same_in else open_ends[:-1]
    return open_ends[0] if open_ends else ""


def _record(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Inputs and outputs of the first call of every module, in order of completion."""
    runner = copy.deepcopy(model).eval().double()
    record: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name not in record:
                record[name] = (_tensors(args), _tensors(output))

        return hook

    for name, module in runner.named_modules():
        if name:
            module.register_forward_hook(hook_for(name))
    with torch.no_grad():
        runner(*_cast(inputs, torch.float64))
    return record


def _tensors(value: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tree_leaves(value) if isinstance(t, Tensor)]


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest floating-point dtype among the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float64)
