"""A module that stands in the middle of a layer's own forward, where that convolves.

A class that pads by a rule of its own, scales its input or activates computes ``y = Q(conv(P(x)))``. Its code runs as
it is written; only the call of torch's convolution with the layer's weight is answered by another module. So nothing
has to be known of P and Q, the border is P's, and the module computes exactly where the convolution did. The class sees
a weight of the right shape, dtype and device; who reads its numbers reads NaN.

A class that computes with its weight before it convolves (standardised weights) is given the module's kernel in place
of its weight, whatever it does with it: a module that is one kernel goes there as well, and a sum of maps does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from passes.algebra.conv_form import per_dim
from passes.algebra.geometry import Geometry
from passes.algebra.opaque import without_numbers

__all__ = ["CONVOLUTIONS", "Alone", "Given", "Inner", "Inside", "Options", "Within", "arounds", "bare", "convolution"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)

Options = tuple[Any, Any, Any, int]
"""Stride, padding, dilation and groups of a call."""

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Inside:
    """Where a layer's own forward convolves.

    Args:
        geometry: of the convolution itself: what the layer does to its input before is no part of it.
        options: what the forward calls the convolution with.
        biased: whether it gives the layer's bias to the convolution, or would if there were one.
        last: whether it returns what the convolution gives.
        computed: whether it does anything else with its weight; what is said of the convolution is then that of the
            layer's attributes.
    """

    geometry: Geometry
    options: Options
    biased: bool
    last: bool
    computed: bool = False

    @property
    def takes_norm(self) -> bool:
        """Whether a batch norm behind the layer can go into it: nothing is between, and its shift has a place."""
        return self.biased and self.last


class Within(nn.Module):
    """A module that is called as a layer is, and computes :meth:`inner` where that layer convolves.

    Args:
        around: the layer without its weight and bias (:func:`bare`); None if it only convolves.
        inside: where its forward convolves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.around: nn.Module | None  # annotated here, not in the class: TorchScript reads those there
        self.inside: Inside | None = None
        self.register_module("around", None)

    def inner(self, input: Tensor) -> Tensor:
        """What is computed in the place of the convolution."""
        raise NotImplementedError

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias of a module that is one convolution."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # called by keyword as torch's layers are
        if self.inside is None or self.around is None:
            return self.inner(input)
        shown = vars(self.around)
        if self.inside.computed:
            weight, bias = self.numbers()
            mode: TorchFunctionMode = Given([(shown["weight"], weight), (shown["bias"], bias)])
        else:
            mode = _Answered(shown["weight"], self.inside.options, self.inner)
        with mode:
            y: Tensor = self.around(input)
        return y

    def _stand(self) -> None:
        """Show the class around a weight and bias of the dtype, and on the device, that the parameters now have."""
        if self.inside is not None and self.around is not None:
            _show(self.around, next(p for p in self.parameters() if p.is_floating_point()))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Within:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._stand()
        return self


class Inner(nn.Module):
    """What a module computes in the place of the convolution, as a module."""

    def __init__(self, module: Within) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        return self.module.inner(input)


class Alone(nn.Module):
    """Calls one module under its name: a block whose surroundings cannot be read is one layer of these."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, input: Tensor) -> Any:
        (module,) = self.children()
        return module(input)


def bare(layer: _ConvNd) -> _ConvNd:
    """A copy of a layer without weight and bias, which shares all else that it holds.

    In their places are tensors of their shapes that hold no numbers and are no parameters.
    """
    made = without_numbers(layer)
    vars(made).update(weight=layer.weight.detach(), bias=None if layer.bias is None else layer.bias.detach())
    _show(made, layer.weight)
    return made


def arounds(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Layers without their weight that stand around one of ``modules``, by id."""
    found = (module.around for module in modules if isinstance(module, Within) and module.inside is not None)
    return {id(layer): layer for layer in found if layer is not None}


def _show(layer: nn.Module, like: Tensor) -> None:
    for name in ("weight", "bias"):
        own = vars(layer)[name]
        if own is not None:
            vars(layer)[name] = torch.full((), float("nan"), dtype=like.dtype, device=like.device).expand(own.shape)


def convolution(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[dict[str, Any], Options]:
    """Tensors of a call of torch's convolutions by name, and its options in one form."""
    given = dict(zip(_NAMES, args, strict=False)) | (kwargs or {})
    n = given["weight"].dim() - 2
    padding = given.get("padding", 0)
    return given, (
        tuple(per_dim(given.get("stride", 1), n)),
        padding if isinstance(padding, str) else tuple(per_dim(padding, n)),
        tuple(per_dim(given.get("dilation", 1), n)),
        given.get("groups", 1),
    )


class Given(TorchFunctionMode):
    """While it is on, torch's functions are given other tensors for these."""

    def __init__(self, pairs: list[tuple[Tensor | None, Tensor | None]]) -> None:
        super().__init__()
        self.pairs = [(shown, number) for shown, number in pairs if shown is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._given(tuple(args)), **self._given(kwargs or {}))

    def _given(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return next((number for shown, number in self.pairs if value is shown), value)
        if isinstance(value, dict):
            return {name: self._given(item) for name, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._given(item) for item in value)
        return value


class _Answered(TorchFunctionMode):
    """While it is on, a convolution with just this kernel is answered by ``answer``.

    Raises :class:`RuntimeError` if that convolution has other options than the layer was read with.
    """

    def __init__(self, kernel: Any, options: Options, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.options, self.answer = kernel, options, answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS:
            given, options = convolution(args, kwargs)
            if given["weight"] is self.kernel:
                if options != self.options:
                    raise RuntimeError(f"a layer convolves with {options}, and with {self.options} when it was read")
                return self.answer(given["input"])
        return func(*args, **(kwargs or {}))
