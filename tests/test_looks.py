"""Layers that are handed to code which cannot be read: what only asks for their geometry does not keep them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.graph.looks import attributes_asked


def pad_by_rule(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Padding that keeps the size, by numbers that a trace cannot know."""
    over = int(x.shape[-1]) % conv.stride[0]
    along = max(conv.kernel_size[0] - (over or conv.stride[0]), 0)
    return F.pad(x, (along // 2, along - along // 2) * 2)


def pad_by_padding(x: Tensor, conv: nn.Conv2d) -> Tensor:
    along = 1 if int(x.shape[-1]) % 2 else conv.padding[0] + 2
    return F.pad(x, (along,) * 4)


def weigh(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.pad(x, (int(x.shape[-1]) % 2,) * 4) * conv.weight.mean()


def call(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return x + conv(F.pad(x, (1, 1 + int(x.shape[-1]) % 2 * 0) * 2)).mean()


def hand_on(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return weigh(x, conv)


def rename(x: Tensor, conv: nn.Conv2d) -> Tensor:
    other = conv
    return F.pad(x, (int(x.shape[-1]) % 2,) * 4) * other.weight.mean()


class Padded(nn.Module):
    """A convolution without padding of its own, as in ports of TensorFlow's networks."""

    def __init__(self, stride: int = 2, by_name: bool = False) -> None:
        super().__init__()
        self.by_name, self.zeros = by_name, nn.ZeroPad2d(1)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, stride, bias=False), nn.BatchNorm2d(3)


class ByRule(Padded):
    def forward(self, x: Tensor) -> Tensor:
        padded = pad_by_rule(x, conv=self.conv) if self.by_name else pad_by_rule(x, self.conv)
        y: Tensor = self.norm(self.conv(padded)).relu()
        return y


class ByPadding(Padded):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.zeros(pad_by_padding(x, self.conv)))).relu()
        return y


class Weighing(Padded):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(weigh(x, self.conv))).relu()
        return y


class Calling(Padded):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(call(x, self.conv))).relu()
        return y


class HandingOn(Padded):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(hand_on(x, self.conv))).relu()
        return y


class Renaming(Padded):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(rename(x, self.conv))).relu()
        return y


def _compared(model: nn.Module, folded: nn.Module) -> None:
    for size in (7, 8, 9, 12):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", [None, torch.randn(2, 3, 8, 8, dtype=torch.float64)])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_padding_function_that_is_handed_the_convolution_keeps_no_norm(given: Any, by_name: bool) -> None:
    model = lively(ByRule(by_name=by_name))
    folded, report = reparam.collapse_with_report(model, example_inputs=given)
    assert isinstance(folded.norm, nn.Identity)
    assert folded.conv.bias is not None
    assert [fold.layers for fold in report.folds] == [("conv", "norm")]
    _compared(model, folded)


@pytest.mark.parametrize("kind", [Weighing, Calling, HandingOn, Renaming])
def test_a_function_that_does_more_with_a_layer_keeps_it(kind: type[Padded]) -> None:
    model = lively(kind(stride=1))
    folded, report = reparam.collapse_with_report(model, example_inputs=torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert folded.conv.bias is None
    assert any(refusal.layer in ("conv", "norm") for refusal in report.refusals)
    _compared(model, folded)


def test_a_layer_that_is_asked_for_its_padding_keeps_it() -> None:
    """The pad before it could become part of the convolution, were it not asked how it pads."""
    model = lively(ByPadding())
    folded, report = reparam.collapse_with_report(model)
    assert isinstance(folded.norm, nn.Identity)
    assert isinstance(folded.zeros, nn.ZeroPad2d)
    assert folded.conv.padding == (0, 0)
    assert not report.taken_back
    _compared(model, folded)


def test_what_is_asked_is_read_from_the_code() -> None:
    conv = nn.Conv2d(3, 3, 3)
    assert attributes_asked(pad_by_rule, 1, conv) == {"stride", "kernel_size"}
    assert attributes_asked(pad_by_rule, "conv", conv) == {"stride", "kernel_size"}
    assert attributes_asked(pad_by_padding, 1, conv) == {"padding"}
    for function in (weigh, call, hand_on, rename):
        assert attributes_asked(function, 1, conv) is None
    assert attributes_asked(pad_by_rule, 2, conv) is None
    assert attributes_asked(print, 0, conv) is None


class Optional(nn.Module):
    """As every network of transformers: all arguments may be left out, and without an image it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor | None = None, states: bool | None = None) -> Any:
        if pixels is None:
            raise ValueError("You have to specify pixels")
        before = self.conv(pixels)
        after = self.norm(before)
        return (after, before) if states else after


class Harmless(Optional):
    def forward(self, pixels: Tensor | None = None, states: bool | None = None) -> Any:
        if pixels is None:
            raise ValueError("You have to specify pixels")
        after = self.norm(self.conv(pixels))
        return (after, after) if states else after


def test_an_option_is_tried_with_the_input_that_may_be_left_out() -> None:
    model = lively(Harmless())
    folded = reparam.collapse(model)
    assert isinstance(folded.norm, nn.Identity)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for states in (None, True):
        torch.testing.assert_close(folded(x, states=states), model(x, states=states))


def test_an_option_that_uses_what_would_vanish_keeps_it() -> None:
    model = lively(Optional())
    folded, report = reparam.collapse_with_report(model)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    (refusal,) = report.refusals
    assert "states" in refusal.message
    assert "You have to specify" not in refusal.message


def pad_by_size(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Whose every call asks something that depends on the size."""
    along = 2 if x.shape[-1] % 2 == 0 else 1
    return F.pad(x, (1, along) * 2)


class Deep(nn.Module):
    """As Hugging Face's MobileNets: padding by a function, and one option that every layer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, bias=False) for _ in range(24))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(24))

    def forward(self, pixels: Tensor | None = None, states: bool | None = None) -> Any:
        if pixels is None:
            raise ValueError("You have to specify pixels")
        found = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            pixels = norm(conv(pad_by_size(pixels, conv))).relu()
            if states:
                found.append(pixels)
        return (pixels, *found)


def test_an_option_that_every_layer_asks_for_is_one_question() -> None:
    """More layers than ways that are tried, and too many for a question of each to be answered both ways."""
    model = lively(Deep())
    folded, report = reparam.collapse_with_report(model)
    assert not report.refusals
    assert len(report.folds) == len(folded.convs)
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    for states in (None, True, False):
        torch.testing.assert_close(folded(x, states=states), model(x, states=states))


class Filling(nn.Module):
    """An option that is empty at first, and is not any more once the forward has put something in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Any:
        before = self.conv(x)
        after = self.norm(before)
        if seen is not None:
            was = bool(seen)
            seen.append(x)
            if seen and not was:
                return after + before
        return after


def test_an_option_that_was_used_since_is_asked_again() -> None:
    model = lively(Filling())
    folded = reparam.collapse(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for seen in (None, [], [x]):
        torch.testing.assert_close(folded(x, copy.copy(seen)), model(x, copy.copy(seen)))


class Skipping(nn.Module):
    """As detectors are: layers in a row that is never called, each told by the code where its input is from."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)),
        )
        self.norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        x, values = self.norm(x), list[Tensor]()
        for i, layer in enumerate(self.row):
            values.append(layer(values[0] if i else x))
        return values[1] + values[2]


@pytest.mark.parametrize("given", [None, torch.randn(2, 3, 8, 8, dtype=torch.float64)])
def test_a_row_that_is_never_called_as_one_is_read_layer_by_layer(given: Any) -> None:
    model = lively(Skipping())
    folded, report = reparam.collapse_with_report(model, example_inputs=given)
    assert [type(m) for m in folded.modules() if isinstance(m, nn.BatchNorm2d)] == []
    assert not report.refusals
    assert not report.taken_back
    _compared(model, folded)


def pad_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Padding as TensorFlow's, written with questions about the size that it takes."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    high, wide = _missing(x.shape[-2], kernel, stride), _missing(x.shape[-1], kernel, stride)
    return F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)) if high > 0 or wide > 0 else x


def _missing(size: int, kernel: int, stride: int) -> int:
    return max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)


def halve(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    if x.shape[-1] % 2 or x.shape[-2] % 2 or x.shape[-1] > 50:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    y: Tensor = norm(conv(x)).relu()
    return y


def gate(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    y: Tensor = norm(conv(x)).relu()
    return y if float(x.max()) > -1e6 else x


class Several(nn.Module):
    """More questions about sizes than ways are followed, all from one function."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, 1 + i % 2, bias=False) for i in range(count)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(count)])

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(pad_same(x, conv))).relu()
            x = x if mask is None else x * mask.mean()
        return x if scale is None else x * scale


class Halving(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = halve(F.pad(x, (1,) * 4), conv, norm)
        return x


class Gated(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = gate(F.pad(x, (1,) * 4), conv, norm)
        return x


def test_a_function_that_asks_for_more_sizes_than_are_followed_is_one_call() -> None:
    model = lively(Several())
    folded = reparam.collapse(model)
    assert all(isinstance(norm, nn.Identity) for norm in folded.norms)
    _compared(model, folded)
    expanded = reparam.expand(model, "acb")
    assert not any(isinstance(norm, nn.BatchNorm2d) for norm in expanded.norms), "each moved into its block"
    _compared(model, expanded)


def test_a_function_that_asks_for_sizes_and_calls_layers_is_not() -> None:
    """A run shows what it does with them."""
    model = lively(Halving())
    plan = reparam.plan(model, "acb")
    assert len(plan.expanded) == 5
    _compared(model, plan.apply())


def test_layers_that_are_given_to_code_which_is_not_read_are_told() -> None:
    model = lively(Gated())
    folded, report = reparam.collapse_with_report(model)
    _compared(model, folded)
    told = {refusal.layer: refusal.message for refusal in report.untraced}
    assert told["norms.0"] == "gate is given it, and cannot be traced"
    rows = reparam.plan(model, "acb").rows
    assert {str(row.refusal and row.refusal.message) for row in rows} == {"gate is given it, and cannot be traced"}


class Epsilon(nn.Module):
    """Computes with the epsilon of norms that fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).sigmoid()
        return y / (1 + self.norm.eps)


class EpsilonOfFunction(Epsilon):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).sigmoid()
        return scaled(y, self.norm)


def scaled(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    return y * (1 + norm.eps) if float(y.max()) > -1e6 else y


class EpsilonOfProperty(Epsilon):
    @property
    def epsilon(self) -> float:
        return self.norm.eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).sigmoid()
        return y / (1 + self.epsilon)


class EpsilonByName(Epsilon):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x)).sigmoid()
        return y / (1 + getattr(self.norm, "eps"))  # noqa: B009


@pytest.mark.parametrize("kind", [Epsilon, EpsilonOfFunction, EpsilonOfProperty, EpsilonByName])
@pytest.mark.parametrize("verify", [True, "folds"])
def test_a_forward_that_computes_with_an_epsilon_keeps_it(kind: type[Epsilon], verify: Any) -> None:
    model = lively(kind())
    folded, report = reparam.collapse_with_report(model, verify=verify)
    assert not report.taken_back
    _compared(model, folded)
    _compared(model, reparam.expand(model, "acb", verify=verify))


def test_a_norm_folds_where_a_forward_computes_with_its_epsilon() -> None:
    assert isinstance(reparam.collapse(lively(Epsilon())).norm, nn.Identity)
