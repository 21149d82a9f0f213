"""Stock layers, and a scale and shift, as plain data: what their constructors are given, without numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import CONVS, PADS
from passes.algebra.opaque import without_numbers
from passes.edits.errors import EditError
from passes.graph.opset import operation_of_layer
from passes.portable import ScaleShift

__all__ = ["GEOMETRY", "Layer", "describe", "described"]

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_TRANSPOSED = (*_CONV[:5], "output_padding", *_CONV[5:])
_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Identity: (),
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys(CONVS, _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
    **{kind: ("padding",) for kinds in PADS.values() for kind in kinds},
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    ),
    ScaleShift: ("channels", "dims"),
}
_CONSTANT: tuple[type[nn.Module], ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_OPTIONS.update(dict.fromkeys(_CONSTANT, ("padding", "value")))
_KINDS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _OPTIONS}
_WEIGHTED = tuple(kind for kind in _OPTIONS if issubclass(kind, (nn.Linear, _ConvNd)))
_WITH_TENSORS = (*_WEIGHTED, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, ScaleShift)
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_LARGEST = 2**31
GEOMETRY = frozenset({*_CONV, "_reversed_padding_repeated_twice"})
"""Attributes of a convolution that say where its windows lie."""


@dataclass(frozen=True)
class Layer:
    """One stock layer, or a sequence of them.

    Args:
        kind: ``Conv2d``, ``Linear``, ``Sequential``, ...; ``like`` for a copy of a layer of the model, with a forward
            of its own and other numbers; ``given`` for a layer of a class of its own, of the architecture given as
            ``like=``.
        options: what the constructor is given, by name.
        layers: of a ``Sequential``, by name.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    layers: tuple[tuple[str, Layer], ...] = ()

    def __post_init__(self) -> None:
        names = tuple(name for name, _ in self.options)
        if self.kind == "Sequential":
            wanted: tuple[str, ...] = ()
        elif self.kind == "like":
            wanted = ("path", "bias")
        elif self.kind == "given":
            wanted = ("name",)
        elif self.kind in _KINDS:
            kind = _KINDS[self.kind]
            wanted = (*_OPTIONS[kind], *(("bias",) if kind in _WEIGHTED else ()))
        else:
            raise EditError(f"no layer of the kind {self.kind!r} is known")
        if names != wanted or (self.layers and self.kind != "Sequential"):
            raise EditError(f"{self.kind} takes {', '.join(wanted) or 'nothing'}, and is given {', '.join(names)}")
        for name, value in self.options:
            if not _is_option(name, value):
                raise EditError(f"{self.kind} cannot have {name}={value!r}")
        for name, _ in self.layers:
            if not name.isidentifier():
                raise EditError(f"no layer can be named {name!r}")

    def build(self, model: nn.Module) -> nn.Module:
        """The layer without numbers, on the meta device; ``model`` is where a layer that it is like stands."""
        given = dict(self.options)
        if self.kind == "Sequential":
            return nn.Sequential(OrderedDict((name, layer.build(model)) for name, layer in self.layers)).eval()
        if self.kind == "like":
            return _relative(model.get_submodule(given["path"]), given["bias"])
        if self.kind == "given":
            raise EditError(f"{self} is not known here: hand it to apply() among the layers")
        kind: Callable[..., nn.Module] = _KINDS[self.kind]
        try:
            return kind(**given, **({"device": "meta"} if kind in _WITH_TENSORS else {})).eval()
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise EditError(f"there is no {self} ({error})".splitlines()[0]) from error

    def __str__(self) -> str:
        given = dict(self.options)
        if self.kind == "like":
            return f"a copy of {given['path']} with the folded numbers"
        if self.kind == "given":
            return f"the {given['name']} of like="
        if "num_features" in given or "channels" in given:
            return f"{self.kind}({self.options[0][1]})"
        if self.kind == "Sequential":
            return f"Sequential({', '.join(str(layer) for _, layer in self.layers)})"
        if self.kind == "Linear":
            return f"Linear({given['in_features']} -> {given['out_features']})"
        if "kernel_size" not in given:
            return f"{self.kind}({', '.join(str(value) for _, value in self.options)})"
        stride = "" if set(given["stride"]) == {1} else f", stride {_times(given['stride'])}"
        groups = "" if given["groups"] == 1 else f", groups {given['groups']}"
        ends = f"{given['in_channels']} -> {given['out_channels']}"
        return f"{self.kind}({ends}, {_times(given['kernel_size'])}{stride}{groups})"


def describe(layer: nn.Module, paths: dict[int, str]) -> Layer:
    """The description of an emitted layer.

    A layer with a forward of its own is a copy of one in the model, with which it shares the table of its children:
    ``paths`` finds that one by the table's id.

    Raises :class:`EditError` for a layer that is neither.
    """
    kind = type(layer)
    if kind is nn.Sequential:
        return Layer("Sequential", layers=tuple((name, describe(m, paths)) for name, m in layer.named_children()))
    if kind in _OPTIONS:
        return _stock(layer)
    of = paths.get(id(layer._modules))
    if of is None:
        raise EditError(f"a {kind.__name__} cannot be described")
    return Layer("like", (("path", of), ("bias", layer._parameters.get("bias") is not None)))


def described(layer: nn.Module) -> Layer:
    """The description of a layer of the architecture given as ``like=``: stock, or of a class of its own."""
    kind = type(layer)
    return _stock(layer) if kind in _OPTIONS else Layer("given", (("name", kind.__name__),))


def _stock(layer: nn.Module) -> Layer:
    kind = type(layer)
    options = tuple((name, getattr(layer, name)) for name in _OPTIONS[kind])
    return Layer(kind.__name__, (*options, *((("bias", layer.bias is not None),) if kind in _WEIGHTED else ())))


def _relative(original: nn.Module, bias: bool) -> nn.Module:
    """A copy of a convolution of a class of its own, its weight and bias without numbers."""
    operation = operation_of_layer(original)
    deformable = operation is not None and operation.id == "deform_conv2d"
    if not isinstance(original, _ConvNd) and not deformable:
        raise EditError(f"a {type(original).__name__} is no convolution whose numbers can be folded")
    layer: Any = without_numbers(original)
    layer.weight = nn.Parameter(torch.empty_like(original.weight, device="meta"))  # type: ignore[arg-type]
    empty = nn.Parameter(torch.empty(layer.out_channels, device="meta")) if bias else None
    layer.register_parameter("bias", empty)
    made: nn.Module = layer.eval()
    return made


def _is_option(name: str, value: Any) -> bool:
    if name in ("path", "name"):
        return isinstance(value, str)
    if name in ("bias", "affine", "track_running_stats"):
        return isinstance(value, bool)
    if name in ("value", "eps"):
        return isinstance(value, (int, float))
    if name == "momentum":
        return value is None or isinstance(value, (int, float))
    if name == "padding_mode":
        return value in _PADDING_MODES
    if name == "padding" and value in ("same", "valid"):
        return True
    if name == "dims":
        return type(value) is int and 0 <= value <= 3
    least = -_LARGEST if name == "padding" else 0
    numbers = value if isinstance(value, tuple) and len(value) <= 6 else (value,)
    return all(type(n) is int and least <= n < _LARGEST for n in numbers)


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
