"""A network that no input can be made up for is expanded all the same, unless its code finds the blocks out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ready
from torch import Tensor, nn

import reparam
from passes.blocks.kit.layers import is_block


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Looks(nn.Module):
    """Takes 23 channels, as no layer tells, and adds what it finds out about itself."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        super().__init__()
        self.look, self.block, self.head = look, Block(), nn.Conv2d(4, 4, 1)

    def count(self) -> int:
        found: list[nn.Module] = []
        self.apply(found.append)
        return len(found)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(x[:, 21:])) + 0.1 * self.look(self)
        return y


LOOKS: dict[str, Callable[[Any], Any]] = {
    "modules": lambda net: len(list(net.modules())),
    "names of modules": lambda net: len(dict(net.named_modules())),
    "parameters": lambda net: len(list(net.parameters())),
    "names of parameters": lambda net: len(dict(net.named_parameters())),
    "their sum": lambda net: sum(p.abs().sum() for p in net.parameters()),
    "their numbers": lambda net: sum(p.numel() for p in net.parameters()),
    "buffers": lambda net: len(list(net.buffers())),
    "state": lambda net: len(net.state_dict()),
    "apply": Looks.count,
    "attributes": lambda net: len(vars(net.block.conv)),
    "a kernel by name": lambda net: net.get_parameter("block.conv.weight").abs().sum(),
    "the class": lambda net: len(type(net.block.conv).__name__),
    "text": lambda net: len(str(net.block.conv)),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "children": lambda net: len(list(net.children())),
    "an attribute that a block has": lambda net: net.block.conv.in_channels,
    "a buffer by name": lambda net: net.get_buffer("block.bn.running_mean").numel(),
}


def looking(look: Callable[[Any], Any]) -> nn.Module:
    return ready(Looks(look)).double().eval()


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module) -> float:
    x = torch.randn(2, 23, 8, 8, dtype=torch.float64)
    return float((model(x) - other(x)).abs().max())


@pytest.mark.parametrize("block", ["acb", "doconv"])
@pytest.mark.parametrize("look", LOOKS)
def test_code_that_finds_a_block_out(look: str, block: str, caplog: pytest.LogCaptureFixture) -> None:
    model = looking(LOOKS[look])
    with caplog.at_level(logging.WARNING, "reparam"):
        expanded = reparam.expand(model, block)
    assert difference(model, expanded) < 1e-10
    if not any(map(is_block, expanded.modules())):
        assert any("0 of 2 convolutions get a block" in message for message in caplog.messages)


@pytest.mark.parametrize("look", LOOKS)
def test_collapse(look: str) -> None:
    model = looking(LOOKS[look])
    assert difference(model, reparam.collapse(model)) < 1e-10


@pytest.mark.parametrize("look", HARMLESS)
def test_what_a_block_answers_as_its_convolution(look: str) -> None:
    model = looking(HARMLESS[look])
    expanded = reparam.expand(model, "acb")
    assert is_block(expanded.get_submodule("block.conv"))
    assert difference(model, expanded) < 1e-10


def test_the_plan_says_what_was_compared() -> None:
    plan = reparam.plan(looking(HARMLESS["children"]), "acb")
    assert "code of the whole network, on no input: the same operations" in str(plan)
    assert "pass example_inputs" in str(plan)
    text = " ".join(str(reparam.plan(looking(LOOKS["modules"]), "acb")).split())
    assert "with its block the network computes something else: the network does something else at" in text


def test_channels_that_layers_share_out_between_them() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, 1)
            y: Tensor = self.a(left) - self.b(right)
            return y

    assert "whole network, made-up input 2x6x" in str(reparam.plan(Halves().eval(), "acb"))
