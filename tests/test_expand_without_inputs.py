"""A network that no input can be made up for is expanded all the same, unless its code finds the blocks out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ready
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from passes.graph import capture
from passes.graph.tracer import Tracer
from passes.training import build
from passes.training.equivalent import plain_layer


class Activated(nn.BatchNorm2d):
    """A norm that activates: its activation stays in its place when it moves into a block."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.Hardswish()

    def forward(self, input: Tensor) -> Tensor:
        assert self.momentum is not None
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        y: Tensor = self.act(F.batch_norm(input, *own, self.training, self.momentum, self.eps))
        return y


class Block(nn.Module):
    def __init__(self, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Looks(nn.Module):
    """Takes 23 channels, as no layer tells, and adds what it finds out about itself."""

    def __init__(self, look: Callable[[Any], Any], norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.look, self.block, self.head = look, Block(norm), nn.Conv2d(4, 4, 1)

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
    "the norm's children": lambda net: len(list(net.block.bn.children())),
    "the norm's class": lambda net: len(type(net.block.bn).__name__),
    "the norm's tensors": lambda net: len(list(net.block.bn.buffers())),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "children": lambda net: len(list(net.children())),
    "an attribute that a block has": lambda net: net.block.conv.in_channels,
    "a buffer by name": lambda net: net.get_buffer("block.bn.running_mean").numel(),
    "a function that is handed the layer": lambda net: rows_of(torch.ones(4, 1, 1), net.block.conv),
}


def rows_of(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return x * (int(x.flatten()[0]) + conv.stride[0])


def looking(look: Callable[[Any], Any], norm: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> nn.Module:
    return ready(Looks(look, norm)).double().eval()


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module) -> float:
    x = torch.randn(2, 23, 8, 8, dtype=torch.float64)
    return float((model(x) - other(x)).abs().max())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
@pytest.mark.parametrize("block", ["acb", "doconv"])
@pytest.mark.parametrize("look", LOOKS)
def test_code_that_finds_a_block_out(
    look: str, block: str, norm: type[nn.BatchNorm2d], caplog: pytest.LogCaptureFixture
) -> None:
    model = looking(LOOKS[look], norm)
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


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
def test_the_network_itself_is_read_once_in_each_mode(
    norm: type[nn.BatchNorm2d], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its convolutions were found by is what the trial is compared with; the norm's place then holds less."""
    read = []

    class Counting(Tracer):
        def trace(self) -> Any:
            if type(self.root) is Looks:
                read.append(is_block(self.root.block.conv))
            return super().trace()

    monkeypatch.setattr(capture, "Tracer", Counting)
    plan = reparam.plan(looking(HARMLESS["children"], norm), "acb")
    assert [row.layer for row in plan.expanded] == ["block.conv"]
    assert plan.expanded[0].found.norm is not None
    assert read == [False, False, True, True]


def test_no_kernel_is_computed_to_put_a_block_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution without a bias has an attribute that is None, for which a block need not be asked."""
    model = looking(HARMLESS["children"])
    model.block.conv.bias = None
    asked = []
    monkeypatch.setattr(build, "plain_layer", lambda block: asked.append(block) or plain_layer(block))
    expanded = reparam.expand(model, "acb")
    assert not asked
    assert expanded.block.conv.bias is not None  # that of the norm, in eval mode
    assert asked == [expanded.block.conv]


def test_a_norm_that_reads_otherwise_within_is_compared_as_one_call() -> None:
    """By a keyword, the norm is entered in another way than what is left in its place, which is one layer of torch."""

    class Named(Looks):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.block.bn(input=self.block.conv(x[:, 21:])))
            return y

    model = ready(Named(len, Activated)).double().eval()
    model.block.bn.act = nn.Identity()
    plan = reparam.plan(model, "acb")
    assert plan.expanded[0].found.norm is not None
    assert isinstance(plan.apply().block.bn, nn.Identity)


def test_who_reads_from_within_a_call_reads_something_else() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sigmoid().tanh(), x.relu().tanh()

    class Reading(nn.Module):
        def __init__(self, which: int) -> None:
            super().__init__()
            self.which, self.weight = which, nn.Parameter(torch.ones(1))
            self.inner, self.alone = Inner(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[self.which] * self.weight

    graphs = [capture.trace_units(Reading(which))[0][0].graph for which in (0, 1)]
    assert capture.first_difference(*graphs) is not None
    assert capture.first_difference(*graphs, {"inner"}) is not None
    assert capture.first_difference(graphs[0], graphs[0], {"alone"}) is None


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
