"""A convolution that pads by a rule of its own, and is therefore no :class:`ConvForm`.

timm's ``same`` padding depends on the input's size, and so does that of ONNX. Such a layer is still linear in its
weight, so one law holds: a map per output channel goes into weight and bias (F1, F10). Every other law refuses; and
that one too, where the layer does more behind its convolution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.algebra.kernels import swap_in_out
from passes.refusal import Reason, RefusalError

if TYPE_CHECKING:
    from passes.algebra.conv_form import Ints

__all__ = ["OpaqueForm", "without_numbers"]

Layer = TypeVar("Layer", bound=nn.Module)


def without_numbers(layer: Layer) -> Layer:
    """A copy of a layer that has neither weight nor bias, and shares all else that it holds."""
    made = copy.copy(layer)
    parameters = {name: p for name, p in layer._parameters.items() if name not in ("weight", "bias")}
    own = {name: value for name, value in vars(layer).items() if name not in ("weight", "bias")}
    made.__dict__ = {**own, "_parameters": parameters}
    return made


def _is_transposed(layer: nn.Module) -> bool:
    """Whether its weight has input channels first; a deformable convolution does not even say."""
    return bool(getattr(layer, "transposed", False))


@dataclass(frozen=True, eq=False)
class OpaqueForm:
    """A layer of such a class, with other numbers.

    Args:
        layer: what decides where its windows lie.
        weight, bias: as in :class:`ConvForm`.
        last: whether nothing is done to what the layer's convolution gives, so that a map per channel goes into it.
    """

    layer: _ConvNd
    weight: Tensor
    bias: Tensor | None
    last: bool = True
    widened = False

    @staticmethod
    def of(layer: _ConvNd, weight: Tensor, bias: Tensor | None) -> OpaqueForm:
        """The form of a layer with this weight, which lies as the layer's own."""
        return OpaqueForm(layer, swap_in_out(weight, layer.groups) if _is_transposed(layer) else weight, bias)

    # ---------------------------------------------------------------- facts

    @property
    def n(self) -> int:
        """Number of spatial dimensions."""
        return self.weight.dim() - 2

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def stride(self) -> Ints:
        return tuple(self.layer.stride)

    @property
    def dilation(self) -> Ints:
        return tuple(self.layer.dilation)

    @property
    def groups(self) -> int:
        return self.layer.groups

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def rate(self) -> float:
        """Output positions per input position, about."""
        each = math.prod(self.stride)
        return each if _is_transposed(self.layer) else 1 / each

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per input position, about."""
        return self.weight.numel() * self.rate

    @property
    def own_weight(self) -> Tensor:
        """The weight as it lies in the layer: of a transposed one, input channels come first."""
        return swap_in_out(self.weight, self.groups).contiguous() if _is_transposed(self.layer) else self.weight

    @property
    def numbers(self) -> int:
        """How many numbers weight and bias hold."""
        return self.weight.numel() + (0 if self.bias is None else self.out_channels)

    @property
    def most_groups(self) -> int:
        return self.groups

    def same_size(self, other: object) -> bool:
        """Whether another form gives maps of the same size and number of channels for every input."""
        return isinstance(other, OpaqueForm) and other.layer is self.layer

    def out_size(self, size: Sequence[int]) -> Ints:
        """A size that the output may have, to follow questions about it by example."""
        steps = zip(size, self.stride, strict=True)
        return tuple(s * t if _is_transposed(self.layer) else -(-s // t) for s, t in steps)

    def to(self, device: torch.device | str) -> OpaqueForm:
        """The same form with its numbers elsewhere."""
        return replace(self, weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))

    # ---------------------------------------------------------------- laws

    def affine(self, scale: Tensor | None, shift: Tensor | None) -> OpaqueForm:
        """``scale * y + shift`` per output channel; both ``(out,)`` or None."""
        weight, bias = self.weight, self.bias
        if not self.last:
            self.refuse()
        if scale is not None:
            weight = weight * scale.reshape(-1, *(1,) * self.n, 1)
            bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return replace(self, weight=weight, bias=bias)

    def __neg__(self) -> OpaqueForm:
        return self.affine(self.weight.new_full((1,), -1.0), None)

    def narrowed(self) -> OpaqueForm:
        """Its groups are those of its layer."""
        return self

    def refuse(self, *_: object) -> NoReturn:
        """What every other law answers."""
        if not self.last:
            raise RefusalError(Reason.OWN_FORWARD, f"{type(self.layer).__name__} does more behind its convolution")
        raise RefusalError(Reason.PAD_MODE, "a convolution that pads by a rule of its own takes only per-channel maps")

    __add__ = then = pad = pad_mode = rows = refuse
