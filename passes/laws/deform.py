"""Deformable convolutions: linear in their weight, whatever their offsets and their mask are.

A layer, or a function that is given weight and bias. A map per channel behind it goes into the two (F1, F10), and
nothing else is said of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.algebra.opaque import OpaqueForm
from passes.graph.dataflow import Constants, Flow
from passes.laws.regions import form_device
from passes.refusal import RefusalError

__all__ = ["deformed", "given_to", "is_deforming_call", "with_numbers"]

_LAYER = ("input", "offset", "mask")
_FUNCTION = ("input", "weight", "offset", "mask", "bias")  # of the operator, with as many numbers as there are sides


def is_deforming_call(flow: Flow, node: fx.Node) -> bool:
    """Whether this is a deformable convolution, as a function."""
    operation = flow.operations.get(node)
    return node.op == "call_function" and operation is not None and operation.id == "deform_conv2d"


def given_to(node: fx.Node) -> dict[str, Any]:
    """What a deformable convolution is given, by name."""
    return dict(zip(_LAYER if node.op == "call_module" else _FUNCTION, node.args, strict=False)) | node.kwargs


def with_numbers(
    node: fx.Node, numbers: dict[str, Any], take: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of such a call with these in their places, the others as ``take`` has them."""
    names = (*_FUNCTION, *(None,) * (len(node.args) - len(_FUNCTION)))
    args = tuple(numbers[name] if name in numbers else take(a) for name, a in zip(names, node.args, strict=True))
    return args, take(dict(node.kwargs))


def deformed(flow: Flow, node: fx.Node, dtype: torch.dtype | None) -> OpaqueForm | None:
    """The form of a deformable convolution; None for anything else, and for one whose weight is no constant."""
    operation, module = flow.operations.get(node), flow.modules.get(node)
    if operation is None or operation.id != "deform_conv2d":
        return None
    constants, device = Constants(flow, dtype), form_device(flow, dtype)
    layer: Any = module
    if module is None:
        given = given_to(node)
        none = getattr(given.get("bias"), "target", None) is torch.zeros  # which torchvision makes of None
        nodes = given.get("weight"), None if none else given.get("bias")
        try:  # what is computed of the input has no value here
            weight, bias = (None if n is None else constants.value(n) for n in nodes)
            assert weight is not None
            layer = _holder(weight, node.args[len(_FUNCTION) :])
        except (RefusalError, TypeError, ValueError, IndexError):
            return None
    else:
        weight, bias = (constants.read(module, name) for name in ("weight", "bias"))
    assert weight is not None
    return OpaqueForm(layer, weight.to(device), None if bias is None else bias.to(device))


def _holder(weight: torch.Tensor, sides: Sequence[Any]) -> nn.Conv2d:
    """What holds the numbers of a call. It is told nothing of groups: there are as many as the input has room for."""
    stride, padding, dilation = sides[:2], sides[2:4], sides[4:6]
    return nn.Conv2d(
        weight.shape[1], len(weight), (weight.shape[2], weight.shape[3]), (stride[0], stride[1]),
        (padding[0], padding[1]), (dilation[0], dilation[1]), device="meta",
    )  # fmt: skip
