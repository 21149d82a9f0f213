"""Layers that are handed to code which cannot be read: what only asks for their geometry does not keep them."""

from __future__ import annotations

import copy
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
