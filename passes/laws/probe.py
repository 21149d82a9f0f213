"""Impulse response of modules that cannot be read.

A module that torch.fx cannot trace may still act as a convolution: item assignment into a padded tensor, control flow
on a device query, a kernel recomputed in Python. It is run in float64, on a copy, and believed only when the
convolution found from its impulse response gives the same on random inputs of several sizes, borders included.

A convolution that pads by a rule of its own (timm's ``same`` padding depends on the input's size) is not one
ConvForm, but per-channel maps behind it still fold into its weight. That it is linear in its weight is tried as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.conv_form import ConvForm, Form, Ints
from passes.algebra.opaque import OpaqueForm
from passes.graph.capture import Unit
from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators
from passes.graph.opset import operation_of_layer
from passes.laws.values import Signal, View, settle
from passes.laws.watch import watched
from passes.refusal import Reason, Refusal, RefusalError

__all__ = ["ProbedForms", "probe"]

TOLERANCE = 1e-10
"""Largest difference from a convolution, relative to the output, that still counts as rounding in float64."""

MAX_NUMBERS = 1 << 24
"""Modules with more numbers than this are not probed: none of them is a single block."""


class ProbedForms:
    """What probing found, once per module of a unit."""

    _of: ClassVar[WeakKeyDictionary[Unit, ProbedForms]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._found: dict[int, Form | Refusal] = {}

    @classmethod
    def of(cls, unit: Unit) -> ProbedForms:
        return cls._of.setdefault(unit, cls())

    def apply(self, module: nn.Module, x: object) -> Signal:
        """The probed module applied to a signal."""
        found = self._form(module)
        if isinstance(found, Refusal):
            raise RefusalError(found.reason, found.message)
        if not isinstance(x, Signal) or settle(x).view != View(found.n):
            raise RefusalError(Reason.LAYOUT)
        form = found.to(x.form.weight.device)
        return x.with_form(form if x.untouched else settle(x).form.then(form), work=form.weight.numel(), conv=True)

    def demand(self, module: nn.Module) -> tuple[View, int] | None:
        """How the module reads its input, None if it is not a convolution."""
        found = self._form(module)
        return None if isinstance(found, Refusal) else (View(found.n), found.in_channels)

    def _form(self, module: nn.Module) -> Form | Refusal:
        if id(module) not in self._found:
            try:
                self._found[id(module)] = probe(module)
            except RefusalError as error:
                self._found[id(module)] = error.refusal
        return self._found[id(module)]


def probe(module: nn.Module) -> Form:
    """The convolution that ``module`` acts as, in float64 on the CPU; refuses with ``NOT_A_CONVOLUTION``.

    The module takes one tensor and gives one. It is run on a copy; nothing about it changes.
    """
    numbers = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    if numbers > MAX_NUMBERS or not numbers > 0:
        raise RefusalError(Reason.NOT_A_CONVOLUTION, "not probed: too large, or without weights")
    bent = next((m for m in module.modules() if _is_nonlinear(m)), None)
    if bent is not None:  # it may act as a convolution for now, with a gamma of zero, but it is not one
        raise RefusalError(Reason.NOT_A_CONVOLUTION, f"not probed: it holds {type(bent).__name__}")
    with torch.no_grad(), kept_generators():
        torch.manual_seed(0)
        runner = _Runner(module)
        if isinstance(module, _ConvNd) and next(module.children(), None) is None:
            return _opaque(module, runner)
        for n, channels in _guesses(module):
            affine = runner.is_affine(n, channels)
            if affine:
                return _respond(runner, n, channels)
            if affine is False:
                break
    raise RefusalError(Reason.NOT_A_CONVOLUTION)


def _is_nonlinear(module: nn.Module) -> bool:
    """A layer of torch that no transfer function knows."""
    own = type(module).__module__.startswith("torch.nn.modules")
    operation = operation_of_layer(module)
    known = operation is not None and operation.affine
    return own and next(module.children(), None) is None and not known and not _is_empty(module)


def _is_empty(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


class _Runner:
    """Runs a float64 copy of a module on the CPU; anything it raises is a refusal."""

    def __init__(self, module: nn.Module) -> None:
        try:
            self.module = deep_copy(module).to("cpu", torch.float64).eval()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise RefusalError(Reason.NOT_A_CONVOLUTION, f"not probed: cannot be copied ({error})") from error

    def __call__(self, x: Tensor) -> Tensor:
        version = x._version
        try:
            y = watched(self.module, x)
        # User code may fail in any way on an input it was not made for.
        except Exception as error:
            raise RefusalError(Reason.NOT_A_CONVOLUTION, f"probing failed: {error}".splitlines()[0]) from error
        if x._version != version:
            raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: changes its input in place")
        if not isinstance(y, Tensor) or y.dim() != x.dim() or y.shape[0] != x.shape[0]:
            raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: does not give one map for one map")
        return y.double()

    def is_affine(self, n: int, channels: int) -> bool | None:
        """A first, cheap look: same answer twice, and affine along one line; None if the input is not accepted."""
        try:
            x, y = torch.randn(2, 1, channels, *(9, 8, 7)[:n], dtype=torch.float64)
            zero = self(torch.zeros_like(x))
            a, b, both = self(x) - zero, self(y) - zero, self(2 * x - 3 * y) - zero
            again = self(x) - zero
        except RefusalError:
            return None
        return _close(again, a) and _close(2 * a - 3 * b, both)


def _guesses(module: nn.Module) -> list[tuple[int, int]]:
    """Spatial dimensions and input channels worth trying, most likely first."""
    shapes = [tuple(t.shape) for t in [*module.parameters(), *module.buffers()] if t.dim() > 0]
    kernels = [s for s in shapes if len(s) in (3, 4, 5)]
    n = len(kernels[0]) - 2 if kernels else 2
    sizes = [s[1] for s in kernels] + [s[0] for s in kernels] + [d for s in shapes for d in s]
    return [(n, c) for c in dict.fromkeys(sizes) if c > 0][:8]


def _respond(runner: _Runner, n: int, channels: int) -> ConvForm:
    for size in (17, 33, 65):
        form = _impulse_response(runner, n, channels, size)
        if form is not None:
            break
    else:
        raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: its kernel is larger than 32")
    form = replace(form, widened=True).narrowed()
    shapes = ((size, size + 1, size + 2), (size + 3, size, size + 1), (size + 2, size + 5, size))
    # A clamp shows itself only on large values.
    for sizes, scale in zip((*shapes, shapes[0]), (1.0, 1e3, 1e-3, 1e6), strict=True):
        x = scale * torch.randn(2, channels, *sizes[:n], dtype=torch.float64)
        wanted, got = runner(x), form.apply(x)
        if wanted.shape != got.shape or not _close(got, wanted):
            raise RefusalError(Reason.NOT_A_CONVOLUTION)
    return form


def _impulse_response(runner: _Runner, n: int, channels: int, size: int) -> ConvForm | None:
    """Read stride, kernel and offset from impulses in the middle; None if the kernel reaches the edge."""
    blank = torch.zeros(channels, channels, *(size,) * n, dtype=torch.float64)
    zero = runner(blank)  # of the same batch: what no impulse reaches is then the same to the last bit
    stride, extent = _geometry(runner, n, channels, size)
    centre = size // 2
    taps: dict[Ints, Tensor] = {}
    for shift in product(*(range(s) for s in stride)):
        at = tuple(centre + d for d in shift)
        x = blank.clone()
        hit: Any = (torch.arange(channels), torch.arange(channels), *at)
        x[hit] = 1.0
        response = runner(x) - zero  # input channel, output channel, *position
        for place in (response.abs().amax((0, 1)) > 0).nonzero().tolist():
            if any(p in (0, response.shape[2 + i] - 1) for i, p in enumerate(place)) and response.shape[2] > 2:
                return None
            tap = tuple(at[i] - place[i] * stride[i] for i in range(n))
            taps[tap] = response[(slice(None), slice(None), *place)].T
    if not taps:
        raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: its output does not depend on its input")
    low = tuple(min(t[i] for t in taps) for i in range(n))
    step = tuple(math.gcd(*(t[i] - low[i] for t in taps)) or 1 for i in range(n))
    kernel = tuple((max(t[i] for t in taps) - low[i]) // step[i] + 1 for i in range(n))
    weight = torch.zeros(zero.shape[1], channels, *kernel, dtype=torch.float64)
    for tap, value in taps.items():
        at_tap: Any = (slice(None), slice(None), *((tap[i] - low[i]) // step[i] for i in range(n)))
        weight[at_tap] = value
    at_middle: Any = (0, slice(None), *(s // 2 for s in zero.shape[2:]))
    middle = zero[at_middle]
    bias = middle.clone() if bool((middle != 0).any()) else None
    return ConvForm(weight, bias, stride, step, low, extent, (1,) * n)


def _geometry(runner: _Runner, n: int, channels: int, size: int) -> tuple[Ints, Ints]:
    """Stride and extent from the output's size at many input sizes."""
    stride, extent = [], []
    for axis in range(n):
        out = []
        for s in range(size, size + 17):
            shape = [size] * n
            shape[axis] = s
            out.append(runner(torch.zeros(1, channels, *shape, dtype=torch.float64)).shape[2 + axis])
        step = next((t for t in range(1, 9) if all(out[i + t] == out[i] + 1 for i in range(len(out) - t))), None)
        if step is None:
            raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: its output's size is not that of a convolution")
        turn = next(i for i in range(1, step + 1) if out[i] > out[i - 1])  # size + turn + extent divides by the step
        stride.append(step)
        extent.append((out[turn] - 1) * step - (size + turn))
    return tuple(stride), tuple(extent)


def _opaque(module: _ConvNd, runner: _Runner) -> OpaqueForm:
    """Whether the module is linear in weight and bias per output channel; then those carry per-channel maps."""
    n, own = len(module.kernel_size), runner.module
    if not all(isinstance(own._parameters.get(name), (nn.Parameter, type(None))) for name in ("weight", "bias")):
        raise RefusalError(Reason.NOT_A_CONVOLUTION)
    inputs = [
        torch.randn(1, module.in_channels, *sizes[:n], dtype=torch.float64) for sizes in ((16, 17, 9), (19, 14, 8))
    ]
    before = [runner(x) for x in inputs]
    channels = int(module.out_channels)
    scale, shift = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    assert isinstance(own, _ConvNd)
    form = OpaqueForm.of(module, own.weight.clone(), None if own.bias is None else own.bias.clone())
    tried = form.affine(scale, shift)
    own.weight, own.bias = nn.Parameter(tried.own_weight), nn.Parameter(tried.bias)  # type: ignore[arg-type]
    tail = (1, -1, *(1,) * n)
    for x, y in zip(inputs, before, strict=True):
        if not _close(runner(x), y * scale.reshape(tail) + shift.reshape(tail)):
            raise RefusalError(Reason.NOT_A_CONVOLUTION, "probed: not linear in its weight")
    return form


def _close(got: Tensor, wanted: Tensor) -> bool:
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return got.shape == wanted.shape and bool(((got - wanted).abs() <= TOLERANCE * max(scale, 1e-30)).all())
